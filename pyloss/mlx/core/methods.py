"""The methods and operators of `array`: MLX's functions of the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss.mlx.core import elementwise, products, reductions, shaping
from pyloss.mlx.core.arrays import array, cast, of, promoted, raw, recorded

#: Methods that are a function of the same name, with the array as the first argument.
_METHODS: dict[Any, tuple[str, ...]] = {
    elementwise: (
        "abs", "conj", "cos", "exp", "log", "log10", "log1p", "log2", "reciprocal", "round",
        "rsqrt", "sin", "sqrt", "square",
    ),
    reductions: (
        "all", "any", "argmax", "argmin", "cummax", "cummin", "cumprod", "cumsum", "logcumsumexp",
        "logsumexp", "max", "mean", "min", "prod", "std", "sum", "var",
    ),
    shaping: ("diag", "diagonal", "flatten", "moveaxis", "split", "squeeze", "swapaxes", "view"),
}  # fmt: skip


def _method(function: Callable, name: str) -> Callable:
    def method(self: array, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f"`mx.{name}` of this array."
    return method


def _operator(function: Callable, reflected: bool = False) -> Callable:
    def method(self: array, other: Any) -> Any:
        if not isinstance(other, array | bool | int | float | complex | np.generic):
            return NotImplemented
        return function(other, self) if reflected else function(self, other)

    return method


def _in_place(function: Callable) -> Callable:
    def method(self: array, other: Any) -> array:
        found = function(self, other)
        if found.shape != self.shape:
            raise ValueError(
                f"an array of shape {self.shape} cannot become one of shape {found.shape} in place"
            )
        self._set(raw(found))
        return self

    return method


def reshape(self: array, *shape: Any, stream: Any = None) -> array:
    """The same elements in another shape."""
    sizes: Any = shape[0] if len(shape) == 1 and np.iterable(shape[0]) else shape
    return shaping.reshape(self, sizes)


def transpose(self: array, *axes: Any, stream: Any = None) -> array:
    """The axes in another order; all reversed by default."""
    order = axes[0] if len(axes) == 1 and np.iterable(axes[0]) else axes
    return shaping.transpose(self, tuple(order) or None)


def astype(self: array, dtype: Any, stream: Any = None) -> array:
    """The values in another type."""
    return of(cast(recorded(self._value), np.dtype(dtype)))


def power(self: array, other: Any, modulus: Any = None) -> Any:
    """a ** b."""
    return elementwise.power(self, other)


def equal(self: array, other: Any) -> Any:
    """a == b; False for what is no number or array."""
    known = isinstance(other, array | bool | int | float | complex | np.generic)
    return elementwise.equal(self, other) if known else False


def not_equal(self: array, other: Any) -> Any:
    """a != b; True for what is no number or array."""
    known = isinstance(other, array | bool | int | float | complex | np.generic)
    return elementwise.not_equal(self, other) if known else True


def tolist(self: array) -> Any:
    """The values as lists of Python's numbers."""
    values = np.asarray(self.data)
    return (values.astype(np.float32) if values.dtype.kind == "V" else values).tolist()


_OPERATORS: dict[str, Callable] = {
    "add": elementwise.add, "sub": elementwise.subtract, "mul": elementwise.multiply,
    "truediv": elementwise.divide, "floordiv": elementwise.floor_divide,
    "mod": elementwise.remainder, "matmul": products.matmul, "pow": power,
    "and": elementwise.bitwise_and, "or": elementwise.bitwise_or, "xor": elementwise.bitwise_xor,
    "lshift": elementwise.left_shift, "rshift": elementwise.right_shift,
}  # fmt: skip
_COMPARISONS: dict[str, Callable] = {
    "lt": elementwise.less, "le": elementwise.less_equal, "gt": elementwise.greater,
    "ge": elementwise.greater_equal,
}  # fmt: skip


def install() -> None:
    """Gives `array` its methods."""
    for module, names in _METHODS.items():
        for name in names:
            setattr(array, name, _method(getattr(module, name), name))
    for name, function in _OPERATORS.items():
        if name != "pow":
            setattr(array, f"__{name}__", _operator(function))
        setattr(array, f"__r{name}__", _operator(function, reflected=True))
        setattr(array, f"__i{name}__", _in_place(function))
    for name, function in _COMPARISONS.items():
        setattr(array, f"__{name}__", _operator(function))
    more = {
        "__pow__": power,
        "__eq__": equal,
        "__ne__": not_equal,
        "__neg__": lambda self: elementwise.negative(self),
        "__pos__": lambda self: elementwise.positive(self),
        "__abs__": lambda self: elementwise.abs(self),
        "__invert__": _inverted,
        "__rpow__": lambda self, other: elementwise.power(other, self),
        "reshape": reshape,
        "transpose": transpose,
        "astype": astype,
        "tolist": tolist,
        "T": property(lambda self: shaping.transpose(self), doc="All axes reversed."),
        "mT": property(lambda self: shaping.swapaxes(self, -1, -2), doc="Matrices transposed."),
        "at": property(shaping.ArrayAt, doc="`a.at[index].add(v)`, see `ArrayAt`."),
        "real": property(lambda self: elementwise.real(self), doc="The real part."),
        "imag": property(lambda self: elementwise.imag(self), doc="The imaginary part."),
    }
    for name, value in more.items():
        setattr(array, name, value)


def _inverted(self: array) -> array:
    (x,) = promoted(self)
    return elementwise.logical_not(x) if x.dtype.kind == "b" else elementwise.bitwise_invert(x)
