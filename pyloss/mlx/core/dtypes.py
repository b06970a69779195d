"""MLX's element types: NumPy's types by MLX's names, their categories, limits and promotion."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

bool_ = np.dtype(np.bool_)
int8, int16, int32, int64 = (np.dtype(f"i{size}") for size in (1, 2, 4, 8))
uint8, uint16, uint32, uint64 = (np.dtype(f"u{size}") for size in (1, 2, 4, 8))
float16, float32, float64 = (np.dtype(f"f{size}") for size in (2, 4, 8))
#: ml_dtypes' type: stored in 16 bits; products of it are computed in float32.
bfloat16 = np.dtype(ml_dtypes.bfloat16)
complex64 = np.dtype(np.complex64)

#: The class of every type, for `isinstance`.
Dtype = np.dtype


class DtypeCategory:
    """A set of element types, for `issubdtype`."""

    def __init__(self, name: str, *kinds: Any):
        self.name = name
        self.types: frozenset[np.dtype] = frozenset().union(
            *(kind.types if isinstance(kind, DtypeCategory) else (kind,) for kind in kinds)
        )

    def __repr__(self) -> str:
        return f"pyloss.mlx.core.{self.name}"


signedinteger = DtypeCategory("signedinteger", int8, int16, int32, int64)
unsignedinteger = DtypeCategory("unsignedinteger", uint8, uint16, uint32, uint64)
integer = DtypeCategory("integer", signedinteger, unsignedinteger)
floating = DtypeCategory("floating", float16, bfloat16, float32, float64)
complexfloating = DtypeCategory("complexfloating", complex64)
inexact = DtypeCategory("inexact", floating, complexfloating)
number = DtypeCategory("number", integer, inexact)
generic = DtypeCategory("generic", number, bool_)


def issubdtype(arg1: Any, arg2: Any) -> bool:
    """Whether a type or category lies in another one."""
    if not isinstance(arg2, DtypeCategory):
        return not isinstance(arg1, DtypeCategory) and np.dtype(arg1) == np.dtype(arg2)
    if isinstance(arg1, DtypeCategory):
        return arg1.types <= arg2.types
    return np.dtype(arg1) in arg2.types


class finfo:
    """The limits of a type of floats."""

    def __init__(self, dtype: Any):
        given = np.dtype(getattr(dtype, "dtype", dtype))
        if given not in inexact.types:
            raise ValueError(f"finfo takes a type of floats, not {given}")
        self.dtype = float32 if given == complex64 else given
        found = ml_dtypes.finfo(self.dtype)
        self.bits = int(found.bits)
        self.min, self.max, self.eps = float(found.min), float(found.max), float(found.eps)
        self.smallest_normal = float(found.smallest_normal)


class iinfo:
    """The limits of a type of whole numbers."""

    def __init__(self, dtype: Any):
        self.dtype = np.dtype(getattr(dtype, "dtype", dtype))
        if self.dtype not in integer.types:
            raise ValueError(f"iinfo takes a type of whole numbers, not {self.dtype}")
        found = np.iinfo(self.dtype)
        self.min, self.max = int(found.min), int(found.max)


def is_float(dtype: np.dtype) -> bool:
    """Whether values of the type are real floats."""
    return dtype in floating.types


def common(*given: np.dtype) -> np.dtype:
    """The type of a result of these types by MLX's rules: any float stands above all integers."""
    floats = [dtype for dtype in given if dtype in inexact.types]
    if not floats:
        return np.result_type(*given)
    kinds = set(floats)
    if len(kinds) == 1:
        return floats[0]
    if kinds == {float16, bfloat16}:
        return float32
    return np.result_type(*(float32 if dtype == bfloat16 else dtype for dtype in floats))


def narrowed(dtype: np.dtype) -> np.dtype:
    """The type that MLX's constructor gives values that NumPy holds as `dtype`."""
    return {float64: float32, np.dtype(np.complex128): complex64}.get(dtype, dtype)
