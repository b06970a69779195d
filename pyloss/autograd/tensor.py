"""Tensor: an array whose gradient may be needed.

It has NumPy's attributes, methods and protocols. How a function computes its gradient is written
in `functions/`, which fills `UFUNCS` and `FUNCTIONS`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pyloss.autograd.scope import OPEN, local, no_grad
from pyloss.autograd.tensor_text import tensor_html, tensor_text
from pyloss.autograd.trees import tree_map

if TYPE_CHECKING:
    from pyloss.autograd.tape import Node

#: What computes each ufunc of Tensors, and each other function of NumPy.
UFUNCS: dict[np.ufunc, Callable] = {}
FUNCTIONS: dict[Callable, Callable] = {}

_WAYS = (
    "docs/experiments.md lists the functions that carry gradients; pyloss.custom_function adds "
    "one, pyloss.stop_gradient(t) makes a constant"
)


_ELSEWHERE = (
    "a value that another thread records a gradient for is used in this thread, and its gradient "
    "would be lost: compute in the thread that records, or enter pyloss.no_grad() here"
)


def refuse_elsewhere(values: Iterable[Any]) -> None:
    """TypeError for a value whose gradient another thread records."""
    for x in values:
        if type(x) is Parameter or (
            isinstance(x, Tensor) and x._node is not None and x._node.root in OPEN
        ):
            raise TypeError(_ELSEWHERE)


def carries(t: Tensor) -> bool:
    """Whether this thread records a gradient for t."""
    tape = local.tape
    if tape is None:
        if OPEN and not local.inside:
            refuse_elsewhere([t])
        return False
    return tape.node_of(t) is not None


def unchanged(x: Any) -> Any:
    """x as the result of a function that does nothing: a constant where nothing is recorded."""
    return x.data if isinstance(x, Tensor) and local.tape is None else x


def stripped(value: Any) -> Any:
    """`value` with the arrays of Tensors in place of Tensors, in lists, tuples and dicts too."""
    return tree_map(lambda x: x.data if isinstance(x, Tensor) else x, value)


def refuse_outer(x: Any) -> None:
    """TypeError for a value that is being differentiated, where an inner gradient is asked for."""
    if local.tape is not None and local.tape.node_of(x) is not None:
        raise TypeError(
            "an inner gradient is taken by a value that is being differentiated, and gradients of "
            "gradients are not computed: pyloss.stop_gradient(x) makes a constant, and so does "
            "pyloss.no_grad() around the inner function"
        )


def _refuse_out(name: str) -> TypeError:
    return TypeError(
        f"{name}(..., out=) of a Tensor would lose the gradient: use the result, y = {name}(...)"
    )


def _full_name(func: Callable) -> str:
    return f"{func.__module__}.{func.__name__}"


def _refuse_write(kind: str) -> TypeError:
    return TypeError(
        f"{kind} would change a Tensor in place, and its gradient would be lost: "
        "write t = t + x, or np.where(mask, new, t)"
    )


def _called(func: Callable, args: Any, kwargs: Any) -> Any:
    """What computes NumPy's function for Tensors; TypeError for arguments that it does not take."""
    function = FUNCTIONS[func]
    try:
        return function(*args, **kwargs)
    except TypeError:
        if _misfit(function, args, kwargs) is None:
            raise
    args, kwargs = _without_defaults(func, args, kwargs)
    error = _misfit(function, args, kwargs)
    if error is not None:
        taken = [
            p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()
        ]
        raise TypeError(
            f"{_full_name(func)} of a Tensor takes {inspect.Signature(taken)}: {error}"
        ) from None
    return function(*args, **kwargs)


def _misfit(function: Callable, args: Any, kwargs: Any) -> TypeError | None:
    """Why a function does not take these arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        return error
    return None


def _without_defaults(func: Callable, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """The arguments of NumPy's function without its defaults, such as out=None and where=True."""
    try:
        parameters = inspect.signature(func).parameters
    except ValueError:  # functions in C, before NumPy 2.4
        named, args, defaults = dict(kwargs), args, {}
    else:
        named = {**dict(zip(list(parameters)[1:], args[1:], strict=False)), **kwargs}
        args, defaults = args[:1], {name: p.default for name, p in parameters.items()}
    usual = {"out": None, "where": True}
    return args, {
        name: value
        for name, value in named.items()
        if value is not defaults.get(name, inspect.Parameter.empty)
        and value is not usual.get(name, inspect.Parameter.empty)
    }


def _by_name(name: str) -> Callable:
    """A method that calls NumPy's function of this name."""
    function = getattr(np, name)

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"`numpy.{name}` of this Tensor."
    return method


def _operator(ufunc: np.ufunc, reflected: bool = False) -> Callable:
    def method(self: Tensor, other: Any) -> Any:
        return UFUNCS[ufunc](other, self) if reflected else UFUNCS[ufunc](self, other)

    return method


def _in_place(symbol: str) -> Callable:
    def method(self: Tensor, other: Any) -> Any:
        raise _refuse_write(f"t {symbol} x")

    return method


class Tensor:
    """A traced array: functions under `value_and_grad` compute with these.

    NumPy's functions, operators and indexing carry the gradient or raise TypeError; results that
    have no gradient (comparisons, `argmax`, `np.zeros_like`) are plain arrays. `.data` is the
    ndarray, a constant.
    """

    __slots__ = ("_array", "_node")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: np.ndarray, node: Node | None = None):
        self._array = data
        self._node = node

    @property
    def data(self) -> np.ndarray:
        """The ndarray."""
        return self._array

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        """The element type."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def T(self) -> Any:
        """The transpose: all axes reversed."""
        return np.transpose(self)

    @property
    def mT(self) -> Any:
        """The transpose of the last two axes."""
        return np.swapaxes(self, -1, -2)

    # NumPy's protocols

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if carries(self):
            raise TypeError(
                f"this would make a plain array of a Tensor and lose its gradient: {_WAYS}"
            )
        # NumPy 1 knows no copy=None.
        return np.asarray(self.data, dtype) if not copy else np.array(self.data, dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if local.tape is not None:
            if kwargs:
                if kwargs.get("out") is not None:
                    raise _refuse_out(f"numpy.{ufunc.__name__}")
                if kwargs.get("where") is True:
                    del kwargs["where"]
            if method == "__call__" and not kwargs and ufunc in UFUNCS:
                return UFUNCS[ufunc](*inputs)
            if any(isinstance(x, Tensor) and carries(x) for x in inputs):
                name = ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}"
                more = f" with {', '.join(kwargs)}" if kwargs else ""
                raise TypeError(f"numpy.{name}{more} has no gradient: {_WAYS}")
        elif OPEN and not local.inside:
            refuse_elsewhere(inputs)
        return getattr(ufunc, method)(*stripped(inputs), **stripped(kwargs))

    def __array_function__(self, func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        if local.tape is None:
            if OPEN and not local.inside:
                tree_map(lambda x: refuse_elsewhere([x]), [args, kwargs])
            return func(*stripped(args), **stripped(kwargs))
        if kwargs.get("out") is not None:
            raise _refuse_out(_full_name(func))
        if func not in FUNCTIONS:
            raise TypeError(f"{_full_name(func)} has no gradient: {_WAYS}")
        return _called(func, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Only called for what a Tensor lacks."""
        if hasattr(np.ndarray, name):
            raise AttributeError(f"a Tensor has no {name!r}, which arrays have: {_WAYS}")
        raise AttributeError(f"a Tensor has no {name!r}")

    # Numbers

    def item(self, *args: Any) -> Any:
        """The value of a Tensor with one element, a constant."""
        return self.data.item(*args)

    def tolist(self) -> Any:
        """The values as lists of numbers, constants."""
        return np.asarray(self.data).tolist()

    def _number(self, kind: Callable) -> Any:
        if carries(self):
            raise TypeError(
                f"{kind.__name__}(t) would lose the gradient of a Tensor: use t.item() for a "
                "constant, or NumPy's functions (np.sqrt instead of math.sqrt)"
            )
        return kind(self.data.item())

    def __float__(self) -> float:
        return self._number(float)

    def __int__(self) -> int:
        return self._number(int)

    def __complex__(self) -> complex:
        return self._number(complex)

    def __bool__(self) -> bool:
        return bool(np.asarray(self.data))

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(
                "len() of a Tensor without dimensions: t.item() gives its number, and t.data the "
                "array for another library, both as constants"
            )
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __contains__(self, value: Any) -> bool:
        return stripped(value) in np.asarray(self.data)

    def __repr__(self) -> str:
        return tensor_text(self)

    def _repr_html_(self) -> str:
        return tensor_html(self)

    def __format__(self, spec: str) -> str:
        return format(self.data.item(), spec) if spec and self.size == 1 else str(self)

    def __copy__(self) -> Any:
        return np.copy(self)  # type: ignore[call-overload]

    def __deepcopy__(self, memo: Any) -> Any:
        return np.copy(self)  # type: ignore[call-overload]

    # Operators

    __add__, __radd__ = _operator(np.add), _operator(np.add, True)
    __sub__, __rsub__ = _operator(np.subtract), _operator(np.subtract, True)
    __mul__, __rmul__ = _operator(np.multiply), _operator(np.multiply, True)
    __truediv__, __rtruediv__ = _operator(np.divide), _operator(np.divide, True)
    __floordiv__, __rfloordiv__ = _operator(np.floor_divide), _operator(np.floor_divide, True)
    __mod__, __rmod__ = _operator(np.remainder), _operator(np.remainder, True)
    __rpow__ = _operator(np.power, True)
    __matmul__, __rmatmul__ = _operator(np.matmul), _operator(np.matmul, True)
    __lt__, __le__ = _operator(np.less), _operator(np.less_equal)
    __gt__, __ge__ = _operator(np.greater), _operator(np.greater_equal)
    __eq__ = _operator(np.equal)  # type: ignore[assignment]
    __ne__ = _operator(np.not_equal)  # type: ignore[assignment]
    __iadd__, __isub__, __imul__ = _in_place("+="), _in_place("-="), _in_place("*=")
    __itruediv__, __ifloordiv__ = _in_place("/="), _in_place("//=")
    __imod__, __ipow__, __imatmul__ = _in_place("%="), _in_place("**="), _in_place("@=")

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        if modulus is not None:
            raise TypeError("pow() of a Tensor takes no modulus: write t ** x % modulus")
        return UFUNCS[np.power](self, other)

    def __neg__(self) -> Any:
        return UFUNCS[np.negative](self)

    def __pos__(self) -> Any:
        return UFUNCS[np.positive](self)

    def __abs__(self) -> Any:
        return UFUNCS[np.absolute](self)

    def __getitem__(self, index: Any) -> Any:
        return FUNCTIONS[Tensor.__getitem__](self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _refuse_write("t[...] = x")

    # Methods

    sum, mean, prod, clip = _by_name("sum"), _by_name("mean"), _by_name("prod"), _by_name("clip")
    var, std, cumsum = _by_name("var"), _by_name("std"), _by_name("cumsum")
    max, min, any, all = _by_name("max"), _by_name("min"), _by_name("any"), _by_name("all")
    argmax, argmin, argsort = _by_name("argmax"), _by_name("argmin"), _by_name("argsort")
    ravel, squeeze, swapaxes = _by_name("ravel"), _by_name("squeeze"), _by_name("swapaxes")
    take, repeat, dot = (
        _by_name("take"),
        _by_name("repeat"),
        _by_name("dot"),
    )
    diagonal, trace, round = _by_name("diagonal"), _by_name("trace"), _by_name("round")
    nonzero, copy = _by_name("nonzero"), _by_name("copy")
    flatten = ravel

    def reshape(self, *shape: Any, order: Any = "C") -> Any:
        """The same elements in another shape."""
        return np.reshape(self, shape[0] if len(shape) == 1 else shape, order)  # type: ignore[call-overload]

    def transpose(self, *axes: Any) -> Any:
        """The axes in another order; all reversed by default."""
        order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        return np.transpose(self, order or None)

    def astype(self, dtype: Any, copy: bool = True) -> Any:
        """The values in another type; for a type that is not real, a plain array."""
        return FUNCTIONS[Tensor.astype](self, dtype)

    def detach(self) -> np.ndarray:
        """The array, a constant to the tape; a view that cannot be written to."""
        array = self.data
        if isinstance(array, np.ndarray):
            array = array.view()
            array.flags.writeable = False
        return array


class Parameter(Tensor):
    """A trained array of a module while a function is differentiated.

    Each thread's tape finds its leaf by the identity of the array.
    """

    __slots__ = ()


class LazyTensor(Tensor):
    """A Tensor that computes its data when they are first read.

    Backward does not read the data of a loss, so the core computes a loss and its gradient in one
    call.
    """

    __slots__ = ("_compute", "_dtype", "_shape")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, compute: Callable[[], np.ndarray]):
        self._compute: Callable[[], np.ndarray] | None = compute
        self._shape, self._dtype = shape, dtype
        self._node = None

    @property
    def data(self) -> np.ndarray:
        if self._compute is not None:
            with no_grad():
                self.set_data(self._compute())
        return self._array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    def set_data(self, data: np.ndarray) -> None:
        """Sets the data, when backward has computed them already."""
        self._array, self._compute = data, None
