"""Without --model, commands take the model that the adapter was trained over."""

import json
import shutil

import pytest
import tiny_project

from pyloss.cli import main

SAID = "model base, which the adapter was trained over"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A project whose folder `run` has an adapter of a run over `base`."""
    tiny_project.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([*tiny_project.TRAIN, "--adapter-path", "run"]) == 0
    return tmp_path


@pytest.mark.parametrize(
    "argv",
    [
        ["eval", "--data", "data"],
        ["generate", "--prompt", "hello", "--max-tokens", "4"],
        ["train", "--test", "--data", "data"],
    ],
    ids=["eval", "generate", "train --test"],
)
def test_it_is_the_one_that_the_run_names(trained, capsys, argv):
    capsys.readouterr()
    assert main([*argv, "--adapter-path", "run"]) == 0
    found = capsys.readouterr()
    assert found.err.count(SAID) == 1
    assert main([*argv, "--adapter-path", "run", "--model", "base"]) == 0
    given = capsys.readouterr()
    assert found.out == given.out and SAID not in given.err


def test_a_fused_or_exported_model_is_made_of_it(trained):
    for argv in (["fuse", "--save-path"], ["export", "--to", "gguf", "--output"]):
        place = "made.gguf" if argv[0] == "export" else "made"
        assert main([*argv, place, "--adapter-path", "run"]) == 0
    assert json.loads((trained / "made" / "config.json").read_text())["hidden_size"] < 576
    assert "base" in (trained / "made" / "README.md").read_text()
    assert (trained / "made.gguf").stat().st_size < 10e6


def test_one_that_is_not_there_is_asked_for(trained, capsys):
    shutil.move("base", "elsewhere")
    capsys.readouterr()
    assert main(["generate", "--adapter-path", "run", "--prompt", "hello"]) == 2
    error = capsys.readouterr().err
    assert "the adapter in run was trained over the model 'base'" in error
    assert "give its place as --model" in error
    assert main(["generate", "--adapter-path", "run", "--model", "elsewhere", "-m", "2"]) == 0


def test_the_name_in_peft_s_configuration_counts_too(trained, capsys):
    export = ["export", "--to", "peft", "--adapter-path", "run", "--output", "peft"]
    assert main([*export, "--name", "base"]) == 0
    config = json.loads((trained / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    capsys.readouterr()
    assert main(["generate", "--adapter-path", "peft", "--prompt", "hello", "-m", "2"]) == 0
    assert SAID in capsys.readouterr().err
