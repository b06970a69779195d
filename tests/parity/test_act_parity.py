"""The ACT loss head against HRM's in PyTorch and torch's autograd, in float64."""

import types

import numpy as np
import pytest

from pyloss import ACTLossHead
from pyloss.autograd.differentiation import value_and_grad

torch = pytest.importorskip("torch", reason="torch is not installed (parity extra)")

from torch.nn import functional as F

B, T, V = 9, 6, 11
IGNORE = -100
LOSSES = ["stablemax_cross_entropy", "softmax_cross_entropy"]


def cross_entropy(kind, logits, labels):
    """Loss per token; like HRM's stablemax loss, softmax is computed in float64."""
    if kind == "softmax_cross_entropy":
        return F.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none"
        )
    s = torch.where(logits < 0, 1 / (1 - logits + 1e-30), logits + 1)
    picked = torch.log(s / s.sum(-1, keepdim=True)).gather(-1, labels.clamp_min(0)[..., None])[
        ..., 0
    ]
    return -torch.where(labels == IGNORE, 0, picked)


def hrm(kind, padded, logits, q_halt, q_continue, target, labels, halted, steps):
    """HRM's `ACTLossHead.forward` from the logits on.

    With `padded` "ignore", rows without labels are removed first.
    """
    if padded == "ignore":
        full = (labels != IGNORE).any(-1)
        logits, q_halt, q_continue, labels, halted, steps = (
            v[full] for v in (logits, q_halt, q_continue, labels, halted, steps)
        )
        target = None if target is None else target[full]
    valid = labels != IGNORE
    counts = valid.sum(-1)
    divisor = counts.clamp_min(1)[:, None]
    right = valid & (logits.argmax(-1) == labels)
    exact = right.sum(-1) == counts
    counted = halted & (counts > 0)
    lm_loss = (cross_entropy(kind, logits, labels) / divisor).sum()
    q_halt_loss = F.binary_cross_entropy_with_logits(
        q_halt, exact.to(q_halt.dtype), reduction="sum"
    )
    q_continue_loss = torch.zeros(())
    if target is not None:
        q_continue_loss = F.binary_cross_entropy_with_logits(q_continue, target, reduction="sum")
    metrics = {
        "count": counted.sum(),
        "accuracy": torch.where(counted, (right.double() / divisor).sum(-1), 0).sum(),
        "exact_accuracy": (counted & exact).sum(),
        "q_halt_accuracy": (counted & ((q_halt >= 0) == exact)).sum(),
        "steps": torch.where(counted, steps, 0).sum(),
        "lm_loss": lm_loss,
        "q_halt_loss": q_halt_loss,
        "q_continue_loss": q_continue_loss,
    }
    return (
        lm_loss + 0.5 * (q_halt_loss + q_continue_loss),
        {k: v.item() for k, v in metrics.items()},
        halted.all().item(),
    )


class Model:
    def __init__(self, carry):
        self.carry = carry

    def __call__(self, outputs):
        return self.carry, outputs


class LooksAhead(Model):
    halt_max_steps = 4

    def __init__(self, carry, following):
        super().__init__(carry)
        self.following = following

    def next_q_logits(self, carry):
        return self.following


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", ["none", "given", "next step", "off"])
@pytest.mark.parametrize("padded", ["reference", "ignore"])
@pytest.mark.parametrize("kind", LOSSES)
def test_act_loss_head_equals_hrm(kind, padded, target, seed):
    rng = np.random.default_rng(seed)
    values = 4 * rng.standard_normal((B, T, V)), *(3 * rng.standard_normal((2, B)))
    labels = np.where(rng.uniform(size=(B, T)) < 0.2, IGNORE, rng.integers(0, V, (B, T)))
    labels[2:4] = values[0][2:4].argmax(-1)
    labels[4:6] = IGNORE
    halted, steps = rng.uniform(size=B) < (0.6 if seed else 1), rng.integers(1, 5, B)

    following = 3 * rng.standard_normal((2, B))
    bootstrap = following if target == "next step" else values[1:]
    wanted = torch.sigmoid(torch.maximum(*map(torch.tensor, bootstrap)))
    if target == "next step":
        wanted = torch.where(
            torch.tensor(steps >= 4), torch.sigmoid(torch.tensor(following[0])), wanted
        )
    if target == "given":
        wanted = torch.tensor(rng.uniform(size=B))

    carry = types.SimpleNamespace(halted=halted, steps=steps, current_data={"labels": labels})
    model = LooksAhead(carry, following) if target == "next step" else Model(carry)
    head = ACTLossHead(model, kind, q_continue=target != "off", padded_rows=padded)

    def ours(*values):
        outputs = dict(zip(("logits", "q_halt_logits", "q_continue_logits"), values))
        if target == "given":
            outputs["target_q_continue"] = wanted.numpy()
        _, loss, metrics, _, all_halted = head(outputs=outputs)
        return 0.7 * loss, metrics, all_halted

    (loss, metrics, all_halted), grads = value_and_grad(ours, (0, 1, 2))(*values)
    leaves = [torch.tensor(v, requires_grad=True) for v in values]
    theirs, want_metrics, want_halted = hrm(
        kind,
        padded,
        *leaves,
        None if target == "off" else wanted,
        *map(torch.tensor, (labels, halted, steps)),
    )
    (0.7 * theirs).backward()
    assert loss == pytest.approx(0.7 * theirs.item(), rel=1e-12)
    assert metrics == pytest.approx(want_metrics, rel=1e-12) and all_halted is want_halted
    for gradient, leaf in zip(grads, leaves):
        expected = np.zeros_like(gradient) if leaf.grad is None else leaf.grad.numpy()
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-15)
