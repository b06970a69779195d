"""MLX's sums, extremes, sorts and cumulative functions along axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss.autograd.functions import logsumexp as log_sum, softmax as normalized
from pyloss.autograd.tensor import FUNCTIONS
from pyloss.mlx.core.arrays import array, axes_of, call, cast, of, promoted, raw, result
from pyloss.mlx.core.dtypes import bool_, int32, is_float, uint32
from pyloss.mlx.core.elementwise import constant, in_float32

Axis = int | list[int] | tuple[int, ...] | None


def _counted(x: Any) -> Any:
    """Whole numbers in the type in which MLX adds them up: 32 bits at least."""
    if x.dtype == bool_ or (x.dtype.kind == "i" and x.dtype.itemsize < 4):
        return cast(x, int32)
    return cast(x, uint32) if x.dtype.kind == "u" and x.dtype.itemsize < 4 else x


def _total(function: Callable, a: Any, axis: Any, keepdims: bool) -> array:
    (x,) = promoted(a)
    x = _counted(x)
    found = call(function, x, axes_of(axis), keepdims=keepdims)
    return found if found.dtype == x.dtype else of(cast(raw(found), x.dtype))


def sum(a: Any, /, axis: Axis = None, keepdims: bool = False, *, stream: Any = None) -> array:
    """The sum; of bool in int32."""
    return _total(np.sum, a, axis, keepdims)


def prod(a: Any, /, axis: Axis = None, keepdims: bool = False, *, stream: Any = None) -> array:
    """The product."""
    return _total(np.prod, a, axis, keepdims)


def mean(a: Any, /, axis: Axis = None, keepdims: bool = False, *, stream: Any = None) -> array:
    """The mean; of whole numbers in float32."""
    return call(np.mean, *promoted(a, floats=True), axes_of(axis), keepdims=keepdims)


def var(
    a: Any,
    /,
    axis: Axis = None,
    keepdims: bool = False,
    ddof: int = 0,
    *,
    correction: int | None = None,
    stream: Any = None,
) -> array:
    """The variance: the sum of squares divided by the count less `ddof`."""
    ddof = ddof if correction is None else correction
    return call(np.var, *promoted(a, floats=True), axes_of(axis), ddof=ddof, keepdims=keepdims)


def std(
    a: Any,
    /,
    axis: Axis = None,
    keepdims: bool = False,
    ddof: int = 0,
    *,
    correction: int | None = None,
    stream: Any = None,
) -> array:
    """The standard deviation."""
    ddof = ddof if correction is None else correction
    (x,) = promoted(a, floats=True)
    found = call(np.std, x, axes_of(axis), ddof=ddof, keepdims=keepdims)
    return of(cast(raw(found), x.dtype))


def max(a: Any, /, axis: Axis = None, keepdims: bool = False, *, stream: Any = None) -> array:
    """The largest element; equal ones share its gradient."""
    return call(np.max, *promoted(a), axes_of(axis), keepdims=keepdims)


def min(a: Any, /, axis: Axis = None, keepdims: bool = False, *, stream: Any = None) -> array:
    """The smallest element; equal ones share its gradient."""
    return call(np.min, *promoted(a), axes_of(axis), keepdims=keepdims)


def minmax(
    a: Any, /, axis: Axis = None, keepdims: bool = False, *, stream: Any = None
) -> tuple[array, array]:
    """The smallest and the largest element."""
    return min(a, axis, keepdims), max(a, axis, keepdims)


def median(a: Any, /, axis: Axis = None, keepdims: bool = False, *, stream: Any = None) -> array:
    """The median; it has no gradient here."""
    (x,) = promoted(a, floats=True)
    x = constant(x, "median")
    return of(np.asarray(np.median(x, axis=axes_of(axis), keepdims=keepdims)).astype(x.dtype))


def all(a: Any, /, axis: Axis = None, keepdims: bool = False, *, stream: Any = None) -> array:
    """Whether no element is 0."""
    return call(np.all, *promoted(a), axes_of(axis), keepdims=keepdims)


def any(a: Any, /, axis: Axis = None, keepdims: bool = False, *, stream: Any = None) -> array:
    """Whether an element is not 0."""
    return call(np.any, *promoted(a), axes_of(axis), keepdims=keepdims)


def count_nonzero(
    a: Any, /, *, axis: Axis = None, keepdims: bool = False, stream: Any = None
) -> array:
    """How many elements are not 0, int32."""
    found = call(np.count_nonzero, *promoted(a), axis=axes_of(axis), keepdims=keepdims)
    return array(found, int32)


def logsumexp(a: Any, /, axis: Axis = None, keepdims: bool = False, *, stream: Any = None) -> array:
    """log(sum(exp(a)))."""
    return in_float32(log_sum, a, axis=axes_of(axis), keepdims=keepdims)


def softmax(a: Any, /, axis: Axis = None, *, precise: bool = False, stream: Any = None) -> array:
    """exp(a) / sum(exp(a)) along an axis, several, or all. Halves are computed in float32."""
    (x,) = promoted(a, floats=True)
    axes = tuple(range(len(x.shape))) if axis is None else axes_of(axis)
    return in_float32(normalized, x, axis=axes)


def _places(function: Callable, a: Any, axis: int | None, keepdims: bool) -> array:
    return array(call(function, *promoted(a), axis, keepdims=keepdims), uint32)


def argmax(
    a: Any, /, axis: int | None = None, keepdims: bool = False, *, stream: Any = None
) -> array:
    """The place of the first largest element, uint32."""
    return _places(np.argmax, a, axis, keepdims)


def argmin(
    a: Any, /, axis: int | None = None, keepdims: bool = False, *, stream: Any = None
) -> array:
    """The place of the first smallest element, uint32."""
    return _places(np.argmin, a, axis, keepdims)


def sort(a: Any, /, axis: int | None = -1, *, stream: Any = None) -> array:
    """In ascending order."""
    (x,) = promoted(a)
    if axis is None:
        x, axis = FUNCTIONS[np.ravel](x), 0
    return call(np.sort, x, axis)


def argsort(a: Any, /, axis: int | None = -1, *, stream: Any = None) -> array:
    """The places of the elements in ascending order, equal ones as they are, uint32."""
    return array(call(np.argsort, *promoted(a), axis, kind="stable"), uint32)


def partition(a: Any, /, kth: int, axis: int | None = -1, *, stream: Any = None) -> array:
    """In an order in which no element before `kth` is larger; here all are sorted."""
    return sort(a, axis)


def argpartition(a: Any, /, kth: int, axis: int | None = -1, *, stream: Any = None) -> array:
    """The places of `partition`; here those of all elements in order."""
    return argsort(a, axis)


def topk(a: Any, /, k: int, axis: int | None = -1, *, stream: Any = None) -> array:
    """The k largest elements, in ascending order (MLX promises no order)."""
    found = raw(sort(a, axis))
    along = len(found.shape) - 1 if axis is None else axis % len(found.shape)
    if not 0 <= k <= found.shape[along]:
        raise ValueError(f"k is {k}; axis {axis} has {found.shape[along]} elements")
    return of(found)[(slice(None),) * along + (slice(found.shape[along] - k, None),)]


def searchsorted(
    sorted_sequence: Any, values: Any, /, side: str = "left", *, stream: Any = None
) -> array:
    """Where values belong in a sorted sequence, uint32."""
    x, y = promoted(sorted_sequence, values)
    return array(call(np.searchsorted, x, y, side), uint32)


def _cumulative(
    name: str, function: Callable, a: Any, axis: int | None, reverse: bool, inclusive: bool,
    first: Any, dtype: Any = None,
) -> array:  # fmt: skip
    """A cumulative function along an axis; `first` stands before the first element."""
    (x,) = promoted(a)
    x = x if dtype is None else cast(x, np.dtype(dtype))
    if axis is None:
        x, axis = FUNCTIONS[np.ravel](x), 0
    if name != "cumsum":
        x = constant(x, name)
    if reverse:
        x = FUNCTIONS[np.flip](x, axis)
    kind = x.dtype
    found = cast(function(x, axis), kind)
    if not inclusive:
        shape = [1 if i == axis % len(x.shape) else n for i, n in enumerate(x.shape)]
        rest = _before_last(found, axis)
        found = FUNCTIONS[np.concatenate]([np.full(shape, first, kind), rest], axis)
    return result(FUNCTIONS[np.flip](found, axis) if reverse else found)


def _before_last(x: Any, axis: int) -> Any:
    """x without the last element along an axis."""
    before = (slice(None),) * (axis % len(x.shape))
    return raw(of(x)[before + (slice(0, x.shape[axis] - 1),)])


def cumsum(
    a: Any,
    /,
    axis: int | None = None,
    *,
    reverse: bool = False,
    inclusive: bool = True,
    dtype: Any = None,
    stream: Any = None,
) -> array:
    """Sums up to each element, or with `reverse` from each one on."""
    if dtype is None and raw(a).dtype == bool_:
        dtype = int32
    return _cumulative("cumsum", FUNCTIONS[np.cumsum], a, axis, reverse, inclusive, 0, dtype)


def cumprod(
    a: Any,
    /,
    axis: int | None = None,
    *,
    reverse: bool = False,
    inclusive: bool = True,
    dtype: Any = None,
    stream: Any = None,
) -> array:
    """Products up to each element; it has no gradient here."""
    return _cumulative("cumprod", np.cumprod, a, axis, reverse, inclusive, 1, dtype)


cumulative_sum, cumulative_prod = cumsum, cumprod


def _least(x: Any) -> Any:
    if x.dtype == bool_:
        return False
    return -np.inf if is_float(x.dtype) else np.iinfo(x.dtype).min


def _largest(x: Any) -> Any:
    if x.dtype == bool_:
        return True
    return np.inf if is_float(x.dtype) else np.iinfo(x.dtype).max


def cummax(
    a: Any, /, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True,
    stream: Any = None,
) -> array:  # fmt: skip
    """The largest element so far; it has no gradient here."""
    function = np.maximum.accumulate
    return _cumulative("cummax", function, a, axis, reverse, inclusive, _least(raw(a)))


def cummin(
    a: Any, /, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True,
    stream: Any = None,
) -> array:  # fmt: skip
    """The smallest element so far; it has no gradient here."""
    function = np.minimum.accumulate
    return _cumulative("cummin", function, a, axis, reverse, inclusive, _largest(raw(a)))


def logcumsumexp(
    a: Any, /, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True,
    stream: Any = None,
) -> array:  # fmt: skip
    """log(cumsum(exp(a))); it has no gradient here."""
    (x,) = promoted(a, floats=True)
    function = np.logaddexp.accumulate
    return _cumulative("logcumsumexp", function, x, axis, reverse, inclusive, -np.inf)


def allclose(
    a: Any, b: Any, /, rtol: float = 1e-5, atol: float = 1e-8, *, equal_nan: bool = False,
    stream: Any = None,
) -> array:  # fmt: skip
    """Whether all elements are nearly equal: an array of one bool."""
    return all(isclose(a, b, rtol, atol, equal_nan=equal_nan))


def isclose(
    a: Any, b: Any, /, rtol: float = 1e-5, atol: float = 1e-8, *, equal_nan: bool = False,
    stream: Any = None,
) -> array:  # fmt: skip
    """Whether elements are nearly equal."""
    return call(np.isclose, *promoted(a, b), rtol, atol, equal_nan)


def array_equal(a: Any, b: Any, equal_nan: bool = False, stream: Any = None) -> array:
    """Whether shapes and all elements are equal: an array of one bool."""
    x, y = promoted(a, b)
    return array(bool(call(np.array_equal, x, y, equal_nan=equal_nan and is_float(x.dtype))))


def unique(
    a: Any, /, size: int, return_index: bool = False, return_inverse: bool = False,
    return_counts: bool = False, fill_value: Any = None, *, stream: Any = None,
) -> Any:  # fmt: skip
    """The distinct elements in order, `size` of them: filled up with `fill_value`, or the least."""
    x = constant(promoted(a)[0], "unique").reshape(-1)
    values, index, inverse, counts = np.unique(x, True, True, True)
    fill = (values[0] if len(values) else 0) if fill_value is None else raw(array(fill_value))

    def sized(found: np.ndarray, rest: Any) -> np.ndarray:
        return np.concatenate(
            [
                found[:size],
                np.full(0 if size < len(found) else size - len(found), rest, found.dtype),
            ]
        )

    found = [of(sized(values, fill))]
    if return_index:
        found.append(array(sized(index, index[0] if len(index) else 0), uint32))
    if return_inverse:
        found.append(array(inverse.reshape(-1), uint32))
    if return_counts:
        found.append(array(sized(counts, 0), uint32))
    return found[0] if len(found) == 1 else tuple(found)
