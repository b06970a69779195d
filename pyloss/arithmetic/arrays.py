"""Which arrays the core takes, and new arrays beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import _core
from pyloss.runtime import device

FLOAT32 = np.dtype(np.float32)
#: The most axes of an array that the core reads.
MOST_AXES = 8


def is_f32(x: Any) -> bool:
    """Whether x is a float32 array as the core reads it, on the host or a device."""
    if type(x) is np.ndarray:
        return x.dtype is FLOAT32 and x.flags.carray and x.ndim <= MOST_AXES
    return isinstance(x, device.DeviceArray) and x.kind == "f32"


def empty(shape: tuple[int, ...], like: Any) -> Any:
    """An uninitialized float32 array on the device of `like`."""
    if type(like) is np.ndarray:
        return _core.empty(shape)
    return device.empty(shape, np.float32, like)
