"""Training runs of recursive models: updates, schedules, EMA, exact resume, files, bad input."""

import json
import math

import numpy as np
import pytest

import pyloss
from pyloss import nn, optim
from pyloss.recursive import state_dict
from pyloss.recursive.data import PuzzleDataset
from pyloss.recursive.run_files import load_recursive
from pyloss.recursive.settings import RecursiveArgs, make_head
from pyloss.recursive.training import RecursiveRun, schedule_of, train_recursive
from pyloss.tuner.callbacks import TrainingCallback

ARCH = {
    "name": "trm", "hidden_size": 16, "num_heads": 2, "H_cycles": 2, "L_cycles": 1, "L_layers": 1,
    "halt_max_steps": 3, "puzzle_emb_ndim": 16,
}  # fmt: skip
SETTINGS = {
    "global_batch_size": 4, "epochs": 4, "eval_interval": 2, "lr": 1e-3, "lr_warmup_steps": 3,
    "lr_min_ratio": 0.1, "ema": True, "ema_rate": 0.8, "steps_per_report": 3, "save_every": 2,
    "progress": False,
}  # fmt: skip


def puzzles(count=9, seed=0, identifiers=3, **more):
    rng = np.random.default_rng(seed)
    inputs = rng.integers(1, 7, (count, 5))
    ids = rng.integers(0, identifiers, count)
    return PuzzleDataset(
        inputs, inputs[:, ::-1].copy(), 7, ids, num_puzzle_identifiers=identifiers, **more
    )


def train(arch=ARCH, data=None, test=None, **changes):
    test = puzzles(6, 1) if test is None else test
    return train_recursive(arch, data or puzzles(), test, **SETTINGS | changes)


class Stops(TrainingCallback):
    """Ctrl-C at the first report from an iteration on."""

    def __init__(self, at):
        self.at = at

    def on_train_loss_report(self, train_info):
        if train_info["iteration"] >= self.at:
            raise KeyboardInterrupt


def test_the_learning_rate_is_that_of_the_authors_code():
    args = RecursiveArgs(8, 10, lr=2e-3, lr_warmup_steps=4, lr_min_ratio=0.25)
    schedule = schedule_of(2e-3, args, 20)
    for update in range(1, 21):
        progress = (update - 4) / 16
        expected = 2e-3 * (
            update / 4 if update < 4 else 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * progress))
        )
        assert schedule(update - 1) == pytest.approx(expected, rel=1e-12)
    plain = RecursiveArgs(8, 10, lr=2e-3, lr_warmup_steps=0)
    assert [schedule_of(2e-3, plain, 20)(step) for step in (0, 19)] == [2e-3, 2e-3]


def test_the_updates_are_those_of_a_plain_loop():
    """Weights, embeddings and averages of a run, beside the same updates written out."""
    head, result = train(epochs=2)
    data, size = puzzles(), 4
    pyloss.random.seed(0)
    plain = make_head(ARCH, seq_len=5, vocab_size=7, num_puzzle_identifiers=3, batch_size=size)
    plain.train()
    args = RecursiveArgs(**SETTINGS | {"epochs": 2})
    main = optim.AdamATan2(schedule_of(1e-3, args, 4), betas=(0.9, 0.95), weight_decay=0.1)
    sparse = optim.SparseSignSGD(schedule_of(1e-2, args, 4), 0.1)
    average = optim.EMA(plain, 0.8)
    carry = None
    for batch in data.batches(size, seed=0, epoch=0, epochs=2):
        carry = plain.initial_carry(batch) if carry is None else carry

        def step(carry=carry, batch=batch):
            new, loss, *_ = plain(carry=carry, batch=batch)
            return loss / size, new

        (_, carry), grads = nn.value_and_grad(plain, step, has_aux=True)()
        local = grads.pop("model.inner.puzzle_emb.local_weights")
        plain.model.puzzle_emb.update(sparse, local)
        main.update(plain, grads)
        average.update(plain)
    average.copy_to(plain)
    assert result.updates == main.step == 4
    mine, theirs = state_dict(head.model), state_dict(plain.model)
    assert np.abs(mine["inner.puzzle_emb.weights"]).max() > 0
    for name, array in mine.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": False, "lr_min_ratio": 1.0}, {"freeze_weights": True}, {"min_eval_interval": 1}],
    ids=["ema", "plain", "frozen", "later evaluation"],
)
def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path, changes):
    head, result = train(folder=tmp_path / "whole", **changes)
    for at in (3, 6):
        with pytest.raises(KeyboardInterrupt, match=f"update {at}: saved to .*--resume"):
            train(folder=tmp_path / "parts", resume=at > 3, callback=Stops(at), **changes)
    other, again = train(folder=tmp_path / "parts", resume=True, **changes)
    assert again.updates == result.updates == 8 and again.evaluation == result.evaluation
    for name, array in state_dict(head.model).items():
        np.testing.assert_array_equal(array, state_dict(other.model)[name], err_msg=name)
    for file in ("trainer_state.safetensors", "model.safetensors", "evaluation.json"):
        whole, parts = ((tmp_path / run / file).read_bytes() for run in ("whole", "parts"))
        assert whole == parts, file
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k not in TIMES}
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("whole", "parts")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == (4 if changes.get("min_eval_interval") else 5)


TIMES = ("seconds", "val_time", "iterations_per_second", "tokens_per_second", "peak_memory")


def test_a_finished_run_that_is_resumed_reports_nothing_twice(tmp_path, capsys):
    train(folder=tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    _, result = train(folder=tmp_path, resume=True, progress=True)
    out = capsys.readouterr().out
    assert "the run is finished" in out and "s/update" not in out
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics and result.updates == 8


def test_a_line_says_where_no_puzzle_has_ended(capsys):
    """Untrained heads do not halt: of three steps a puzzle ends in the third."""
    _, result = train(epochs=2, steps_per_report=1, progress=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "train loss" in line]
    assert [("no puzzle has ended" in line, "exact" in line) for line in lines[:3]] == [
        *[(True, False)] * 2,
        (False, True),
    ]
    assert list(result.history["puzzles"][:3]) == [0, 0, 4]


def test_frozen_weights_stay_and_embeddings_move():
    head, _ = train(freeze_weights=True)
    pyloss.random.seed(0)
    sizes = {"seq_len": 5, "vocab_size": 7, "num_puzzle_identifiers": 3, "batch_size": 4}
    first = state_dict(make_head(ARCH, **sizes).model)
    for name, array in state_dict(head.model).items():
        same = (array == first[name]).all()
        assert same == (name != "inner.puzzle_emb.weights"), name
    with pytest.raises(ValueError, match="puzzle_emb_ndim is 0"):
        train(arch=ARCH | {"puzzle_emb_ndim": 0}, freeze_weights=True)


def test_the_files_of_a_run(tmp_path):
    head, result = train(folder=tmp_path / "run", checkpoint_every_eval=True)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("config.yaml", "model.safetensors", "trainer_state.safetensors", "metrics.jsonl"),
        *("evaluation.json", "step_4.safetensors", "step_8.safetensors"),
    }
    read = load_recursive(tmp_path / "run")
    assert not read.training and read.model.config.batch_size == 1
    for name, array in state_dict(head.model).items():
        np.testing.assert_array_equal(array, state_dict(read.model)[name])
    early = state_dict(load_recursive(tmp_path / "run" / "step_4.safetensors").model)
    assert any((early[name] != array).any() for name, array in state_dict(head.model).items())
    assert load_recursive(tmp_path / "run", halt_max_steps=9).model.halt_max_steps == 9
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["update"] == 8 and found["accuracy"] == result.evaluation.accuracy
    assert result.history["val_accuracy"][-1] == result.evaluation.accuracy
    train(folder=tmp_path / "run", epochs=2)
    assert (tmp_path / "run" / "previous-1" / "step_8.safetensors").is_file()
    train(folder=tmp_path / "run", epochs=2, overwrite=True)
    assert not (tmp_path / "run" / "previous-2").exists()
    with pytest.raises(ValueError, match=r"hidden_size|embed_tokens.*shape \(7, 16\), expected"):
        load_recursive(tmp_path / "run", hidden_size=32, puzzle_emb_ndim=32)
    with pytest.raises(FileNotFoundError, match=r"config\.yaml is missing"):
        load_recursive(tmp_path)


def test_max_time_stops_and_the_run_goes_on(tmp_path):
    head, result = train(folder=tmp_path / "run", max_time=1e-9)
    assert result.stopped_early and result.updates == 0 and result.evaluation.count == 6
    head, result = train(folder=tmp_path / "run", resume=True)
    whole, _ = train()
    assert not result.stopped_early and result.updates == 8
    for name, array in state_dict(whole.model).items():
        np.testing.assert_array_equal(array, state_dict(head.model)[name], err_msg=name)


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path):
    run = RecursiveRun(
        ARCH, puzzles(), None, RecursiveArgs(**SETTINGS), tmp_path / "run", None, None
    )
    run.model.inner.lm_head.weight[0, 0] = np.inf
    before = {name: array.copy() for name, array in run.head.parameters().items()}
    with pytest.raises(FloatingPointError, match="update 1: the loss is .*those of update 0"):
        run.run(False, False, {})
    for name, array in run.head.parameters().items():
        if not name.endswith("local_weights"):
            np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ({"hidden_size": 32}, {}, "another architecture: hidden_size 16, now 32"),
        ({}, {"global_batch_size": 3}, "global_batch_size 4, not 3"),
        ({}, {"data": puzzles(9, 5)}, "trained on other data"),
    ],
)
def test_a_run_of_another_kind_is_not_resumed(tmp_path, arch, changes, message):
    train(folder=tmp_path / "run", epochs=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=message):
        train(ARCH | arch, folder=tmp_path / "run", resume=True, **{"epochs": 2} | changes)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_damaged_states_are_refused(tmp_path):
    train(folder=tmp_path / "run", epochs=2)
    file = tmp_path / "run" / "trainer_state.safetensors"
    raw = file.read_bytes()
    for damaged in (raw[: len(raw) // 2], raw.replace(b"pyloss_recursive", b"pyloss_recursivx")):
        file.write_bytes(damaged)
        with pytest.raises(pyloss.FormatError, match="not a (readable )?trainer state"):
            train(folder=tmp_path / "run", epochs=2, resume=True)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(folder=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="needs the folder"):
        train(resume=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs is 0; it must be a whole number of at least 1"),
        ({"epochs": 3}, ValueError, "eval_interval is 2; it must be a divisor of epochs, 3"),
        ({"lr": -1}, ValueError, "lr is -1"),
        ({"beta1": 1}, ValueError, "beta1 is 1"),
        ({"ema": 1}, TypeError, "ema is 1; it must be true or false"),
        ({"global_batch_size": 99}, ValueError, "no batch of global_batch_size 99"),
        ({"test": puzzles(4, 1, 5)}, ValueError, "the test data have num_puzzle_identifiers 5"),
    ],
)
def test_settings_that_cannot_be(changes, error, message):
    with pytest.raises(error, match=message):
        train(**changes)
