"""Functions that make arrays of shapes, numbers and other libraries' arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyloss.mlx.core.arrays import array, call, cast, of, promoted, raw
from pyloss.mlx.core.dtypes import float32, int32, int64

Shape = int | Sequence[int]


def shape_of(shape: Any) -> tuple[int, ...]:
    """A shape given as a number or several."""
    return tuple(int(n) for n in shape) if np.iterable(shape) else (int(shape),)


def zeros(shape: Shape, dtype: Any = float32, *, stream: Any = None) -> array:
    """0 everywhere."""
    return of(np.zeros(shape_of(shape), dtype or float32))


def ones(shape: Shape, dtype: Any = float32, *, stream: Any = None) -> array:
    """1 everywhere."""
    return of(np.ones(shape_of(shape), dtype or float32))


def empty(shape: Shape, dtype: Any = float32, *, stream: Any = None) -> array:
    """Zeros, as in MLX."""
    return zeros(shape, dtype)


def full(shape: Shape, vals: Any, dtype: Any = None, *, stream: Any = None) -> array:
    """`vals` broadcast to a shape."""
    values = raw(array(vals) if not hasattr(vals, "dtype") else vals)
    values = values if dtype is None else cast(values, np.dtype(dtype))
    return call(np.broadcast_to, values, shape_of(shape))


def _like(a: Any, value: float, dtype: Any) -> array:
    x = raw(a)
    return of(np.full(x.shape, value, x.dtype if dtype is None else np.dtype(dtype)))


def zeros_like(a: Any, /, dtype: Any = None, *, stream: Any = None) -> array:
    """0 everywhere, in a's shape and type."""
    return _like(a, 0, dtype)


def ones_like(a: Any, /, dtype: Any = None, *, stream: Any = None) -> array:
    """1 everywhere, in a's shape and type."""
    return _like(a, 1, dtype)


def empty_like(a: Any, /, dtype: Any = None, *, stream: Any = None) -> array:
    """Zeros in a's shape and type, as in MLX."""
    return _like(a, 0, dtype)


def full_like(a: Any, vals: Any, dtype: Any = None, *, stream: Any = None) -> array:
    """`vals` broadcast to a's shape, in its type."""
    return full(raw(a).shape, vals, raw(a).dtype if dtype is None else dtype)


def eye(
    n: int, m: int | None = None, k: int = 0, dtype: Any = float32, *, stream: Any = None
) -> array:
    """1 on diagonal k, else 0."""
    return of(np.eye(n, m, k, dtype or float32))


def identity(n: int, dtype: Any = float32, *, stream: Any = None) -> array:
    """The identity matrix."""
    return eye(n, dtype=dtype)


def tri(
    n: int, m: int | None = None, k: int = 0, dtype: Any = None, *, stream: Any = None
) -> array:
    """1 on and below diagonal k, else 0."""
    return of(np.tri(n, m, k, dtype or float32))


def arange(
    start: Any, stop: Any = None, step: Any = None, dtype: Any = None, *, stream: Any = None
) -> array:
    """Numbers from `start` to below `stop`; int32, or float32 if any of them is a float."""
    if stop is None:
        start, stop = 0, start
    step = 1 if step is None else step
    given = [x.item() if isinstance(x, array) else x for x in (start, stop, step)]
    kind = dtype or (float32 if any(isinstance(x, float) for x in given) else int32)
    if not all(math.isfinite(x) for x in given) or given[2] == 0:
        raise ValueError(f"arange needs finite numbers and a step that is not 0, not {given}")
    if dtype is None and kind == int32 and not all(-(2**31) <= x < 2**31 for x in given):
        kind = int64
    if (given[1] - given[0]) / given[2] >= 2**31:
        raise ValueError(f"arange of {given} has more than 2^31 numbers")
    return of(np.arange(*given).astype(kind))


def linspace(
    start: float,
    stop: float,
    num: int | None = 50,
    endpoint: bool = True,
    dtype: Any = float32,
    stream: Any = None,
) -> array:
    """`num` numbers at equal distances."""
    return of(np.linspace(start, stop, 50 if num is None else num, endpoint).astype(dtype))


def meshgrid(
    *arrays: Any, sparse: bool | None = False, indexing: str | None = "xy", stream: Any = None
) -> tuple[array, ...]:
    """The coordinates of a grid."""
    values = [np.asarray(raw(x)) for x in arrays]
    grids: Any = np.meshgrid(*values, sparse=bool(sparse), indexing=indexing or "xy")  # type: ignore[call-overload]
    return tuple(of(x.copy()) for x in grids)


def _window(values: np.ndarray) -> array:
    return of(values.astype(float32))


def bartlett(M: int, *, stream: Any = None) -> array:
    """A triangular window."""
    return _window(np.bartlett(M))


def hanning(M: int, *, stream: Any = None) -> array:
    """A window of one cosine."""
    return _window(np.hanning(M))


def hamming(M: int, *, stream: Any = None) -> array:
    """A window of one cosine that does not reach 0."""
    return _window(np.hamming(M))


def blackman(M: int, *, stream: Any = None) -> array:
    """A window of two cosines."""
    return _window(np.blackman(M))


def asarray(a: Any, dtype: Any = None, *, copy: bool | None = None) -> array:
    """`array`; one that is an array of this type already stays itself unless `copy`."""
    if type(a) is array and not copy and dtype in (None, a.dtype):
        return a
    return array(a, dtype)


def from_dlpack(x: Any, /, *, copy: bool | None = None) -> array:
    """An array of another library's values."""
    return array(np.from_dlpack(x))


def astype(a: Any, dtype: Any, /, *, stream: Any = None) -> array:
    """The values in another type."""
    (x,) = promoted(a)
    return of(cast(x, np.dtype(dtype)))
