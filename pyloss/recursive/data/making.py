"""Puzzles that are made by chance, until enough of them are different."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import numpy as np

#: Attempts without a new puzzle after which a request is given up.
ATTEMPTS = 500


class Puzzle(Protocol):
    @property
    def question(self) -> np.ndarray: ...


P = TypeVar("P", bound=Puzzle)


def different(
    attempt: Callable[[], P | None], count: int | None, refusal: Callable[[int], str]
) -> Iterator[P]:
    """Puzzles with different questions.

    Args:
        attempt: makes a puzzle, or None where it does not succeed.
        count: how many; None: as many as are taken.
        refusal: the error after so many puzzles.

    Raises ValueError if ATTEMPTS in a row give no new puzzle.
    """
    seen: set[bytes] = set()
    failed = 0
    while count is None or len(seen) < count:
        puzzle = attempt()
        key = b"" if puzzle is None else puzzle.question.tobytes()
        if puzzle is None or key in seen:
            failed += 1
            if failed == ATTEMPTS:
                raise ValueError(refusal(len(seen)))
            continue
        seen.add(key)
        failed = 0
        yield puzzle
