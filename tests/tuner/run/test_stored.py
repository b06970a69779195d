"""The adapters that a run stores, and their names."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_training import run, tiny_loss, tiny_value_and_grad

from pyloss import FormatError, nn
from pyloss.tuner.adapters.layout import adapter_place
from pyloss.tuner.run.stored import checkpoint_file, stored_checkpoints


@pytest.fixture(autouse=True)
def numpy_gradients(monkeypatch):
    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)


@pytest.fixture
def folder(tmp_path):
    """A run of 12 iterations, saved each 5, whose best adapter is that of iteration 4."""
    batches = 0

    def counting(model, batch, lengths):
        nonlocal batches
        batches += not model.training
        return tiny_loss(model, batch, lengths)

    run(None, loss=counting)
    each, done = batches // 4, 0  # batches of a validation; at 0, 4, 8 and 12

    def loss(model, batch, lengths):
        nonlocal done
        value, count = tiny_loss(model, batch, lengths)
        if model.training:
            return value, count
        done += 1
        return [1.0, 0.5, 2.0, 3.0][(done - 1) // each], count

    run(tmp_path, loss=loss)
    return tmp_path


def test_a_run_lists_its_saves_the_best_and_the_last(folder):
    found = {checkpoint.name: checkpoint for checkpoint in stored_checkpoints(folder)}
    assert list(found) == ["@5", "@10", "@12", "@best", "@last"]
    assert [c.iteration for c in found.values()] == [5, 10, 12, 4, 12]
    assert [c.val_loss for c in found.values()] == [None, None, 3.0, 0.5, 3.0]
    assert all((c.train_loss is None) == (name == "@best") for name, c in found.items())
    assert found["@last"].path == found["@12"].path
    assert all(c.saved > 1e9 for c in found.values())


def test_names_are_files(folder):
    for name, file in (
        ("5", "0000005_adapters.safetensors"),
        ("0010", "0000010_adapters.safetensors"),
        ("4", "best_adapters.safetensors"),
        ("best", "best_adapters.safetensors"),
        ("last", "0000012_adapters.safetensors"),
    ):
        assert checkpoint_file(f"{folder}@{name}") == folder / file
        assert adapter_place(f"{folder}@{name}") == (folder, file)
    best, kept = (
        load_file(folder / "best_adapters.safetensors"),
        load_file(folder / "adapters.safetensors"),
    )
    for name, array in best.items():
        np.testing.assert_array_equal(array, kept[name])
    with pytest.raises(FileNotFoundError, match="stores no adapter @7; it has @5, @10, @12, @best"):
        checkpoint_file(f"{folder}@7")


def test_other_paths_are_no_names(folder, tmp_path):
    assert checkpoint_file(folder) is None
    assert checkpoint_file(f"{folder}@first") is None
    assert checkpoint_file(tmp_path / "none@5") is None
    (own := tmp_path / "mine@5").mkdir()
    (tmp_path / "mine").mkdir()
    assert checkpoint_file(own) is None  # a path that exists means itself


def test_without_keep_best_the_adapter_is_the_last(tmp_path):
    run(tmp_path, keep_best=False)
    last = stored_checkpoints(tmp_path)[-1]
    assert (last.name, last.iteration) == ("@last", 12) and last.val_loss is not None
    assert last.path == tmp_path / "adapters.safetensors"


def test_a_resumed_run_tells_the_same(tmp_path):
    run(tmp_path / "whole", keep_best=False, steps_per_report=5)
    run(tmp_path / "parts", keep_best=False, steps_per_report=5, iters=7)
    run(tmp_path / "parts", keep_best=False, steps_per_report=5, resume=True)
    whole, parts = (stored_checkpoints(tmp_path / name)[-1] for name in ("whole", "parts"))
    assert (whole.iteration, whole.val_loss) == (parts.iteration, parts.val_loss)


def test_folders_of_others_have_names_too(tmp_path):
    arrays = {"a": np.zeros(1, np.float32)}
    for name in ("0000100_adapters", "0000200_adapters", "adapters"):
        save_file(arrays, tmp_path / f"{name}.safetensors")
    found = stored_checkpoints(tmp_path)
    assert [(c.name, c.iteration) for c in found] == [("@100", 100), ("@200", 200), ("@last", None)]
    assert found[-1].path == tmp_path / "adapters.safetensors"


def test_damaged_metadata_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        stored_checkpoints(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        stored_checkpoints(tmp_path / "none")
    for told in ("[]", "{", json.dumps({"iteration": "x"}), json.dumps({"iteration": -1})):
        arrays = {"a": np.zeros(1, np.float32)}
        save_file(arrays, tmp_path / "adapters.safetensors", {"checkpoint": told})
        with pytest.raises(FormatError, match="not a checkpoint's"):
            stored_checkpoints(tmp_path)
