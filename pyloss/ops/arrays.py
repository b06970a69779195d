"""Arguments for the core: contiguous arrays of one type, handles of weights, buffers."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import Gradients, data
from pyloss.autograd.tensor import Tensor
from pyloss.checks.arrays import as_integers
from pyloss.runtime import device
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

Array = Any  # numpy.ndarray or Tensor
_FLOAT32 = np.dtype(np.float32)


def empty(*shape: int, like: Any = None) -> Any:
    """An uninitialized float32 array over a reused buffer, on the device of `like`."""
    return (
        device.empty(shape, np.float32, like)
        if isinstance(like, device.DeviceArray)
        else _core.empty(shape)
    )


def zeros(*shape: int, like: Any = None) -> Any:
    """float32 zeros on the device of `like`."""
    if not isinstance(like, device.DeviceArray):
        return np.zeros(shape, np.float32)
    there = empty(*shape, like=like)
    there.clear()
    return there


def integers(shape: tuple[int, ...], like: Any) -> Any:
    """An uninitialized int32 array on the device of `like`."""
    return (
        device.empty(shape, np.int32, like)
        if isinstance(like, device.DeviceArray)
        else _core.empty(shape, "i32")
    )


def f32(x: Array, name: str = "x") -> Any:
    """The contiguous float32 array of an argument, on its device.

    Other real dtypes are converted.
    """
    array = x.data if isinstance(x, Tensor) else x
    if type(array) is np.ndarray and array.dtype is _FLOAT32 and array.flags.carray:
        return array
    array = data(array, name)
    if isinstance(array, device.DeviceArray):
        if array.kind not in ("f32", "f64", "f16", "bf16"):
            raise TypeError(f"{name} on a device must hold floats, not {array.dtype}")
        return array.astype(np.float32, copy=False)
    if array.dtype == np.float32 and array.flags.carray:
        return array
    if array.dtype.kind not in "fiu" and not device.is_bfloat16(array.dtype):
        raise TypeError(f"{name} must hold real numbers, not {array.dtype}")
    return np.require(array, np.float32, ["C", "A"])


def f32_matrix(x: Array, name: str = "x") -> Any:
    """`f32`, and ValueError unless the array has two dimensions."""
    return check_matrix(f32(x, name), name)


def check_matrix(x: Any, name: str) -> Any:
    """`x`, a Tensor or an array; ValueError unless it has two dimensions."""
    if len(x.shape) != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(x.shape)}")
    return x


def i32(x: Any, name: str = "ids") -> np.ndarray:
    """The contiguous int32 ndarray of an integer argument."""
    if isinstance(x, np.ndarray) and x.dtype == np.int32:
        return np.require(x, np.int32, ["C", "A"])
    array = as_integers(x, name)
    if array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
        raise ValueError(
            f"{name} must lie within the 32-bit integers, "
            f"got values from {array.min()} to {array.max()}"
        )
    return np.require(array, np.int32, ["C", "A"])


def index(x: Any, name: str, like: Any) -> Any:
    """`i32` on the device of `like`; an array on a device stays as it is."""
    return x if isinstance(x, device.DeviceArray) else device.on_device_of(like, i32(x, name))


def core_weight(weight: Array | Weight | WeightStack) -> Any:
    """A weight for the core: the handle of stored bytes, or a float32 array."""
    return weight.handle if isinstance(weight, Weight | WeightStack) else f32(weight, "weight")


def core_table(weight: Array | Weight) -> tuple[Any, tuple[int, int]]:
    """A matrix of rows to choose from, for the core, and its shape.

    ValueError unless it has two dimensions.
    """
    if isinstance(weight, Weight):
        if weight.columns is not None:
            raise ValueError("a table of rows must have its columns in order")
        return weight.handle, weight.shape
    rows = f32_matrix(weight, "weight")
    return rows, rows.shape


def in_stored_order(a: Any, weight: Any) -> Any:
    """The rows of a float32 matrix [I, R] in the order of the columns that `weight` stores."""
    orders = getattr(weight, "orders", None)
    if orders is None:
        return a
    y = empty(*a.shape, like=a)
    _core.gather_rows(a, index(orders[0], "columns", a), y)
    return y


def first_array(matrix: Any) -> Any:
    """An array on the device of a weight in the core's form: its (first) bytes, or itself."""
    return first_array(matrix[0]) if isinstance(matrix, tuple) else matrix


def trainable(weight: Array | Weight | WeightStack) -> Array:
    """The weight as the tape sees it: None for stored bytes, which are never trained."""
    return None if isinstance(weight, Weight | WeightStack) else weight


def transpose(x: Any) -> Any:
    """x^T of a float32 matrix, or of each of several, contiguous, on its device."""
    y = empty(*x.shape[:-2], x.shape[-1], x.shape[-2], like=x)
    _core.transpose(x, y)
    return y


def column_sum(x: np.ndarray) -> np.ndarray:
    """The sum of the rows of x [..., D]: [D]."""
    out = empty(x.shape[-1], like=x)
    _core.column_sum(x, out)
    return out


def multiply_columns(matrix: Any, factor: Any) -> Any:
    """A matrix [N, D] with each column multiplied by its factor [D]."""
    scaled = empty(*matrix.shape, like=matrix)
    _core.scale_columns(matrix, factor, scaled)
    return scaled


def multiply_rows(matrices: Any, factor: Any) -> Any:
    """Matrices [..., D] with each row multiplied by its factor [...]."""
    scaled = empty(*matrices.shape, like=matrices)
    flat = (factor.size, matrices.shape[-1])
    _core.scale_rows(matrices.reshape(flat), factor.reshape(-1), scaled.reshape(flat))
    return scaled


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two float32 arrays are the same to the bit."""
    same = np.empty(1, np.uint8)
    if x.shape != y.shape:
        return False
    _core.same_bits(f32(x).reshape(-1), f32(y).reshape(-1), same)
    return bool(same[0])


def gradient_buffer(
    grads: Gradients, i: int, shape: tuple[int, ...], like: Any = None
) -> tuple[Any, int]:
    """The buffer for the gradient of input i, and 1 if it holds a gradient to add to."""
    partial = grads.partial(i)
    if partial is None:
        return empty(*shape, like=like), 0
    if partial.dtype == np.float32:
        if isinstance(partial, device.DeviceArray) or partial.flags.c_contiguous:
            return partial, 1
    return empty(*shape, like=like), 0
