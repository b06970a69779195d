"""Keys of LFM2's config.json that other families have under other names, or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pyloss.checks.numbers import shown
from pyloss.models.config.fields import CONV, FULL
from pyloss.models.config.values import FLAG, LIST, Values, real, whole

_KEYS = {
    "num_hidden_layers": whole(1, 1 << 16),
    "hidden_size": whole(1),
    "intermediate_size": whole(1),
    "num_attention_heads": whole(1),
    "norm_eps": real,
    "block_ff_dim": whole(1),
    "block_auto_adjust_ff_dim": FLAG,
    "block_ffn_dim_multiplier": real,
    "block_multiple_of": whole(1),
    "tie_embedding": FLAG,
    "full_attn_idxs": LIST,
    "layer_types": LIST,
    "block_dim": whole(1),
    "conv_dim": whole(1),
    "conv_dim_out": whole(1),
    "num_heads": whole(1),
}
#: Keys that `plain_keys` reads and no other reader.
READ = {key for key in _KEYS if key not in ("num_hidden_layers", "layer_types")} | {"rms_norm_eps"}
# Second names of sizes, which transformers ignores.
_SAME = {
    "block_dim": "hidden_size",
    "conv_dim": "hidden_size",
    "conv_dim_out": "hidden_size",
    "num_heads": "num_attention_heads",
}


def plain_keys(
    path: str | os.PathLike[str],
    content: Mapping[str, Any],
    defaults: Mapping[str, Any],
    adjusted: bool,
) -> dict[str, Any]:
    """`content` under the keys of other families, as transformers reads it.

    `adjusted`: intermediate_size follows from the keys that begin with "block_".

    Raises ValueError for keys that contradict each other, FormatError for values of a wrong type.
    """
    read = Values(
        path,
        content,
        _KEYS,
        {
            **dict.fromkeys(_KEYS),
            "norm_eps": defaults["rms_norm_eps"],
            "block_auto_adjust_ff_dim": True,
            "block_multiple_of": 256,
            **{key: defaults[key] for key in _KEYS if key in defaults},
        },
    )
    if "block_ffn_dim_multiplier" not in content:  # a null is none
        read["block_ffn_dim_multiplier"] = 1.0
    for second, first in _SAME.items():
        if read[second] not in (None, read[first]):
            raise ValueError(
                f"{path}: {second} {read[second]} is not supported; it must be {first}, "
                f"{read[first]}"
            )
    tie = read["tie_embedding"]
    found = {key: value for key, value in content.items() if key not in READ}
    return found | {
        "hidden_size": read["hidden_size"],
        "num_attention_heads": read["num_attention_heads"],
        "rms_norm_eps": read["norm_eps"],
        "intermediate_size": _inner_size(read) if adjusted else read["intermediate_size"],
        "layer_types": _layer_types(read),
        **({} if tie is None else {"tie_word_embeddings": tie}),
    }


def _inner_size(read: Values) -> int:
    size: int = read["intermediate_size"] if read["block_ff_dim"] is None else read["block_ff_dim"]
    if not read["block_auto_adjust_ff_dim"]:
        return size
    size, factor = int(2 * size / 3), read["block_ffn_dim_multiplier"]
    if factor is None:
        return size
    multiple = read["block_multiple_of"]
    return int(multiple * ((int(factor * size) + multiple - 1) // multiple))


def _layer_types(read: Values) -> list[str]:
    """As in transformers, layer_types count more than full_attn_idxs."""
    layers, types, full = read["num_hidden_layers"], read["layer_types"], read["full_attn_idxs"]
    if types is not None:
        return list(types)
    if full is None:
        return [FULL] * layers
    if any(type(i) is not int or not 0 <= i < layers for i in full):
        raise ValueError(
            f"{read.path}: full_attn_idxs must be layers from 0 to {layers - 1}, got {shown(full)}"
        )
    return [FULL if i in full else CONV for i in range(layers)]


def own_keys(content: Mapping[str, Any], adjusted: bool) -> dict[str, Any]:
    """The keys that transformers and mlx-lm read in place of some of `content`.

    `adjusted` as in `plain_keys`.
    """
    found = {key: value for key, value in content.items() if key not in ("rms_norm_eps",)}
    found["norm_eps"] = content["rms_norm_eps"]
    if not adjusted:
        return found
    types = content["layer_types"]
    return found | {
        "block_ff_dim": content["intermediate_size"],
        "block_dim": content["hidden_size"],
        "block_auto_adjust_ff_dim": False,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "full_attn_idxs": [i for i, kind in enumerate(types) if kind == FULL],
    }
