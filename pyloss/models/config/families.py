"""`FAMILIES`: what is particular to each model family beyond its numbers, one record each.

`config` reads configurations by it, `building` and `transformer` have one place for each of its options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Experts:
    """How a family has mixtures of experts in the place of MLPs."""

    block: str = "mlp"
    """The block's name in a decoder layer."""
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """What an expert's gate, up and down are called in Hugging Face's files."""
    own_size: bool = False
    """Experts have a size of their own, and some layers may have an MLP after all."""
    normalise: bool | None = None
    """Whether the weights of a token's experts are divided by their sum; None where norm_topk_prob says it."""
    gguf_normalise: bool = True
    """The same in llama.cpp, where files don't say it."""


@dataclass(frozen=True)
class Family:
    """The switches of a family, named in Hugging Face's config.json by its model_type."""

    architecture: str
    """The class transformers looks for."""
    gguf: str
    """GGUF's general.architecture."""
    gguf_interleaved: bool = False
    """GGUF has the rows of q and k with rotary pairs interleaved."""
    qkv_bias: bool = False
    """q, k and v always have biases, and o has none."""
    qk_norm: str | None = None
    """RMS norms of q and k before the rotation: "head" over each head, "width" over all of them together."""
    post_norms: bool = False
    """Norms after attention and after the MLP too, and other names of the norms."""
    norm_offset: float = 0.0
    """What norms add to their weight; GGUF has the sum."""
    activation: str = "silu"
    """Of the MLP's gate, in transformers' name."""
    experts: Experts | None = None
    """Present in families of mixtures of experts."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes where config.json lacks a key, unless that is `ModelConfig`'s own default.

    A family has windows, a second rotary base or a pattern of layers when its key (sliding_window, use_sliding_window,
    max_window_layers, sliding_window_pattern, rope_local_base_freq) is here.
    """


_QWEN = {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

# A family with the same layers is one more record.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", gguf_interleaved=True),
    "mistral": Family(
        "MistralForCausalLM",
        "llama",
        gguf_interleaved=True,
        defaults={"sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, defaults=_QWEN),
    "qwen3": Family(
        "Qwen3ForCausalLM", "qwen3", qk_norm="head", defaults={"head_dim": 128, **_QWEN}
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "llama",
        gguf_interleaved=True,
        experts=Experts("block_sparse_moe", ("w1", "w3", "w2"), normalise=True),
        defaults={
            "sliding_window": None,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        qk_norm="head",
        experts=Experts(own_size=True),
        defaults={
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        "olmoe",
        qk_norm="width",
        experts=Experts(gguf_normalise=False),
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "gemma3",
        qk_norm="head",
        post_norms=True,
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        scaled_embedding=True,
        # Published configurations rely on many of these.
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
        },
    ),
}
