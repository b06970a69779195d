"""What the layouts ask of a kind of adapter: here of a kind without ranks, one vector per layer."""

import json
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from pyloss.errors import FormatError
from pyloss.nn import Linear, SwitchLinear
from pyloss.tuner import load_adapters, save_adapter
from pyloss.tuner.adapters import registry
from pyloss.tuner.adapters.adapter import Adapter, adapter_modules
from pyloss.tuner.adapters.gguf import write_lora_gguf
from pyloss.tuner.utils import add_adapters

KEYS = ["mlp.up_proj", "self_attn.q_proj"]


class Gain(Adapter):
    """y = gain * base(x), gain [out]."""

    kind, base_name, base_type = "gain", "linear", Linear
    parts: ClassVar = {"gain": 1}

    @classmethod
    def shapes(cls, layer):
        return {"gain": (layer.shape[0],)}

    def _attach(self, layer):
        self._check_base(layer)
        self._take_base(layer)
        self.gain = np.ones(layer.shape[0], np.float32)

    def __call__(self, x):
        return self.linear(x) * self.gain

    def merged(self, weight):
        return self.gain[:, None] * weight


@pytest.fixture
def model(tmp_path, monkeypatch):
    module = types.ModuleType("pyloss.tuner.gain")
    module.Gain = Gain
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.KINDS, "gain", ("gain:Gain",))
    registry._classes.cache_clear()
    model = tiny.load_tiny(tmp_path / "model")
    add_adapters(model, "gain", 1, {"keys": KEYS})
    rng = np.random.default_rng(0)
    for array in model.trainable_parameters().values():
        array[...] = rng.uniform(0.5, 2, array.shape)
    yield model.eval()
    registry._classes.cache_clear()


def test_another_kind_is_saved_and_loaded(model, tmp_path):
    save_adapter(model, tmp_path / "a")
    found = load_file(tmp_path / "a" / "adapters.safetensors")
    assert sorted(found) == [f"model.layers.2.{key}.gain" for key in KEYS]
    for name, array in found.items():
        np.testing.assert_array_equal(array, model.trainable_parameters()[name])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config == {"fine_tune_type": "gain", "num_layers": 1, "lora_parameters": {"keys": KEYS}}
    again = tiny.load_tiny(tmp_path / "model")
    load_adapters(again, tmp_path / "a")
    assert {type(layer) for layer in adapter_modules(again).values()} == {Gain}
    ids = np.array([[1, 2, 3]])
    np.testing.assert_array_equal(again.eval()(ids), model(ids))


def test_adapters_put_in_by_hand_are_named_in_the_configuration(model, tmp_path):
    model.adapter_config = None
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {"keys": [f"model.layers.2.{key}" for key in KEYS]}


def test_arrays_that_the_kind_does_not_have(model, tmp_path):
    save_adapter(model, tmp_path / "a")
    file = tmp_path / "a" / "adapters.safetensors"
    one, two = (f"model.layers.2.{key}" for key in KEYS)
    arrays = load_file(file)
    save_file({**arrays, f"{one}.lora_a": np.ones((2, 3), np.float32)}, file)
    with pytest.raises(FormatError, match=f"{one}.lora_a: .* names that end in .gain"):
        load_adapters(tiny.load_tiny(tmp_path / "model"), tmp_path / "a")
    save_file({**arrays, f"{two}.gain": np.ones((1, 2, 3), np.float32)}, file)
    with pytest.raises(FormatError, match=r"expected one or two dimensions"):
        load_adapters(tiny.load_tiny(tmp_path / "model"), tmp_path / "a")
    save_file({**arrays, f"{two}.gain": np.ones(5, np.float32)}, file)
    with pytest.raises(ValueError, match=rf"{two}: gain \(5,\), expected \(32\)"):
        load_adapters(tiny.load_tiny(tmp_path / "model"), tmp_path / "a")


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda model, path: save_adapter(model, path, "peft"), "PEFT's layout has no gain"),
        (lambda model, path: save_adapter(model, path, one_rank=True), "mlx-lm has no gain"),
        (lambda model, path: write_lora_gguf(model, path / "a.gguf"), "llama.cpp has no gain"),
    ],
)
def test_layouts_without_the_kind_refuse_it(model, tmp_path, save, message):
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "a")
    assert not list((tmp_path / "a").glob("*"))


@pytest.mark.parametrize("kind", registry.KINDS)
def test_parts_have_the_dimensions_that_a_kind_declares(kind):
    for cls in registry._classes(kind):
        sizes = (5, 8, 6) if cls.base_type is SwitchLinear else (8, 6)
        shapes = cls.shapes(types.SimpleNamespace(shape=sizes), 3)
        dimensions = {name: len(shape) - (len(sizes) - 2) for name, shape in shapes.items()}
        assert dimensions == dict(registry.parts_of(kind))
