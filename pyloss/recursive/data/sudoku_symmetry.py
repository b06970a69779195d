"""When two full grids of 4 x 4 or 6 x 6 are the same under the symmetries of Sudoku."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import permutations, product
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.recursive.data.sudoku import Sudoku
from pyloss.recursive.data.sudoku_search import BOXES

#: Sizes whose symmetries are few enough to try all.
SIZES = (4, 6)


def sudoku_class(answer: Any) -> bytes:
    """The least of all grids that symmetries make of a full grid; like grids have the same.

    The symmetries are those of `shuffle_sudoku`. 4 x 4 has 2 classes, 6 x 6 has 49.

    Raises ValueError for grids that are not 4 x 4 or 6 x 6.
    """
    grid = np.asarray(answer)
    size = len(grid) if grid.ndim == 2 else 0
    if size not in SIZES or grid.shape != (size, size):
        raise ValueError(f"grids of 4 x 4 and 6 x 6 have classes, not of shape {shown(grid.shape)}")
    moved = grid.reshape(-1)[_moves(size)]
    # Digits are renamed so that the first row is 0, 1, 2, ...
    names = np.argsort(moved[:, :size], axis=1).astype(np.uint8)
    named = np.take_along_axis(names, moved.astype(np.int64) - 1, 1)
    return min(row.tobytes() for row in named)


def split_by_class(
    puzzles: Iterable[Sudoku], share: float, seed: int = 0
) -> tuple[list[Sudoku], list[Sudoku]]:
    """Puzzles to train on, and about `share` of them to test, whose grids' classes are all others.

    So no test grid is a training grid under any symmetry. Raises ValueError where the puzzles have
    one class.
    """
    given = list(puzzles)
    classes = [sudoku_class(puzzle.answer) for puzzle in given]
    counts = Counter(classes)
    if len(counts) < 2:
        raise ValueError("the puzzles' grids have one class under symmetries: none can be held out")
    names = sorted(counts)
    held: set[bytes] = set()
    for index in np.random.default_rng(seed).permutation(len(names)):
        room = share * len(given) - sum(counts[name] for name in held)
        if counts[names[index]] <= room * 1.5 or not held:
            held.add(names[index])
    tests = [each in held for each in classes]
    return (
        [puzzle for puzzle, test in zip(given, tests, strict=True) if not test],
        [puzzle for puzzle, test in zip(given, tests, strict=True) if test],
    )


@cache
def _moves(size: int) -> np.ndarray:
    """The places [symmetries, cells] from which cells come."""
    height, width = BOXES[size]
    rows, columns = _orders(size, height), _orders(size, width)
    cells = np.arange(size * size).reshape(size, size)
    whole = [cells, cells.T] if height == width else [cells]
    return np.array([x[np.ix_(r, c)].reshape(-1) for x in whole for r in rows for c in columns])


def _orders(size: int, lines: int) -> list[list[int]]:
    """The orders of a grid's rows, whose bands have so many `lines`."""
    within = list(permutations(range(lines)))
    found = []
    for bands in permutations(range(size // lines)):
        for inner in product(within, repeat=len(bands)):
            found.append(
                [
                    band * lines + line
                    for band, order in zip(bands, inner, strict=True)
                    for line in order
                ]
            )
    return found
