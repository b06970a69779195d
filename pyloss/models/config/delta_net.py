"""`DeltaNet`: the gated delta rule of some layers, read from either format and written to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss.checks.numbers import whole
from pyloss.models.config.families import Family
from pyloss.models.config.fields import FULL, LINEAR
from pyloss.models.config.values import Kind, Values, checked, whole as whole_kind

#: Keys of config.json by the fields of `DeltaNet`.
KEYS = {
    "keys": "linear_num_key_heads",
    "values": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "taps": "linear_conv_kernel_dim",
}
#: Keys of GGUF; the values' heads have ssm.inner_size together.
GGUF_KEYS = {
    "keys": "ssm.group_count",
    "values": "ssm.time_step_rank",
    "key_dim": "ssm.state_size",
    "taps": "ssm.conv_kernel",
}
GGUF_INNER, GGUF_INTERVAL = "ssm.inner_size", "full_attention_interval"
GGUF_KINDS: dict[str, Kind] = {
    key: whole_kind(1) for key in (*GGUF_KEYS.values(), GGUF_INNER, GGUF_INTERVAL)
}


@dataclass
class DeltaNet:
    """The heads of layers of type "linear_attention".

    Attributes:
        keys, values: heads of queries and keys, and of values, which share those in runs.
        key_dim, value_dim: their sizes.
        taps: rows that the convolution before them sees.

    Raises:
        ValueError: numbers that do not fit together.
    """

    keys: int = 16
    values: int = 32
    key_dim: int = 128
    value_dim: int = 128
    taps: int = 4

    def __post_init__(self) -> None:
        for field, key in KEYS.items():
            whole(getattr(self, field), key, 1, 1 << 16)
        if self.values % self.keys:
            raise ValueError(
                f"{KEYS['values']} {self.values} is not a multiple of {KEYS['keys']} {self.keys}"
            )

    @property
    def columns(self) -> int:
        """How many columns queries, keys and values have together."""
        return 2 * self.keys * self.key_dim + self.values * self.value_dim

    def to_hf(self, types: list[str]) -> dict[str, Any]:
        """The keys of config.json for these `layer_types`; mlx-lm reads only the interval."""
        sizes = {key: getattr(self, field) for field, key in KEYS.items()}
        return sizes | {"full_attention_interval": interval_of(types)}

    def to_gguf(self, types: list[str]) -> dict[str, Any]:
        """The metadata, without the architecture's name, for these `layer_types`.

        Raises ValueError for what GGUF cannot describe.
        """
        if self.key_dim != self.value_dim:
            raise ValueError(
                f"{KEYS['value_dim']} {self.value_dim} cannot be written: llama.cpp needs that of "
                f"keys, {self.key_dim}"
            )
        interval = interval_of(types)
        if interval is None:
            raise ValueError(
                "llama.cpp reads layer_types that repeat with one full_attention at the end, "
                f"got {types}"
            )
        return {
            **{key: getattr(self, field) for field, key in GGUF_KEYS.items()},
            GGUF_INNER: self.values * self.value_dim,
            GGUF_INTERVAL: interval,
        }

    def fused_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of queries, keys and values in in_proj_qkvz, and those of the gate.

        It has those of one head of keys after those of another.
        """
        shared = self.values // self.keys * self.value_dim
        each = self.key_dim, self.key_dim, shared, shared
        rows = np.arange(self.keys * sum(each)).reshape(self.keys, -1)
        q, k, v, z = (part.reshape(-1) for part in np.split(rows, np.cumsum(each)[:-1], axis=1))
        return np.concatenate([q, k, v]), z

    def gguf_rows(self, tensor: str) -> np.ndarray | None:
        """The row at each place of a tensor of GGUF; None: they are in order.

        llama.cpp has the first head of values of each head of keys first, then their second ones.
        """
        part = _part_of(tensor)
        if self.keys == self.values or part not in _ROWS:
            return None
        if part not in ("in_proj_qkv", "conv1d"):
            return self._places(self.value_dim if part == "in_proj_z" else 1)
        first = 2 * self.keys * self.key_dim
        return np.concatenate([np.arange(first), first + self._places(self.value_dim)])

    def gguf_columns(self, tensor: str) -> np.ndarray | None:
        """The column at each place of a tensor of GGUF; None: they are in order."""
        if self.keys == self.values or _part_of(tensor) != "out_proj":
            return None
        return self._places(self.value_dim).astype(np.int32)

    def _places(self, size: int) -> np.ndarray:
        heads = np.arange(self.values).reshape(self.keys, -1).T.reshape(-1, 1)
        return (heads * size + np.arange(size)).reshape(-1)


# The tensors of a layer that have rows for each head of values.
_ROWS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "A_log", "dt_bias")


def _part_of(tensor: str) -> str:
    """What follows linear_attn in the name of a tensor."""
    return tensor.rpartition(".linear_attn.")[2].split(".")[0]


def periodic_types(interval: int, layers: int) -> list[str]:
    """`layer_types` where each interval-th layer has full attention."""
    return [LINEAR if (i + 1) % interval else FULL for i in range(layers)]


def interval_of(types: list[str]) -> int | None:
    """The interval that `periodic_types` makes these of, or None."""
    interval = types.index(FULL) + 1 if FULL in types else len(types) + 1
    return interval if types == periodic_types(interval, len(types)) else None


def mrope_sections(pairs: int) -> list[int]:
    """How many rotary pairs follow time, rows and columns of images; text has only one position."""
    return [(pairs + 2 - i) // 3 for i in range(3)]


def read_hf_delta(read: Values, family: Family) -> dict[str, Any]:
    """`delta` and layer_types of a config.json; nothing for a family without them."""
    if not family.linear_attention:
        return {}
    types = read["layer_types"]
    if types is None:
        types = periodic_types(read["full_attention_interval"], read["num_hidden_layers"])
    sizes = {field: read[key] for field, key in KEYS.items()}
    return {"delta": checked(read.path, DeltaNet, **sizes), "layer_types": types}


def read_gguf_delta(read: Values, family: Family) -> dict[str, Any]:
    """The same of GGUF's metadata."""
    if not family.linear_attention:
        return {}
    sizes = {field: read[key] for field, key in GGUF_KEYS.items()}
    if read[GGUF_INNER] % sizes["values"]:
        raise read.wrong(GGUF_INNER, f"{sizes['values']} heads do not divide {read[GGUF_INNER]}")
    sizes["value_dim"] = read[GGUF_INNER] // sizes["values"]
    types = periodic_types(read[GGUF_INTERVAL], read["block_count"])
    return {"delta": checked(read.path, DeltaNet, **sizes), "layer_types": types}
