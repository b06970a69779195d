"""Merging an adapter into a weight: storing the sum in the base's format, and the rounding loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pyloss.nn import Module
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

#: Adds the adapter to a dense float32 weight and returns a new array.
Merge = Callable[[np.ndarray], np.ndarray]


class Fused(NamedTuple):
    """A merged layer.

    Attributes:
        layer: the plain layer.
        kept: the share of the adapter's change that storing left: 1 - |error|^2 / |change|^2.
    """

    layer: Module
    kept: float


def with_weight(layer: Any, weight: Any) -> Any:
    """A layer of the same kind with another weight, stored or float32, and the same bias."""
    return (
        layer.from_weight(weight, layer.bias)
        if hasattr(layer, "bias")
        else layer.from_weight(weight)
    )


def dense(weight: np.ndarray | Weight | WeightStack) -> np.ndarray:
    """A weight as a float32 array; a stored one is dequantized into a new array."""
    return weight.dequantize() if isinstance(weight, Weight | WeightStack) else weight


def merge(
    base: np.ndarray | Weight, merged: Merge, dequantize: bool
) -> tuple[np.ndarray | Weight, float]:
    """`merged(dense base)` in the base's format, and the share of the change that is kept.

    A quantized base gives float32 with `dequantize`. A format that can only be read gives float32
    too, with a warning.
    """
    if not isinstance(base, Weight):
        return merged(base), 1.0
    stored, change, error = merge_stored(base, merged, dequantize)
    return stored, share_kept(change, error)


def merge_stored(base: Weight, merged: Merge, dequantize: bool) -> tuple[Weight, float, float]:
    """`merge` of a stored matrix: the new weight, |change|^2 and |error|^2."""
    before = base.dequantize()
    after = merged(before)
    if not (dequantize or base.can_requantize):
        warnings.warn(
            f"{base.format} can be read but not written: "
            "the weights fused over it are kept in float32",
            stacklevel=2,
        )
    if base.format == "f32" or not (base.is_float or (base.can_requantize and not dequantize)):
        return Weight.quantize(after, "f32"), 1.0, 0.0
    stored = base.requantize(after)
    change = np.subtract(after, before, dtype=np.float64)
    error = np.subtract(stored.dequantize(), after, dtype=np.float64)
    return stored, float(np.sum(change**2)), float(np.sum(error**2))


def share_kept(change: float, error: float) -> float:
    """The share of a change that storing left; both arguments are squared norms."""
    return 1 - error / change if change else 1.0
