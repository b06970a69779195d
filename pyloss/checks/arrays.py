"""Arrays as somebody gives them: the one way from an argument to NumPy, with errors that name the argument."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from pyloss.errors import DeviceError


def as_array(x: Any, name: str = "the argument") -> np.ndarray:
    """`x` as a plain ndarray of any dtype, over its own memory where it is one or has one.

    Raises:
        TypeError: it is a masked array with masked elements, which would be read as if they were not, or it raises something of
            its own instead of giving an array.
        ValueError: its rows have different lengths.
    """
    if type(x) is np.ndarray:
        return x
    ma = sys.modules.get("numpy.ma")  # NumPy imports it late: whoever has a masked array has it
    if ma is not None and ma.is_masked(x):
        raise TypeError(
            f"masked elements cannot be read as {name}; give them values with .filled(value)"
        )
    try:
        return np.asarray(x)
    except (MemoryError, DeviceError):
        raise
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as an array of one shape: {error}") from error
    except Exception as error:  # whatever a class's own __array__ comes to
        problem = f"{type(error).__name__}: {error}"
        raise TypeError(
            f"{name} cannot be read as an array: {type(x).__name__} raises {problem}"
        ) from error


def as_integers(x: Any, name: str) -> np.ndarray:
    """`x` as integers with room for any sentinel, -1 included: int64, or uint64 where the argument has it.

    Python's ints beyond 64 bits stay as they are, in an array of objects: whoever checks the range can show them.

    Raises:
        TypeError: it does not hold integers; bools are none.
        ValueError: its rows have different lengths.
    """
    array = as_array(x, name)
    if array.dtype.kind not in "iu" and array.size:
        large = _large_integers(x, array)
        if large is None:
            raise TypeError(f"{name} must be integers, not {array.dtype}")
        return large
    return array.astype(
        np.uint64 if array.dtype.kind == "u" and array.dtype.itemsize == 8 else np.int64, copy=False
    )


def _large_integers(x: Any, array: np.ndarray) -> np.ndarray | None:
    """Ints of a list that NumPy has no common type for, as objects; None where there is anything else in it."""
    if isinstance(x, np.ndarray) or array.dtype.kind not in "fO":
        return None
    exact = np.asarray(x, object)
    whole = all(
        isinstance(value, int | np.integer) and not isinstance(value, bool)
        for value in exact.reshape(-1)
    )
    return exact if whole else None
