"""Adapters on disk: both layouts bit for bit, what their settings say, and what they cannot say."""

import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from pyloss.tuner import LoRALinear, linear_to_lora_layers, load_adapters, save_adapter
from pyloss.tuner.adapter import adapter_modules
from pyloss.tuner.adapters import read_adapter

LAYOUTS = {"mlx": "adapters.safetensors", "peft": "adapter_model.safetensors"}


@pytest.fixture
def model(tmp_path):
    model = tiny.load_tiny(tmp_path / "model", bias=True)
    linear_to_lora_layers(model, 2, {"rank": 3, "scale": 2.5, "dropout": 0.125})
    rng = np.random.default_rng(0)
    for array in model.trainable_parameters().values():
        array[...] = rng.standard_normal(array.shape)
    return model


@pytest.mark.parametrize("format", list(LAYOUTS))
def test_a_round_trip_keeps_every_bit(model, tmp_path, format):
    save_adapter(model, tmp_path / "a" / "deep", format)
    assert sorted(p.name for p in (tmp_path / "a" / "deep").iterdir()) == sorted([LAYOUTS[format], "adapter_config.json"])
    again = tiny.load_tiny(tmp_path / "model", bias=True)
    load_adapters(again, tmp_path / "a" / "deep")
    layers = adapter_modules(again)
    assert layers.keys() == adapter_modules(model).keys()
    for name, layer in adapter_modules(model).items():
        assert layers[name].lora_a.tobytes() == layer.lora_a.tobytes() and layers[name].lora_b.tobytes() == layer.lora_b.tobytes()
        assert (layers[name].scale, layers[name].dropout) == (2.5, 0.125)
    # And what was loaded is saved as the same files again, whichever layout it came in.
    save_adapter(again, tmp_path / "b", format)
    for name in (LAYOUTS[format], "adapter_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / "deep" / name).read_bytes()


@pytest.mark.parametrize("format", list(LAYOUTS))
def test_saving_over_an_older_adapter(model, tmp_path, format):
    save_adapter(model, tmp_path / "a", format)
    model.trainable_parameters()["model.layers.2.mlp.up_proj.lora_b"][...] = 7
    save_adapter(model, tmp_path / "a", format)
    a, b = read_adapter(tmp_path / "a").matrices["model.layers.2.mlp.up_proj"]
    assert (b == 7).all() and a.shape == (32, 3)


def test_names_and_settings_of_the_mlx_layout(model, tmp_path):
    save_adapter(model, tmp_path / "a")
    arrays = load_file(tmp_path / "a" / "adapters.safetensors")
    assert arrays["model.layers.1.self_attn.k_proj.lora_a"].shape == (32, 3)
    assert arrays["model.layers.1.self_attn.k_proj.lora_b"].shape == (3, 16)
    assert len(arrays) == 2 * 7 * 2 and all(a.dtype == np.float32 for a in arrays.values())
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == {
        "fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": 2.5, "dropout": 0.125},
    }  # fmt: skip


def test_names_and_settings_of_the_peft_layout(model, tmp_path):
    save_adapter(model, tmp_path / "a", "peft", base_model="some/model")
    arrays = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert arrays["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"].shape == (3, 32)
    assert arrays["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"].shape == (16, 3)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 3, 7.5, 0.125)
    assert config["base_model_name_or_path"] == "some/model" and len(config["target_modules"]) == 14


@pytest.mark.parametrize(("extra", "scale"), [({}, 2.5), ({"use_rslora": True}, 7.5 / np.sqrt(3)), ({"lora_alpha": 6}, 2.0), ({"alpha_pattern": {}, "bias": "none"}, 2.5)])
def test_the_scale_of_peft(model, tmp_path, extra, scale):
    save_adapter(model, tmp_path / "a", "peft")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))
    assert read_adapter(tmp_path / "a").scale == pytest.approx(scale)


def test_what_peft_cannot_say_and_pyloss_can(model, tmp_path):
    base = model.model.layers[2].mlp.up_proj.linear
    model.set_module("model.layers.2.mlp.up_proj", LoRALinear.from_base(base, r=5, scale=2.5, dropout=0.125))
    with pytest.raises(ValueError, match="one rank, scale and dropout"):
        save_adapter(model, tmp_path / "a", "peft")
    assert not list((tmp_path / "a").glob("*"))
    save_adapter(model, tmp_path / "a")
    again = tiny.load_tiny(tmp_path / "model", bias=True)
    load_adapters(again, tmp_path / "a")
    assert again.model.layers[2].mlp.up_proj.lora_a.shape == (32, 5)


def test_models_that_cannot_be_saved(model, tmp_path):
    with pytest.raises(ValueError, match="format must be 'mlx' or 'peft', not 'gguf'"):
        save_adapter(model, tmp_path / "a", "gguf")
    model.adapter_config = None
    with pytest.raises(ValueError, match="does not know its adapter's settings"):
        save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="the model has no adapter"):
        save_adapter(tiny.load_tiny(tmp_path / "other"), tmp_path / "a")


@pytest.mark.parametrize("format", list(LAYOUTS))
def test_a_folder_that_is_a_file(model, tmp_path, format):
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "a")):
        save_adapter(model, tmp_path / "a", format)


def test_adapters_in_half_precision_are_read(model, tmp_path):
    from safetensors.numpy import save_file

    save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / "adapters.safetensors"
    arrays = load_file(path)
    save_file({name: array.astype(np.float16) for name, array in arrays.items()}, path)
    for name, (a, b) in read_adapter(tmp_path / "a").matrices.items():
        for half, array in (("lora_a", a), ("lora_b", b)):
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, arrays[f"{name}.{half}"].astype(np.float16).astype(np.float32))
