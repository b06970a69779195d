"""Impossible trainer states: a FormatError names the file, and nothing hangs."""

import json
import signal
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers its types before safetensors looks for them)
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_training import Tiny, run, tiny_value_and_grad

import pyloss
from pyloss import FormatError, nn, optim
from pyloss.tuner.run import checkpoints as state, run_folder


@pytest.fixture(autouse=True)
def numpy_gradients(monkeypatch):
    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)


def rewrite(folder, change):
    """Rewrite the state in `folder` with its JSON changed by `change`."""
    path = folder / run_folder.STATE_FILE
    with safe_open(path, framework="numpy") as opened:
        tree = json.loads(opened.metadata()[state.STATE_KEY])
    tensors = load_file(path)
    found = change(tree)
    save_file(
        tensors,
        path,
        metadata={state.STATE_KEY: found if isinstance(found, str) else json.dumps(tree)},
    )


def put(*path, value):
    def change(tree):
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value

    return change


INFINITY = float("inf")
CASES = {
    "an iteration before all": put("progress", "iteration", value=-INFINITY),
    "an iteration that is none": put("progress", "iteration", value=float("nan")),
    "half an iteration": put("progress", "iteration", value=2.5),
    "a negative iteration": put("progress", "iteration", value=-1),
    "an iteration of many digits": put("progress", "iteration", value=10**400),
    "true iterations": put("progress", "iteration", value=True),
    "a report of the future": put("progress", "reported_at", value=99),
    "more pending than there were": put("progress", "pending", value=7),
    "an infinite loss": put("progress", "loss_sum", value=INFINITY),
    "a text for the best loss": put("progress", "best_loss", value="low"),
    "no counters": put("progress", value=None),
    "a counter that is not one": put("progress", "speed", value=1),
    "a list of arrays": put("model", value=[]),
    "a number for an array": put("model", "layers.0.lora_a", value=3),
    "an array that is not there": put("model", "layers.0.lora_a", value={"__array__": "nowhere"}),
    "a name that cannot be one": put("model", "layers.0.lora_a", value={"__array__": []}),
    "best of another model": put("best", value={"other": {"__array__": "/model/layers.0.lora_a"}}),
    "accumulated of another shape": put(
        "accumulated", value={"layers.0.lora_a": {"__array__": "/model/layers.0.lora_b"}}
    ),
    "accumulated of another model": put(
        "accumulated", value={"other": {"__array__": "/model/layers.0.lora_b"}}
    ),
    "no optimizer": put("optimizer", value=None),
    "an optimizer step of a text": put("optimizer", "step", value="three"),
    "a negative optimizer step": put("optimizer", "step", value=-3),
    "an infinite optimizer step": put("optimizer", "step", value=INFINITY),
    "a moment that is no array": put("optimizer", "m.layers.0.lora_a", value={"a": 1}),
    "an optimizer's name that is none": put("optimizer_name", value=["AdamW"]),
    "batches that are a number": put("batches", value=3),
    "a place of a text": put("batches", "position", value="x"),
    "a random state that is a list": put("random", value=[1, 2]),
    "a random state without a counter": put("random", value={"seed": 1}),
    "a random state before all": put("random", "seed", value=-1),
    "settings that are a list": put("settings", value=[1]),
    "a base that is a number": put("base", value=7),
    "an unknown part": put("more", value=1),
    "a list": lambda tree: "[]",
    "no JSON": lambda tree: "{",
    "deep JSON": lambda tree: "[" * 100_000,
    "long numbers": lambda tree: "9" * 5000,
}


@pytest.mark.parametrize("name", CASES)
def test_a_state_that_no_run_wrote_is_refused(tmp_path, name):
    run(tmp_path, iters=3)
    rewrite(tmp_path, CASES[name])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    random, model = pyloss.random.state(), Tiny(seed=5)
    with pytest.raises(ValueError) as raised:
        run(tmp_path, model, iters=5, resume=True)
    assert isinstance(raised.value, FormatError) or not name.startswith(
        ("an iteration", "no ", "a list")
    ), raised.value
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert (
        pyloss.random.state() == random
        or name in ("no optimizer",)
        or "optimizer" in name
        or "moment" in name
    )
    for array, other in zip(model.arrays.values(), Tiny(seed=5).arrays.values()):
        np.testing.assert_array_equal(array, other)


def test_the_reported_case_ends(tmp_path):
    case = Path(__file__).parents[2] / "cases" / "state-6364-hang.safetensors"
    with pytest.raises(FormatError, match=r"state-6364-hang\.safetensors: .*iteration is -inf"):
        state.load_checkpoint(case)


def test_a_run_far_beyond_its_end_takes_no_batches(tmp_path):
    """Batches without a state are skipped one by one, but not 10**15 of them for a run of three."""

    def endless(**options):
        while True:
            yield np.ones((1, 3), np.int32), np.array([[0, 3]], np.int32)

    run(tmp_path, iters=3, iterate=endless, val=None)
    rewrite(tmp_path, put("progress", "iteration", value=10**15))
    _, _, result = run(tmp_path, iters=3, iterate=endless, val=None, resume=True)
    assert result.iterations == 10**15


def test_fewer_batches_than_the_run_had_are_said(tmp_path):
    def some(count):
        return lambda **options: iter(
            [(np.ones((1, 3), np.int32), np.array([[0, 3]], np.int32))] * count
        )

    run(tmp_path, iters=5, iterate=some(9), val=None)
    with pytest.raises(ValueError, match="had 5 batches, and here are 2 in all"):
        run(tmp_path, iters=9, iterate=some(2), val=None, resume=True)


def test_a_handler_of_ctrl_c_that_is_not_pythons_stays(monkeypatch):
    """signal.getsignal gives None for an embedder's handler, which cannot be restored."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: pytest.fail("touched"))
    with state.uninterrupted():
        done = True
    assert done


def test_a_thread_that_only_seems_the_main_one(monkeypatch):
    def refuse(number, handler):
        raise ValueError("signal only works in main thread of the main interpreter")

    monkeypatch.setattr(signal, "signal", refuse)
    with state.uninterrupted():
        done = True
    assert done


def test_ctrl_c_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with state.uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_state_without_a_fingerprint_is_one_of_an_earlier_version(tmp_path):
    run(tmp_path, iters=3)
    rewrite(tmp_path, lambda tree: tree.pop("base") and None)
    _, _, result = run(tmp_path, Tiny(seed=5), optim.AdamW(0.05), iters=5, resume=True)
    assert result.iterations == 5
