"""Sudokus of 4 x 4, 6 x 6 and 9 x 9 cells: checks, their CSV, augmentation, tokens, data sets.

A grid is uint8 [size, size], 0 is an empty cell. A cell's token is its digit + 1, so that 0 can pad
and the vocabulary has size + 2 tokens; all cells are predicted, as in the authors' data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyloss.checks.arrays import as_integers
from pyloss.checks.numbers import whole
from pyloss.errors import FormatError
from pyloss.io.bars import bar
from pyloss.io.files import PathLike
from pyloss.recursive.data.csv_file import read_puzzle_csv
from pyloss.recursive.data.dataset import PuzzleDataset
from pyloss.recursive.data.sudoku_search import BOXES, board, search

#: How often an augmentation that makes an answer of the test set is drawn again.
_TRIES = 1000


class Sudoku(NamedTuple):
    """A puzzle with its only solution.

    Attributes:
        question, answer: uint8 [size, size]; 0 is an empty cell of the question.
        rating: how hard it is, see `rate_sudoku`; the rating column of a CSV.
    """

    question: np.ndarray
    answer: np.ndarray
    rating: int


class _Sudokus(Sequence[Sudoku]):
    """Puzzles over arrays: the authors' CSV has millions, of which a few are drawn."""

    def __init__(self, questions: np.ndarray, answers: np.ndarray, ratings: np.ndarray):
        self._arrays = questions, answers, ratings

    def __len__(self) -> int:
        return len(self._arrays[0])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Sudokus(*(array[index] for array in self._arrays))
        question, answer, rating = (array[index] for array in self._arrays)
        return Sudoku(question, answer, int(rating))


def solve_sudoku(question: Any) -> Sudoku:
    """The solution of a grid, proven to be the only one, with its rating.

    The rating counts the dead ends of an exhaustive search that places naked and hidden singles and
    then guesses. Puzzles that need no guess have rating 0.

    Raises:
        ValueError: the grid is none of 4, 6 or 9 cells a side, or has no solution or several.
    """
    grid = as_integers(question, "question")
    if grid.ndim != 2 or grid.shape[0] != grid.shape[1] or len(grid) not in BOXES:
        raise ValueError(
            f"question must be a grid of {_sizes()} cells a side, got shape {grid.shape}"
        )
    if grid.min() < 0 or grid.max() > len(grid):
        raise ValueError(
            f"question has cells from {grid.min()} to {grid.max()}; they must be digits up to "
            f"{len(grid)}, 0 for an empty cell"
        )
    on = board(len(grid))
    found = search(on, *on.start(on.bits(grid)))
    if len(found.solutions) != 1:
        raise ValueError(
            f"the question has {'several solutions' if found.solutions else 'no solution'}"
        )
    return Sudoku(grid.astype(np.uint8), on.grid(found.solutions[0]), found.dead_ends)


def shuffle_sudoku(question: Any, answer: Any, rng: Any) -> tuple[np.ndarray, np.ndarray]:
    """Another puzzle of the same kind: digits renamed, transposed or not, rows and columns moved.

    Bands are permuted and the rows in each, stacks and the columns in each. 6 x 6 is never
    transposed, since its boxes have 2 rows and 3 columns.

    Args:
        rng: a NumPy Generator or RandomState. After `np.random.seed(n)` the authors' code draws
            what `np.random.RandomState(n)` gives here.
    """
    size = len(question)
    height, width = BOXES[size]
    digits = np.concatenate([[0], rng.permutation(np.arange(1, size + 1))]).astype(np.uint8)
    transposed = rng.random() < 0.5 if height == width else False
    bands = rng.permutation(size // height)
    rows = np.concatenate([b * height + rng.permutation(height) for b in bands])
    stacks = rng.permutation(size // width)
    columns = np.concatenate([s * width + rng.permutation(width) for s in stacks])

    def moved(grid: Any) -> np.ndarray:
        grid = np.asarray(grid)
        return digits[(grid.T if transposed else grid)[rows[:, None], columns]]

    return moved(question), moved(answer)


def sudoku_dataset(
    puzzles: Iterable[Sudoku],
    augment: int = 0,
    seed: Any = 0,
    exclude: Collection[bytes] = (),
) -> PuzzleDataset:
    """A data set of puzzles, a group for each with its `augment` shuffled versions after it.

    Args:
        seed: a number, or a NumPy Generator or RandomState.
        exclude: answers as bytes, such as those of the test set: a shuffled version with one of
            them is drawn again.

    Raises:
        ValueError: no puzzles, of unlike sizes, or none but excluded versions are found.
    """
    whole(augment, "augment", 0)
    rng = seed if hasattr(seed, "permutation") else np.random.RandomState(whole(seed, "seed", 0))
    given = puzzles if isinstance(puzzles, Sequence) else list(puzzles)
    sizes = sorted({np.shape(puzzle.question)[0] for puzzle in given})
    if len(sizes) != 1:
        raise ValueError(
            f"the puzzles are grids of {' and '.join(map(str, sizes))} cells a side: give one size"
            if sizes
            else "there are no puzzles"
        )
    size, each = sizes[0], 1 + augment
    arrays = np.empty((2, len(given) * each, size * size), np.uint8)
    with bar("shuffling", len(given), "puzzle") as progress:
        for i, puzzle in enumerate(given):
            for j in range(each):
                made = puzzle[:2] if j == 0 else _another(puzzle, rng, exclude)
                arrays[:, i * each + j] = np.reshape(made, (2, -1))
            progress.step()
    arrays += 1
    groups = np.arange(len(given) + 1, dtype=np.int32) * each
    return PuzzleDataset(arrays[0], arrays[1], size + 2, group_indices=groups)


def _another(puzzle: Sudoku, rng: Any, exclude: Collection[bytes]) -> tuple[Any, Any]:
    for _ in range(_TRIES):
        made = shuffle_sudoku(puzzle.question, puzzle.answer, rng)
        if not exclude or made[1].tobytes() not in exclude:
            return made
    raise ValueError(
        f"{_TRIES} shuffled versions of a puzzle all had answers of the test set: hold out fewer "
        "puzzles, or augment none"
    )


def read_sudoku_csv(path: PathLike, min_rating: int | None = None) -> Sequence[Sudoku]:
    """The puzzles of a CSV with the authors' columns source, question, answer, rating.

    Cells are digits, row by row; 0 or a dot is an empty cell. Each answer must be a solution of its
    question; that it is the only one is not proven. `min_rating` leaves out lines below it.

    Raises:
        FormatError: names the line of a wrong length, symbol, answer or rating.
        OSError: the file cannot be read.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    lines: list[int] = []
    questions: list[str] = []
    answers: list[str] = []
    ratings: list[int] = []
    size = 0

    def check() -> None:
        if lines:
            both = _digits(path, lines, questions, size), _digits(path, lines, answers, size)
            _check_answers(path, lines, *both)
            parts.append((*both, np.array(ratings)))
            for each in (lines, questions, answers, ratings):
                each.clear()  # type: ignore[attr-defined]

    for row in read_puzzle_csv(path):
        if min_rating is not None and row.rating < min_rating:
            continue
        for name, text in (("question", row.question), ("answer", row.answer)):
            if not size and len(text) in {n * n for n in BOXES}:
                size = round(len(text) ** 0.5)
            if len(text) != size * size:
                allowed = f"{size * size}, as above" if size else "16, 36 or 81"
                raise FormatError(
                    path, f"line {row.line}", f"{name} has {len(text)} cells; expected {allowed}"
                )
        lines.append(row.line)
        questions.append(row.question)
        answers.append(row.answer)
        ratings.append(row.rating)
        if len(lines) == 4096:
            check()
    check()
    if not parts:
        above = "" if min_rating is None else f" of rating {min_rating} or more"
        raise FormatError(path, None, f"no puzzle{above} in the file")
    return _Sudokus(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _digits(path: PathLike, lines: Sequence[int], texts: Sequence[str], size: int) -> np.ndarray:
    """The grids of texts of one length, uint8 [K, size, size]."""
    # A character beyond ASCII becomes one byte, too: the question mark.
    raw = np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8)
    cells = np.where(raw == ord("."), 0, raw - np.uint8(ord("0"))).reshape(len(texts), -1)
    if cells.max() > size:
        line, at = np.argwhere(cells > size)[0]
        raise FormatError(
            path,
            f"line {lines[line]}",
            f"cell {at + 1} is {texts[line][at]!r}; cells are digits up to {size}, and 0 or . "
            "where empty",
        )
    return cells.reshape(-1, size, size)


def _check_answers(
    path: PathLike, lines: Sequence[int], questions: np.ndarray, answers: np.ndarray
) -> None:
    """Refuses answers that are not full, break a rule of Sudoku or contradict their questions."""

    def refuse(wrong: np.ndarray, text: str, *given: np.ndarray) -> None:
        if wrong.any():
            line, row, column = np.argwhere(wrong)[0]
            values = [array[line, row, column] for array in given]
            at = f"row {row + 1}, column {column + 1}"
            raise FormatError(path, f"line {lines[line]}", text.format(*values, at=at))

    size = answers.shape[1]
    height, width = BOXES[size]
    refuse(answers == 0, "the answer has an empty cell at {at}")
    refuse(
        (questions > 0) & (questions != answers),
        "the question has {0} at {at}, and the answer {1}",
        questions,
        answers,
    )
    boxes = answers.reshape(-1, size // height, height, size // width, width)
    kinds = {
        "row": answers,
        "column": answers.swapaxes(1, 2),
        "box": boxes.swapaxes(2, 3).reshape(-1, size, size),
    }
    for name, units in kinds.items():
        seen = np.bitwise_or.reduce(1 << units.astype(np.int32), 2)
        if (wrong := seen != (2 << size) - 2).any():
            line, unit = np.argwhere(wrong)[0]
            raise FormatError(
                path, f"line {lines[line]}", f"{name} {unit + 1} of the answer repeats a digit"
            )


def _sizes() -> str:
    return ", ".join(map(str, BOXES))
