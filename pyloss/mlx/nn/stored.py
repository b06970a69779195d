"""Stored weights of pyloss's layers as MLX's scripts use them.

A matrix of floats acts as an `mx.array`. Of a quantized one, whose `weight` is pyloss's and not an
array of packed codes, the layer shows the scales and what belongs to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss import nn
from pyloss.mlx.core.arrays import array, of
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


def show_floats(stored: Any) -> None:
    """Makes a `Weight` of floats a `FloatWeight`; the object stays the same."""
    if type(stored) is Weight and stored_floats(stored) is not None:
        stored.__class__ = FloatWeight


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
        first, groups = parts[0], parts[0].groups
        if (
            not first.format.startswith("affine")
            or first.columns is not None
            or first.head_dim
            or groups.offsets is None
            or groups.scale_format not in _KINDS
        ):
            raise AttributeError(
                f"this layer's weight has the format {first.format}, which has no {name} of MLX's: "
                "layer.weight.dequantize() gives its values"
            )
        if name in ("group_size", "mode"):
            return groups.size if name == "group_size" else "affine"
        found = np.stack([_scales(part, name) for part in parts])
        return of(found.reshape(*weight.shape[:-1], -1))

    return property(get, doc=text)


def _bits(self: nn.Module) -> Any:
    """Not here: scripts multiply a packed shape by 32 // bits.

    AttributeError that says what the shape is.
    """
    raise AttributeError(
        "a quantized layer of pyloss has no bits: its weight.shape is (outputs, inputs), and not "
        "that of packed codes, so leave the factor 32 // bits out. layer.weight.format says how "
        "it is stored, and layer.weight.dequantize() gives its values"
    )


#: What the classes of quantized layers have under MLX's view.
GROUPS: dict[str, Any] = {
    "scales": _of_groups("scales", "The scales of the groups, a copy."),
    "biases": _of_groups("biases", "The smallest values of the groups, a copy."),
    "group_size": _of_groups("group_size", "The elements of a group."),
    "mode": _of_groups("mode", "MLX's name of the format."),
    "bits": property(_bits),
}
