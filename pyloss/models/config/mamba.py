"""`Mamba2`: the scan of some layers, read from either format and written to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyloss.checks.numbers import real, shown, whole
from pyloss.models.config.fields import FULL, MAMBA
from pyloss.models.config.values import FLAG, LIST, Kind, Values, checked, whole as whole_kind

#: Keys of config.json by the fields of `Mamba2`.
KEYS = {
    "heads": "mamba_n_heads",
    "groups": "mamba_n_groups",
    "state": "mamba_d_state",
    "taps": "mamba_d_conv",
    "conv_bias": "mamba_conv_bias",
    "proj_bias": "mamba_proj_bias",
}
_HEAD_DIM, _EXPAND, _LIMITS = "mamba_d_head", "mamba_expand", "time_step_limit"
#: GGUF's architecture of models with such layers, and its keys; heads have ssm.inner_size together.
GGUF_ARCHITECTURE = "granitehybrid"
_GGUF_KEYS = {
    "heads": "ssm.time_step_rank",
    "groups": "ssm.group_count",
    "state": "ssm.state_size",
    "taps": "ssm.conv_kernel",
}
_GGUF_INNER = "ssm.inner_size"
GGUF_KINDS: dict[str, Kind] = {key: whole_kind(1) for key in (*_GGUF_KEYS.values(), _GGUF_INNER)}
_OTHER_NAMES = {"attention": FULL, "linear_attention": MAMBA}


@dataclass
class Mamba2:
    """The heads of layers of type "mamba".

    Attributes:
        heads, head_dim: heads of values, and the size of each.
        groups, state: groups of heads that share keys and queries, and the size of these.
        taps: rows that the convolution before the scan sees.
        conv_bias, proj_bias: whether the convolution has a bias, and whether the projections have.
        limits: the least and the largest time step.

    Raises:
        ValueError: numbers that do not fit together.
    """

    heads: int = 128
    head_dim: int = 64
    groups: int = 1
    state: int = 256
    taps: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    limits: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        for field, key in (("head_dim", _HEAD_DIM), *KEYS.items()):
            if not field.endswith("_bias"):
                whole(getattr(self, field), key, 1, 1 << 16)
        if self.heads % self.groups:
            raise ValueError(
                f"{KEYS['heads']} {self.heads} is not a multiple of {KEYS['groups']} {self.groups}"
            )
        low, high = self.limits
        if not 0 <= low <= high:
            raise ValueError(f"{_LIMITS} must be two numbers from 0 on, got {low}, {high}")

    @property
    def inner(self) -> int:
        """How many columns all heads have together."""
        return self.heads * self.head_dim

    @property
    def columns(self) -> int:
        """How many columns values, keys and queries have together."""
        return self.inner + 2 * self.groups * self.state

    def check_hidden(self, hidden_size: int) -> None:
        """Raises ValueError if the heads are no whole multiple of the model's width."""
        if self.inner % hidden_size:
            raise ValueError(
                f"{KEYS['heads']} {self.heads} heads of {self.head_dim} are no multiple of "
                f"hidden_size {hidden_size}"
            )

    def to_hf(self, hidden_size: int) -> dict[str, Any]:
        """The keys of config.json."""
        content = {key: getattr(self, field) for field, key in KEYS.items()}
        content |= {_HEAD_DIM: self.head_dim, _EXPAND: self.inner // hidden_size}
        content["mamba_chunk_size"] = 256  # of kernels; changes no result
        return content | ({_LIMITS: list(self.limits)} if self.limits != (0, math.inf) else {})

    def to_gguf(self, hidden_size: int) -> dict[str, Any]:
        """The metadata, without the architecture's name.

        Raises ValueError for what llama.cpp does not have.
        """
        if self.inner != 2 * hidden_size:
            raise ValueError(
                f"{_EXPAND} {self.inner // hidden_size} cannot be written: llama.cpp takes 2"
            )
        if self.proj_bias:
            raise ValueError(f"{KEYS['proj_bias']} cannot be written: llama.cpp does not have it")
        if self.limits != (0, math.inf):
            low, high = self.limits
            raise ValueError(
                f"{_LIMITS} {low:g}, {high:g} cannot be written: llama.cpp does not have it"
            )
        sizes = {key: getattr(self, field) for field, key in _GGUF_KEYS.items()}
        return {**sizes, _GGUF_INNER: self.inner}


def read_gguf_mamba(read: Values, conv_bias: bool) -> Mamba2:
    """The sizes of layers of type "mamba" in GGUF's metadata."""
    sizes = {field: read[key] for field, key in _GGUF_KEYS.items()}
    if read[_GGUF_INNER] % sizes["heads"]:
        raise read.wrong(_GGUF_INNER, f"{sizes['heads']} heads do not divide {read[_GGUF_INNER]}")
    head_dim = read[_GGUF_INNER] // sizes["heads"]
    return checked(read.path, Mamba2, head_dim=head_dim, conv_bias=conv_bias, **sizes)


def read_hf_types(read: Values) -> list[str] | None:
    """The types of layers of a config.json in `fields`' names; None if all have attention.

    Raises ValueError for layers of another kind.
    """
    types = read["layers_block_type"] if read["layer_types"] is None else read["layer_types"]
    layers = read["num_hidden_layers"]
    types = [MAMBA] * layers if types is None else types
    named = [_OTHER_NAMES.get(kind, kind) if type(kind) is str else kind for kind in types]
    others = [kind for kind in named if kind not in (FULL, MAMBA)]
    if others:
        raise ValueError(
            f"{read.path}: layers of type {shown(others[0])} are not supported; "
            f"supported are those of types 'attention' and '{MAMBA}'"
        )
    if len(named) != layers:
        raise read.wrong(
            "layer_types",
            f"it names {len(named)} layers, and num_hidden_layers is {layers}",
        )
    return named if MAMBA in named else None


def read_hf_mamba(read: Values, content: Mapping[str, Any]) -> Mamba2:
    """The sizes of layers of type "mamba" in the `content` of a config.json."""
    kinds: dict[str, Kind] = {
        key: FLAG if field.endswith("_bias") else whole_kind(1) for field, key in KEYS.items()
    }
    kinds |= {_HEAD_DIM: _size, _EXPAND: whole_kind(1), _LIMITS: _limits}
    own = Mamba2()
    defaults = {key: getattr(own, field) for field, key in KEYS.items()}
    defaults |= {_HEAD_DIM: "auto", _EXPAND: 2, _LIMITS: own.limits}
    found = Values(read.path, content, kinds, defaults)
    heads, inner = found[KEYS["heads"]], found[_EXPAND] * read["hidden_size"]
    size = inner // heads if found[_HEAD_DIM] == "auto" else found[_HEAD_DIM]
    if heads * size != inner:
        raise read.wrong(
            KEYS["heads"],
            f"{heads} heads of {size} are not {_EXPAND} {found[_EXPAND]} times hidden_size "
            f"{read['hidden_size']}",
        )
    sizes = {field: found[key] for field, key in KEYS.items()}
    return checked(read.path, Mamba2, head_dim=size, limits=found[_LIMITS], **sizes)


def _size(value: Any) -> Any:
    return value if value == "auto" else whole(value, "the value", 1)


def _limits(value: Any) -> tuple[float, float]:
    """Two numbers; the second may be infinite, which transformers 5 writes as an object."""
    first, *rest = LIST(value) or [None]
    if len(rest) != 1:
        raise ValueError(f"it must be two numbers, got {shown(value)}")
    last = rest[0]
    if last in (math.inf, {"__float__": "Infinity"}):
        return real(first, "the value"), math.inf
    return real(first, "the value"), real(last, "the value")
