"""Mazes: their CSV, augmentation, data sets.

A maze is uint8 [size, size] of places in CHARSET: walls, ways, the start S, the goal G, and in the
answer the shortest way from S to G as o. A cell's token is its place + 1, so that 0 can pad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyloss.checks.numbers import whole
from pyloss.errors import FormatError
from pyloss.io.files import PathLike
from pyloss.recursive.data.csv_file import read_puzzle_csv
from pyloss.recursive.data.dataset import PuzzleDataset
from pyloss.recursive.data.dihedral import SYMMETRIES, dihedral

CHARSET = "# SGo"
WALL, WAY, START, GOAL, PATH = range(len(CHARSET))
#: Mazes with more cells a side are no task for these models.
LARGEST = 128


class Maze(NamedTuple):
    """A maze with its shortest way.

    Attributes:
        question, answer: uint8 [size, size], see CHARSET.
        rating: the steps of the way; the rating column of a CSV.
    """

    question: np.ndarray
    answer: np.ndarray
    rating: int


def distances(open_cells: np.ndarray, start: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Steps from `start` over open cells and the number of shortest ways, int64 [rows, columns].

    By breadth-first search. -1 steps: there is no way; ways beyond 2 count as 2.
    """
    rows, columns = open_cells.shape
    wide = columns + 1  # a wall at the end of each row
    closed = np.ones((rows + 2, wide), bool)
    closed[1:-1, :columns] = ~open_cells
    free = (~closed).reshape(-1).tolist()
    steps, ways = [-1] * len(free), [0] * len(free)
    first = (start[0] + 1) * wide + start[1]
    steps[first], ways[first] = 0, 1
    ring = [first]
    while ring:
        after = []
        for cell in ring:
            far = steps[cell] + 1
            for other in (cell - wide, cell + wide, cell - 1, cell + 1):
                if free[other]:
                    if steps[other] < 0:
                        steps[other] = far
                        after.append(other)
                    if steps[other] == far:
                        ways[other] = min(2, ways[other] + ways[cell])
        ring = after
    both = np.array([steps, ways]).reshape(2, rows + 2, wide)[:, 1:-1, :columns]
    return both[0], both[1]


def solve_maze(question: np.ndarray) -> Maze:
    """A maze with a shortest way drawn in; of several, one.

    ValueError if it has not one S and one G, or no way between them.
    """
    places = {}
    for name, value in (("S", START), ("G", GOAL)):
        found = np.argwhere(question == value)
        if len(found) != 1:
            raise ValueError(f"a maze has one {name}, and this one {len(found)}")
        places[value] = row, column = int(found[0][0]), int(found[0][1])
    steps, _ = distances(question != WALL, places[START])
    row, column = places[GOAL]
    far = int(steps[row, column])
    if far < 0:
        raise ValueError("there is no way from S to G")
    answer = question.copy()
    for left in range(far - 1, 0, -1):
        beside = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
        row, column = next(
            (r, c)
            for r, c in beside
            if 0 <= r < len(steps) and 0 <= c < steps.shape[1] and steps[r, c] == left
        )
        answer[row, column] = PATH
    return Maze(question, answer, far)


def maze_dataset(puzzles: Sequence[Maze], augment: int = 0) -> PuzzleDataset:
    """A data set of mazes, a group for each with the first `augment` of its seven symmetries.

    ValueError for no mazes, mazes of unlike sizes, or a number that is not from 0 to 7.
    """
    whole(augment, "augment", 0, SYMMETRIES - 1)
    shapes = sorted({np.shape(puzzle.question) for puzzle in puzzles})
    if len(shapes) != 1:
        raise ValueError(
            f"the mazes have {' and '.join(map(str, shapes))} cells: give one size"
            if shapes
            else "there are no mazes"
        )
    each = 1 + augment
    arrays = np.empty((2, len(puzzles) * each, np.prod(shapes[0])), np.uint8)
    for i, puzzle in enumerate(puzzles):
        for j in range(each):
            for k, grid in enumerate(puzzle[:2]):
                arrays[k, i * each + j] = dihedral(grid, j).reshape(-1)
    arrays += 1
    groups = np.arange(len(puzzles) + 1, dtype=np.int32) * each
    return PuzzleDataset(arrays[0], arrays[1], len(CHARSET) + 1, group_indices=groups)


def read_maze_csv(path: PathLike) -> list[Maze]:
    """The mazes of a CSV with the authors' columns source, question, answer, rating.

    Cells are `#`, space, S, G and o (in answers), row by row. An answer must be its question with a
    way of o from S to G. Whether it is the shortest is not checked.

    Raises:
        FormatError: names the line of a wrong length, symbol or answer.
        OSError: the file cannot be read.
    """
    codes = np.full(256, len(CHARSET), np.uint8)
    codes[[ord(c) for c in CHARSET]] = range(len(CHARSET))
    size, found = 0, []
    for row in read_puzzle_csv(path):
        grids = []
        for name, text in (("question", row.question), ("answer", row.answer)):
            side = size or round(len(text) ** 0.5)
            if len(text) != side * side or not 2 <= side <= LARGEST:
                allowed = f"{size * size}, as above" if size else f"the square of 2 to {LARGEST}"
                raise FormatError(
                    path, f"line {row.line}", f"{name} has {len(text)} cells; expected {allowed}"
                )
            size = side
            cells = codes[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]
            if (wrong := np.flatnonzero(cells == len(CHARSET))).size:
                raise FormatError(
                    path,
                    f"line {row.line}",
                    f"cell {wrong[0] + 1} of the {name} is {text[wrong[0]]!r}; cells are "
                    f"{', '.join(map(repr, CHARSET))}",
                )
            grids.append(cells.reshape(size, size))
        if problem := _problem(*grids):
            raise FormatError(path, f"line {row.line}", problem)
        found.append(Maze(grids[0], grids[1], row.rating))
    if not found:
        raise FormatError(path, None, "no maze in the file")
    return found


def _problem(question: np.ndarray, answer: np.ndarray) -> str | None:
    """What is wrong with an answer."""
    for name, value in (("S", START), ("G", GOAL)):
        if (count := np.count_nonzero(question == value)) != 1:
            return f"the question has {count} {name}; a maze has one"
    if (question == PATH).any():
        return "the question has o, the way of an answer"
    if (wrong := (question != answer) & ~((question == WAY) & (answer == PATH))).any():
        row, column = np.argwhere(wrong)[0]
        return (
            f"the question has {CHARSET[question[row, column]]!r} at row {row + 1}, column "
            f"{column + 1}, and the answer {CHARSET[answer[row, column]]!r}"
        )
    start = np.argwhere(question == START)[0]
    steps, _ = distances(np.isin(answer, (START, PATH, GOAL)), (int(start[0]), int(start[1])))
    if steps[question == GOAL][0] < 0:
        return "the answer's o make no way from S to G"
    return None
