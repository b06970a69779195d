"""Numbers from callers: options, configurations, YAML, scalars of the core."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np

# Limits of the core's scalars and of file formats.
SMALLEST, LARGEST = -(1 << 63), (1 << 63) - 1

_SHOWN = 40


def whole(value: Any, name: str, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int from `low` to `high`; by default, any signed 64-bit integer.

    Takes ints, NumPy's ints and 0-dimensional arrays of them; not bools, and not floats.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is out of range. Both name `name`, the value and the allowed range.
    """
    try:
        # A bool is an int to Python.
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(_refused(value, name, _whole_range(low, high)))
    least, most = SMALLEST if low is None else low, LARGEST if high is None else high
    if number < least:
        raise ValueError(_refused(number, name, _whole_range(least, high)))
    if number > most:
        raise ValueError(_refused(number, name, _whole_range(low, most)))
    return number


def real(
    value: Any,
    name: str,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """`value` as a finite float with `low <= value <= high` and `above < value < below`.

    Takes ints, floats, NumPy's and 0-dimensional arrays of them; not bools, and not text.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of range, infinite or NaN. Both name `name`, the value and the range.
    """
    given = value
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(_refused(given, name, _real_range(low, high, above, below)))
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        number = math.inf
    if (
        not math.isfinite(number)
        or (low is not None and number < low)
        or (high is not None and number > high)
        or (above is not None and number <= above)
        or (below is not None and number >= below)
    ):
        raise ValueError(_refused(value, name, _real_range(low, high, above, below)))
    return number


def shown(value: Any) -> str:
    """`value` as messages show it; long values are cut."""
    # Python refuses to write out ints of more than 4300 digits, and would take long.
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _refused(value: Any, name: str, allowed: str) -> str:
    # An array that may carry a gradient.
    constant = "; it carries no gradient, and t.item() is a number" * hasattr(value, "detach")
    return f"{name} is {shown(value)}; it must be {allowed}{constant}"


def _whole_range(low: int | None, high: int | None) -> str:
    if low is not None and high is not None:
        return f"a whole number from {low} to {high}"
    if low is not None:
        return f"a whole number of at least {low}"
    return "a whole number" if high is None else f"a whole number of at most {high}"


def _real_range(
    low: float | None, high: float | None, above: float | None, below: float | None
) -> str:
    bounds = [
        f"{words} {bound:g}"
        for words, bound in (
            ("of at least", low),
            ("above", above),
            ("of at most", high),
            ("below", below),
        )
        if bound is not None
    ]
    return " ".join(["a finite number", " and ".join(bounds)]).rstrip()
