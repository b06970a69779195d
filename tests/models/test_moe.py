"""Blocks of experts: shared ones, and routers by sigmoids; and queries that grow by position."""

import numpy as np
import pytest
from drawn import Drawn
from slopes import gradient_error

import pyloss
from pyloss.models.building import build_model
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.tuner.utils import unfreeze_layers

SMALL = {
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_hidden_layers": 2,
}
YARN = {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 3,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}
FAMILIES = {
    "qwen2_moe": {"mixture": Mixture(4, 2, 6, False, shared_size=10)},
    "granitemoeshared": {
        "mixture": Mixture(4, 2, 12, True, shared_size=10),
        "residual_multiplier": 0.22,
    },
    "granitemoehybrid": {"no_rope_layers": [0, 0], "attention_multiplier": 0.3},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "mixture": Mixture(4, 2, 6, True, (0,), bias=True, scaling=1.5),
    },
    "ministral3": {"rope_scaling": YARN, "llama_4_scaling_beta": 0.5},
}


def model(family, **sizes):
    return build_model(ModelConfig(family, **SMALL | FAMILIES[family] | sizes), Drawn())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_float64(family):
    """LoRA over all linear layers, routers, gates and experts included."""
    net = model(family)
    pyloss.linear_to_lora_layers(net, -1, {"rank": 1, "scale": 2.0, "dropout": 0.0})
    rng = np.random.default_rng(5)
    for name, array in net.trainable_parameters().items():
        if name.endswith("lora_b"):
            array[...] = rng.standard_normal(array.shape) / 8
    tokens = rng.integers(0, 17, 11).astype(np.int32)
    offsets = np.array([0, 4, 5, 11], np.int32)
    assert gradient_error(net, tokens, offsets) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_do_not_see_each_other(family):
    net, rng = model(family), np.random.default_rng(2)
    parts = [rng.integers(0, 17, n).astype(np.int32) for n in (1, 2, 9, 30)]
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    packed = net.hidden(np.concatenate(parts), offsets)
    for part, begin, end in zip(parts, offsets, offsets[1:], strict=False):
        alone = net.hidden(part, np.array([0, len(part)], np.int32))
        np.testing.assert_allclose(packed[begin:end], alone, rtol=1e-6, atol=2e-6)


def test_the_bias_of_experts_is_kept_and_not_trained(tmp_path):
    net = model("lfm2_moe")
    name = "model.layers.1.feed_forward.expert_bias"
    unfreeze_layers(net, -1, None)
    assert name in net.buffers() and name not in net.trainable_parameters()
    net.save(tmp_path)
    again = pyloss.load_model(tmp_path)
    np.testing.assert_array_equal(again.buffers()[name], net.buffers()[name])
    tokens = np.arange(12).reshape(1, 12)
    np.testing.assert_array_equal(again(tokens), net(tokens))


def test_queries_grow_with_their_position():
    """The same model without growth has the same answers up to the original length."""
    grown, plain = model("ministral3"), model("ministral3", llama_4_scaling_beta=None)
    tokens = np.random.default_rng(0).integers(0, 17, (1, 9))
    one, other = grown(tokens)[0], plain(tokens)[0]
    np.testing.assert_array_equal(one[:3], other[:3])
    assert np.abs(one[3:] - other[3:]).max() > 1e-3
