"""Keys of published configurations are accepted; keys that could change results are named."""

import json
import warnings

import pytest
from published_configs import GGUF, HF

from pyloss.io.tensor_file import StoredTensor
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.files.quantized import Quantization

TENSORS = {
    "token_embd.weight": StoredTensor("m.gguf", "token_embd.weight", "Q8_0", (49152, 576), None),
    "blk.47.attn_norm.weight": None,
}


def read(folder, content):
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Quantization(path, content)
        return ModelConfig.from_hf(path)


@pytest.mark.parametrize("name", HF)
def test_published_configurations_are_accepted_without_a_word(tmp_path, name):
    content = HF[name]
    config = read(tmp_path, content)
    assert config.hidden_size == {**content, **content.get("text_config", {})}["hidden_size"]


@pytest.mark.parametrize("name", GGUF)
def test_published_metadata_are_accepted_without_a_word(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ModelConfig.from_gguf(GGUF[name], TENSORS).num_hidden_layers == 30


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (
            "llama-2",
            {"logit_scale": 0.5},
            "logit_scale 0.5 is not supported; supported is null or 1",
        ),
        ("llama-2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("llama-2", {"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
        (
            "llama-2",
            {"rope_interleaved": True},
            "rope_interleaved True is not supported; supported is null or false",
        ),
        ("llama-2", {"num_local_experts": 8}, "num_local_experts 8 is not supported for llama"),
        (
            "llama-2",
            {"query_pre_attn_scalar": 144},
            "query_pre_attn_scalar 144 is not supported for llama",
        ),
        ("qwen2.5", {"use_mrope": True}, "use_mrope True"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("granite-3.1-2b", {"logit_scale": 8.0}, "logit_scale 8.0 is not supported"),
        ("phi-4-mini", {"full_attn_mod": 2}, "full_attn_mod 2 is not supported"),
        ("phi-4-mini", {"interpolate_factor": 2}, "interpolate_factor 2 is not supported"),
        ("phi-3.5-mini", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not"),
        (
            "llama-2",
            {"rope_scaling": HF["phi-3.5-mini"]["rope_scaling"]},
            "rope_type 'longrope' is not supported; supported are default, linear",
        ),
        ("lfm2", {"block_use_swiglu": False}, "block_use_swiglu False is not supported"),
        ("lfm2", {"use_pos_enc": False}, "use_pos_enc False is not supported"),
        (
            "lfm2",
            {"conv_dim": 1024},
            "conv_dim 1024 is not supported; it must be hidden_size, 2048",
        ),
        (
            "lfm2",
            {"num_heads": 16},
            "num_heads 16 is not supported; it must be num_attention_heads",
        ),
        ("lfm2", {"full_attn_idxs": [2, 16]}, "full_attn_idxs must be layers from 0 to 15"),
        ("lfm2", {"layer_types": ["conv"] * 15}, "layer_types names 15 layers"),
        (
            "lfm2",
            {"layer_types": ["sliding_attention"] * 16},
            "must be of full_attention, conv, got",
        ),
        ("lfm2", {"sliding_window": 64}, "sliding_window 64 for lfm2 is not supported"),
        ("lfm2", {"attention_bias": True}, "attention_bias is not supported for lfm2"),
        ("lfm2", {"conv_L_cache": 0}, "conv_L_cache: the value is 0"),
        ("lfm2", {"block_multiple_of": 0}, "block_multiple_of: the value is 0"),
        ("llama-2", {"conv_bias": True}, "conv_bias True is not supported for llama"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        (
            "llama-3.2",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor of rope_scaling 0.5",
        ),
        (
            "qwen2.5",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "mrope_section": [16, 24, 24]}},
            "'mrope_section' of rope_scaling is not supported",
        ),
        ("qwen3", {"layer_types": ["chunked_attention"] * 28}, "layer_types"),
        ("llama-2", {"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        (
            "mistral with a window",
            {"layer_types": ["sliding_attention", "full_attention"] * 16},
            "layer_types",
        ),
    ],
)
def test_what_would_change_results_is_refused_by_name(tmp_path, base, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, {**HF[base], **changes})


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 8192),
        ({"block_auto_adjust_ff_dim": False}, 12288),
        ({"block_ff_dim": 6656}, 4608),
        ({"block_ffn_dim_multiplier": 1.3}, 10752),
        ({"block_ffn_dim_multiplier": None, "block_ff_dim": 6656}, 4437),
        ({"block_multiple_of": 1000}, 9000),
        ({"block_ff_dim": None, "intermediate_size": 3000, "block_multiple_of": 1}, 2000),
    ],
)
def test_the_size_of_lfm2s_mlp(tmp_path, changes, size):
    config = read(tmp_path, {**HF["lfm2"], **changes})
    assert config.intermediate_size == size
    assert [i for i in range(16) if not config.convolved(i)] == [2, 5, 8, 10, 12, 14]
    content = config.to_hf()
    assert read(tmp_path, content) == config


def test_options_that_are_not_used_may_be_written_out(tmp_path):
    off = {
        "logit_scale": 1.0,
        "final_logit_softcapping": None,
        "num_experts": 0,
        "layer_types": ["full_attention"] * 32,
        "attention_multiplier": None,
    }
    assert read(tmp_path, {**HF["llama-2"], **off}) == read(tmp_path, HF["llama-2"])


def test_unknown_keys_are_named_and_nulls_are_none(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**HF["llama-2"], "frobnication": 2, "hyper_connections": [1], "other": None})
    )
    with pytest.warns(
        UserWarning,
        match=r"config.json: pyloss does not know and does not use: 'frobnication', 'hyper_connections'$",
    ):
        ModelConfig.from_hf(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "llama.attention.scale",
            0.25,
            "llama.attention.scale 0.25 is not supported; supported is 0",
        ),
        ("llama.logit_scale", 8.0, "llama.logit_scale 8.0 is not supported; supported is 0 or 1"),
        (
            "llama.attention.causal",
            False,
            "llama.attention.causal False is not supported; supported is true",
        ),
        ("llama.attention.value_length", 128, "value_length"),
        (
            "llama.rope.dimension_sections",
            [16, 24, 24],
            "dimension_sections .* is not known to pyloss, and might change results",
        ),
        ("llama.moe_every_n_layers", 2, "moe_every_n_layers 2 is not known"),
        ("llama.rope.scaling.yarn_log_multiplier", 0.1, "yarn_log_multiplier 0.1"),
        ("llama.pooling_type", 4, "pooling_type 4 is not supported"),
    ],
)
def test_metadata_that_would_change_results_are_refused_by_name(key, value, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_gguf({**GGUF["llama"], key: value}, TENSORS)


def test_embedding_models_have_the_decoder_of_others():
    """How llama.cpp makes one vector of a text's hidden states changes none of them."""
    plain = ModelConfig.from_gguf(GGUF["llama"], TENSORS)
    assert ModelConfig.from_gguf({**GGUF["llama"], "llama.pooling_type": 3}, TENSORS) == plain
