"""`Gemma4`: what Gemma 4's decoder has beside others'; read from config.json and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown, whole as checked_whole
from pyloss.errors import FormatError
from pyloss.io.tensor_file import StoredTensor
from pyloss.models.config.fields import FULL, LIMITS, SLIDING
from pyloss.models.config.values import FLAG, OBJECT, TEXT, Kind, Values, checked, counts, whole

#: Keys of config.json that only this family has.
KEYS: dict[str, Kind] = {
    "global_head_dim": whole(1, LIMITS["head_dim"]),
    "num_global_key_value_heads": whole(1),
    "per_layer_config": OBJECT,
    "num_kv_shared_layers": whole(0, LIMITS["num_hidden_layers"]),
    "hidden_size_per_layer_input": whole(0),
    "vocab_size_per_layer_input": whole(0),
    "use_double_wide_mlp": FLAG,
    "attention_k_eq_v": FLAG,
    "top_k_experts": whole(1),
    "enable_moe_block": FLAG,
    "use_bidirectional_attention": TEXT,
}
#: transformers' values where these keys are missing.
DEFAULTS = {
    "global_head_dim": 512,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
    "use_double_wide_mlp": False,
}


@dataclass
class Gemma4:
    """The options of Gemma 4, in Hugging Face's names.

    Attributes:
        global_head_dim: the size of a head in layers without a window.
        num_kv_shared_layers: so many last layers have no keys and values: each takes those of the
            last layer before them that is of its type.
        use_double_wide_mlp: the MLPs of these layers are twice as wide.
        hidden_size_per_layer_input: the width of each layer's own embedding of a token; 0: there
            are none.
        vocab_size_per_layer_input: the rows of the table of these embeddings.
        attention_k_eq_v: in layers without a window the keys, before their norm, are values too.
        num_global_key_value_heads: the heads of keys in these layers; None: as in others.
        num_experts: of each layer, beside its MLP; 0: there are none.
        top_k_experts: experts that a token visits.
        moe_intermediate_size: an expert's inner size.

    Raises:
        ValueError: numbers that are no sizes.
    """

    global_head_dim: int
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    attention_k_eq_v: bool = False
    num_global_key_value_heads: int | None = None
    num_experts: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0

    def __post_init__(self) -> None:
        if self.num_experts and not (
            1 <= self.top_k_experts <= self.num_experts and self.moe_intermediate_size >= 1
        ):
            raise ValueError(
                f"a token cannot visit {self.top_k_experts} of {self.num_experts} experts of size "
                f"{self.moe_intermediate_size}"
            )
        checked_whole(self.global_head_dim, "global_head_dim", 1, LIMITS["head_dim"])
        if self.global_head_dim % 2:
            raise ValueError(f"global_head_dim must be even, got {self.global_head_dim}")
        for name in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
            checked_whole(getattr(self, name), name, 0)
        least = 1 if self.hidden_size_per_layer_input else 0
        checked_whole(self.vocab_size_per_layer_input, "vocab_size_per_layer_input", least)

    def check_layers(self, types: list[str] | None, layers: int) -> None:
        """Raises ValueError if layers share keys that no layer before them makes."""
        first = layers - self.num_kv_shared_layers
        if first < 1:
            raise ValueError(
                f"num_kv_shared_layers {self.num_kv_shared_layers} leaves no layer of "
                f"{layers} that makes keys and values"
            )
        if types is None:
            return
        for i, kind in enumerate(types[first:], first):
            if kind not in types[:first]:
                raise ValueError(
                    f"layer {i} shares keys and values of type {kind}, and none of the layers "
                    f"before layer {first} is of this type"
                )

    def to_gguf(self, head_dim: int, inner: list[int]) -> dict[str, Any]:
        """The metadata, without the architecture's name, for MLPs of the sizes `inner`."""
        return {
            "feed_forward_length": inner,
            "attention.key_length": self.global_head_dim,
            "attention.value_length": self.global_head_dim,
            "attention.key_length_swa": head_dim,
            "attention.value_length_swa": head_dim,
            "attention.shared_kv_layers": self.num_kv_shared_layers,
            "embedding_length_per_layer_input": self.hidden_size_per_layer_input,
            "rope.dimension_count": self.global_head_dim,
            "rope.dimension_count_swa": head_dim,
            **(self._experts_in_gguf() if self.num_experts else {}),
        }

    def _experts_in_gguf(self) -> dict[str, Any]:
        return {
            "expert_count": self.num_experts,
            "expert_used_count": self.top_k_experts,
            "expert_feed_forward_length": self.moe_intermediate_size,
        }

    def to_hf(self) -> dict[str, Any]:
        """The keys of config.json."""
        return {
            "global_head_dim": self.global_head_dim,
            "num_kv_shared_layers": self.num_kv_shared_layers,
            "use_double_wide_mlp": self.use_double_wide_mlp,
            "hidden_size_per_layer_input": self.hidden_size_per_layer_input,
            "vocab_size_per_layer_input": self.vocab_size_per_layer_input,
            "attention_k_eq_v": self.attention_k_eq_v,
            "num_global_key_value_heads": self.num_global_key_value_heads,
            "enable_moe_block": self.num_experts > 0,
            "num_experts": self.num_experts or None,
            "top_k_experts": self.top_k_experts or None,
            "moe_intermediate_size": self.moe_intermediate_size or None,
        }


#: Keys of GGUF's metadata, without the architecture's name, that this family has or has lists of.
GGUF_KEYS: dict[str, Kind] = {
    "feed_forward_length": counts,
    "attention.head_count_kv": counts,
    "attention.key_length_swa": whole(1),
    "attention.value_length_swa": whole(1),
    "attention.shared_kv_layers": whole(0, LIMITS["num_hidden_layers"]),
    "embedding_length_per_layer_input": whole(0),
    "rope.dimension_count_swa": whole(1),
    "expert_used_count": whole(1),
    "expert_feed_forward_length": whole(1),
}


def read_hf_gemma4(read: Values, types: list[str] | None) -> Gemma4:
    """The options in a config.json whose layers have these types (None: all have a window).

    Raises ValueError for options that pyloss lacks, FormatError for values that do not fit.
    """
    experts = ("num_experts", "top_k_experts", "moe_intermediate_size")
    mixture = {name: read[name] for name in experts} if read["enable_moe_block"] else {}
    if None in mixture.values():
        missing = next(name for name, value in mixture.items() if value is None)
        raise read.wrong(missing, "this key is missing, and enable_moe_block is true")
    global_head_dim, global_heads = _global_heads(read, types)
    both_ways = read["use_bidirectional_attention"]
    if both_ways not in (None, "vision"):  # "vision": between parts of an image
        raise read.unsupported(f"use_bidirectional_attention {shown(both_ways)}", "null")
    return checked(
        read.path,
        Gemma4,
        global_head_dim=global_head_dim,
        num_global_key_value_heads=global_heads,
        attention_k_eq_v=bool(read["attention_k_eq_v"]),
        **mixture,
        num_kv_shared_layers=read["num_kv_shared_layers"],
        use_double_wide_mlp=read["use_double_wide_mlp"],
        hidden_size_per_layer_input=read["hidden_size_per_layer_input"],
        vocab_size_per_layer_input=read["vocab_size_per_layer_input"],
    )


def _global_heads(read: Values, types: list[str] | None) -> tuple[int, int | None]:
    """The size of heads in layers without a window, and the number of those of keys.

    As transformers writes them: per layer, where global_head_dim is not said.
    """
    layers: dict[str, Any] = read["per_layer_config"] or {}
    if not layers:
        heads = read["num_global_key_value_heads"] if read["attention_k_eq_v"] else None
        return read["global_head_dim"], heads
    full = [i for i, kind in enumerate(types or ()) if kind == FULL]
    named = sorted(int(name) if name.isdecimal() else -1 for name in layers)  # "04" and "4"
    first = next(iter(layers.values()))
    keys = {"head_dim", "num_key_value_heads"}
    known = isinstance(first, dict) and "head_dim" in first and set(first) <= keys
    numbers = known and all(type(value) is int for value in first.values())
    if named != full or not numbers or any(value != first for value in layers.values()):
        reason = f"must give all layers of type {FULL} one head_dim, got {shown(layers)}"
        raise read.wrong("per_layer_config", reason)
    return int(first["head_dim"]), first.get("num_key_value_heads")


def read_gguf_gemma4(
    read: Values, tensors: Mapping[str, StoredTensor], types: list[str] | None
) -> dict[str, Any]:
    """The fields of `ModelConfig` that GGUF has in other places for this family.

    `tensors` tell the share of heads that rotates and the rows of the layers' embeddings.
    Raises ValueError for sizes that differ from layer to layer in other ways, FormatError for
    factors of other rotations.
    """
    layers, dims = read["block_count"], read["attention.key_length"]
    heads, widths = read["attention.head_count_kv"], read["feed_forward_length"]
    size = read["embedding_length_per_layer_input"] or 0
    shared = read["attention.shared_kv_layers"] or 0
    kinds = types or [SLIDING] * layers
    of_kind = _heads_by_kind(read, heads, kinds)
    keyed = [i for i in range(layers) if f"blk.{i}.attn_k.weight" in tensors]
    k_eq_v = any(kinds[i] == FULL and f"blk.{i}.attn_v.weight" not in tensors for i in keyed)
    each = widths if isinstance(widths, list) else [widths] * layers
    wide = bool(shared) and each[-1] == 2 * each[0]
    if each != [each[0]] * (layers - shared) + [each[0] * (2 if wide else 1)] * shared:
        name = f"{read.prefix}feed_forward_length {shown(widths)}"
        raise read.unsupported(name, "one size, and twice it in layers that share keys")
    if dims is None:
        raise read.wrong("attention.key_length", "this key is missing")
    small = read["attention.key_length_swa"] or dims
    for key in ("attention.value_length_swa", "rope.dimension_count_swa"):
        if read[key] not in (None, small):
            raise read.unsupported(f"{read.prefix}{key} {read[key]}", f"{small}, as of keys")
    table = tensors.get("per_layer_token_embd.weight")
    if size and table is None:
        raise FormatError(read.path, "per_layer_token_embd.weight", "this tensor is missing")
    return {
        "intermediate_size": each[0],
        "num_key_value_heads": of_kind.get(SLIDING, of_kind.get(FULL)),
        "head_dim": small,
        "rope_scaling": _proportional(read, tensors.get("rope_freqs.weight"), dims),
        "gemma4": checked(
            read.path,
            Gemma4,
            global_head_dim=dims,
            num_kv_shared_layers=shared,
            use_double_wide_mlp=wide,
            hidden_size_per_layer_input=size,
            vocab_size_per_layer_input=table.shape[0] if table is not None and size else 0,
            attention_k_eq_v=k_eq_v,
            num_global_key_value_heads=None if len(set(of_kind.values())) < 2 else of_kind[FULL],
            num_experts=read["expert_count"] or 0,
            top_k_experts=read["expert_used_count"] or 0,
            moe_intermediate_size=read["expert_feed_forward_length"] or 0,
        ),
    }


def _heads_by_kind(read: Values, heads: Any, types: list[str]) -> dict[str, int]:
    """The heads of keys of each type of layer. Raises ValueError for several of one type."""
    each = (
        heads if isinstance(heads, list) else [heads or read["attention.head_count"]] * len(types)
    )
    found: dict[str, int] = {}
    for kind, count in zip(types, each, strict=False):
        if found.setdefault(kind, count) != count:
            name = f"{read.prefix}attention.head_count_kv {shown(heads)}"
            raise read.unsupported(name, "one number for each type of layer")
    return found


# llama.cpp's divisor of the frequencies of pairs that do not rotate.
_STILL = 1e30


def rotary_divisors(scaling: Mapping[str, Any] | None, head_dim: int) -> np.ndarray:
    """The tensor rope_freqs.weight of layers without a window, float32 [head_dim / 2]."""
    factor = scaling["partial_rotary_factor"] if scaling else 1.0
    divisors = np.full(head_dim // 2, _STILL, np.float32)
    divisors[: int(factor * head_dim // 2)] = 1
    return divisors


def _proportional(read: Values, stored: StoredTensor | None, dims: int) -> dict[str, Any] | None:
    """rope_scaling of layers without a window; None if whole heads rotate, as without `stored`."""
    if stored is None:
        return None
    divisors = stored.array()
    rotating = int((divisors == 1).sum())
    scaling = {"rope_type": "proportional", "partial_rotary_factor": 2 * rotating / dims}
    if not rotating or not np.array_equal(divisors, rotary_divisors(scaling, dims)):
        raise FormatError(
            read.path,
            stored.name,
            "these are not the rotary factors of Gemma 4: 1 for the pairs that rotate, and 1e30",
        )
    return scaling
