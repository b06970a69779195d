"""NumPy's functions of single elements, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyloss.arithmetic import (
    BINARY,
    GRADIENT_READS,
    binary,
    scaled,
    unary,
    unary_grad,
    where as core_where,
)
from pyloss.autograd.functions.apply import apply, constant, implements, operand, value_of
from pyloss.autograd.tape import recording
from pyloss.autograd.tensor import FUNCTIONS, Tensor

#: The core's names of its functions of one array.
_IN_CORE: dict[Any, str] = {
    np.exp: "exp", np.expm1: "expm1", np.log: "log", np.log1p: "log1p", np.sqrt: "sqrt",
    np.square: "square", np.reciprocal: "reciprocal", np.absolute: "absolute", np.tanh: "tanh",
}  # fmt: skip


def times(a: Any, b: Any) -> Any:
    """a * b, in the core where it can."""
    found = binary("multiply", a, b)
    return a * b if found is None else found


def negated(a: Any) -> Any:
    """-a, in the core where it can."""
    found = scaled(a, -1.0)
    return -a if found is None else found


def _unary(ufunc: np.ufunc, slope: Callable[[Any, Any], Any], reads: str) -> None:
    """Registers a function of one array; `slope(x, y)` is its derivative."""

    name = _IN_CORE.get(ufunc)
    if name is not None:
        reads = {"x": "0", "y": "y"}[GRADIENT_READS[name]]

    def value(xd: Any) -> Any:
        found = None if name is None else unary(name, xd)
        return ufunc(xd) if found is None else found

    def gradient(i: int, dy: Any, y: Any, xd: Any) -> Any:
        found = None if name is None else unary_grad(name, dy, xd if y is None else y)
        return dy * slope(xd, y) if found is None else found

    def computed(x: Any) -> Any:
        x = operand(x)
        return apply(
            value,
            (x,),
            gradient,
            reads,
            lambda: (np.shape(x) if not isinstance(x, Tensor) else x.shape, _type(ufunc, x)),
        )

    implements(ufunc)(computed)


def _binary(
    ufunc: np.ufunc,
    slopes: tuple[Callable[..., Any], Callable[..., Any]],
    reads: str | Sequence[str],
) -> None:
    """Registers a function of two arrays; `slopes[i](dy, a, b, y)` is dy times a derivative."""

    name = ufunc.__name__ if ufunc.__name__ in BINARY else None

    def value(ad: Any, bd: Any) -> Any:
        found = None if name is None else binary(name, ad, bd)
        return ufunc(ad, bd) if found is None else found

    def computed(a: Any, b: Any) -> Any:
        a, b = operand(a), operand(b)
        return apply(
            value,
            (a, b),
            lambda i, dy, y, ad, bd: slopes[i](dy, ad, bd, y),
            reads,
            lambda: (np.broadcast_shapes(_shape(a), _shape(b)), _type(ufunc, a, b)),
        )

    implements(ufunc)(computed)


def _shape(x: Any) -> tuple[int, ...]:
    return x.shape if isinstance(x, Tensor) else np.shape(x)


def _type(ufunc: np.ufunc, *inputs: Any) -> np.dtype:
    small = [np.ones((1,) * len(_shape(x)), x.dtype) if hasattr(x, "dtype") else x for x in inputs]
    return np.asarray(ufunc(*small)).dtype


LN2, LN10 = float(np.log(2)), float(np.log(10))

for _ufunc, _slope, _reads in [
    (np.negative, lambda x, y: -1, ""),
    (np.positive, lambda x, y: 1, ""),
    (np.conjugate, lambda x, y: 1, ""),
    (np.absolute, lambda x, y: np.sign(x), "0"),
    (np.fabs, lambda x, y: np.sign(x), "0"),
    (np.square, lambda x, y: 2 * x, "0"),
    (np.reciprocal, lambda x, y: -y * y, "y"),
    (np.sqrt, lambda x, y: 0.5 / y, "y"),
    (np.cbrt, lambda x, y: 1 / (3 * y * y), "y"),
    (np.exp, lambda x, y: y, "y"),
    (np.exp2, lambda x, y: y * LN2, "y"),
    (np.expm1, lambda x, y: np.exp(x), "0"),
    (np.log, lambda x, y: 1 / x, "0"),
    (np.log2, lambda x, y: 1 / (x * LN2), "0"),
    (np.log10, lambda x, y: 1 / (x * LN10), "0"),
    (np.log1p, lambda x, y: 1 / (1 + x), "0"),
    (np.sin, lambda x, y: np.cos(x), "0"),
    (np.cos, lambda x, y: -np.sin(x), "0"),
    (np.tan, lambda x, y: 1 + y * y, "y"),
    (np.arcsin, lambda x, y: 1 / np.sqrt(1 - x * x), "0"),
    (np.arccos, lambda x, y: -1 / np.sqrt(1 - x * x), "0"),
    (np.arctan, lambda x, y: 1 / (1 + x * x), "0"),
    (np.sinh, lambda x, y: np.cosh(x), "0"),
    (np.cosh, lambda x, y: np.sinh(x), "0"),
    (np.tanh, lambda x, y: 1 - y * y, "y"),
    (np.arcsinh, lambda x, y: 1 / np.sqrt(x * x + 1), "0"),
    (np.arccosh, lambda x, y: 1 / np.sqrt(x * x - 1), "0"),
    (np.arctanh, lambda x, y: 1 / (1 - x * x), "0"),
    (np.deg2rad, lambda x, y: np.pi / 180, ""),
    (np.radians, lambda x, y: np.pi / 180, ""),
    (np.rad2deg, lambda x, y: 180 / np.pi, ""),
    (np.degrees, lambda x, y: 180 / np.pi, ""),
]:
    _unary(_ufunc, _slope, _reads)


def _share(mine: Any, other: Any, y: Any, largest: bool | None = None) -> Any:
    """The share of a maximum's or minimum's gradient; equal values have half each.

    `largest` lets the core compute it, for functions that give NaN for NaN.
    """
    if largest is not None:
        found = binary("above", *((mine, other) if largest else (other, mine)))
        if found is not None:
            return found
    return np.where(mine == y, np.where(other == y, 0.5, 1.0), 0.0).astype(np.float32)


def _power_by_base(dy: Any, a: Any, b: Any, y: Any) -> Any:
    if isinstance(b, int | float):
        return dy * (b * a ** (b - 1)) if b else np.zeros_like(dy)
    return dy * (b * a ** np.where(np.equal(b, 0), 1, np.subtract(b, 1)))


def _power_by_exponent(dy: Any, a: Any, b: Any, y: Any) -> Any:
    logs = np.log(np.where(np.equal(a, 0), 1, a))  # 0 ** b is flat
    return dy * (y * np.asarray(logs, y.dtype))


for _two, _slopes, _by in [
    (np.add, (lambda dy, a, b, y: dy, lambda dy, a, b, y: dy), ""),
    (np.subtract, (lambda dy, a, b, y: dy, lambda dy, a, b, y: negated(dy)), ""),
    (np.multiply, (lambda dy, a, b, y: times(dy, b), lambda dy, a, b, y: times(dy, a)), ("1", "0")),
    (
        np.divide,
        (lambda dy, a, b, y: dy / b, lambda dy, a, b, y: negated(times(dy, y) / b)),
        ("1", "1y"),
    ),
    (np.power, (_power_by_base, _power_by_exponent), "01y"),
    (np.float_power, (_power_by_base, _power_by_exponent), "01y"),
    (
        np.remainder,
        (lambda dy, a, b, y: dy, lambda dy, a, b, y: -dy * np.floor_divide(a, b)),
        "01",
    ),
    (
        np.fmod,
        (lambda dy, a, b, y: dy, lambda dy, a, b, y: -dy * np.trunc(np.divide(a, b))),
        "01",
    ),
    (
        np.hypot,
        (lambda dy, a, b, y: dy * (a / y), lambda dy, a, b, y: dy * (b / y)),
        "01y",
    ),
    (
        np.arctan2,
        (
            lambda dy, a, b, y: dy * (b / (a * a + b * b)),
            lambda dy, a, b, y: -dy * (a / (a * a + b * b)),
        ),
        "01",
    ),
    (
        np.logaddexp,
        (lambda dy, a, b, y: dy * np.exp(a - y), lambda dy, a, b, y: dy * np.exp(b - y)),
        "01y",
    ),
    (
        np.logaddexp2,
        (lambda dy, a, b, y: dy * np.exp2(a - y), lambda dy, a, b, y: dy * np.exp2(b - y)),
        "01y",
    ),
    *(
        (
            extreme,
            (
                lambda dy, a, b, y, largest=largest: times(dy, _share(a, b, y, largest)),
                lambda dy, a, b, y, largest=largest: times(dy, _share(b, a, y, largest)),
            ),
            "01y",
        )
        for extreme, largest in (
            (np.maximum, True),
            (np.minimum, False),
            (np.fmax, None),
            (np.fmin, None),
        )
    ),
]:
    _binary(_two, _slopes, _by)

constant(
    np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal,
    np.logical_and, np.logical_or, np.logical_xor, np.logical_not,
    np.isnan, np.isinf, np.isfinite, np.signbit, np.sign,
    np.floor, np.ceil, np.trunc, np.rint, np.floor_divide,
    np.round, np.around, np.fix,
)  # fmt: skip


@implements(np.heaviside)
def heaviside(x1: Any, x2: Any) -> Any:
    """Of x1 it has no gradient; x2 has one where it is chosen."""
    x, y = value_of(operand(x1)), operand(x2)
    if not recording(y):
        return np.heaviside(x, value_of(y))
    return where(np.equal(x, 0), y, np.heaviside(x, np.zeros((), y.dtype)))


@implements(np.where)
def where(condition: Any, x: Any = None, y: Any = None) -> Any:
    if x is None or y is None:
        return np.where(value_of(operand(condition)))
    mask = np.asarray(value_of(operand(condition))).astype(bool)
    a, b = operand(x), operand(y)
    return apply(
        lambda ad, bd: chosen(mask, ad, bd),
        (a, b),
        lambda i, dy, out, *unread: chosen(mask, dy, 0) if i == 0 else chosen(mask, 0, dy),
    )


def chosen(mask: Any, a: Any, b: Any) -> Any:
    """np.where, in the core where it can."""
    found = core_where(mask, a, b)
    return np.where(mask, a, b) if found is None else found


@implements(np.clip)
def clip(a: Any, a_min: Any = None, a_max: Any = None, *, min: Any = None, max: Any = None) -> Any:
    low, high = (a_min if min is None else min), (a_max if max is None else max)
    if low is None and high is None:
        return copy(a)
    for bound, ufunc in ((low, np.maximum), (high, np.minimum)):
        if isinstance(bound, Tensor) or recording(bound):
            a = ufunc(a, bound)
        elif bound is not None:
            a = _bounded(a, bound, ufunc)
    return a


def _bounded(a: Any, bound: Any, ufunc: np.ufunc) -> Any:
    """A maximum or minimum with a constant; a value on the bound keeps its whole gradient."""
    return apply(
        ufunc,
        (operand(a), operand(bound)),
        lambda i, dy, y, ad, bd: np.where(ad == y, dy, 0),
        "0y",
    )


@implements(np.nan_to_num)
def nan_to_num(
    x: Any, copy: bool = True, nan: float = 0.0, posinf: Any = None, neginf: Any = None
) -> Any:
    return apply(
        lambda xd: np.nan_to_num(xd, nan=nan, posinf=posinf, neginf=neginf),
        (operand(x),),
        lambda i, dy, y, xd: np.where(np.isfinite(xd), dy, 0),
        "0",
    )


@implements(Tensor.astype)
def astype(x: Any, dtype: Any) -> Any:
    wanted = np.dtype(dtype)
    if wanted.kind not in "fiubV" and recording(x):
        raise TypeError(f"a value of type {wanted} has no gradient: use stop_gradient(t) first")
    if wanted.kind not in "fV":
        return np.asarray(value_of(x)).astype(wanted)
    return apply(lambda xd: xd.astype(wanted), (x,), lambda i, dy, y, xd: dy)


if hasattr(np, "astype"):
    FUNCTIONS[np.astype] = lambda x, dtype, copy=True, device=None: astype(x, dtype)


@implements(np.copy)
def copy(a: Any, order: str = "K", subok: bool = False) -> Any:
    return apply(np.copy, (operand(a),), lambda i, dy, y, xd: dy)


@implements(np.real)
def real(val: Any) -> Any:
    return val
