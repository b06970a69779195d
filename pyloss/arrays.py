"""Arguments as the core takes them: contiguous arrays of one type, handles of stored matrices, reused buffers."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _core, device
from .autograd import Gradients, data
from .weight_stack import WeightStack
from .weights import Weight

Array = Any  # numpy.ndarray or Tensor


def empty(*shape: int) -> np.ndarray:
    """An uninitialised float32 array over a reused buffer."""
    return _core.empty(shape)


def f32(x: Array, name: str = "x") -> np.ndarray:
    """The contiguous float32 ndarray of an argument; other real dtypes are converted."""
    array = device.on_host(data(x), name)
    if array.dtype == np.float32 and array.flags.carray:
        return array
    if array.dtype.kind not in "fiu" and not device.is_bfloat16(array.dtype):
        raise TypeError(f"{name} must hold real numbers, not {array.dtype}")
    return np.require(array, np.float32, ["C", "A"])


def i32(x: Any, name: str = "ids") -> np.ndarray:
    """The contiguous int32 ndarray of an integer argument."""
    array = np.asarray(x)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must hold integers, not {array.dtype}")
    if array.dtype.itemsize > 4 and array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
        raise ValueError(f"{name} must lie within the 32-bit integers, got values from {array.min()} to {array.max()}")
    return np.require(array, np.int32, ["C", "A"])


def matrix(weight: Array | Weight | WeightStack) -> Any:
    """A weight as the core takes it: the handle of what is stored, or a float32 ndarray."""
    return weight.handle if isinstance(weight, Weight | WeightStack) else f32(weight, "weight")


def frozen(weight: Array | Weight | WeightStack) -> Array:
    """What the tape sees of a weight: stored matrices are never trained."""
    return None if isinstance(weight, Weight | WeightStack) else weight


def column_sum(x: np.ndarray) -> np.ndarray:
    """The sum of the rows of x [..., D]: [D]."""
    out = empty(x.shape[-1])
    _core.column_sum(x, out)
    return out


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two float32 arrays are the same to the bit."""
    same = np.empty(1, np.uint8)
    if x.shape != y.shape:
        return False
    _core.same_bits(f32(x).reshape(-1), f32(y).reshape(-1), same)
    return bool(same[0])


def into(grads: Gradients, i: int, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Where the gradient of input i goes: into what is there (1), or a new buffer (0)."""
    partial = grads.partial(i)
    if partial is not None and partial.dtype == np.float32 and partial.flags.c_contiguous:
        return partial, 1
    return empty(*shape), 0
