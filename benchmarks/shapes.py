"""Shapes of published models as their config.json has them, for measurements over random weights.

`SHAPES` has whole models. `narrow` takes a few of the layers of a family, at their real width.
"""

from __future__ import annotations

import json
from typing import Any

from common import WORK


def _shape(
    architecture: str,
    model_type: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    vocabulary: int,
    **more: Any,
) -> dict[str, Any]:
    """A configuration; `heads` are those of queries and of keys."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **more,
    }


def _llama(*sizes: Any, **more: Any) -> dict[str, Any]:
    return _shape("LlamaForCausalLM", "llama", *sizes, hidden_act="silu", **more)


def _qwen3(*sizes: Any) -> dict[str, Any]:
    more = {"hidden_act": "silu", "attention_bias": False, "head_dim": 128}
    return _shape("Qwen3ForCausalLM", "qwen3", *sizes, max_position_embeddings=40960, **more)


def _lfm2(hidden: int, inner: int, heads: int) -> dict[str, Any]:
    attention = (2, 5, 8, 10, 12, 14)
    types = ["full_attention" if i in attention else "conv" for i in range(16)]
    more = {
        "layer_types": types,
        "block_ff_dim": inner,
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": 3,
        "conv_bias": False,
        "norm_eps": 1e-5,
    }
    return _shape("Lfm2ForCausalLM", "lfm2", hidden, inner, 16, (heads, 8), 65536, **more)


#: config.json of models by name
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _llama(576, 1536, 30, (9, 3), 49152),
    "LFM2-350M": _lfm2(1024, 4608, 16),
    "Qwen2.5-0.5B": _shape(
        "Qwen2ForCausalLM", "qwen2", 896, 4864, 24, (14, 2), 151936, hidden_act="silu"
    ),
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, (16, 8), 151936),
    "Qwen3.5-0.8B": _shape(
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        1024,
        3584,
        24,
        (8, 2),
        248320,
        hidden_act="silu",
        head_dim=256,
        layer_types=[*["linear_attention"] * 3, "full_attention"] * 6,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    ),
    "Gemma-3-1B": _shape(
        "Gemma3ForCausalLM",
        "gemma3_text",
        1152,
        6912,
        26,
        (4, 1),
        262144,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        sliding_window_pattern=6,
        rope_local_base_freq=10000.0,
        hidden_activation="gelu_pytorch_tanh",
    ),
    "LFM2-1.2B": _lfm2(2048, 8192, 32),
    "Llama-3.2-1B": _llama(2048, 8192, 16, (32, 8), 128256, head_dim=64),
    "OLMo-2-1B": _shape(
        "Olmo2ForCausalLM",
        "olmo2",
        2048,
        8192,
        16,
        (16, 16),
        100352,
        hidden_act="silu",
        tie_word_embeddings=False,
    ),
    "OLMoE-1B-7B": _shape(
        "OlmoeForCausalLM",
        "olmoe",
        2048,
        1024,
        16,
        (16, 16),
        50304,
        hidden_act="silu",
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        tie_word_embeddings=False,
    ),
    "SmolLM2-1.7B": _llama(2048, 8192, 24, (32, 32), 49152),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, (16, 8), 151936),
    "Granite-3.3-2B": _shape(
        "GraniteForCausalLM",
        "granite",
        2048,
        8192,
        40,
        (32, 8),
        49159,
        hidden_act="silu",
        embedding_multiplier=12.0,
        attention_multiplier=0.015625,
        residual_multiplier=0.22,
        logits_scaling=8.0,
    ),
    "Gemma-2-2B": _shape(
        "Gemma2ForCausalLM",
        "gemma2",
        2304,
        9216,
        26,
        (8, 4),
        256000,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        hidden_activation="gelu_pytorch_tanh",
    ),
    "Gemma-4-E2B": _shape(
        "Gemma4ForCausalLM",
        "gemma4_text",
        1536,
        6144,
        35,
        (8, 1),
        262144,
        head_dim=256,
        global_head_dim=512,
        hidden_activation="gelu_pytorch_tanh",
        layer_types=[*["sliding_attention"] * 4, "full_attention"] * 7,
        sliding_window=512,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=262144,
        final_logit_softcapping=30.0,
        rope_parameters={
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1e6,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "SmolLM3-3B": _shape(
        "SmolLM3ForCausalLM", "smollm3", 2048, 11008, 36, (16, 4), 128256, hidden_act="silu"
    ),
    "Phi-4-mini": _shape(
        "Phi3ForCausalLM",
        "phi3",
        3072,
        8192,
        32,
        (24, 8),
        200064,
        hidden_act="silu",
        partial_rotary_factor=0.75,
        original_max_position_embeddings=4096,
        pad_token_id=0,
    ),
    "Qwen3-4B": _qwen3(2560, 9728, 36, (32, 8), 151936),
}


def write(name: str, config: dict[str, Any]) -> str:
    """Writes a config.json; returns its path."""
    path = WORK / name / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return str(path)


def shape_file(name: str) -> str:
    """The config.json of a whole model."""
    return write(name, SHAPES[name])


def narrow(name: str, layers: int, vocabulary: int, **changes: Any) -> str:
    """The config.json of the first layers of a model, with a vocabulary of at most so many."""
    config = SHAPES[name] | changes
    config["num_hidden_layers"] = layers
    for key in {"vocab_size", "vocab_size_per_layer_input"} & config.keys():
        config[key] = min(config[key], vocabulary)
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    return write(f"{name}-{layers}", config)
