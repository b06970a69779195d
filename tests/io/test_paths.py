"""All functions read paths alike: `~`, and names that are not UTF-8."""

import json
import os
import shutil

import pytest
from safetensors.numpy import load_file
from tiny_project import TRAIN

import pyloss
from pyloss.cli import main
from pyloss.io.gguf import read_gguf
from pyloss.io.safetensors import read_safetensors
from pyloss.models import load_model
from pyloss.models.files.gguf_writer import write_gguf
from pyloss.models.tokenizer import Tokenizer
from pyloss.tuner import linear_to_lora_layers, load_adapters, save_adapter
from pyloss.tuner.adapters.folder import read_adapter
from pyloss.tuner.adapters.gguf import write_lora_gguf
from pyloss.tuner.run.checkpoints import load_checkpoint


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    """The user's home, with a project in it; the process runs elsewhere."""
    shutil.copytree(made, tmp_path / "home")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path / "home"
    assert not list((tmp_path / "elsewhere").iterdir())  # in particular no folder named ~


def test_functions_that_take_a_path(home):
    model, tokenizer = pyloss.load("~/base", adapter_path="~/adapters")
    save_adapter(model, "~/saved")
    load_adapters(load_model("~/base.gguf"), "~/saved")
    assert read_adapter("~/saved").layers
    write_lora_gguf(model, "~/lora.gguf")
    pyloss.export(model, "~/new/model.gguf", "gguf", tokenizer)
    pyloss.export(model, "~/peft", "peft")
    plain = load_model("~/base")
    plain.save("~/copy", tokenizer)
    tokenizer.save("~/text")
    assert Tokenizer.from_folder("~/text").encode("hello") == tokenizer.encode("hello")
    write_gguf(plain, "~/plain.gguf", tokenizer)
    assert read_gguf("~/plain.gguf").tensors and read_gguf("~/lora.gguf").tensors
    assert (
        read_safetensors("~/copy").tensors
        and read_safetensors("~/saved/adapters.safetensors").tensors
    )


def test_training_from_python(home):
    model, tokenizer = pyloss.load("~/base")
    train, _, _ = pyloss.load_dataset("~/data", tokenizer)
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 2.0})
    options = {"batch_size": 2, "adapter_file": "~/run/adapters.safetensors", "progress": False}
    pyloss.train(
        model, pyloss.optim.SGD(1e-3), train, None, pyloss.TrainingArgs(iters=1, **options)
    )
    assert load_checkpoint("~/run").progress.iteration == 1
    pyloss.train(
        model,
        pyloss.optim.SGD(1e-3),
        train,
        None,
        pyloss.TrainingArgs(iters=2, resume="~/run", **options),
    )
    assert load_checkpoint("~/run/trainer_state.safetensors").progress.iteration == 2


def test_commands(home, capsys):
    (home / "lora.yaml").write_text(
        "data: ~/data\nmodel: ~/base\nadapter_path: ~/run\niters: 1\nbatch_size: 2\nnum_layers: 1\n"
    )
    assert main(["train", "-c", "~/lora.yaml"]) == 0
    assert (
        main(
            [
                "train",
                "-c",
                "~/lora.yaml",
                "--adapter-path",
                "~/two",
                "--resume-adapter-file",
                "~/run/adapters.safetensors",
            ]
        )
        == 0
    )
    assert main(["eval", "--model=~/base", "--data=~/data", "--adapter-path=~/run"]) == 0
    assert main(["generate", "--model=~/base", "--adapter-path=~/run", "--max-tokens=2"]) == 0
    assert main(["fuse", "--model=~/base", "--adapter-path=~/run", "--save-path=~/fused"]) == 0
    assert (
        main(["export", "--model=~/base", "--adapter-path=~/run", "--to=peft", "--output=~/peft"])
        == 0
    )
    assert main(["convert", "--model=~/base", "--output=~/converted"]) == 0
    for name in ("run", "two", "fused", "peft", "converted"):
        assert (home / name).is_dir()


def test_names_that_are_not_utf_8(made, tmp_path, monkeypatch, capsys):
    place = tmp_path / os.fsdecode(b"\xff\xe4")
    try:
        shutil.copytree(made, place)
    except OSError:
        pytest.skip("this file system has no such names")
    base, data, run = (str(place / name) for name in ("base", "data", "run"))
    train = ["train", "--model", base, "--data", data, "--adapter-path", run, *TRAIN[5:]]
    assert main([*train, "--train", "--test"]) == 0
    assert load_file(place / "run" / "adapters.safetensors")
    assert json.loads((place / "run" / "adapter_config.json").read_bytes())["iters"] == 2
    assert main([*train, "--resume", "--iters", "3"]) == 0
    assert main(["eval", "--model", base, "--data", data, "--adapter-path", run]) == 0
    assert (
        main(["fuse", "--model", base, "--adapter-path", run, "--save-path", str(place / "fused")])
        == 0
    )
    for to, name in (("peft", "peft"), ("hf", "hf"), ("gguf", "m.gguf")):
        assert (
            main(
                [
                    "export",
                    "--model",
                    base,
                    "--adapter-path",
                    run,
                    "--to",
                    to,
                    "--output",
                    str(place / name),
                ]
            )
            == 0
        )
    assert main(["generate", "--model", str(place / "m.gguf"), "--max-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["eval", "--model", base, "--data", str(place / "none")]) == 2
    assert "\\udcff" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["eval", "--model", "", "--data", "data"],
        ["eval", "--model", "base", "--data", "data", "--adapter-path", ""],
        ["fuse", "--model", "base", "--save-path", ""],
        ["export", "--model", "base", "--to", "hf", "--output", ""],
        ["train", "--model", "base", "--data", "data", "--adapter-path", ""],
        ["train", "-c", ""],
    ],
)
def test_an_empty_path_is_none(made, monkeypatch, capsys, argv):
    """A script passes "" if its variable is not set."""
    monkeypatch.chdir(made)
    before = set(made.rglob("*"))
    assert main(argv) == 2
    assert "path" in capsys.readouterr().err
    assert set(made.rglob("*")) == before
