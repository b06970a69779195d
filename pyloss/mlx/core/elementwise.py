"""MLX's functions of single elements."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss import autograd
from pyloss.autograd.functions.activations import _erf
from pyloss.autograd.functions.apply import apply
from pyloss.autograd.tape import recording
from pyloss.autograd.tensor import Tensor
from pyloss.mlx.core.arrays import array, call, cast, of, promoted, raw, result
from pyloss.mlx.core.dtypes import float32

_STREAM = inspect.Parameter("stream", inspect.Parameter.KEYWORD_ONLY, default=None)


def _signature(*names: str) -> inspect.Signature:
    given = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
    return inspect.Signature([*given, _STREAM])


def _unary(name: str, ufunc: np.ufunc, floats: bool, text: str) -> Callable[..., array]:
    def function(a: Any, /, *, stream: Any = None) -> array:
        return call(ufunc, *promoted(a, floats=floats))

    return _named(function, name, text, "a")


def _binary(name: str, ufunc: np.ufunc, floats: bool, text: str) -> Callable[..., array]:
    def function(a: Any, b: Any, *, stream: Any = None) -> array:
        return call(ufunc, *promoted(a, b, floats=floats))

    return _named(function, name, text, "a", "b")


def _named(function: Callable, name: str, text: str, *names: str) -> Callable:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = text
    function.__signature__ = _signature(*names)  # type: ignore[attr-defined]
    return function


exp = _unary("exp", np.exp, True, "e to the power of a.")
expm1 = _unary("expm1", np.expm1, True, "exp(a) - 1.")
log = _unary("log", np.log, True, "The natural logarithm.")
log2 = _unary("log2", np.log2, True, "The logarithm to base 2.")
log10 = _unary("log10", np.log10, True, "The logarithm to base 10.")
log1p = _unary("log1p", np.log1p, True, "log(1 + a).")
sqrt = _unary("sqrt", np.sqrt, True, "The square root.")
sin = _unary("sin", np.sin, True, "The sine.")
cos = _unary("cos", np.cos, True, "The cosine.")
tan = _unary("tan", np.tan, True, "The tangent.")
arcsin = asin = _unary("arcsin", np.arcsin, True, "The inverse sine.")
arccos = acos = _unary("arccos", np.arccos, True, "The inverse cosine.")
arctan = atan = _unary("arctan", np.arctan, True, "The inverse tangent.")
sinh = _unary("sinh", np.sinh, True, "The hyperbolic sine.")
cosh = _unary("cosh", np.cosh, True, "The hyperbolic cosine.")
tanh = _unary("tanh", np.tanh, True, "The hyperbolic tangent.")
arcsinh = asinh = _unary("arcsinh", np.arcsinh, True, "The inverse hyperbolic sine.")
arccosh = acosh = _unary("arccosh", np.arccosh, True, "The inverse hyperbolic cosine.")
arctanh = atanh = _unary("arctanh", np.arctanh, True, "The inverse hyperbolic tangent.")
degrees = _unary("degrees", np.degrees, True, "From radians to degrees.")
radians = _unary("radians", np.radians, True, "From degrees to radians.")
reciprocal = _unary("reciprocal", np.reciprocal, True, "1 / a.")
square = _unary("square", np.square, False, "a * a.")
abs = _unary("abs", np.absolute, False, "The absolute value.")
negative = _unary("negative", np.negative, False, "-a.")
positive = _unary("positive", np.positive, False, "a.")
sign = _unary("sign", np.sign, False, "-1, 0 or 1; it has no gradient.")
floor = _unary("floor", np.floor, False, "The next whole number below; it has no gradient.")
ceil = _unary("ceil", np.ceil, False, "The next whole number above; it has no gradient.")
trunc = _unary("trunc", np.trunc, False, "The whole part; it has no gradient.")
isnan = _unary("isnan", np.isnan, False, "Whether an element is NaN.")
isinf = _unary("isinf", np.isinf, False, "Whether an element is infinite.")
isfinite = _unary("isfinite", np.isfinite, False, "Whether an element is neither.")
logical_not = _unary("logical_not", np.logical_not, False, "Whether an element is 0.")
conjugate = conj = _unary("conjugate", np.conjugate, False, "a, of real numbers.")

add = _binary("add", np.add, False, "a + b.")
subtract = _binary("subtract", np.subtract, False, "a - b.")
multiply = _binary("multiply", np.multiply, False, "a * b.")
divide = _binary("divide", np.divide, True, "a / b; of whole numbers in float32.")
floor_divide = _binary("floor_divide", np.floor_divide, False, "The whole part of a / b.")
remainder = _binary("remainder", np.remainder, False, "The rest of a / b, with b's sign.")
maximum = _binary("maximum", np.maximum, False, "The larger one; NaN if any is NaN.")
minimum = _binary("minimum", np.minimum, False, "The smaller one; NaN if any is NaN.")
logaddexp = _binary("logaddexp", np.logaddexp, True, "log(exp(a) + exp(b)).")
arctan2 = atan2 = _binary("arctan2", np.arctan2, True, "The angle of the point (b, a).")
equal = _binary("equal", np.equal, False, "a == b.")
not_equal = _binary("not_equal", np.not_equal, False, "a != b.")
less = _binary("less", np.less, False, "a < b.")
less_equal = _binary("less_equal", np.less_equal, False, "a <= b.")
greater = _binary("greater", np.greater, False, "a > b.")
greater_equal = _binary("greater_equal", np.greater_equal, False, "a >= b.")
logical_and = _binary("logical_and", np.logical_and, False, "Whether neither is 0.")
logical_or = _binary("logical_or", np.logical_or, False, "Whether any is not 0.")
logical_xor = _binary("logical_xor", np.logical_xor, False, "Whether one of the two is 0.")


def power(a: Any, b: Any, /, *, stream: Any = None) -> array:
    """a to the power of b."""
    x, y = promoted(a, b)
    return call(np.power, x, y)


pow = power


def divmod(a: Any, b: Any, stream: Any = None) -> tuple[array, array]:
    """The whole part of a / b, and the rest."""
    return floor_divide(a, b), remainder(a, b)


def rsqrt(a: Any, /, *, stream: Any = None) -> array:
    """1 / sqrt(a)."""
    return reciprocal(sqrt(a))


def sigmoid(a: Any, /, *, stream: Any = None) -> array:
    """1 / (1 + exp(-a))."""
    return in_float32(autograd.functions.sigmoid, a)


def in_float32(function: Callable, a: Any, **options: Any) -> array:
    """A function of floats, of halves in float32 and rounded back."""
    (x,) = promoted(a, floats=True)
    kind = x.dtype
    if kind.itemsize == 2:
        return of(cast(function(cast(x, float32), **options), kind))
    return result(function(x, **options))


def erf(a: Any, /, *, stream: Any = None) -> array:
    """The error function."""
    (x,) = promoted(a, floats=True)
    slope = 2 / math.sqrt(math.pi)
    return result(
        apply(
            lambda xd: _erf(xd).astype(xd.dtype),
            (x,),
            lambda i, dy, y, xd: dy * (slope * np.exp(-xd * xd)),
            "0",
        )
    )


def round(a: Any, /, decimals: int = 0, stream: Any = None) -> array:
    """The nearest number with so many decimals, halves to even ones; it has no gradient."""
    (x,) = promoted(a)
    return call(np.round, x, decimals)


def isposinf(a: Any, stream: Any = None) -> array:
    """Whether an element is inf."""
    return equal(a, math.inf)


def isneginf(a: Any, stream: Any = None) -> array:
    """Whether an element is -inf."""
    return equal(a, -math.inf)


def where(condition: Any, x: Any, y: Any, /, *, stream: Any = None) -> array:
    """x where the condition holds, else y."""
    mask = raw(condition)
    mask = mask if hasattr(mask, "dtype") else np.asarray(mask)
    a, b = promoted(x, y)
    return call(np.where, mask, a, b)


def clip(a: Any, /, a_min: Any, a_max: Any, *, stream: Any = None) -> array:
    """Bounded below and above; None for no bound."""
    found = [a, *(bound for bound in (a_min, a_max) if bound is not None)]
    values = iter(promoted(*found))
    x = next(values)
    low = None if a_min is None else next(values)
    return call(np.clip, x, low, None if a_max is None else next(values))


def nan_to_num(
    a: Any,
    nan: float = 0,
    posinf: float | None = None,
    neginf: float | None = None,
    *,
    stream: Any = None,
) -> array:
    """Other numbers for NaN and infinities: 0 and the type's largest."""
    (x,) = promoted(a)
    return call(np.nan_to_num, x, nan=nan, posinf=posinf, neginf=neginf)


def _bits(name: str, ufunc: np.ufunc, text: str) -> Callable[..., array]:
    def function(a: Any, b: Any, *, stream: Any = None) -> array:
        x, y = (constant(v, name) for v in promoted(a, b))
        return result(ufunc(x, y))

    return _named(function, name, text, "a", "b")


def constant(x: Any, name: str) -> Any:
    """The array of a value without a gradient; TypeError for one that carries it."""
    if isinstance(x, Tensor) and recording(x):
        raise TypeError(
            f"mx.{name} has no gradient here: take it of mx.stop_gradient(x), or write it with "
            "functions that have one (docs/coming_from_mlx.md lists them)"
        )
    return x.data if isinstance(x, Tensor) else x


bitwise_and = _bits("bitwise_and", np.bitwise_and, "a & b.")
bitwise_or = _bits("bitwise_or", np.bitwise_or, "a | b.")
bitwise_xor = _bits("bitwise_xor", np.bitwise_xor, "a ^ b.")
left_shift = bitwise_left_shift = _bits("left_shift", np.left_shift, "a << b.")
right_shift = bitwise_right_shift = _bits("right_shift", np.right_shift, "a >> b.")


def bitwise_invert(a: Any, stream: Any = None) -> array:
    """All bits inverted."""
    return result(np.invert(constant(raw(a), "bitwise_invert")))


def real(a: Any, /, *, stream: Any = None) -> array:
    """a, of real numbers."""
    return result(np.real(constant(raw(a), "real"))) if raw(a).dtype.kind == "c" else positive(a)


def imag(a: Any, /, *, stream: Any = None) -> array:
    """The imaginary part."""
    return result(np.imag(constant(raw(a), "imag")).copy())
