"""Mixtures of experts on a device compared with the processor: routing, products and training."""

import numpy as np
import pytest
from test_device_model import adapted, same_steps, steps

import pyloss
from pyloss import _core, ops
from pyloss.models import dequantize_model
from pyloss.models.building import build_model
from pyloss.models.config.families import FAMILIES
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.synthetic import RandomSource
from pyloss.tuner.utils import unfreeze_layers
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Every kind of block: Mixtral's normalizes shares, Qwen 3's follows a layer with an MLP, OLMoE's
# has shares of all experts, Qwen 2's a shared expert with a gate, LFM2's sigmoids, Granite's
# a shared expert beside the block.
MODELS = {
    "mixtral": Mixture(5, 2, 64, True),
    "qwen3_moe": Mixture(8, 3, 32, True, (0,)),
    "olmoe": Mixture(6, 2, 64, False),
    "lfm2_moe": Mixture(6, 2, 32, True, (0,), bias=True),
    "granitemoeshared": Mixture(6, 2, 64, True, shared_size=64),
    "qwen2_moe": Mixture(6, 2, 32, False, shared_size=64),
}


class Drawn(RandomSource):
    """Every matrix has its own numbers: equal experts would hide wrong routing."""

    def __init__(self, format):
        super().__init__(format)
        self._rng = np.random.default_rng(2)

    def matrix(self, name, rows, cols, rotary=False):
        values = self._rng.standard_normal((rows, cols), dtype=np.float32) / np.float32(
            np.sqrt(cols)
        )
        return Weight.quantize(values, self._format)

    def experts(self, name, count, rows, cols):
        return WeightStack([self.matrix(name, rows, cols) for _ in range(count)])


def model_of(family, format):
    types = ["conv", "full_attention"] if family == "lfm2_moe" else None
    config = ModelConfig(
        family, intermediate_size=64, mixture=MODELS[family], layer_types=types, **SIZES
    )
    return build_model(config, Drawn(format))


def adapted_experts(family, format, **options):
    block = FAMILIES[family].experts.block
    gate = "router.layer" if family.startswith("granite") else "gate"
    inner = (gate, "switch_mlp.gate_proj", "switch_mlp.up_proj", "switch_mlp.down_proj")
    return adapted(
        model_of(family, format),
        keys=["self_attn.q_proj", *(f"{block}.{name}" for name in inner)],
        **options,
    )


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("format", "dropout", "dora"), [("f32", 0.0, False), ("q4_1", 0.25, False), ("q4_1", 0.0, True)]
)
def test_ten_steps_are_those_of_the_processor(device, family, format, dropout, dora):
    here, there = (adapted_experts(family, format, dropout=dropout, dora=dora) for _ in range(2))
    assert any(".switch_mlp.up_proj.lora_a" in name for name in here.trainable_parameters())
    # Trains the router too, so that the gradient of the routing is used.
    routers = (".gate.lora_a", ".router.layer.lora_a")
    assert any(name.endswith(routers) for name in here.trainable_parameters())
    want = same_steps(here, there, device, count=10, rtol=1e-4)
    assert want[-1, 0] < want[0, 0]
    assert all(
        isinstance(array, pyloss.DeviceArray) for array in there.trainable_parameters().values()
    )


def test_training_all_parameters(device):
    found = []
    for where in ("cpu", device):
        model = model_of("olmoe", "f32")
        dequantize_model(model)
        unfreeze_layers(model, -1, None)
        found.append(steps(pyloss.to_device(model.train(), where), np.random.default_rng(1), 3))
    np.testing.assert_allclose(found[1], found[0], rtol=2e-5)


def test_generation(device):
    here, there = (model_of("qwen3_moe", "q4_1") for _ in range(2))
    pyloss.to_device(there, device)
    tokens = np.random.default_rng(0).integers(0, 48, (1, 9))
    np.testing.assert_allclose(np.asarray(there(tokens)), here(tokens), atol=1e-5)
    caches = here.make_cache(), there.make_cache()
    for part in (tokens[0, :5], tokens[0, 5:6], tokens[0, 6:7], tokens[0, 7:]):
        np.testing.assert_allclose(
            there.step(part, caches[1]), here.step(part, caches[0]), atol=1e-5
        )


def test_routing_stays_there(device):
    logits = np.random.default_rng(6).standard_normal((7, 5)).astype(np.float32)
    here, weights = ops.route(logits, 2, True)
    put = pyloss.to_device(logits, device)
    _core.profile(True)
    there, got = ops.route(put, 2, True)
    copied = _core.profile(False)["copied from devices"]
    assert (copied[0], copied[2]) == (1, 4 * 7 * 2)  # only the chosen experts
    for name in ("tokens", "visits", "offsets"):
        array = getattr(there, name)
        assert isinstance(array, pyloss.DeviceArray)
        np.testing.assert_array_equal(array.numpy(), getattr(here, name))
    assert isinstance(got, pyloss.DeviceArray)
    np.testing.assert_allclose(got.numpy(), weights, rtol=1e-6)
    with pytest.raises(ValueError, match="from 1 to 5, not 6"):
        ops.route(pyloss.to_device(logits, device), 6, True)
