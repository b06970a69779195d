"""`checkpoints`, and the names that it lists."""

from pathlib import Path

import pytest
import tiny_project
from tiny_commands import fails
from tiny_project import TRAIN

from pyloss.cli import main


@pytest.fixture
def project(tmp_path, monkeypatch):
    tiny_project.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, "--iters", "3", "--save-every", "1", "--adapter-path", "run"]) == 0
    return tmp_path


def test_the_stored_adapters_are_listed_and_taken_by_name(project, capsys):
    capsys.readouterr()
    assert main(["checkpoints", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "name",
        "iteration",
        "train",
        "loss",
        "val",
        "loss",
        "saved",
        "file",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["@1", "@2", "@3", "@best", "@last"]
    assert lines[1].split()[1] == "1" and lines[1].endswith("0000001_adapters.safetensors")
    data = ["--model", "base", "--data", "data"]
    answers = ["generate", "--model", "base", "--prompt", "hello", "-m", "3"]
    for name in ("1", "best", "last"):
        assert main([*answers, "--adapter-path", f"run@{name}"]) == 0
    assert main(["eval", *data, "--adapter-path", "run@1", "--compare", "run@last"]) == 0
    assert "compared with model base, adapter run@last" in capsys.readouterr().err
    assert main(["fuse", "--model", "base", "--adapter-path", "run@2", "--save-path", "f"]) == 0
    again = ["--resume-adapter-file", "run@2", "--adapter-path", "again"]
    assert main([*TRAIN, "--iters", "1", *again]) == 0
    assert "starting from the adapter in run/0000002_adapters" in capsys.readouterr().err
    fails(capsys, [*answers, "--adapter-path", "run@7"], "stores no adapter @7; it has @1, @2")
    fails(capsys, [*TRAIN, "--adapter-path", "run@1"], "training writes a folder")
    assert not Path("run@1").exists()
    fails(capsys, ["checkpoints", "nothing"], "no adapter in nothing")
