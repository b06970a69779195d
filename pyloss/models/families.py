"""`FAMILIES`: what is particular to each model family beyond its numbers, one record each.

`config` reads configurations by it, `building` and `transformer` have one place for each of its options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes where config.json lacks a key, unless that is `ModelConfig`'s own default."""


# A family with the same layers is one more record.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", gguf_interleaved=True),
    "mistral": Family(
        "MistralForCausalLM",
        "llama",
        gguf_interleaved=True,
        defaults={"sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, defaults={"max_position_embeddings": 32768}),
    "qwen3": Family(
        "Qwen3ForCausalLM", "qwen3", qk_norm="head", defaults={"head_dim": 128, "max_position_embeddings": 32768}
    ),
}
