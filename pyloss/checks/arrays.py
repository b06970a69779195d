"""Arrays from callers: conversion to NumPy, with errors that name the argument."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from pyloss.errors import DeviceError


def as_array(x: Any, name: str = "the argument") -> np.ndarray:
    """`x` as a plain ndarray of any dtype, over its own memory if it has some.

    Raises:
        TypeError: a masked array with masked elements, whose values would be read; or a conversion
            that raises an error of its own.
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
    except Exception as error:  # a class's own __array__ may raise anything
        problem = f"{type(error).__name__}: {error}"
        raise TypeError(
            f"{name} cannot be read as an array: {type(x).__name__} raises {problem}"
        ) from error


def as_integers(x: Any, name: str) -> np.ndarray:
    """`x` as int64, or as uint64 if it has that type, so that any sentinel fits, -1 included.

    Python ints beyond 64 bits stay in an array of objects, so that range checks can show them.

    Raises:
        TypeError: it does not hold integers; bools are refused.
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
    """The ints of a list for which NumPy has no type, as objects; None if there is more."""
    if isinstance(x, np.ndarray) or array.dtype.kind not in "fO":
        return None
    exact = np.asarray(x, object)
    whole = all(
        isinstance(value, int | np.integer) and not isinstance(value, bool)
        for value in exact.reshape(-1)
    )
    return exact if whole else None
