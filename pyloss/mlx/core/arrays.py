"""`array`: MLX's class of arrays, over an ndarray or a value that a tape records.

It is a `pyloss.Tensor`, so that pyloss's functions and layers take it as it is and gradients flow
through it. It is no subclass of ndarray, because MLX's semantics differ from NumPy's in ways that
training scripts notice: `a += b` and `a[i] = b` are allowed while gradients are recorded and never
change memory that another array shares, an int32 array times a float is float32, and an element is
an array. `isinstance(x, mx.array)` also holds for ndarrays and other Tensors, which every function
here takes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from pyloss.autograd.functions.apply import apply
from pyloss.autograd.scope import local
from pyloss.autograd.tensor import FUNCTIONS, UFUNCS, Parameter, Tensor
from pyloss.mlx.core import dtypes
from pyloss.runtime.device import is_bfloat16


class _ArrayType(type):
    """ndarrays and Tensors are instances of `array`, as MLX's code asks before it uses one."""

    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, Tensor | np.ndarray) or hasattr(type(x), "__mlx_array__")


#: The `array` that stands for a module's parameter, by the identity of the parameter's ndarray, as
#: long as somebody holds it; see `keep_values`.
_SHARED: weakref.WeakValueDictionary[int, array] = weakref.WeakValueDictionary()


class array(Tensor, metaclass=_ArrayType):
    """An array with MLX's methods, operators and types.

    `array(values, dtype=None)` makes one of a number, lists or an array; floats become float32
    and Python's whole numbers int32, as in MLX. NumPy reads it (`numpy.array(a)`).
    """

    __slots__ = ("__weakref__", "_home", "_value")
    _value: Any
    _home: Callable[[array], None] | None

    def __init__(self, val: Any, dtype: Any = None):
        self._home = None
        self._value = _new(val, dtype)

    # What pyloss reads of a Tensor.

    @property
    def data(self) -> Any:
        """The ndarray."""
        return self._value.data if isinstance(self._value, Tensor) else self._value

    @property
    def _array(self) -> Any:  # type: ignore[override]
        return self.data

    @property
    def _node(self) -> Any:  # type: ignore[override]
        return self._value._node if isinstance(self._value, Tensor) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return self._value.shape

    @property
    def dtype(self) -> np.dtype:
        """The element type."""
        return self._value.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.itemsize

    # Python's protocols

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __reduce__(self) -> Any:
        return array, (np.array(self.data),)

    def __copy__(self) -> array:
        return of(self._value)

    def __deepcopy__(self, memo: Any) -> array:
        return of(np.array(self.data))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # A copy: memory of parameters changes with an update, an array's values do not.
        return np.array(Tensor.__array__(self, dtype))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        given = tuple(raw(x) if type(x) is array else x for x in inputs)
        if method == "__call__" and not kwargs and ufunc in UFUNCS:
            return result(UFUNCS[ufunc](*promoted(*given)))
        return result(super().__array_ufunc__(ufunc, method, *inputs, **kwargs))

    def __repr__(self) -> str:
        values = np.asarray(self.data)
        if is_bfloat16(values.dtype):
            values = values.astype(np.float32)
        body = np.array2string(
            values,
            separator=", ",
            prefix="array(",
            threshold=100,
            formatter={"float_kind": lambda x: f"{x:.6g}"},
        )
        return f"array({body}, dtype={self.dtype})"

    def __format__(self, spec: str) -> str:
        if spec and self.size != 1:
            raise TypeError(f"the format {spec!r} is for an array of one element, not {self.shape}")
        return format(self.item(), spec) if spec else str(self)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return np.array(Tensor.__array__(self)).__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return np.empty(0).__dlpack_device__()

    def __index__(self) -> int:
        return self.item().__index__()

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without dimensions: a.item() gives its number")
        return self.shape[0]

    def item(self, *args: Any) -> Any:
        """The value of an array with one element, a Python number."""
        found = self.data.item(*args)
        return float(found) if is_bfloat16(self.dtype) else found

    def __getitem__(self, index: Any) -> Any:
        where = tree_raw(index)
        if isinstance(self._value, Tensor):
            return of(FUNCTIONS[Tensor.__getitem__](self._value, where))
        return result(self._value[where], (self._value,))

    def __setitem__(self, index: Any, value: Any) -> None:
        self._set(placed(self._value, tree_raw(index), value))

    def _set(self, value: Any) -> None:
        """Becomes another value; so does the attribute of a module that this stands for."""
        self._value = raw(value)
        if self._home is not None:
            self._home(self)


def of(value: Any) -> array:
    """The `array` of an ndarray or Tensor.

    A module's parameter, or a view of one, is copied: it changes with the next update.
    """
    if (
        type(value) is np.ndarray
        and _SHARED
        and (id(value) in _SHARED or id(value.base) in _SHARED)
    ):
        value = value.copy()
    return _over(value)


def _over(value: Any) -> array:
    """The `array` of an ndarray or Tensor, without a copy."""
    new = array.__new__(array)
    new._home = None
    new._value = value
    return new


def shared(value: Any, home: Callable[[array], None] | None = None) -> array:
    """The `array` of a module's parameter: the one that somebody holds already, or a new one.

    `home` sets the module's attribute, for what changes the array in place. While the parameter
    is differentiated, the array carries its gradient.
    """
    value = recorded(value)
    if isinstance(value, Tensor):
        return of(value)
    found = _SHARED.get(id(value))
    if found is None or found._value is not value:
        found = _over(value)
        _SHARED[id(value)] = found
    found._home = home
    return found


def keep_values(parameter: np.ndarray) -> None:
    """Arrays that stand for this parameter keep its values, which are about to be overwritten."""
    found = _SHARED.pop(id(parameter), None)
    if found is not None and found._value is parameter:
        found._home = None
        found._value = parameter.copy()


def recorded(value: Any) -> Any:
    """A parameter, shown or not, as the Tensor that carries its gradient; else the value."""
    tape = local.tape
    if tape is not None and not (isinstance(value, Tensor) and type(value) is not Parameter):
        node = tape.node_of(value)
        if node is not None:
            return Tensor(value.data if isinstance(value, Parameter) else value, node)
    return value._array if type(value) is Parameter else value


def raw(x: Any) -> Any:
    """What pyloss computes with in place of an argument: an ndarray, a Tensor, a Python number."""
    if type(x) is array:
        return x._value
    if isinstance(x, Tensor | np.ndarray):
        return recorded(x)
    if isinstance(x, np.float64):  # a float of Python's, too
        return float(x)
    if isinstance(x, np.generic):
        return np.asarray(x)
    if isinstance(x, list | tuple):
        return _new(x, None)
    return x.__mlx_array__() if hasattr(type(x), "__mlx_array__") else x


def tree_raw(x: Any) -> Any:
    """`raw` of arrays in lists, tuples and dicts, which stay as they are: indices, arguments."""
    if isinstance(x, list | tuple):
        items = [tree_raw(value) for value in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if isinstance(x, dict):
        return {key: tree_raw(value) for key, value in x.items()}
    return raw(x) if isinstance(x, array | np.generic) else x


def result(y: Any, sources: Iterable[Any] = ()) -> Any:
    """Arrays of what a function of pyloss or NumPy gave, in lists, tuples and dicts too.

    A view of a module's parameter becomes a copy: the parameter changes with the next update.
    `sources` are what a view may be of.
    """
    if type(y) is array:
        return y
    if isinstance(y, Tensor):
        return of(y)
    if isinstance(y, np.ndarray):
        if y.base is not None and any(id(x) in _SHARED for x in sources):
            return _over(y.copy())
        return of(y)
    if isinstance(y, np.generic):
        return of(np.asarray(y))
    if isinstance(y, list | tuple):
        items = [result(value, sources) for value in y]
        return type(y)(*items) if hasattr(y, "_fields") else type(y)(items)
    if isinstance(y, dict):
        return {key: result(value, sources) for key, value in y.items()}
    return y


def call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """NumPy's function of raw values, by the one of pyloss that carries gradients.

    Floats of bfloat16 are bfloat16, which NumPy turns into float32 in some functions.
    """
    of_tensors = UFUNCS.get(function) if isinstance(function, np.ufunc) else FUNCTIONS[function]
    assert of_tensors is not None
    found = of_tensors(*args, **kwargs)
    if any(getattr(x, "dtype", None) == dtypes.bfloat16 for x in args):
        found = _in_bfloat16(found)
    return result(found, args)


def _in_bfloat16(found: Any) -> Any:
    """Floats of 32 or 64 bits rounded to bfloat16; anything else as it is."""
    # None equals float64 to NumPy.
    kind = getattr(found, "dtype", dtypes.bfloat16)
    return cast(found, dtypes.bfloat16) if kind.kind == "f" and kind.itemsize > 2 else found


def _new(val: Any, dtype: Any) -> Any:
    """The value of a new array, in memory of its own."""
    val = tree_raw(val)
    if isinstance(val, Tensor):
        found = FUNCTIONS[np.copy](val)
        return found if dtype is None else cast(found, np.dtype(dtype))
    if isinstance(val, list | tuple) and _holds_tensor(val):
        found = _stacked(val)
        return found if dtype is None else cast(found, np.dtype(dtype))
    made = np.array(val)
    if made.dtype.kind == "O":
        raise TypeError(f"array takes numbers, lists of them and arrays, not {type(val).__name__}")
    if dtype is not None:
        return made.astype(np.dtype(dtype), copy=False)
    if made.dtype == np.int64 and not _typed(val):
        fits = not made.size or (made.min() >= -(2**31) and made.max() < 2**31)
        return made.astype(np.int32) if fits else made
    if not isinstance(val, np.ndarray) and made.size == 0:
        return made.astype(np.float32)
    return made.astype(dtypes.narrowed(made.dtype), copy=False)


def _typed(val: Any) -> bool:
    """Whether values have a type of their own, unlike Python's numbers."""
    if isinstance(val, list | tuple):
        return any(map(_typed, val))
    return isinstance(val, np.ndarray | np.generic)


def _holds_tensor(val: Any) -> bool:
    if isinstance(val, list | tuple):
        return any(map(_holds_tensor, val))
    return isinstance(val, Tensor)


def _stacked(val: Any) -> Any:
    """Lists of values that carry gradients, as one value."""
    if not isinstance(val, list | tuple):
        return val if isinstance(val, Tensor) else _new(val, None)
    parts = [_stacked(part) for part in val]
    kind = dtypes.common(*(part.dtype for part in parts))
    return FUNCTIONS[np.stack]([cast(part, kind) for part in parts])


def cast(x: Any, dtype: np.dtype) -> Any:
    """A value in another type. Whole numbers of a recorded value are constants, as in MLX."""
    if x.dtype == dtype:
        return x
    if not isinstance(x, Tensor):
        return np.asarray(x).astype(dtype)
    if dtype.kind not in "fV":
        return np.asarray(x.data).astype(dtype)
    return FUNCTIONS[Tensor.astype](x, dtype)


def promoted(*xs: Any, floats: bool = False) -> list[Any]:
    """Operands in types that NumPy combines as MLX does: with a float, integers become floats.

    With `floats` the result is a float in any case. Python's numbers stay, unless there are
    only numbers, or the type is bfloat16: NumPy would compute with them in float32.
    """
    values = [raw(x) for x in xs]
    kinds = [x.dtype for x in values if not isinstance(x, bool | int | float | complex)]
    numbers = [x for x in values if isinstance(x, bool | int | float | complex)]
    if not kinds:
        values = [_new(x, None) for x in values]
        kinds, numbers = [x.dtype for x in values], []
    kind = dtypes.common(*kinds)
    if kind not in dtypes.inexact.types:
        if floats or any(isinstance(x, float) for x in numbers):
            kind = dtypes.float32
        elif kind == dtypes.bool_ and any(type(x) is int for x in numbers):
            kind = dtypes.int32
    if any(isinstance(x, complex) for x in numbers):
        kind = dtypes.complex64
    if kind == dtypes.bfloat16:
        values = [np.asarray(x, kind) if isinstance(x, bool | int | float) else x for x in values]
    return [
        x if isinstance(x, bool | int | float | complex) or x.dtype == kind else cast(x, kind)
        for x in values
    ]


def placed(x: Any, index: Any, value: Any) -> Any:
    """x with `value` at an index, in its type; the gradient of both is carried."""
    x = recorded(x)
    given = raw(value)
    if not isinstance(given, Tensor | np.ndarray):
        given = np.asarray(given, x.dtype)
    given = cast(given, x.dtype)

    def forward(xd: Any, vd: Any) -> Any:
        new = np.array(xd)
        new[index] = vd
        return new

    def gradient(i: int, dy: Any, y: Any, *unread: Any) -> Any:
        if i == 1:
            return np.asarray(dy[index])
        rest = np.array(dy)
        rest[index] = 0
        return rest

    return apply(forward, (x, fitting(given, x, index)), gradient)


def fitting(given: Any, x: Any, index: Any) -> Any:
    """What is put into x at an index, without leading axes of 1 that have no place there."""
    extra = len(given.shape) - np.ndim(np.broadcast_to(np.empty((), bool), x.shape)[index])
    if extra > 0 and given.shape[:extra] == (1,) * extra:
        return FUNCTIONS[np.reshape](given, given.shape[extra:])
    return given


def axes_of(axis: Any) -> Any:
    """An axis, or several in a tuple, as NumPy takes them."""
    axis = tree_raw(axis)
    return tuple(int(i) for i in axis) if isinstance(axis, Sequence | np.ndarray) else axis
