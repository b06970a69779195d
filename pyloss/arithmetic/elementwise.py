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
_BOOL = np.dtype(np.bool_)
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
    shape, (axes_a, axes_b), axes = plan
    y = empty(shape, a)
    if 0 in shape:
        return y
    function(
        a if axes_a is None else a.reshape(axes_a),
        b if axes_b is None else b.reshape(axes_b),
        y if axes is None else y.reshape(axes),
    )
    return y


def where(mask: Any, a: Any, b: Any) -> Any:
    """a where the mask, an array of bools, is True, else b; None: use NumPy.

    The shapes broadcast as in `binary`. a and b are float32 arrays; one or both may be numbers,
    which become float32. On devices the mask is an array of uint8, and a and b are arrays.
    """
    if type(mask) is np.ndarray:
        if mask.dtype is not _BOOL or not mask.flags.carray:
            return None
        mask = mask.view(np.uint8)
        a, b = (np.array(x, FLOAT32) if isinstance(x, _SCALARS) else x for x in (a, b))
    elif getattr(mask, "kind", None) != "u8":
        return None
    if not (is_f32(a) and is_f32(b)) or not type(mask) is type(a) is type(b):
        return None
    plan = broadcast_plan(mask.shape, a.shape, b.shape)
    if plan is None:
        return None
    shape, operands, axes = plan
    y = empty(shape, a)
    if 0 in shape:
        return y
    _core.select(
        *(
            x if three is None else x.reshape(three)
            for x, three in zip((mask, a, b), operands, strict=True)
        ),
        y if axes is None else y.reshape(axes),
    )
    return y


@lru_cache(maxsize=1024)
def broadcast_plan(*shapes: Shape) -> tuple[Shape, tuple[Shape | None, ...], Shape | None] | None:
    """The shape that the shapes broadcast to; each of them, and this shape, as three axes.

    None instead of three axes: the core reads the array so as it is, its leading axes as one. None
    instead of all: three axes are not enough.
    """
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError:
        return None
    if 0 in shape:
        return shape, (None,) * len(shapes), None
    wholes = [_padded(x, shape) for x in (*shapes, shape)]
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
        groups = [[1] * len(wholes)] * (3 - len(groups)) + groups
        three = [tuple(sizes) for sizes in zip(*groups, strict=True)]
    as_read = tuple(
        None if len(x) > 1 and (math.prod(x[:-2]), *x[-2:]) == axes else axes
        for x, axes in zip((*shapes, shape), three, strict=True)
    )
    return shape, as_read[:-1], as_read[-1]


def _kind(sizes: tuple[int, ...]) -> tuple[bool, ...] | None:
    """Which of the operands have all of an axis, of sizes (operands..., result).

    None: it has size 1.
    """
    return None if sizes[-1] == 1 else tuple(n == sizes[-1] for n in sizes[:-1])


def _padded(shape: Shape, whole: Shape) -> Shape:
    return (1,) * (len(whole) - len(shape)) + shape
