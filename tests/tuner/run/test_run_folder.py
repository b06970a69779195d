"""The folder of a run: earlier runs are kept, runs never mix, paths in the configuration."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from tiny_training import Recorder, Tiny, run, tiny_loss, tiny_value_and_grad

import pyloss
from pyloss import nn
from pyloss.io.locks import LOCK_FILE, locked
from pyloss.tuner import linear_to_lora_layers, load_adapters, save_adapter
from pyloss.tuner.adapters.folder import read_adapter
from pyloss.tuner.run import run_folder


@pytest.fixture(autouse=True)
def numpy_gradients(monkeypatch):
    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)


class Other(Tiny):
    adapter_config = Tiny.adapter_config | {"lora_parameters": {"rank": 2, "scale": 1.0}}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("val", [True, None], ids=["validation", "no validation"])
@pytest.mark.parametrize("second", [Tiny, Other], ids=["same kind", "other kind"])
def test_runs_one_after_the_other_lose_and_mix_nothing(tmp_path, second, val):
    run(tmp_path, iters=10, val=val)
    before = files_of(tmp_path)
    assert "0000010_adapters.safetensors" in before
    run(tmp_path, second(seed=2), iters=1, val=val)
    assert files_of(tmp_path / "previous-1") == before
    own = {"adapters.safetensors", "adapter_config.json", "trainer_state.safetensors"}
    own |= {"metrics.jsonl"}
    own |= {"best_adapters.safetensors"} if val else set()
    after = files_of(tmp_path)
    assert set(after) - {"0000001_adapters.safetensors"} == own
    assert not [name for name in after if name.startswith("0000005") or name.startswith("0000010")]
    read_adapter(tmp_path / "previous-1")
    run(tmp_path, iters=1, val=val, overwrite=True)
    assert not (tmp_path / "previous-2").exists()
    run(tmp_path, iters=1, val=val)
    assert files_of(tmp_path / "previous-1") == before and (tmp_path / "previous-2").is_dir()


def test_a_run_that_was_set_aside_can_be_resumed(tmp_path):
    whole, _, _ = run(tmp_path / "whole", iters=12)
    run(tmp_path / "a", iters=5)
    run(tmp_path / "a", Other(seed=1), iters=1)
    resumed, _, _ = run(tmp_path / "a" / "previous-1", Tiny(seed=9), iters=12, resume=True)
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(array, resumed.arrays[name])


def test_a_resumed_run_keeps_its_own_files(tmp_path):
    run(tmp_path, iters=5)
    run(tmp_path, Tiny(seed=4), iters=10, resume=True)
    assert not list(tmp_path.glob("previous*"))
    assert {"0000005_adapters.safetensors", "0000010_adapters.safetensors"} <= set(
        files_of(tmp_path)
    )


def test_an_adapter_of_another_name_and_of_peft_are_kept_too(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_text("peft")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    run(tmp_path, iters=1, val=None, adapter_file=tmp_path / "mine.safetensors")
    kept = files_of(tmp_path / "previous-1")
    assert kept == {
        "adapter_model.safetensors": b"peft",
        "adapter_config.json": b'{"peft_type": "LORA", "r": 8}',
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == Tiny.adapter_config
    run(tmp_path, iters=1, val=None, adapter_file=tmp_path / "mine.safetensors")
    assert "mine.safetensors" in files_of(tmp_path / "previous-2")


def test_it_is_said_in_one_line(tmp_path, capsys):
    run(tmp_path, iters=5)
    run(tmp_path, iters=1, progress=True)
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "kept what was there before" in line
    ]
    assert len(lines) == 1 and lines[0].endswith(f"in {tmp_path / 'previous-1'}")


@pytest.mark.parametrize("earlier", [True, False])
def test_no_iterations_write_nothing(tmp_path, capsys, earlier):
    if earlier:
        run(tmp_path, iters=5)
    before = files_of(tmp_path)
    _, _, result = run(tmp_path, Tiny(seed=7), iters=0, progress=True)
    assert (
        result.iterations == 0
        and files_of(tmp_path) == before
        and not list(tmp_path.glob("previous*"))
    )
    assert "nothing was trained, so no adapter is saved" in capsys.readouterr().out
    # A run whose data give no batch writes no adapter either.
    run(tmp_path / "none", iters=3, iterate=lambda **options: iter(()), val=None)
    assert not (tmp_path / "none" / "adapters.safetensors").exists()


def test_a_users_own_keys_stay(tmp_path):
    run(tmp_path, iters=1)
    path = tmp_path / "adapter_config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {"my_note": {"a": [1]}, "system_prompt": "old", "iters": 7}
        )
    )
    for settings in ({"resume": True, "iters": 2}, {"iters": 1}, {"iters": 1, "overwrite": True}):
        run(tmp_path, Tiny(seed=3), **settings)
        assert json.loads(path.read_text()) == Tiny.adapter_config | {"my_note": {"a": [1]}}
    model = tiny.load_tiny(tmp_path / "model")
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0})
    save_adapter(model, tmp_path)
    assert json.loads(path.read_text()) == model.adapter_config | {"my_note": {"a": [1]}}


def test_a_configuration_that_a_script_wrote_is_kept_beside(tmp_path):
    """Its keys that a run knows too would change or go."""
    own = {"num_layers": 3, "model": "/a/place", "note": "mine"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(own))
    run(tmp_path, iters=1)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == Tiny.adapter_config | {"note": "mine"}
    kept = tmp_path / "previous-1" / "adapter_config.json"
    assert json.loads(kept.read_text()) == own
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps({"note": "mine"}))
    run(tmp_path / "b", iters=1)
    assert not (tmp_path / "b" / "previous-1").exists()


def test_the_configuration_names_no_place_of_the_machine(tmp_path):
    given = {
        "model": "/home/me/models/Some-Model", "data": Path("/srv/data"), "adapter_path": "~/out/adapters", "config": "my/lora.yaml",
        "resume_adapter_file": None, "hf_dataset": {"path": "/data/set", "name": "owner/name"}, "system_prompt": "/no_think Answer.",
        "lora_parameters": {"loftq_model": "/home/me/float", "rank": 1},
    }  # fmt: skip
    run(tmp_path, iters=1, adapter_config=given)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "model": "Some-Model", "data": "./data", "adapter_path": "adapters", "config": "my/lora.yaml", "resume_adapter_file": None,
        "hf_dataset": {"path": "set", "name": "owner/name"}, "system_prompt": "/no_think Answer.",
        "lora_parameters": {"loftq_model": "float", "rank": 1},
    }  # fmt: skip
    assert run_folder.portable({"model": "owner/name", "data": "../data"}) == {
        "model": "owner/name",
        "data": "../data",
    }


def test_a_configuration_that_cannot_be_written_moves_nothing(tmp_path):
    run(tmp_path, iters=1)
    before = files_of(tmp_path)
    for value, error in ((float("nan"), ValueError), (object(), TypeError)):
        with pytest.raises(error):
            run(tmp_path, iters=1, adapter_config={"note": value})
    assert files_of(tmp_path) == before and not list(tmp_path.glob("previous*"))


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    """The first run trains in another thread."""
    training, done, refused = threading.Event(), threading.Event(), []

    def loss(model, batch, lengths):
        training.set()
        assert done.wait(60)
        return tiny_loss(model, batch, lengths)

    first = threading.Thread(
        target=run, args=(tmp_path,), kwargs={"loss": loss, "iters": 2, "callback": Recorder()}
    )
    first.start()
    assert training.wait(60)
    for settings in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(BlockingIOError, match="another run is writing here: process"):
            run(tmp_path, Tiny(seed=1), **settings)
        refused.append(settings)
    with pytest.raises(BlockingIOError):
        save_adapter(with_adapter(tmp_path / "model"), tmp_path)
    run(tmp_path, Tiny(seed=1), iters=0)
    done.set()
    first.join()
    assert (
        len(refused) == 3
        and not (tmp_path / LOCK_FILE).exists()
        and not list(tmp_path.glob("previous*"))
    )
    run(tmp_path, Tiny(seed=1), iters=3, resume=True)


def with_adapter(folder):
    model = tiny.load_tiny(folder)
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0})
    return model


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="the training data: none of the 2 samples has a target"):
        run(tmp_path / "new", data=[([1, 2, 3], 3)] * 2)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    with locked(tmp_path):
        pass


def test_validation_data_without_targets_are_named(tmp_path):
    with pytest.raises(ValueError, match="the validation data: none of the 1 sample has a target"):
        run(tmp_path, val=[([1, 2, 3], 3)])


def test_numbered_and_best_adapters_are_read_where_they_lie(tmp_path):
    """By every reader, through `read_adapter` or `load_full`."""
    model = with_adapter(tmp_path / "model")
    b = model.layers[-1].mlp.up_proj.lora_b
    b[...] = 1
    save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "adapters.safetensors").rename(
        tmp_path / "a" / "0000100_adapters.safetensors"
    )
    b[...] = 2
    save_adapter(model, tmp_path / "b")
    (tmp_path / "b" / "adapters.safetensors").rename(tmp_path / "a" / "adapters.safetensors")
    for name, value in (("", 2), ("0000100_adapters.safetensors", 1)):
        again, _ = tiny.load_tiny(tmp_path / "model"), None
        load_adapters(again, tmp_path / "a" / name)
        assert (again.layers[-1].mlp.up_proj.lora_b == value).all()
    with pytest.raises(FileNotFoundError, match=r"it has no 0000200_adapters\.safetensors"):
        load_adapters(again, tmp_path / "a" / "0000200_adapters.safetensors")
    with pytest.raises(FileNotFoundError, match=r"it has no adapter_config\.json"):
        load_adapters(again, tmp_path / "b" / ".." / "0000200_adapters.safetensors")


def test_a_numbered_file_of_full_fine_tuning(tmp_path):
    model = tiny.load_tiny(tmp_path / "model")
    pyloss.tuner.unfreeze_layers(model, 1, ["input_layernorm"])
    name, array = next(iter(model.trainable_parameters().items()))
    array[...] = 3
    save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "adapters.safetensors").rename(
        tmp_path / "a" / "0000100_adapters.safetensors"
    )
    again = tiny.load_tiny(tmp_path / "model")
    load_adapters(again, tmp_path / "a" / "0000100_adapters.safetensors")
    assert (again.parameters()[name] == 3).all()
    assert set(load_file(tmp_path / "a" / "0000100_adapters.safetensors")) == {name}
