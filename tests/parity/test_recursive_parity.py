"""HRM and TRM against PyTorch: losses, states and every gradient over the steps of a carry."""

import sys
from pathlib import Path

import numpy as np
import pytest

import pyloss
from pyloss import nn, optim
from pyloss.recursive import HRM, TRM, RecursiveConfig, load_checkpoint, state_dict
from pyloss.recursive.checkpoints import _parts_of
from pyloss.recursive.puzzles import without_puzzles

torch = pytest.importorskip("torch", reason="torch is not installed (parity extra)")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import recursive_peer
import recursive_pyloss
import recursive_work
from recursive_torch import Recursive, as_torch

SIZES = {
    "seq_len": 9, "vocab_size": 11, "batch_size": 6, "hidden_size": 32, "num_heads": 2,
    "H_cycles": 2, "L_cycles": 2, "L_layers": 2, "halt_max_steps": 3, "halt_exploration_prob": 0.0,
}  # fmt: skip
PUZZLES = {"puzzle_emb_ndim": 32, "num_puzzle_identifiers": 5}
CASES = {
    "trm": ("trm", {}),
    "trm, puzzles": ("trm", PUZZLES | {"puzzle_emb_len": 3}),
    "trm, continue": ("trm", {"no_ACT_continue": False}),
    "trm, learned": ("trm", {"pos_encodings": "learned"}),
    # an untrained recursion of these is chaotic: one cycle here, more beside float64 below
    "trm, mlp_t": (
        "trm",
        PUZZLES | {"mlp_t": True, "pos_encodings": "none", "H_cycles": 1, "L_cycles": 1},
    ),
    "hrm": ("hrm", {"H_layers": 2}),
    "hrm, puzzles": ("hrm", PUZZLES | {"H_layers": 1, "puzzle_emb_ndim": 40}),
    "hrm, learned": ("hrm", {"H_layers": 1, "pos_encodings": "learned"}),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Arrays are small: torch's threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch_of(rng, config):
    labels = rng.integers(0, config.vocab_size, (config.batch_size, config.seq_len))
    labels[rng.random(labels.shape) < 0.3] = -100
    batch = {"inputs": rng.integers(0, config.vocab_size, labels.shape), "labels": labels}
    if config.puzzle_emb_ndim:
        ids = rng.integers(0, config.num_puzzle_identifiers, config.batch_size)
        batch["puzzle_identifiers"] = ids
    return batch


def both(case):
    kind, changes = CASES[case]
    config = RecursiveConfig(**SIZES | changes)
    theirs = Recursive(config, kind, seed=3)
    model = {"hrm": HRM, "trm": TRM}[kind](config)
    load_checkpoint(model, theirs.p.arrays())
    return config, theirs, pyloss.ACTLossHead(model, "stablemax_cross_entropy").train()


def recorded(head):
    def step(carry, batch):
        carry, loss, metrics, _, _ = head(carry=carry, batch=batch)
        return loss, (carry, metrics)

    return nn.value_and_grad(head, step, has_aux=True)


@pytest.mark.parametrize("case", CASES)
def test_losses_states_and_gradients(case):
    config, theirs, head = both(case)
    rng, step = np.random.default_rng(1), recorded(head)
    batch = batch_of(rng, config)
    carry, their_carry = head.initial_carry(batch), theirs.begin(as_torch(batch))
    for _ in range(4):
        batch = batch_of(rng, config)
        (loss, (carry, _)), grads = step(carry, batch)
        theirs.p.zero_grad()
        their_carry, their_loss = theirs.step(their_carry, as_torch(batch))
        their_loss.backward()
        assert float(loss) == pytest.approx(their_loss.item(), rel=5e-6)
        np.testing.assert_array_equal(carry.halted, their_carry["halted"])
        np.testing.assert_array_equal(carry.steps, their_carry["steps"])
        for z, their_z in zip(
            (carry.inner_carry.z_H, carry.inner_carry.z_L), their_carry["z"], strict=True
        ):
            np.testing.assert_allclose(z, their_z.numpy(), atol=2e-4)
        if config.puzzle_emb_ndim:
            ids = head.model.puzzle_emb._ids
            local = grads.pop("model.inner.puzzle_emb.local_weights")
            table = np.zeros_like(theirs["puzzle_emb.weights"].detach().numpy())
            np.add.at(table, ids, local)
            grads["model.inner.puzzle_emb.weights"] = table
        expected = theirs.p.gradients()
        for name, parts in _parts_of(grads).items():
            mine = np.concatenate([grads[part] for part in parts])
            error = np.linalg.norm(mine - expected[name]) / np.linalg.norm(expected[name])
            assert error < 2e-4, (name, error)


@pytest.mark.parametrize("case", ["trm", "trm, continue", "hrm"])
def test_exploration_by_the_same_draws(case, monkeypatch):
    """Where q says halt, a sequence goes on for the steps that were drawn for it."""
    config, theirs, head = both(case)
    with torch.no_grad():
        theirs["q_head.bias"][0] += 5
    load_checkpoint(head.model, theirs.p.arrays())
    rng, went_on = np.random.default_rng(1), 0
    batch = batch_of(rng, config)
    carry, their_carry = head.initial_carry(batch), theirs.begin(as_torch(batch))
    for _ in range(6):
        batch = batch_of(rng, config)
        least = np.where(rng.random(6) < 0.6, rng.integers(2, 4, 6), 0)
        monkeypatch.setattr(type(head.model), "_least_steps", lambda self, count, n=least: n)
        carry, loss, *_ = head(carry=carry, batch=batch)
        with torch.no_grad():
            their_carry, their_loss = theirs.step(
                their_carry, as_torch(batch), torch.from_numpy(least)
            )
        assert float(loss) == pytest.approx(their_loss.item(), rel=5e-6)
        np.testing.assert_array_equal(carry.halted, their_carry["halted"])
        np.testing.assert_array_equal(carry.steps, their_carry["steps"])
        went_on += (~carry.halted).sum()
    assert went_on > 5


@pytest.mark.parametrize("case", ["trm", "hrm"])
def test_updates_of_an_optimizer(case):
    """Twelve updates by AdamW: the same losses."""
    config, theirs, head = both(case)
    rng, step = np.random.default_rng(1), recorded(head)
    ours = optim.AdamW(1e-3, weight_decay=0.01, bias_correction=True)
    decayed = [p for n, p in theirs.p.named_parameters() if not n.endswith("_init")]
    adam = torch.optim.AdamW(decayed, 1e-3, weight_decay=0.01)
    batch = batch_of(rng, config)
    carry, their_carry = head.initial_carry(batch), theirs.begin(as_torch(batch))
    for _ in range(12):
        batch = batch_of(rng, config)
        (loss, (carry, _)), grads = step(carry, batch)
        ours.update(head, grads)
        adam.zero_grad()
        their_carry, their_loss = theirs.step(their_carry, as_torch(batch))
        their_loss.backward()
        adam.step()
        assert float(loss) == pytest.approx(their_loss.item(), rel=2e-4)


class Authors:
    """A model of recursive_torch and the updates of the authors' training, written out.

    Dense weights by AdamATan2; rows of puzzle embeddings that the batch took by SignSGD.
    """

    def __init__(self, model, batch):
        self.model, self.carry, self.count = model, model.begin(batch), 0
        self.moments = {}

    def update(self, batch, rate=1e-3, decay=0.1, puzzle_rate=1e-2, betas=(0.9, 0.95)):
        self.model.p.zero_grad()
        self.carry, loss = self.model.step(self.carry, batch)
        loss.backward()
        self.count += 1
        with torch.no_grad():
            for key, p in self.model.p.named_parameters():
                if key.endswith("puzzle_emb/weights"):
                    rows = self.carry["data"]["puzzle_identifiers"].unique()
                    p[rows] = (
                        p[rows] * (1 - puzzle_rate * decay) - puzzle_rate * p.grad[rows].sign()
                    )
                elif not key.endswith("_init"):
                    zeros = torch.zeros_like(p)
                    m, v = (
                        beta * old + (1 - beta) * new
                        for beta, old, new in zip(
                            betas,
                            self.moments.get(key, (zeros, zeros)),
                            (p.grad, p.grad.square()),
                            strict=True,
                        )
                    )
                    self.moments[key] = m, v
                    first, second = (1 - beta**self.count for beta in betas)
                    p *= 1 - rate * decay
                    p -= rate / first * torch.atan2(m, (v / second).sqrt())
        return loss.item()


@pytest.mark.parametrize("case", ["trm, puzzles", "hrm, puzzles"])
def test_thirty_updates_of_the_authors_training(case):
    """The losses of torch in float64 to 1e-6, which its own in float32 keep as well."""
    config, single, head = both(case)
    wide = Recursive(config, CASES[case][0], dtype=torch.float64)
    wide.p.load_state_dict(single.p.state_dict())
    rng, step = np.random.default_rng(1), recorded(head)
    batch = batch_of(rng, config)
    carry = head.initial_carry(batch)
    theirs = [Authors(model, as_torch(batch)) for model in (single, wide)]
    dense = optim.AdamATan2(1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    sparse, errors = optim.SparseSignSGD(1e-2, 0.1), []
    for _ in range(30):
        batch = batch_of(rng, config)
        (loss, (carry, _)), grads = step(carry, batch)
        grads, local = without_puzzles(grads)
        for gradient in local.values():
            head.model.puzzle_emb.update(sparse, gradient)
        dense.update(head, grads)
        other, exact = (each.update(as_torch(batch)) for each in theirs)
        errors.append([abs(value / exact - 1) for value in (float(loss), other)])
        assert carry.steps.tolist() == theirs[1].carry["steps"].tolist()
    mine, torchs = np.max(errors, 0)
    assert mine < 1e-6 and torchs < 1e-6, (mine, torchs)


@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_mlp_over_tokens_beside_float64(cycles, monkeypatch):
    """An untrained recursion is chaotic: rounding grows with the cycles, here and in torch."""
    changes = CASES["trm, mlp_t"][1] | {"H_cycles": cycles, "L_cycles": cycles}
    monkeypatch.setitem(CASES, "longer", ("trm", changes))
    config, single, head = both("longer")
    wide = Recursive(config, "trm", dtype=torch.float64)
    wide.p.load_state_dict(single.p.state_dict())
    batch, step = batch_of(np.random.default_rng(7), config), recorded(head)
    (loss, _), grads = step(head.initial_carry(batch), batch)
    values = []
    for model in (single, wide):
        _, value = model.step(model.begin(as_torch(batch)), as_torch(batch))
        value.backward()
        values.append((value.item(), model.p.gradients()))
    (other, torchs), (exact, expected) = values
    assert abs(float(loss) / exact - 1) < max(3 * abs(other / exact - 1), 1e-6)
    for name, parts in _parts_of(grads).items():
        mine = np.concatenate([grads[part] for part in parts])
        size = np.linalg.norm(expected[name])
        error, own = (np.linalg.norm(g - expected[name]) / size for g in (mine, torchs[name]))
        assert error < max(3 * own, 1e-5), (name, error, own)


@pytest.mark.parametrize("case", ["trm, puzzles", "hrm"])
def test_checkpoints_of_torch(case, tmp_path):
    config, theirs, head = both(case)
    saved = {f"_orig_mod.{name}": torch.from_numpy(a) for name, a in theirs.p.arrays().items()}
    saved["_orig_mod.model.inner.H_init"] = saved["_orig_mod.model.inner.H_init"].bfloat16()
    torch.save(saved, tmp_path / "step_100")
    other = type(head.model)(config)
    load_checkpoint(other, tmp_path / "step_100")
    back = state_dict(other, "_orig_mod.model.")
    assert set(back) == set(saved)
    for name, array in back.items():
        np.testing.assert_array_equal(array, saved[name].float().numpy())


@pytest.mark.parametrize("case", ["trm-256", "hrm-256"])
def test_sides_of_the_benchmark_do_the_same_updates(case):
    sizes = {"hidden_size": 32, "num_heads": 2, "seq_len": 9, "batch_size": 4}
    given = recursive_work.config_of(case, **sizes)
    ours = recursive_pyloss.update_of(*given)
    theirs = recursive_peer.update_of(*given, torch.float32, compiled=False)
    half = recursive_peer.update_of(*given, torch.bfloat16, compiled=False)
    losses = [(ours(), theirs(), half()) for _ in range(3)]
    assert len({round(one, 3) for one, _, _ in losses}) == 3
    for one, other, rounded in losses:
        assert one == pytest.approx(other, rel=1e-5)
        assert one == pytest.approx(rounded, rel=0.2)
