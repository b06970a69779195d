"""NumPy's sums, means, extremes and products along axes."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import numpy as np

from pyloss.arithmetic import cumsum as core_cumsum, expanded, extreme_grad, reduced
from pyloss.autograd.functions.apply import apply, constant, implements, operand, value_of
from pyloss.autograd.tape import recording

#: Sums of fewer numbers are added up in float64 by NumPy.
IN_CORE = 1 << 16

Axis = int | tuple[int, ...] | None


def _axes(x: Any, axis: Axis) -> tuple[int, ...]:
    """The axes as numbers from 0; numpy.exceptions.AxisError for one that x has not."""
    if axis is None:
        return tuple(range(x.ndim))
    given = axis if isinstance(axis, tuple) else (axis,)
    found = tuple(operator.index(i) + x.ndim * (i < 0) for i in given)
    for i, place in zip(given, found, strict=True):
        if not 0 <= place < x.ndim:
            errors: Any = getattr(np, "exceptions", np)  # numpy.AxisError before NumPy 1.25
            raise errors.AxisError(i, x.ndim)
    if len(set(found)) < len(found):
        raise ValueError(f"axis names one axis twice: {axis}")
    return found


def _shapes(x: Any, axis: Axis, keepdims: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a reduction's result, with axes of 1 and as it is returned."""
    axes = _axes(x, axis)
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    return kept, kept if keepdims else tuple(n for i, n in enumerate(x.shape) if i not in axes)


def _count(x: Any, axis: Axis) -> int:
    return math.prod(x.shape[i] for i in _axes(x, axis))


@implements(np.sum)
def sum(a: Any, axis: Axis = None, dtype: Any = None, *, keepdims: bool = False) -> Any:
    """Added up in float64, by the core in blocks of float32."""
    x = operand(a)
    if dtype is not None:
        x = x.astype(dtype)
    kept, shape = _shapes(x, axis, keepdims)
    source = x.shape

    def total(xd: np.ndarray) -> np.ndarray:
        # The core adds some numbers in float32 before it widens them.
        found = reduced("sum", xd, axis, keepdims) if xd.size >= IN_CORE else None
        if found is not None:
            return found
        wide = np.float64 if xd.dtype.itemsize < 8 and xd.dtype.kind not in "iub" else None
        return np.asarray(
            xd.sum(axis=axis, keepdims=keepdims, dtype=wide), xd.dtype if wide else None
        )

    def gradient(i: int, dy: Any, y: Any, xd: Any) -> Any:
        spread = expanded(dy.reshape(kept), source)
        return np.broadcast_to(dy.reshape(kept), source) if spread is None else spread

    return apply(total, (x,), gradient, lazy=lambda: (shape, x.dtype))


def _widened(function: Any) -> Any:
    """Computed in float32 for float16, whose sums overflow."""

    @functools.wraps(function)
    def computed(a: Any, *args: Any, **kwargs: Any) -> Any:
        x = operand(a)
        if getattr(x, "dtype", None) != np.float16:
            return function(x, *args, **kwargs)
        return function(x.astype(np.float32), *args, **kwargs).astype(np.float16)

    return computed


@implements(np.mean)
@_widened
def mean(a: Any, axis: Axis = None, dtype: Any = None, *, keepdims: bool = False) -> Any:
    x = operand(a)
    if x.dtype.kind in "iub":
        return np.mean(value_of(x), axis, dtype, keepdims=keepdims)
    count = _count(x, axis)
    total = sum(x, axis, dtype, keepdims=keepdims)
    return total * (1 / count if count else math.nan)


@implements(np.var)
@_widened
def var(
    a: Any, axis: Axis = None, dtype: Any = None, *, ddof: float = 0, keepdims: bool = False
) -> Any:
    x = operand(a)
    squares = np.square(x - mean(x, axis, dtype, keepdims=True))
    left = max(_count(x, axis) - ddof, 0)
    return sum(squares, axis, keepdims=keepdims) * (1 / left if left else math.nan)


@implements(np.std)
@_widened
def std(
    a: Any, axis: Axis = None, dtype: Any = None, *, ddof: float = 0, keepdims: bool = False
) -> Any:
    return _root(var(a, axis, dtype, ddof=ddof, keepdims=keepdims))


def _root(squares: Any) -> Any:
    """A square root whose gradient at 0 is 0, for the root of a sum of squares."""
    y = operand(squares)
    return apply(
        np.sqrt,
        (y,),
        lambda i, dy, root, xd: np.divide(dy, 2 * root, out=np.zeros_like(root), where=root != 0),
        "y",
    )


def _extreme(function: Any) -> Any:
    def computed(a: Any, axis: Axis = None, *, keepdims: bool = False) -> Any:
        x = operand(a)
        kept, _ = _shapes(x, axis, keepdims)
        axes = _axes(x, axis)

        def value(xd: Any) -> Any:
            found = reduced(function.__name__, xd, axes, keepdims)
            return function(xd, axis=axes, keepdims=keepdims) if found is None else found

        def gradient(i: int, dy: Any, y: Any, xd: Any) -> Any:
            found = extreme_grad(dy, xd, y, axes)
            if found is not None:
                return found
            chosen = xd == y.reshape(kept)
            share = dy.reshape(kept) / np.maximum(chosen.sum(axis=axes, keepdims=True), 1)
            return np.where(chosen, share, 0)

        return apply(value, (x,), gradient, "0y")

    return computed


implements(np.max, np.amax)(_extreme(np.max))
implements(np.min, np.amin)(_extreme(np.min))


@implements(np.ptp)
def ptp(a: Any, axis: Axis = None, *, keepdims: bool = False) -> Any:
    return np.max(a, axis, keepdims=keepdims) - np.min(a, axis, keepdims=keepdims)


@implements(np.prod)
def prod(a: Any, axis: Axis = None, *, keepdims: bool = False) -> Any:
    x = operand(a)
    kept, _ = _shapes(x, axis, keepdims)
    axes = _axes(x, axis)

    def gradient(i: int, dy: Any, y: Any, xd: Any) -> Any:
        zeros = xd == 0
        count = zeros.sum(axis=axes, keepdims=True)
        rest = np.prod(np.where(zeros, 1, xd), axis=axes, keepdims=True)  # of those not 0
        by_one = np.where(count == 0, rest / np.where(zeros, 1, xd), 0)
        return dy.reshape(kept) * np.where(zeros & (count == 1), rest, by_one)

    return apply(lambda xd: np.prod(xd, axis=axes, keepdims=keepdims), (x,), gradient, "0")


@implements(np.cumsum)
def cumsum(a: Any, axis: int | None = None) -> Any:
    x = operand(a)
    if axis is None:
        x, axis = np.ravel(x), 0

    last = axis in (-1, x.ndim - 1)

    def value(xd: Any) -> Any:
        found = core_cumsum(xd) if last else None
        return np.cumsum(xd, axis) if found is None else found

    def gradient(i: int, dy: Any, y: Any, xd: Any) -> Any:
        found = core_cumsum(dy, reverse=True) if last else None
        return np.flip(np.cumsum(np.flip(dy, axis), axis), axis) if found is None else found

    return apply(value, (x,), gradient)


@implements(np.diff)
def diff(a: Any, n: int = 1, axis: int = -1) -> Any:
    x = operand(a)
    for _ in range(n):
        size = x.shape[axis]
        front, back = (
            (slice(None),) * (axis % x.ndim) + (s,) for s in (slice(1, size), slice(0, size - 1))
        )
        x = x[front] - x[back]
    return x


@implements(np.average)
def average(
    a: Any,
    axis: Axis = None,
    weights: Any = None,
    returned: bool = False,
    *,
    keepdims: bool = False,
) -> Any:
    """Weights have the shape of a, or that of its axes `axis`."""
    x = operand(a)
    if weights is None:
        if returned:
            raise TypeError("numpy.average(returned=True) of a Tensor needs weights")
        return mean(x, axis, keepdims=keepdims)
    w = operand(weights)
    kind = np.result_type(x.dtype, w.dtype)
    if kind == np.float16:  # sums would overflow
        x, w = x.astype(np.float32), w.astype(np.float32)
    if w.shape != x.shape:
        if axis is None:
            raise TypeError("numpy.average of weights of another shape needs an axis")
        axes = _axes(x, axis)
        if w.shape != tuple(x.shape[i] for i in axes):
            raise ValueError(
                f"numpy.average along {axis} of shape {x.shape} takes weights of shape "
                f"{tuple(x.shape[i] for i in axes)} or {x.shape}, not {w.shape}"
            )
        w = np.transpose(w, np.argsort(axes))
        w = np.reshape(w, tuple(n if i in axes else 1 for i, n in enumerate(x.shape)))
    total = np.sum(np.broadcast_to(w, x.shape), axis, keepdims=keepdims)
    if np.any(np.equal(total, 0)):
        raise ZeroDivisionError("numpy.average: the weights sum to 0, and cannot be normalized")
    found = np.sum(x * w, axis, keepdims=keepdims) / total
    if found.dtype != kind:
        found = found.astype(kind)
    return (found, total.astype(kind)) if returned else found


@implements(np.linalg.norm)
@_widened
def norm(x: Any, ord: Any = None, axis: Axis = None, keepdims: bool = False) -> Any:
    """Of vectors: order 1, 2, infinity or a number above 0; of matrices: Frobenius'."""
    x = operand(x)
    vectors = axis is None and (ord is None or x.ndim == 1)
    one = isinstance(axis, int | np.integer) or (isinstance(axis, tuple) and len(axis) == 1)
    if vectors or one:
        if ord is None or ord == 2:
            return _root(np.sum(np.square(x), axis, keepdims=keepdims))
        if ord == math.inf:
            return np.max(np.abs(x), axis, keepdims=keepdims)
        if isinstance(ord, int | float) and ord > 0:
            sums = np.sum(np.abs(x) ** ord, axis, keepdims=keepdims)
            return sums if ord == 1 else sums ** (1 / ord)
    elif ord in (None, "fro"):
        return _root(np.sum(np.square(x), axis, keepdims=keepdims))
    raise TypeError(
        f"numpy.linalg.norm with ord={ord!r} has no gradient; of vectors 1, 2, inf and other "
        "numbers above 0 have one, of matrices 'fro'"
    )


if hasattr(np.linalg, "vector_norm"):  # from NumPy 2 on

    @implements(np.linalg.vector_norm)
    def vector_norm(x: Any, /, *, axis: Axis = None, keepdims: bool = False, ord: Any = 2) -> Any:
        x = operand(x)
        axes = _axes(x, axis)
        _, shape = _shapes(x, axis, keepdims)
        # The axes become one, the last.
        last = np.transpose(x, (*(i for i in range(x.ndim) if i not in axes), *axes))
        rows = np.reshape(last, (*last.shape[: x.ndim - len(axes)], _count(x, axis)))
        return np.reshape(norm(rows, ord, -1), shape)

    @implements(np.linalg.matrix_norm)
    def matrix_norm(x: Any, /, *, keepdims: bool = False, ord: Any = "fro") -> Any:
        return norm(x, ord, (-2, -1), keepdims)


constant(
    np.argmax, np.argmin, np.argsort, np.nonzero, np.argwhere, np.flatnonzero, np.count_nonzero,
    np.any, np.all, np.searchsorted,
    np.isclose, np.allclose, np.array_equal, np.array_equiv,
    np.array_repr, np.array_str, np.array2string, np.iscomplexobj, np.isrealobj, np.result_type,
    np.can_cast, np.may_share_memory, np.shares_memory, np.argpartition,
)  # fmt: skip


# Of the shape and type alone: data may lie on a device, or not be computed yet.


@implements(np.shape)
def shape(a: Any) -> tuple[int, ...]:
    return operand(a).shape


@implements(np.ndim)
def ndim(a: Any) -> int:
    return len(operand(a).shape)


@implements(np.size)
def size(a: Any, axis: int | None = None) -> int:
    found = operand(a).shape
    return math.prod(found) if axis is None else found[axis]


def _filled(function: Any) -> Any:
    def computed(a: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        x = operand(a)
        like = np.broadcast_to(np.empty((), x.dtype), x.shape)
        return function(like, *map(value_of, args), **{"subok": False, **kwargs})

    return computed


for _like in (np.zeros_like, np.ones_like, np.empty_like):
    implements(_like)(_filled(_like))


@implements(np.full_like)
def full_like(
    a: Any, fill_value: Any, dtype: Any = None, order: str = "K", subok: bool = False,
    shape: Any = None,
) -> Any:  # fmt: skip
    if not recording(fill_value):
        return _filled(np.full_like)(a, fill_value, dtype, order, shape=shape)
    x = operand(a)
    filled = np.broadcast_to(operand(fill_value), x.shape if shape is None else shape)
    return filled.astype(x.dtype if dtype is None else dtype)
