"""Stored weights of pyloss's layers as MLX's scripts use them.

A matrix of floats acts as an `mx.array`. One in MLX's affine format is its packed codes to MLX's
functions, and its layer has `scales`, `biases`, `group_size` and `bits`. Its `shape` is that of the
matrix, as everywhere in pyloss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss import nn
from pyloss.mlx.core.arrays import array, of
from pyloss.mlx.core.dtypes import uint32
from pyloss.mlx.core.quantized import SCALES
from pyloss.mlx.utils import stored_floats
from pyloss.weights.weight import Weight

_KINDS = {name: kind for kind, name in SCALES.items()}


class FloatWeight(Weight):
    """A stored matrix of floats that is an array to scripts. They set the attribute, not elements.

    Attributes that `Weight` does not have are the array's.
    """

    __slots__ = ()

    def __mlx_array__(self) -> np.ndarray:
        floats = stored_floats(self)
        return self.dequantize() if floats is None else floats

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.__mlx_array__(), dtype)

    def __getattr__(self, name: str) -> Any:
        if name in Weight.__slots__ or name.startswith("__"):
            raise AttributeError(name)
        return getattr(of(self.__mlx_array__()), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(
            "elements of a weight in a model's file cannot be set: layer.weight = "
            "mx.array(layer.weight) makes it an array of the layer's own"
        )


def _delegated(name: str) -> Callable:
    def method(self: FloatWeight, *args: Any) -> Any:
        return getattr(array, name)(of(self.__mlx_array__()), *args)

    return method


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv",
    "mod", "rmod", "pow", "rpow", "matmul", "rmatmul", "neg", "abs", "lt", "le", "gt", "ge",
    "getitem", "len", "iter",
):  # fmt: skip
    setattr(FloatWeight, f"__{_name}__", _delegated(f"__{_name}__"))


class CodedWeight(Weight):
    """A matrix in MLX's affine format, which is an array of packed codes to MLX's functions."""

    __slots__ = ()
    dtype = uint32
    ndim = 2

    @property
    def size(self) -> int:
        """The elements of the matrix."""
        return self.shape[0] * self.shape[1]

    def __mlx_array__(self) -> np.ndarray:
        return np.ascontiguousarray(self.raw).view(uint32).reshape(self.shape[0], -1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.__mlx_array__(), dtype)


class Bits(int):
    """The bits of a code, for a weight whose shape is not packed.

    Scripts multiply a shape or size by `32 // bits`, the codes of a packed word. Here the shape
    counts elements, so that `32 // bits` is 1 and `n * 32 // bits` is n.
    """

    def __rfloordiv__(self, other: Any) -> Any:
        return other // (32 if other % 32 == 0 else int(self))


def _in_groups(weight: Weight) -> bool:
    """Whether a matrix is stored as `mx.quantize` does."""
    return (
        weight.format.startswith("affine")
        and weight.columns is None
        and not weight.head_dim
        and weight.groups is not None
        and weight.groups.scale_format in _KINDS
    )


def show_stored(stored: Any) -> None:
    """Makes a `Weight` one that scripts use as an array; the object stays the same."""
    if type(stored) is not Weight:
        return
    if stored_floats(stored) is not None:
        stored.__class__ = FloatWeight
    elif _in_groups(stored) and isinstance(stored.raw, np.ndarray):
        stored.__class__ = CodedWeight


def _scales(weight: Weight, name: str) -> np.ndarray:
    """The scales or biases of a matrix, which may be rows of a larger one."""
    groups = weight.groups
    assert groups is not None
    stored = groups.scales if name == "scales" else groups.offsets
    begin = groups.first // groups.size
    count = weight.shape[0] * weight.shape[1] // groups.size
    return np.asarray(stored).view(_KINDS[groups.scale_format])[begin : begin + count]


def _of_groups(name: str, text: str) -> property:
    def get(self: nn.Module) -> Any:
        weight = vars(self)["weight"]
        parts = getattr(weight, "matrices", (weight,))
        if not _in_groups(parts[0]):
            raise AttributeError(
                f"this layer's weight has the format {parts[0].format}, which has no {name} of "
                "MLX's: layer.weight.dequantize() gives its values"
            )
        if name == "group_size":
            return parts[0].groups.size
        if name == "bits":
            return Bits(parts[0].format.removeprefix("affine"))
        if name == "mode":
            return "affine"
        found = np.stack([_scales(part, name) for part in parts])
        return of(found.reshape(*weight.shape[:-1], -1))

    return property(get, doc=text)


#: What the classes of quantized layers have under MLX's view.
GROUPS: dict[str, Any] = {
    "scales": _of_groups("scales", "The scales of the groups, a copy."),
    "biases": _of_groups("biases", "The smallest values of the groups, a copy."),
    "group_size": _of_groups("group_size", "The elements of a group."),
    "mode": _of_groups("mode", "MLX's name of the format."),
    "bits": _of_groups("bits", "The bits of an element, see `Bits`."),
}
