"""`WeightStack`: the stored matrices of a layer's experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyloss.weights.weight import Array, Weight


class WeightStack:
    """E read-only matrices of one shape and format; `shape` is (E, out_features, in_features).

    Args:
        matrices: the `Weight` of each expert, with bytes anywhere; they are kept as they are.

    Raises:
        ValueError: no matrices, one that differs from the first in format, shape or order of
            rows, or one whose columns are not in order.
    """

    __slots__ = ("format", "handle", "matrices", "shape")

    def __init__(self, matrices: Sequence[Weight]) -> None:
        self.matrices = tuple(matrices)
        if not self.matrices:
            raise ValueError("a stack needs at least one matrix")
        first = self.matrices[0]
        for i, matrix in enumerate(self.matrices):
            if (matrix.format, matrix.shape, matrix.head_dim) != (
                first.format,
                first.shape,
                first.head_dim,
            ):
                raise ValueError(
                    f"the matrices of a stack must be alike: the first is {first}, "
                    f"number {i} is {matrix}"
                )
            if matrix.columns is not None:
                raise ValueError("the matrices of a stack must have their columns in order")
        self.format = first.format
        self.shape = (len(self.matrices), *first.shape)
        # The C binding takes this in place of an array.
        self.handle = tuple(matrix.handle for matrix in self.matrices)

    @classmethod
    def quantize(cls, array: Array, format: str) -> WeightStack:
        """Store `array` (floating, [E, out, in]) in `format`; see `Weight.quantize`."""
        array = np.asarray(array)
        if array.ndim != 3:
            raise ValueError(f"array must have 3 dimensions, got shape {array.shape}")
        return cls([Weight.quantize(matrix, format) for matrix in array])

    @classmethod
    def from_rows(cls, weight: Weight, count: int) -> WeightStack:
        """The `count` matrices that follow each other in `weight` [count * out, in]; no copy."""
        rows = weight.shape[0] // count
        return cls([weight.slice_rows(i * rows, (i + 1) * rows) for i in range(count)])

    def moved(self, put: Callable[[Array], Any]) -> WeightStack:
        """These matrices for kernels elsewhere, see `Weight.moved`."""
        return WeightStack([matrix.moved(put) for matrix in self.matrices])

    @property
    def is_float(self) -> bool:
        """Whether the values are stored as floats, not quantized."""
        return self.matrices[0].is_float

    @property
    def nbytes(self) -> int:
        """The size of the stored bytes."""
        return sum(matrix.nbytes for matrix in self.matrices)

    def dequantize(self) -> Array:
        """All matrices, a new float32 array [E, out, in]."""
        result = np.empty(self.shape, np.float32)
        for expert, matrix in enumerate(self.matrices):
            result[expert] = matrix.dequantize()
        return result

    def __repr__(self) -> str:
        return f"WeightStack({self.format}, shape={self.shape}, {self.nbytes} bytes)"
