"""Adapters in models of a script's own, and what is said of keys and layers."""

import json

import numpy as np
import pytest

from pyloss.mlx import core as mx, nn
from pyloss.mlx.utils import tree_flatten
from pyloss.mlx_lm import load
from pyloss.mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters, remove_lora_layers

CONFIG = {"rank": 2, "scale": 1.0, "dropout": 0.0}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 3, bias=False)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Layer(), Layer()]

    def __call__(self, x):
        return sum(layer.proj(x) for layer in self.layers)


@pytest.mark.parametrize("dora", [False, True])
def test_models_of_a_script(tmp_path, dora):
    model = Own()
    model.freeze()
    linear_to_lora_layers(model, 1, CONFIG, use_dora=dora)
    trained = dict(tree_flatten(model.trainable_parameters()))
    names = {"lora_a", "lora_b", "m"} if dora else {"lora_a", "lora_b"}
    assert set(trained) == {f"layers.1.proj.{name}" for name in names}
    new = {name: mx.random.normal(value.shape) for name, value in trained.items()}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), new)
    config = {
        "num_layers": 1,
        "lora_parameters": CONFIG,
        "fine_tune_type": "dora" if dora else "lora",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    x = mx.random.normal((2, 4))
    other = Own()
    before = np.asarray(other(x))
    found = load_adapters(other, str(tmp_path))
    assert found is other and not np.allclose(np.asarray(other(x)), before)
    found = dict(tree_flatten(other.trainable_parameters()))
    for name, value in new.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value))
    remove_lora_layers(other)
    np.testing.assert_allclose(np.asarray(other(x)), before, atol=1e-6)


def test_keys(made, caplog):
    model, _ = load(str(made / "base"))
    model.freeze()
    with pytest.raises(ValueError, match="no layer that takes a lora adapter is named"):
        linear_to_lora_layers(model, 1, CONFIG | {"keys": ["self_attn.qkv_proj"]})
    linear_to_lora_layers(model, 1, CONFIG | {"keys": ["self_attn.q_proj", "mlp.other"]})
    assert "no layer is named mlp.other: ignored" in caplog.text
