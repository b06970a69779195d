"""Configurations and rotary factors against transformers."""

import dataclasses
import json
import re

import numpy as np
import pytest
from rope_settings import llama3

transformers = pytest.importorskip("transformers", reason="compares with transformers")
pytest.importorskip("torch", reason="transformers computes rotary factors with it")

from pyloss.models.config.families import FAMILIES
from pyloss.models.config.mamba import Mamba2
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.config.rope_scaling import llama3_factors, rotary_frequencies

LLAMA3 = llama3(8.0)


MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0625,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA2 = {"query_pre_attn_scalar": 24, **SOFTCAPS}
GEMMA3 = {"rope_local_base_freq": 1e4, "query_pre_attn_scalar": 24}
PATTERN = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]


def rotary_bases(theirs):
    """rope_theta and rope_local_base_freq of transformers' configuration."""
    rope = theirs.rope_parameters
    if "full_attention" in rope:
        return rope["full_attention"]["rope_theta"], rope["sliding_attention"]["rope_theta"]
    return rope["rope_theta"], None


def windows_of(theirs):
    window = getattr(theirs, "sliding_window", None) or 0
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    return [window if kind == "sliding_attention" else 0 for kind in types]


def our_windows(config):
    """Those of attention."""
    mixed = [config.linear(i) or config.scanned(i) for i in range(config.num_hidden_layers)]
    return [0 if other else config.window(i) for i, other in enumerate(mixed)]


YARN = {**LLAMA3, "rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.2}
del YARN["low_freq_factor"], YARN["high_freq_factor"]


def make(**changes):
    values = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "eos_token_id": [2, 3],
        "tie_word_embeddings": True,
    }
    return ModelConfig(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"model_type": "mistral", "rope_theta": 1e6},
        {"rope_scaling": YARN},
        {"model_type": "qwen2", "rope_theta": 1e6, "head_dim": 16},
        {"model_type": "qwen3", "tie_word_embeddings": False, "attention_bias": True},
        {"model_type": "granite", "head_dim": 16, **MULTIPLIERS},
        {"model_type": "phi3", "head_dim": 16, "partial_rotary_factor": 1.0},
        {
            "model_type": "phi3",
            "head_dim": 16,
            "partial_rotary_factor": 0.75,
            "sliding_window": 262144,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.0, 1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
                "original_max_position_embeddings": 2048,
                "attention_factor": 1.25,
            },
        },
        {"model_type": "mistral", "sliding_window": 100},
        {
            "model_type": "qwen2",
            "head_dim": 16,
            "sliding_window": 100,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        {"model_type": "gemma2", **GEMMA2, "final_logit_softcapping": None},
        {
            "model_type": "gemma2",
            **GEMMA2,
            "sliding_window": 100,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {
            "model_type": "gemma3_text",
            **GEMMA3,
            "sliding_window": 100,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        {
            "model_type": "gemma3_text",
            **GEMMA3,
            "sliding_window": 100,
            "num_hidden_layers": 7,
            "layer_types": PATTERN,
        },
        {
            "model_type": "gemma3_text",
            **GEMMA3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {"model_type": "smollm3", "head_dim": 16, "no_rope_layers": [1, 0]},
        {
            "model_type": "smollm3",
            "head_dim": 16,
            "no_rope_layers": [0, 1],
            "sliding_window": 100,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"model_type": "ministral3", "rope_scaling": YARN, "llama_4_scaling_beta": 0.1},
        {"model_type": "ministral3", "sliding_window": 100},
        {"model_type": "granitemoehybrid", "head_dim": 16, **MULTIPLIERS},
        {"model_type": "granitemoehybrid", "head_dim": 16, "no_rope_layers": [0, 0], **MULTIPLIERS},
        {
            "model_type": "granitemoehybrid",
            "head_dim": 16,
            "no_rope_layers": [0, 0],
            "layer_types": ["mamba", "full_attention"],
            "mamba": Mamba2(8, 16, 2, 20, 3, False, True),
            **MULTIPLIERS,
        },
        {
            "model_type": "granitemoeshared",
            "head_dim": 16,
            "mixture": Mixture(4, 2, 96, True, shared_size=48),
            **MULTIPLIERS,
        },
        {"model_type": "olmo2", "head_dim": 16, "rope_scaling": YARN},
        {
            "model_type": "olmo3",
            "head_dim": 16,
            "sliding_window": 100,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": YARN,
        },
        {"model_type": "olmo3", "head_dim": 16, "rope_theta": 3e5, "rope_local_base_freq": 1e4},
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
    ],
)
def test_transformers_reads_ours_and_we_read_what_it_writes(tmp_path, changes):
    config = make(**changes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for name in (
        "vocab_size",
        "hidden_size",
        "head_dim",
        "num_key_value_heads",
        "tie_word_embeddings",
        "rms_norm_eps",
    ):
        assert getattr(theirs, name, config.head_dim) == getattr(config, name)
    assert rotary_bases(theirs) == (config.rope_theta, config.rope_local_base_freq)
    if config.partial_rotary_factor is not None:
        assert theirs.rope_parameters["partial_rotary_factor"] == config.partial_rotary_factor
        assert theirs.original_max_position_embeddings == (2048 if config.rope_scaling else 4096)
    assert windows_of(theirs) == our_windows(config)
    for name in ("query_pre_attn_scalar", *SOFTCAPS, *MULTIPLIERS):
        assert getattr(theirs, name, None) == getattr(config, name)
    theirs.save_pretrained(tmp_path)
    assert ModelConfig.from_hf(tmp_path / "config.json") == config


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_takes_for_missing_keys(tmp_path, name):
    content = {"model_type": name}
    numbers = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    content |= {key: getattr(make(), key) for key in numbers}
    (tmp_path / "config.json").write_text(json.dumps(content))
    ours, theirs = (
        ModelConfig.from_hf(tmp_path / "config.json"),
        transformers.AutoConfig.from_pretrained(tmp_path),
    )
    assert rotary_bases(theirs) == (ours.rope_theta, ours.rope_local_base_freq)
    assert windows_of(theirs) == our_windows(ours)
    for key in (*SOFTCAPS, *MULTIPLIERS):
        assert getattr(theirs, key, None) == getattr(ours, key)
    if ours.gemma4 is not None:
        kinds = {"sliding_attention": ours.window(0), "full_attention": 0}
        for kind, window in kinds.items():
            layer = theirs.per_layer_config[kind]
            assert layer.head_dim == ours.head_dim_of(window)
            assert layer.num_key_value_heads == ours.key_value_heads_of(window)
        by_layer = {"global_head_dim", "num_global_key_value_heads"}
        for key, value in dataclasses.asdict(ours.gemma4).items():
            assert key in by_layer or (getattr(theirs, key) or 0) == (value or 0)
        theirs = theirs.per_layer_config["sliding_attention"]
    for key in ("head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        other = "norm_eps" if key == "rms_norm_eps" else key
        said = getattr(theirs, key, getattr(theirs, other, None))
        assert (ours.hidden_size // ours.num_attention_heads if said is None else said) == getattr(
            ours, key
        ), key


@pytest.mark.parametrize("name", FAMILIES)
def test_families_have_the_names_of_other_libraries(name):
    gguf = pytest.importorskip("gguf")
    family = FAMILIES[name]
    assert transformers.AutoConfig.for_model(name).model_type == name
    assert hasattr(transformers, family.architecture)
    assert family.gguf in gguf.MODEL_ARCH_NAMES.values()


def test_llama3_factors(tmp_path):
    config = make(rope_scaling=LLAMA3)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    rope = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    inverse, _ = rope(theirs, device="cpu")
    plain = config.rope_theta ** (-np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(
        plain / llama3_factors(LLAMA3, config.rope_theta, 32), inverse.numpy(), rtol=1e-5
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 4096.0,
            }
        },
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
            "original_max_position_embeddings": 2048,
        },
        {"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 1e4}},
        {
            "rope_scaling": {
                key: value for key, value in LLAMA3.items() if not key.startswith("original")
            }
        },
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
)
def test_rotary_frequencies_of_whatever_is_left_out_or_said_twice(tmp_path, changes):
    content = {
        key: value
        for key, value in make(max_position_embeddings=8192).to_hf().items()
        if key != "rope_scaling"
    }
    (tmp_path / "config.json").write_text(json.dumps({**content, **changes}))
    ours, theirs = (
        ModelConfig.from_hf(tmp_path / "config.json"),
        transformers.AutoConfig.from_pretrained(tmp_path),
    )
    table = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    frequencies, scale = rotary_frequencies(ours.rope_theta, ours.head_dim, ours.rope_scaling)
    np.testing.assert_allclose(frequencies, table.inv_freq.numpy(), rtol=1e-5)
    assert scale == pytest.approx(table.attention_scaling)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("DeepseekV3Config", "latent attention (kv_lora_rank"),
        ("DeepseekV2Config", "latent attention (kv_lora_rank"),
        ("MambaConfig", "Mamba-1's selective scan"),
        ("JambaConfig", "Mamba-1's selective scan (mamba_dt_rank"),
        ("FalconH1Config", "Mamba-2 beside attention in one layer (mamba_d_ssm"),
        ("NemotronHConfig", "layers of a mixer or an MLP alone (layers_block_type"),
        ("RwkvConfig", "RWKV's time mixing (rescale_every"),
        ("RecurrentGemmaConfig", "the RG-LRU recurrence (lru_width"),
        ("Zamba2Config", "attention blocks shared between layers (hybrid_layer_ids"),
        ("GptOssConfig", "experts with a clamped gate"),
        ("GPTNeoXConfig", "attention and MLP side by side on one norm (use_parallel_residual"),
        ("FalconConfig", "attention and MLP side by side on one norm (parallel_attn"),
        ("Gemma3nTextConfig", "AltUp and LAuReL (altup_num_inputs"),
        ("Llama4TextConfig", "attention in chunks (attention_chunk_size"),
        ("StableLmConfig", "LayerNorm, which subtracts the mean (layer_norm_eps"),
        ("BertConfig", "attention in both directions (type_vocab_size"),
        ("BartConfig", "an encoder beside the decoder (encoder_layers"),
    ],
)
def test_a_family_that_is_unknown_is_refused_by_the_block_it_needs(tmp_path, name, block):
    """As transformers writes its configuration."""
    # Not the differences from the defaults, which may leave out the key.
    path = tmp_path / "config.json"
    path.write_text(getattr(transformers, name)().to_json_string(use_diff=False))
    with pytest.raises(ValueError, match=f"not supported: it needs {re.escape(block)}"):
        ModelConfig.from_hf(path)
