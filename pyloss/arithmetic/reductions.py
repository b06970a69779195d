"""Reductions of axes, their broadcast counterpart, and maps of rows to probabilities."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.arithmetic.arrays import empty, is_f32
from pyloss.arithmetic.elementwise import broadcast_plan
from pyloss.runtime import device

Shape = tuple[int, ...]
_SOFTMAX_GRADIENTS = {
    "softmax": _core.row_softmax_grad,
    "log_softmax": _core.row_log_softmax_grad,
}
REDUCTIONS = ("sum", "mean", "max", "min", "logsumexp")
ROW_MAPS = ("softmax", "log_softmax", "stablemax", "log_stablemax")


def reduced(name: str, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """A function of `REDUCTIONS` over an axis, several axes or all (None); None: use NumPy.

    Sums and means add in float64 what some ten float32 additions of neighbors give, or 32 where
    the axis is not the last.
    "logsumexp" takes the last axis, or the last ones. The result of all axes is a 0-d array.
    """
    if name not in REDUCTIONS or not is_f32(x):
        return None
    plan = _plan(x.shape, tuple(axis) if isinstance(axis, list) else axis)
    if plan is None:
        return None
    steps, count, shape, kept = plan
    if name == "logsumexp":
        return _logsumexp(x, steps, kept if keepdims else shape)
    if count == 0 and name != "sum":
        return None
    shape = kept if keepdims else shape
    if name in ("max", "min"):
        call = _core.axis_max if name == "max" else _core.axis_min
        for o, n, d in steps:
            y = empty((o, d), x)
            call(x.reshape(o, n, d), y)
            x = y
    else:
        scale = 1.0 if name == "sum" else 1.0 / count
        for o, n, d in steps:
            y = empty((o, d), x)
            _core.axis_sum(x.reshape(o, n, d), scale, y)
            x, scale = y, 1.0
    return x.reshape(shape)


def _logsumexp(x: Any, steps: tuple[Shape, ...], shape: Shape) -> Any:
    if len(steps) != 1 or steps[0][2] != 1:
        return None
    o, n, _ = steps[0]
    y = empty((o,), x)
    _core.row_logsumexp(x.reshape(o, n), y)
    return y.reshape(shape)


def extreme_grad(dy: Any, x: Any, y: Any, axis: Any = None) -> Any:
    """The gradient of "max" or "min" over `axis`; None: use NumPy.

    Elements of x that are equal to the result y share dy evenly. dy and y have one element for each
    result, with or without the axes. The axes must be neighbors.
    """
    if not (is_f32(dy) and is_f32(x) and is_f32(y)) or dy.size != y.size:
        return None
    plan = _plan(x.shape, tuple(axis) if isinstance(axis, list) else axis)
    if plan is None or len(plan[0]) != 1:
        return None
    o, n, d = plan[0][0]
    if y.size != o * d:
        return None
    dx = empty(x.shape, x)
    _core.axis_extreme_grad(
        dy.reshape(o, d), x.reshape(o, n, d), y.reshape(o, d), dx.reshape(o, n, d)
    )
    return dx


def cumsum(x: Any, reverse: bool = False) -> Any:
    """Running sums along the last axis, in float64; None: use NumPy.

    reverse: from the last element on, which is the gradient of the other.
    """
    if not is_f32(x) or x.ndim == 0:
        return None
    y = empty(x.shape, x)
    _core.row_cumsum(x, int(reverse), y)
    return y


def logsumexp_grad(dy: Any, x: Any, y: Any) -> Any:
    """dy exp(x - y), for the y of "logsumexp" over the last axis or axes; None: use NumPy.

    dy and y have one element for each row, in any shape. The gradient is 0 in rows of -inf.
    """
    if not (is_f32(dy) and is_f32(x) and is_f32(y)) or dy.size != y.size:
        return None
    rows = y.size
    if rows == 0 or x.size % rows:
        return None
    dx = empty(x.shape, x)
    _core.row_logsumexp_grad(
        dy.reshape(rows), x.reshape(rows, -1), y.reshape(rows), dx.reshape(rows, x.size // rows)
    )
    return dx


def summed_to(x: Any, shape: Shape) -> Any:
    """x summed to `shape`, from which it was broadcast; None: use NumPy. x itself if it has it."""
    if not is_f32(x):
        return None
    if x.shape == shape:
        return x
    lead = len(x.shape) - len(shape)
    if lead < 0:
        return None
    padded = (1,) * lead + shape
    if any(n not in (1, whole) for n, whole in zip(padded, x.shape, strict=True)):
        return None
    axes = tuple(i for i, (n, whole) in enumerate(zip(padded, x.shape, strict=True)) if n != whole)
    summed = reduced("sum", x, axes)
    return None if summed is None else summed.reshape(shape)


def expanded(x: Any, shape: Shape) -> Any:
    """A copy of x broadcast to `shape`; None: use NumPy."""
    if not is_f32(x):
        return None
    plan = broadcast_plan(x.shape, shape)
    if plan is None or plan[0] != shape:
        return None
    y = empty(shape, x)
    if 0 in shape:
        return y
    one = np.ones((1, 1, 1), np.float32)
    if type(x) is not np.ndarray:
        one = device.on_device_of(x, one)
    axes_x, axes = plan[1][0], plan[2]
    _core.map_multiply(
        x if axes_x is None else x.reshape(axes_x), one, y if axes is None else y.reshape(axes)
    )
    return y


def row_map(name: str, x: Any) -> Any:
    """A function of `ROW_MAPS` along the last axis, which is not empty; None: use NumPy.

    x may be float64, float32, float16 or bfloat16.
    """
    if name not in ROW_MAPS or not _has_rows(x):
        return None
    y = _like(x)
    getattr(_core, name)(_rows(x), None, _rows(y), None)
    return y


def row_map_grad(name: str, dy: Any, read: Any) -> Any:
    """The gradient of a row map; None: use NumPy.

    It reads the result, in float32, of "softmax" and "log_softmax", the argument of the others.
    """
    gradient = _SOFTMAX_GRADIENTS.get(name)
    if gradient is not None:
        if not (is_f32(dy) and is_f32(read)) or dy.shape != read.shape or read.ndim == 0:
            return None
        dx = empty(dy.shape, dy)
        gradient(dy, read, dx)
        return dx
    if name not in ROW_MAPS or not (_has_rows(read) and _has_rows(dy)) or dy.shape != read.shape:
        return None
    dx = _like(read)
    getattr(_core, name)(_rows(read), _rows(dy), None, _rows(dx))
    return dx


def _has_rows(x: Any) -> bool:
    if type(x) is np.ndarray:
        kind = x.dtype.kind == "f" and x.dtype.itemsize <= 8 and x.dtype.isnative
        good = (kind or device.is_bfloat16(x.dtype)) and x.flags.carray
    else:
        good = isinstance(x, device.DeviceArray) and x.kind in ("f64", "f32", "f16", "bf16")
    return good and len(x.shape) > 0 and x.shape[-1] > 0


def _rows(x: Any) -> Any:
    """x for the core: two axes, bfloat16 as 16-bit integers."""
    rows = x if len(x.shape) == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return device.bits(rows) if type(x) is np.ndarray and x.dtype.kind != "f" else rows


def _like(x: Any) -> Any:
    if type(x) is not np.ndarray:
        return device.empty(x.shape, x.dtype, x)
    return _core.empty(x.shape) if x.dtype == np.float32 else np.empty_like(x)


@lru_cache(maxsize=1024)
def _plan(shape: Shape, axis: Any) -> tuple[tuple[Shape, ...], int, Shape, Shape] | None:
    """Steps (axes before, axes that vanish, axes after), the number of elements that become one,
    and the shape of the result without and with the axes."""  # fmt: skip
    rank = len(shape)
    given = range(rank) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if not all(type(i) is int and -rank <= i < rank for i in given):
        return None
    axes = {i % rank for i in given}
    if len(axes) != len(tuple(given)):
        return None
    left = tuple(n for i, n in enumerate(shape) if i not in axes)
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    count = math.prod(shape[i] for i in axes)
    # Runs of neighbors, from the last: an axis of size 1 joins either side.
    runs: list[list[int]] = []
    sizes = [(n, i in axes) for i, n in enumerate(shape) if n != 1]
    for n, vanishes in sizes:
        if runs and bool(runs[-1][1]) == vanishes:
            runs[-1][0] *= n
        else:
            runs.append([n, int(vanishes)])
    steps = []
    while any(vanishes for _, vanishes in runs):
        at = max(i for i, (_, vanishes) in enumerate(runs) if vanishes)
        before, after = (math.prod(n for n, _ in part) for part in (runs[:at], runs[at + 1 :]))
        steps.append((before, runs[at][0], after))
        del runs[at]
    if not steps:
        steps = [(math.prod(shape), 1, 1)]
    return tuple(steps), count, left, kept
