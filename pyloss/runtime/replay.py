"""Repeats the calls that a function makes to the core, without the Python between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss import _core

# As `_core.record` returns them: the number of the operation, and its arguments.
Calls = list[tuple[Any, ...]]

_TRIES = 3
# Index of the first output in a recorded call of each operation.
_OUTPUTS = [1 + text.split(">")[0].count(":") for _, text in _core.ops()]
# The operation whose results decide which path a function takes.
_DECIDING = [name for name, _ in _core.ops()].index("same_bits")


class Replay:
    """Runs a function without arguments that returns an array; later, only its calls of the core.

    The function reads arrays that are written to between its runs. The first runs are recorded. If
    two runs make the same calls (the same operations, on the same arrays or on results of earlier
    calls of that run), and repeating the calls gives the same bits, the calls replace the function,
    usually from its third run on.

    A function that computes with NumPy between its calls makes new arrays on every run; they give
    it away, and it is never replayed. A function may cache results for arrays that it compares by
    `same_bits`; if a comparison then differs, the function is called. Not for functions that
    take another path after their first runs for other reasons, such as values.
    """

    def __init__(self) -> None:
        self._tries = _TRIES
        self._calls: Calls = []
        self._last: Calls | None = None
        self._result: np.ndarray | None = None
        self._found: list[np.ndarray] = []  # the results of the calls that decide
        self._expected = b""

    @property
    def ready(self) -> bool:
        """Whether the recorded calls replace the function."""
        return self._result is not None

    def __call__(self, function: Callable[[], np.ndarray]) -> np.ndarray:
        """The result of `function`, computed by the function or by its recorded calls."""
        if self._result is not None:
            _core.replay(self._calls)
            if self._decisions() == self._expected:
                return self._result
            self._tries, self._calls, self._result = _TRIES, [], None
        if not self._tries:
            return function()
        self._tries -= 1
        _core.record(True)
        try:
            result = function()
        finally:
            calls = _core.record(False) or []
        # The arrays of the last run still exist, so new arrays have other addresses.
        if self._last is not None and _repeats(self._last, calls, result):
            want = result.copy()
            _core.replay(calls)
            if result.tobytes() == want.tobytes():
                self._calls, self._result = calls, result
                self._found = [call[-1] for call in calls if call[0] == _DECIDING]
                self._expected = self._decisions()
            else:
                result = function()  # the replay has overwritten the result
        self._last = calls if self._tries and self._result is None else None
        return result

    def _decisions(self) -> bytes:
        return np.concatenate(self._found).tobytes() if self._found else b""


def _repeats(before: Calls, calls: Calls, result: np.ndarray) -> bool:
    """Whether a run repeated the calls of the previous one, and they made `result`."""
    # Arrays that calls have made: their numbers, by identity.
    made: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def same(x: Any, y: Any, output: bool) -> bool:
        if x is y:
            return True
        if not (isinstance(x, np.ndarray) and isinstance(y, np.ndarray)):
            return type(x) is type(y) and isinstance(x, int | float) and x == y
        if x.shape != y.shape or x.strides != y.strides or x.dtype != y.dtype:
            return False
        root, other = _root(x), _root(y)
        number = made[0].get(id(root))
        if number != made[1].get(id(other)):
            return False
        if number is not None:
            return (x is root and y is other) or _address(x) - _address(root) == _address(
                y
            ) - _address(other)
        if _address(x) == _address(y):
            return True
        if output:
            made[0][id(root)] = made[1][id(other)] = len(made[0])
        return output

    if len(before) != len(calls):
        return False
    for one, other in zip(before, calls, strict=True):
        if one[0] != other[0] or len(one) != len(other):
            return False
        first = _OUTPUTS[one[0]]
        if not all(
            same(x, y, i >= first)
            for i, (x, y) in enumerate(zip(one[1:], other[1:], strict=True), 1)
        ):
            return False
    return id(_root(result)) in made[1]


def _root(array: np.ndarray) -> np.ndarray:
    """The array whose memory a view shows."""
    return array.base if isinstance(array.base, np.ndarray) else array


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
