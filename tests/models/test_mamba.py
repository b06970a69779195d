"""Granite 4's Mamba layers: the scan in place of attention."""

import json

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
from tiny import TOKENS, byte_tokenizer

import pyloss
from pyloss import FormatError
from pyloss.models.config import ModelConfig
from pyloss.models.config.mamba import Mamba2
from pyloss.models.files.gguf_writer import write_gguf
from pyloss.models.synthetic import random_model

TYPES = ["mamba", "full_attention", "mamba", "mamba"]
SIZES = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "residual_multiplier": 0.5,
}


def model(sizes=(4, 12, 2, 8, 4), seed=0, **changes):
    values = {**SIZES, "layer_types": TYPES, "mamba": Mamba2(*sizes), **changes}
    values["no_rope_layers"] = [0] * values["num_hidden_layers"]
    net = random_model(ModelConfig("granitemoehybrid", **values))
    rng = np.random.default_rng(seed)
    for layer in net.layers:
        if layer.self_attn.taps:
            mixer = layer.mamba
            mixer.conv1d.weight[...] = rng.standard_normal(mixer.conv1d.weight.shape) / 2
            for array in (mixer.A_log, mixer.dt_bias, mixer.D):
                array[...] = rng.standard_normal(array.shape)
    return net


def adapted(net, rank=3):
    """LoRA over all linear layers, with the scan's own parameters trained."""
    with_lora(net, rank)
    for layer in net.layers:
        if layer.self_attn.taps:
            layer.mamba.conv1d.unfreeze()
            layer.mamba.norm.unfreeze()
            layer.mamba.unfreeze(recurse=False)
    return net


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_a_model_in_float64(groups):
    small = {
        "vocab_size": 11, "hidden_size": 6, "intermediate_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 2, "layer_types": TYPES[:2],
    }  # fmt: skip
    net = adapted(model((2, 6, groups, 3, 3), **small), rank=1)
    names = net.trainable_parameters()
    for part in ("in_proj.lora_a", "out_proj.lora_b", "conv1d.weight", "conv1d.bias", "norm.weight", "A_log", "dt_bias", "D"):  # fmt: skip
        assert f"model.layers.0.mamba.{part}" in names
    assert "model.layers.1.self_attn.q_proj.lora_a" in names
    tokens = np.random.default_rng(1).integers(0, 11, 8).astype(np.int32)
    offsets = np.array([0, 3, 4, 8], np.int32)
    assert gradient_error(net, tokens, offsets) < 1e-6


def test_packed_sequences_do_not_see_each_other():
    """Also sequences that are shorter than the convolution, whose bits are those of each alone."""

    def scan(rows, rng):
        sizes = {"x": 20, "dt": 4, "g": 4, "b": 16, "c": 16}
        arrays = [rng.standard_normal((rows, n)).astype(np.float32) for n in sizes.values()]
        arrays[1:3] = np.abs(arrays[1]), -np.abs(arrays[2])
        return arrays, lambda *given: pyloss.ops.state_scan(*given, 8)

    packed_as_alone(model(), (1, 2, 3, 9, 1, 130), scan, 2e-5)


def test_checkpointed_layers_have_the_same_gradients():
    same_when_checkpointed(adapted(model()), 70)


def test_a_long_prompt_in_parts_and_one_token_at_a_time():
    same_through_the_cache(model((3, 16, 1, 16, 5)))


def test_configurations():
    def made(**changes):
        return ModelConfig("granitemoehybrid", **{**SIZES, **changes})

    assert made().layer_types is None
    assert made(layer_types=["full_attention"] * 4, mamba=Mamba2(4, 12)) == made()
    for changes, message in (
        ({"layer_types": ["conv"] * 4}, "must be of full_attention, mamba, got"),
        ({"layer_types": TYPES[:3]}, "layer_types names 3 layers"),
        ({"layer_types": TYPES}, "layers of type mamba need their sizes"),
        ({"layer_types": TYPES, "mamba": Mamba2(4, 7)}, "4 heads of 7 are no multiple of hidden"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**changes)
    with pytest.raises(ValueError, match="mamba_n_heads 3 is not a multiple of mamba_n_groups 2"):
        Mamba2(3, 16, 2)
    with pytest.raises(ValueError, match="mamba_d_conv is 0"):
        Mamba2(taps=0)
    with pytest.raises(ValueError, match="time_step_limit must be two numbers from 0 on"):
        Mamba2(limits=(2.0, 1.0))


def test_config_json(tmp_path):
    own = ModelConfig(
        "granitemoehybrid",
        **SIZES,
        layer_types=TYPES,
        mamba=Mamba2(4, 12, 2, 8, 3, False, True, (0.01, 2.0)),
    ).to_hf()

    def read(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**own, **changes}))
        return ModelConfig.from_hf(tmp_path / "config.json")

    assert read().mamba == Mamba2(4, 12, 2, 8, 3, False, True, (0.01, 2.0))
    assert read(mamba_d_head="auto") == read()
    assert (
        read(layer_types=["linear_attention" if kind == "mamba" else kind for kind in TYPES])
        == read()
    )
    for infinite in (float("inf"), {"__float__": "Infinity"}):
        assert read(time_step_limit=[0.5, infinite]).mamba.limits == (0.5, float("inf"))
    for changes, message in (
        ({"mamba_n_heads": 5}, "mamba_n_heads: 5 heads of 12 are not mamba_expand 2 times hidden"),
        ({"mamba_d_state": 0}, "mamba_d_state"),
        ({"time_step_limit": [1.0]}, "time_step_limit.*it must be two numbers"),
        ({"time_step_limit": [-1.0, 1.0]}, "two numbers from 0 on"),
        ({"mamba_n_groups": 3}, "mamba_n_heads 4 is not a multiple of mamba_n_groups 3"),
        ({"layer_types": ["mamba"]}, "layer_types.*it names 1 layers"),
    ):
        with pytest.raises(FormatError, match=message):
            read(**changes)


def gguf(**changes):
    values = {
        "block_count": 3, "context_length": 128, "embedding_length": 24, "feed_forward_length": 40,
        "attention.head_count": 4, "attention.head_count_kv": [0, 2, 0], "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 6, "logit_scale": 1.0, "rope.scaling.finetuned": False, "ssm.conv_kernel": 4,
        "ssm.state_size": 8, "ssm.group_count": 1, "ssm.time_step_rank": 4, "ssm.inner_size": 48,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {
        "general.architecture": "granitehybrid",
        **{f"granitehybrid.{key}": value for key, value in values.items() if value is not None},
    }


def test_gguf():
    names = ("token_embd.weight", *(f"blk.{i}.attn_norm.weight" for i in range(3)))
    tensors = gguf_tensors()

    def read(more=(), **changes):
        held = {**tensors, **dict.fromkeys(more, tensors[names[0]])}
        return ModelConfig.from_gguf(gguf(**changes), held, "m.gguf")

    config = read()
    assert config.layer_types == ["mamba", "full_attention", "mamba"]
    assert config.mamba == Mamba2(4, 12, 1, 8, 4, False)
    assert config.num_key_value_heads == 2 and not config.rotated(1)
    assert read(rope__scaling__finetuned=None).rotated(1)
    assert read(["blk.0.ssm_conv1d.bias"]).mamba.conv_bias
    mixed = read(expert_count=4, expert_used_count=2, expert_shared_feed_forward_length=16)
    assert (mixed.mixture.count, mixed.mixture.shared_size, mixed.gguf) == (4, 16, "granitehybrid")
    for changes, message in (
        ({"ssm__inner_size": 50}, "ssm.inner_size.*4 heads do not divide 50"),
        ({"ssm__state_size": None}, "ssm.state_size: this key is missing"),
        ({"attention__head_count_kv": [0, 2, 1]}, "0 or one number for all layers"),
    ):
        with pytest.raises(ValueError, match=message):
            read(**changes)


def test_what_gguf_cannot_describe(tmp_path):
    for sizes, message in (
        ((4, 6, 2, 8, 4), "mamba_expand 1 cannot be written: llama.cpp takes 2"),
        ((4, 12, 2, 8, 4, True, True), "mamba_proj_bias cannot be written"),
        ((4, 12, 2, 8, 4, True, False, (0.1, 2.0)), "time_step_limit 0.1, 2 cannot be written"),
    ):
        with pytest.raises(ValueError, match=message):
            write_gguf(model(sizes, vocab_size=TOKENS), tmp_path / "m.gguf", byte_tokenizer())
