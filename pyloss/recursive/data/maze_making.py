"""Makes mazes: a random tree of ways with some walls opened, and ends with one shortest way."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import numpy as np

from pyloss.checks.numbers import real, whole
from pyloss.recursive.data.making import ATTEMPTS, different
from pyloss.recursive.data.maze import (
    GOAL,
    LARGEST,
    START,
    WALL,
    WAY,
    Maze,
    distances,
    solve_maze,
)

#: Starts that are tried in a maze.
_STARTS = 4


def maze_puzzles(
    count: int | None = None,
    *,
    size: int = 30,
    min_path: int | None = None,
    openings: float = 0.02,
    seed: int = 0,
) -> Iterator[Maze]:
    """Different mazes in which one way from S to G is the shortest, the same ones for a seed.

    The authors' mazes have random walls, and perhaps several shortest ways, of which the answer
    is one.

    Args:
        count: how many; None: as many as are taken.
        size: cells a side, 5 to 128.
        min_path: the fewest steps from S to G; None: as many as `size`.
        openings: the share of the walls between neighboring ways that are opened. 0: there is one
            way between any two cells.

    Raises:
        ValueError: numbers out of range, or a request for which 500 mazes in a row do not do.
    """
    if count is not None:
        whole(count, "count", 0)
    whole(size, "size", 5, LARGEST)
    least = size if min_path is None else whole(min_path, "min_path", 1)
    most = 2 * ((size + 1) // 2) ** 2 - 2  # a way through every place of the tree
    if least > most:
        raise ValueError(f"min_path is {least}; a maze of {size} x {size} has at most {most} steps")
    share = real(openings, "openings", 0, 1)
    rng = Random(whole(seed, "seed", 0))

    def refusal(made: int) -> str:
        return (
            f"{ATTEMPTS} mazes of {size} x {size} gave no{' new' * bool(made)} one with one "
            f"shortest way of {least} steps or more, after {made}: ask for fewer mazes, a smaller "
            "min_path or fewer openings"
        )

    return different(lambda: _attempt(rng, size, least, share), count, refusal)


def _attempt(rng: Random, size: int, least: int, openings: float) -> Maze | None:
    """A new maze, or None if it has no two places that far from each other."""
    free = _ways(rng, size, openings)
    cells = np.argwhere(free).tolist()
    for row, column in rng.sample(cells, min(_STARTS, len(cells))):
        steps, ways = distances(free, (row, column))
        ends = np.argwhere((steps >= least) & (ways == 1)).tolist()
        if ends:
            question = np.where(free, WAY, WALL).astype(np.uint8)
            question[row, column] = START
            question[tuple(rng.choice(ends))] = GOAL
            return solve_maze(question)
    return None


def _ways(rng: Random, size: int, openings: float) -> np.ndarray:
    """The open cells, bool [size, size], by a random depth-first walk over every second cell."""
    side = (size + 1) // 2
    # An even size leaves a row and a column of walls, at either end.
    down, right = (rng.randrange(2) if size % 2 == 0 else 0 for _ in range(2))
    free = np.zeros((size, size), bool)
    trail = [(rng.randrange(side), rng.randrange(side))]
    visited = set(trail)
    walls = set()
    while trail:
        row, column = trail[-1]
        free[down + 2 * row, right + 2 * column] = True
        around = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
        inside = [(r, c) for r, c in around if 0 <= r < side and 0 <= c < side]
        after = [place for place in inside if place not in visited]
        walls |= {(row + r, column + c) for r, c in inside}
        if not after:
            trail.pop()
            continue
        r, c = rng.choice(after)
        free[down + row + r, right + column + c] = True
        visited.add((r, c))
        trail.append((r, c))
    for row, column in sorted(walls):
        if rng.random() < openings:
            free[down + row, right + column] = True
    return free
