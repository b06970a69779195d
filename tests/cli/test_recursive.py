"""`train-recursive`, from its flags to its files."""

import json

import numpy as np
import pytest

from pyloss.cli import main
from pyloss.recursive.data import PuzzleDataset
from pyloss.recursive.run_files import load_recursive

CONFIG = """
name: trm
hidden_size: 16
num_heads: 2
H_cycles: 2
L_cycles: 1
L_layers: 1
halt_max_steps: 3
global_batch_size: 4
epochs: 4
eval_interval: 2
lr: 1e-3
lr_warmup_steps: 3
steps_per_report: 2
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 6)):
        answers = rng.integers(2, 6, (count, 16))
        questions = np.where(rng.random(answers.shape) < 0.5, 1, answers)
        PuzzleDataset(questions, answers, 6).save(tmp_path / "puzzles", split)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


def fails(capsys, *words):
    assert main(["train-recursive", *words]) == 2
    text = capsys.readouterr().err.strip().splitlines()
    assert len(text) == 1 and text[0].startswith("pyloss: error: ")
    return text[0]


RUN = ("train-recursive", "-c", "c.yaml", "--data", "puzzles")


def test_a_run_from_a_file(place, capsys):
    words = ("--show", "2", "--picture", "a.svg", "--report-to", "csv", "arch.H_cycles=1", "ema=on")
    assert main([*RUN, *words]) == 0
    out = capsys.readouterr().out
    assert "plan: 9 updates of 4 puzzles" in out and "update 8/9: train loss" in out
    assert "step   exact  tokens" in out and out.count("puzzle   ") == 2
    assert "1: " in out and "update 4/9: test loss" in out
    assert (place / "a.svg").read_text().startswith("<svg ")
    folder = place / "recursive"
    head = load_recursive(folder)
    assert head.model.config.H_cycles == 1 and head.model.config.vocab_size == 6
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + 6
    assert main(["train-recursive", "--test-only", "--show"]) == 0
    out = capsys.readouterr().out
    exact = json.loads((folder / "evaluation.json").read_text())["exact_accuracy"]
    assert f"exact accuracy {exact:.2%}" in out and out.count("puzzle   ") == 1


def test_max_time_and_resume(place, capsys):
    assert main([*RUN, "max_time=0.000001", "--output", "run"]) == 0
    assert "stopped after update 0: max_time is" in capsys.readouterr().out
    assert main(["train-recursive", "--resume", "--output", "run"]) == 0
    assert "resuming after update 0" in capsys.readouterr().out
    assert main([*RUN, "--output", "other"]) == 0
    first, second = (place / run / "model.safetensors" for run in ("run", "other"))
    assert first.read_bytes() == second.read_bytes()


def test_weights_to_begin_with(place, capsys):
    assert main([*RUN, "--output", "first"]) == 0
    weights = "first/model.safetensors"
    assert main([*RUN, "--output", "second", "--load-checkpoint", weights, "lr=0"]) == 0
    assert f"starting from {weights}" in capsys.readouterr().err
    assert (place / weights).read_bytes() == (place / "second" / "model.safetensors").read_bytes()
    message = fails(
        capsys, *RUN[1:], "--load-checkpoint", weights, "arch.hidden_size=32", "--output", "third"
    )
    assert "inner.lm_head.weight: shape (6, 16), expected (6, 32)" in message
    assert not (place / "third").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-c", "c.yaml"), "no data: give --data"),
        (("-c", "c.yaml", "--data", "nowhere"), "nowhere"),
        (("--data", "puzzles", "name=trm"), "lack global_batch_size and epochs"),
        (("-c", "c.yaml", "--data", "puzzles", "lerning_rate=1"), "is not known"),
        (("-c", "c.yaml", "--data", "puzzles", "halt_max_steps=0"), "halt_max_steps is 0"),
        (("-c", "c.yaml", "--data", "puzzles", "lr=abc"), "lr is 'abc'; it must be a finite"),
        (("-c", "c.yaml", "--data", "puzzles", "L_cycles=2.5"), "L_cycles is 2.5; it must be"),
        (("-c", "c.yaml", "--data", "puzzles", "vocab_size=9"), "vocab_size is 9 in the settings"),
        (("--test-only", "--resume", "-c", "c.yaml"), "give one of them"),
        (("--test-only", "-c", "c.yaml", "--data", "puzzles"), "no recursive model in"),
        (("--resume",), "config.yaml"),
        (("-c", "c.yaml", "--data", "puzzles", "--picture", "a.html"), "give a name that ends in"),
    ],
)
def test_bad_input(place, capsys, words, message):
    assert message in fails(capsys, *words)
    assert sorted(path.name for path in place.iterdir()) == ["c.yaml", "puzzles"]


def test_data_without_a_test_split(place, capsys):
    (place / "puzzles" / "test").rename(place / "puzzles" / "later")
    assert main([*RUN, "--output", "run"]) == 0
    assert "no split test" in capsys.readouterr().err
    assert not (place / "run" / "evaluation.json").exists()


def test_pictures_without_a_test_split_are_refused_before_the_training(place, capsys):
    (place / "puzzles" / "test").rename(place / "puzzles" / "later")
    assert main([*RUN, "--show"]) == 2
    assert "--show and --picture need the test split" in capsys.readouterr().err
    assert not (place / "recursive").exists()


def test_words_stand_between_flags(place, capsys):
    words = ("epochs=2", "--output", "run", "L_cycles=2", "eval_interval=1", "-q", "lr=0.5")
    assert main([*RUN, *words]) == 0
    config = (place / "run" / "config.yaml").read_text()
    assert "L_cycles: 2" in config and "epochs: 2" in config and "lr: 0.5" in config
    assert "unrecognized arguments: --lr (" in fails(capsys, *RUN[1:], "--lr", "lr=1")


def test_another_test_set_beside_data(place, capsys):
    (place / "puzzles" / "test").rename(place / "later")
    (place / "other").mkdir()
    (place / "later").rename(place / "other" / "test")
    assert main([*RUN, "data_paths_test=[other]"]) == 0
    assert "exact accuracy" in capsys.readouterr().out
