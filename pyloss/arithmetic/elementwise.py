"""Elementwise functions, their gradients, and arithmetic of two arrays that broadcast."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.arithmetic.arrays import FLOAT32, empty, is_f32

Shape = tuple[int, ...]
_SCALARS = (float, int, np.number, np.bool_)

_specifications = {n.removeprefix("map_"): s for n, s in _core.ops() if n.startswith("map_")}
#: For each function of one array, by NumPy's name or torch's, what its gradient reads: "x" or "y"
#: (the result).
GRADIENT_READS = {
    name.removesuffix("_grad"): text.split()[1].partition(":")[0]
    for name, text in _specifications.items()
    if name.endswith("_grad")
}
UNARY = tuple(GRADIENT_READS)
BINARY = tuple(name for name, text in _specifications.items() if text.startswith("a:"))

_maps: dict[str, Callable[..., Any]] = {n: getattr(_core, f"map_{n}") for n in UNARY}
_gradients: dict[str, Callable[..., Any]] = {n: getattr(_core, f"map_{n}_grad") for n in UNARY}
_pairs: dict[str, Callable[..., Any]] = {n: getattr(_core, f"map_{n}") for n in BINARY}


def unary(name: str, x: Any) -> Any:
    """f(x) for a function of `UNARY`; None: use NumPy.

    "gelu" is the exact form, x times the normal distribution function; "gelu_tanh" is the other.
    """
    function = _maps.get(name)
    if function is None or not is_f32(x):
        return None
    if type(x) is np.ndarray:
        return function(x, ...)
    y = empty(x.shape, x)
    function(x, y)
    return y


def unary_grad(name: str, dy: Any, read: Any) -> Any:
    """dy f'(x), with x or y as `read`, which `GRADIENT_READS` says; None: use NumPy."""
    function = _gradients.get(name)
    if function is None or not (is_f32(dy) and is_f32(read)) or dy.shape != read.shape:
        return None
    if type(dy) is np.ndarray:
        return function(dy, read, ...)
    dx = empty(dy.shape, dy)
    function(dy, read, dx)
    return dx


def scaled(x: Any, factor: float) -> Any:
    """x factor, as for -x; None: use NumPy."""
    if not is_f32(x):
        return None
    y = empty(x.shape, x)
    _core.scale(factor, x, y)
    return y


def binary(name: str, a: Any, b: Any) -> Any:
    """f(a, b) for a function of `BINARY`, whose shapes broadcast; None: use NumPy.

    One of both may be a number, which becomes float32. Axes next to each other that broadcast alike
    count as one; at most three may be left.
    """
    function = _pairs.get(name)
    if function is None:
        return None
    if not is_f32(a):
        if not (isinstance(a, _SCALARS) and type(b) is np.ndarray and is_f32(b)):
            return None
        a = np.array(a, FLOAT32)
    elif not is_f32(b):
        if not (isinstance(b, _SCALARS) and type(a) is np.ndarray):
            return None
        b = np.array(b, FLOAT32)
    plan = broadcast_plan(a.shape, b.shape)
    if plan is None:
        return None
    shape, axes_a, axes_b, axes = plan
    y = empty(shape, a)
    if 0 in shape:
        return y
    function(
        a if axes_a is None else a.reshape(axes_a),
        b if axes_b is None else b.reshape(axes_b),
        y if axes is None else y.reshape(axes),
    )
    return y


@lru_cache(maxsize=1024)
def broadcast_plan(
    a: Shape, b: Shape
) -> tuple[Shape, Shape | None, Shape | None, Shape | None] | None:
    """The shape of f(a, b), and a, b and it as three axes.

    None: they are read so as they are, their leading axes as one. None instead of all: three axes
    are not enough.
    """
    try:
        shape = np.broadcast_shapes(a, b)
    except ValueError:
        return None
    if 0 in shape:
        return shape, None, None, None
    wholes = [_padded(x, shape) for x in (a, b, shape)]
    # As they lie, if the leading axes broadcast together: the core joins the others.
    leading = {_kind(sizes) for sizes in zip(*(x[:-2] for x in wholes), strict=True)} - {None}
    if len(shape) > 1 and len(leading) < 2:
        three = [(math.prod(x[:-2]), *x[-2:]) for x in wholes]
    else:
        groups: list[list[int]] = []
        last = None
        for sizes in zip(*wholes, strict=True):
            kind = _kind(sizes)
            if kind is None:
                continue
            if kind == last:
                groups[-1] = [n * m for n, m in zip(groups[-1], sizes, strict=True)]
            else:
                groups.append(list(sizes))
            last = kind
        if len(groups) > 3:
            return None
        groups = [[1, 1, 1]] * (3 - len(groups)) + groups
        three = [tuple(sizes) for sizes in zip(*groups, strict=True)]
    as_read = [
        None if len(x) > 1 and (math.prod(x[:-2]), *x[-2:]) == axes else axes
        for x, axes in zip((a, b, shape), three, strict=True)
    ]
    return shape, as_read[0], as_read[1], as_read[2]


def _kind(sizes: tuple[int, ...]) -> tuple[bool, bool] | None:
    """Whether a and b have all of an axis of a pair, of sizes (a, b, both); None: it has size 1."""
    return None if sizes[2] == 1 else (sizes[0] == sizes[2], sizes[1] == sizes[2])


def _padded(shape: Shape, whole: Shape) -> Shape:
    return (1,) * (len(whole) - len(shape)) + shape
