"""Distillation steps against a torch loop with the same teacher, student and batches."""

import numpy as np
import pytest
from parity_models import TINY, add_adapter, make_tiny, peft_twin, torch, torch_model
from test_training_parity import make_batches

import pyloss
from pyloss.distillation.hidden import HiddenStates
from pyloss.distillation.loss import DistillationLoss
from pyloss.tuner.losses import ModelAndLoss, target_weights

STEPS, RATE = 20, 2e-3


def divergence(kind, q, p, beta):
    """Each row's divergence of torch's logits, written from the papers' formulas."""
    log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if kind == "forward-kl":
        return kl(log_p, log_q)
    if kind == "reverse-kl":
        return kl(log_q, log_p)
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def states_of(model, kept):
    """Hooks that put the outputs of a torch model's layers into `kept` by their numbers."""
    for name, module in model.named_modules():
        if name.split(".")[-2:-1] == ["layers"]:
            number = int(name.split(".")[-1])

            def keep(module, given, output, number=number):
                kept[number] = output[0] if isinstance(output, tuple) else output

            module.register_forward_hook(keep)


def distance(kind, q, p):
    if kind == "mse":
        return ((q - p) ** 2).mean(-1)
    return 1 - torch.nn.functional.cosine_similarity(q, p, dim=-1)


def torch_loss(student, teacher, batch, weights, kind, temperature, alpha, beta):
    tokens = torch.from_numpy(batch.astype(np.int64))
    real = torch.from_numpy((np.cumsum(weights[:, ::-1], axis=1)[:, ::-1] > 0).astype(np.int64))
    q = student(tokens, attention_mask=real).logits[:, :-1]
    with torch.no_grad():
        p = teacher(tokens, attention_mask=real).logits[:, :-1]
    w = torch.from_numpy(weights[:, 1:])
    own = torch.nn.functional.cross_entropy(q.transpose(1, 2), tokens[:, 1:], reduction="none")
    d = divergence(kind, q / temperature, p / temperature, beta)
    rows = alpha * own + (1 - alpha) * temperature**2 * d
    return torch.where(w > 0, rows * w, 0).sum() / w.sum()


@pytest.mark.parametrize(
    ("kind", "temperature", "alpha", "term"),
    [
        ("forward-kl", 2.0, 0.5, None),
        ("reverse-kl", 1.0, 0.0, None),
        ("js", 1.5, 0.1, None),
        ("forward-kl", 1.0, 0.0, ("cosine", {})),
        ("js", 2.0, 0.2, ("mse", {"hidden_size": 48, "num_attention_heads": 3})),
    ],
)
def test_losses_of_twenty_steps(tmp_path, kind, temperature, alpha, term):
    """With and without a term of hidden states, (kind, sizes of the teacher)."""
    sizes = {} if term is None else term[1]
    if sizes:
        sizes = sizes | {"num_key_value_heads": 3}
    make_tiny(0).save_pretrained(tmp_path / "student")
    make_tiny(1, num_hidden_layers=4, **sizes).save_pretrained(tmp_path / "teacher")
    ours = add_adapter(pyloss.load_model(tmp_path / "student"), rank=4, size=0.0)
    theirs = peft_twin(ours, torch_model(tmp_path / "student"))
    known = pyloss.load_model(tmp_path / "teacher"), torch_model(tmp_path / "teacher").eval()
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], 60)
    batches = list(make_batches(tokens, STEPS))

    hidden = None if term is None else HiddenStates(ours, known[0], term[0], "0:1,1:3", 0.5)
    objective = DistillationLoss(known[0], kind, temperature, alpha, hidden=hidden)
    both = ModelAndLoss(ours, objective)
    matrices = [torch.from_numpy(w.copy()) for w in both.of_loss.values()]
    assert len(matrices) == (2 if sizes else 0)
    step = pyloss.nn.value_and_grad(both, objective)
    optimizer = pyloss.optim.AdamW(RATE, weight_decay=0.0)
    found = []
    for batch, lengths in batches:
        (loss, _), grads = step(ours, batch, lengths)
        optimizer.update(both, grads)
        found.append(float(loss))

    states = {}, {}
    for model, kept in zip((theirs, known[1]), states):
        states_of(model, kept)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    trained += [w.requires_grad_() for w in matrices]
    other = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    expected = []
    for batch, lengths in batches:
        weights = target_weights(batch, lengths)
        loss = torch_loss(theirs, known[1], batch, weights, kind, temperature, alpha, 0.5)
        if term is not None:
            w = torch.from_numpy(weights[:, 1:])
            for i, (q, p) in enumerate(((0, 1), (1, 3))):
                own = states[0][q] @ matrices[i].T if matrices else states[0][q]
                each = distance(term[0], own, states[1][p].detach())[:, :-1]
                loss = loss + 0.5 / 2 * torch.where(w > 0, each * w, 0).sum() / w.sum()
        other.zero_grad()
        loss.backward()
        other.step()
        expected.append(loss.item())
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    for w, ours_trained in zip(matrices, both.of_loss.values()):
        np.testing.assert_allclose(ours_trained, w.detach().numpy(), atol=5e-4)
    assert np.mean(found[-5:]) < np.mean(found[:5])
