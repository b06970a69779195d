"""LFM2: short convolutions in place of attention in some layers."""

import numpy as np
import pytest
from mixer_checks import (
    gguf_tensors,
    packed_as_alone,
    same_through_the_cache,
    same_when_checkpointed,
    with_lora,
)
from slopes import gradient_error

import pyloss
from pyloss.errors import FormatError
from pyloss.models.config import ModelConfig
from pyloss.models.synthetic import random_model

SIZES = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
}


def model(**options):
    return random_model(ModelConfig("lfm2", **SIZES, **options))


def adapted(net, rank=3):
    """LoRA over all linear layers, with the convolutions themselves trained."""
    with_lora(net, rank)
    for layer in net.layers:
        if layer.self_attn.taps:
            layer.conv.conv.unfreeze()
    return net


@pytest.mark.parametrize("biased", [False, True])
def test_gradients_of_a_model_in_float64(biased):
    small = {
        "vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 3,
    }  # fmt: skip
    types = ["conv", "full_attention", "conv"]
    config = ModelConfig("lfm2", **small, layer_types=types, conv_bias=biased)
    net = adapted(random_model(config), rank=1)
    names = net.trainable_parameters()
    for part in ("conv.in_proj.lora_a", "conv.out_proj.lora_b", "feed_forward.w2.lora_a", "conv.conv.weight"):  # fmt: skip
        assert f"model.layers.2.{part}" in names
    assert ("model.layers.0.conv.conv.bias" in names) == biased
    tokens = np.random.default_rng(1).integers(0, 17, 11).astype(np.int32)
    offsets = np.array([0, 4, 5, 11], np.int32)
    assert gradient_error(net, tokens, offsets) < 1e-6


def test_packed_sequences_do_not_see_each_other():
    """Also sequences that are shorter than the convolution, whose bits are those of each alone."""
    net = model(conv_L_cache=4)
    taps = net.layers[0].conv.conv.weight

    def convolution(rows, rng):
        x = rng.standard_normal((rows, 72)).astype(np.float32)
        return [x], lambda x, offsets: pyloss.ops.short_conv(x, taps, None, offsets)

    packed_as_alone(net, (1, 2, 3, 9, 1, 30), convolution, 2e-6)


def test_checkpointed_layers_have_the_same_gradients():
    same_when_checkpointed(adapted(model()), 21)


def test_a_long_prompt_in_parts_and_one_token_at_a_time():
    """The cache drops the rows before a convolution's reach and keeps these."""
    same_through_the_cache(model(conv_L_cache=5))


def gguf(**changes):
    values = {
        "block_count": 3, "context_length": 128, "embedding_length": 24, "feed_forward_length": 40,
        "attention.head_count": 4, "attention.head_count_kv": [0, 2, 0], "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e6, "shortconv.l_cache": 3,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {
        "general.architecture": "lfm2",
        **{f"lfm2.{key}": value for key, value in values.items() if value is not None},
    }


def test_gguf():
    tensors = gguf_tensors()

    def read(**changes):
        return ModelConfig.from_gguf(gguf(**changes), tensors, "m.gguf")

    config = read()
    assert config.layer_types == ["conv", "full_attention", "conv"]
    assert (config.num_key_value_heads, config.conv_L_cache, config.head_dim) == (2, 3, 6)
    assert read(attention__head_count_kv=2).layer_types == ["full_attention"] * 3
    for changes, message in (
        ({"attention__head_count_kv": [0, 2, 1]}, "0 or one number for all layers"),
        ({"attention__head_count_kv": [0, 2]}, "layer_types names 2 layers"),
        ({"attention__head_count_kv": [0, -2, 0]}, "head_count_kv"),
        ({"shortconv__l_cache": 0}, "shortconv.l_cache"),
    ):
        with pytest.raises(ValueError, match=message):
            read(**changes)
    with pytest.raises(FormatError, match="shortconv.l_cache: this key is missing"):
        read(shortconv__l_cache=None)
