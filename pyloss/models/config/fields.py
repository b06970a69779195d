"""Shared by `ModelConfig` and the readers of files: defaults, ranges, the types of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyloss.checks.numbers import LARGEST

#: Values of `layer_types`: layers that see all tokens, and layers with a window.
FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")
#: Its further value in LFM2: layers with a short convolution in place of attention.
CONV = "conv"
#: And in Qwen3.5: layers with the gated delta rule in its place.
LINEAR = "linear_attention"
#: And in Granite 4: layers with the scan of Mamba-2.
MAMBA = "mamba"

#: transformers' values for missing keys of config.json, unless the family has its own.
DEFAULTS: Mapping[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

#: Caps of attention scores and of logits in some configurations, under the same keys in GGUF.
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")

#: Factors of activations in some configurations, with the names of their keys in GGUF.
MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}

# Far beyond any model. Counts size lists; windows and sizes are 32-bit integers in the kernels.
_LARGEST_SIZE = (1 << 31) - 1

#: The sizes of a model, which are at least 1, and the largest value that is accepted for each.
LIMITS = {
    "vocab_size": _LARGEST_SIZE,
    "hidden_size": _LARGEST_SIZE,
    "intermediate_size": _LARGEST_SIZE,
    "num_hidden_layers": 1 << 16,
    "num_attention_heads": _LARGEST_SIZE,
    "num_key_value_heads": _LARGEST_SIZE,
    "head_dim": 1 << 16,
    "max_position_embeddings": LARGEST,
    "sliding_window": _LARGEST_SIZE,
    "conv_L_cache": 1 << 16,
}


def head_size(hidden: int, heads: int) -> int:
    """head_dim if a file does not say it. Raises ValueError for sizes that do not divide."""
    if heads < 1 or hidden % heads:
        raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return hidden // heads


def rotated_layers(interval: int, layers: int) -> list[int]:
    """`no_rope_layers` of a file that gives only the interval: 0 for each interval-th layer."""
    return [int((i + 1) % interval != 0) for i in range(layers)]


def periodic_layers(period: int, layers: int) -> list[str]:
    """`layer_types` where each period-th layer has no window. Raises ValueError for period < 1."""
    if period < 1:
        raise ValueError(f"must be at least 1, got {period}")
    return [SLIDING if (i + 1) % period else FULL for i in range(layers)]
