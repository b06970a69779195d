"""HRM and TRM against PyTorch: losses, states and every gradient over the steps of a carry."""

import sys
from pathlib import Path

import numpy as np
import pytest

import pyloss
from pyloss import nn, optim
from pyloss.recursive import HRM, TRM, RecursiveConfig, load_checkpoint, state_dict
from pyloss.recursive.checkpoints import _parts_of

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
    # an untrained recursion of these is chaotic: one cycle
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
