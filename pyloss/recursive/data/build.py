"""Writes a folder of puzzles for training: made ones, or those of files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown, whole
from pyloss.errors import FormatError, counted
from pyloss.io.bars import bar
from pyloss.io.files import PathLike, check_target, temporary_beside, user_path, write_json
from pyloss.io.outputs import output
from pyloss.recursive.data.arc import arc_datasets, read_arc
from pyloss.recursive.data.arc_votes import TEST_PUZZLES_FILE
from pyloss.recursive.data.dataset import IDENTIFIERS_FILE, PuzzleDataset
from pyloss.recursive.data.maze import Maze, maze_dataset, read_maze_csv
from pyloss.recursive.data.maze_making import maze_puzzles
from pyloss.recursive.data.sudoku import Sudoku, read_sudoku_csv, sudoku_dataset
from pyloss.recursive.data.sudoku_making import sudoku_puzzles

KINDS = ("sudoku", "maze", "arc")
#: How many puzzles are made for a split.
TRAIN, TEST = 1000, 200
#: Made puzzles in a row with an answer of the test set after which a request is given up.
_SKIPS = 2000

#: The options of made puzzles and of those of files; all kinds have augment and seed.
_MADE = {
    "sudoku": ("size", "train", "test", "difficulty", "empty"),
    "maze": ("size", "train", "test", "min_path"),
    "arc": (),
}
_READ = {
    "sudoku": ("held_out", "train", "test", "min_rating"),
    "maze": ("held_out", "train", "test"),
    "arc": ("held_out",),
}


@dataclass
class Built:
    """What `build` wrote.

    Attributes:
        folder: the folder.
        train, test: the splits; test is None if nothing is held out.
        lines: what they hold, in words.
    """

    folder: Path
    train: PuzzleDataset
    test: PuzzleDataset | None
    lines: list[str]
    identifiers: list[str] | None = field(default=None, repr=False)
    test_puzzles: dict[str, Any] | None = field(default=None, repr=False)


def build(
    kind: str,
    source: PathLike | Sequence[PathLike] | None,
    out: PathLike,
    *,
    held_out: PathLike | Sequence[PathLike] | None = None,
    size: int | None = None,
    train: int | None = None,
    test: int | None = None,
    difficulty: str | None = None,
    empty: int | None = None,
    min_rating: int | None = None,
    min_path: int | None = None,
    augment: int = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> Built:
    """Writes puzzles into the folder `out`, in the authors' format, wholly or not at all.

    Args:
        kind: "sudoku", "maze" or "arc".
        source: None: puzzles are made. Else the training puzzles: a CSV, or a folder with train.csv
            and perhaps test.csv; ARC's JSON files or folders.
        held_out: the same for the test set.
        size, difficulty, empty, min_path: of made puzzles, see `sudoku_puzzles`, `maze_puzzles`.
        train, test: how many puzzles to make (1000 and 200), or to draw from a CSV (train: all;
            test: all of `held_out`, else none). Without `held_out` the test set is drawn from
            `source`.
        min_rating: leaves out lines of a CSV of Sudokus.
        augment: variations of each training puzzle; a maze has 7. Those of Sudokus never have an
            answer of the test set.
        seed: of all draws.
        overwrite: replaces earlier files, which otherwise move to a folder previous-N.

    Raises:
        ValueError: options out of range or of another kind, requests that cannot be met, files that
            hold something else.
        OSError: a file cannot be read or written.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {shown(kind)}; it must be one of {', '.join(KINDS)}")
    given = {
        "held_out": held_out, "size": size, "train": train, "test": test, "min_path": min_path,
        "difficulty": difficulty, "empty": empty, "min_rating": min_rating,
    }  # fmt: skip
    sources, held = _places(source), _places(held_out)
    given = {name: value for name, value in given.items() if value is not None}
    allowed = (_READ if sources else _MADE)[kind]
    if kind == "arc" and not sources:
        raise ValueError("arc needs a source: ARC's JSON files or folders")
    if wrong := [name for name in given if name not in allowed]:
        what = f"{'read' if sources else 'made'} puzzles of kind {kind}"
        raise ValueError(
            f"{wrong[0]} is no option of {what}; they have {', '.join((*allowed, 'augment'))}"
        )
    for name in ("train", "test"):
        if name in given:
            whole(given[name], name, 1 if name == "train" else 0)
    whole(augment, "augment", 0)
    whole(seed, "seed", 0)
    place = user_path(out)
    check_target(place, folder=True)
    if kind == "arc":
        made = _arc(place, sources, held, augment, seed)
    else:
        chosen = (
            _read_splits(kind, sources, held, given, seed)
            if sources
            else _make_splits(kind, given, seed)
        )
        made = _grids(kind, place, *chosen, augment)
    _write(made, overwrite)
    return made


def _places(given: PathLike | Sequence[PathLike] | None) -> list[Path]:
    if given is None:
        return []
    if isinstance(given, (str, bytes, os.PathLike)):
        given = [given]  # type: ignore[list-item]
    return [user_path(path) for path in given]


def _make_splits(
    kind: str, given: dict[str, Any], seed: int
) -> tuple[Sequence[Any], Sequence[Any], Any]:
    """Made puzzles of both splits, and the generator of the draws after them."""
    counts = given.pop("test", TEST), given.pop("train", TRAIN)
    maker: Callable[..., Iterator[Any]] = sudoku_puzzles if kind == "sudoku" else maze_puzzles
    source, skipped = maker(seed=seed, **given), 0
    with bar("making puzzles", sum(counts), "puzzle") as progress:

        def taken(puzzle: Any) -> Any:
            progress.step()
            return puzzle

        test = [taken(puzzle) for puzzle in islice(source, counts[0])]
        held = _keys(kind, test)
        train: list[Any] = []
        while len(train) < counts[1]:
            puzzle = next(source)
            if _key(kind, puzzle) not in held:
                train.append(taken(puzzle))
                skipped = 0
            elif (skipped := skipped + 1) == _SKIPS:
                raise ValueError(
                    f"{len(train)} of {counts[1]} training puzzles were made, and then only some "
                    "with an answer of the test set: ask for fewer puzzles"
                )
    return train, test, np.random.RandomState(seed)


def _read_splits(
    kind: str, sources: list[Path], held: list[Path], given: dict[str, Any], seed: int
) -> tuple[Sequence[Any], Sequence[Any], Any]:
    """The puzzles of files for both splits, and the generator of the draws after them."""
    if len(sources) > 1 or len(held) > 1:
        raise ValueError(f"{kind} takes one source, a CSV or a folder with train.csv")
    path, others = sources[0], held
    if path.is_dir():
        beside = path / "test.csv"
        others = held or ([beside] if beside.is_file() else [])
        path = path / "train.csv"

    def read(file: Path) -> Sequence[Any]:
        if file.is_dir():
            file = file / "test.csv"
        if kind == "maze":
            return read_maze_csv(file)
        return read_sudoku_csv(file, given.get("min_rating"))

    rng = np.random.RandomState(seed)
    # The draws for training puzzles are those of the authors' scripts after np.random.seed.
    other = np.random.RandomState([seed, 1])
    train, count = read(path), given.get("test")
    test: Sequence[Any] = []
    if others:
        test = _drawn(read(others[0]), count, "test", others[0], other)
    elif count:
        if count >= len(train):
            raise ValueError(f"test is {count}; {path} has {counted(len(train), 'puzzle')}")
        order = other.permutation(len(train))
        test = [train[i] for i in order[:count]]
        train = [train[i] for i in sorted(order[count:])]
    if test and np.shape(test[0].question) != np.shape(train[0].question):
        raise FormatError(others[0], None, "has grids of another size than the training puzzles")
    return _drawn(train, given.get("train"), "train", path, rng), test, rng


def _drawn(
    puzzles: Sequence[Any], count: int | None, name: str, path: Path, rng: Any
) -> Sequence[Any]:
    if count is None or count == len(puzzles):
        return puzzles
    if count > len(puzzles):
        raise ValueError(
            f"{name} is {count}; {path} has {counted(len(puzzles), 'puzzle')} to draw from"
        )
    return [puzzles[i] for i in rng.choice(len(puzzles), size=count, replace=False)]


def _key(kind: str, puzzle: Any) -> bytes:
    """What puzzles of the two splits must not share: a Sudoku's answer, a maze."""
    grid: np.ndarray = puzzle.answer if kind == "sudoku" else puzzle.question
    return grid.tobytes()


def _keys(kind: str, puzzles: Sequence[Any]) -> set[bytes]:
    return {_key(kind, puzzle) for puzzle in puzzles}


def _grids(
    kind: str, place: Path, train: Sequence[Any], test: Sequence[Any], rng: Any, augment: int
) -> Built:
    held = _keys(kind, test)
    splits: list[PuzzleDataset | None] = []
    for puzzles, count in ((train, augment), (test, 0)):
        if not puzzles:
            splits.append(None)
        elif kind == "sudoku":
            splits.append(sudoku_dataset(puzzles, count, rng, held))
        else:
            splits.append(maze_dataset(puzzles, count))
    lines = [f"train: {_described(train)}" + _varied(augment, splits[0])]
    if test:
        lines.append(f"test: {_described(test)}")
    if same := sum(_key(kind, puzzle) in held for puzzle in train):
        what = "an answer" if kind == "sudoku" else "a maze"
        lines.append(f"note: {counted(same, 'training puzzle')} with {what} of the test set")
    assert splits[0] is not None  # train is never empty
    return Built(place, splits[0], splits[1], lines)


def _described(puzzles: Sequence[Sudoku] | Sequence[Maze]) -> str:
    """ "1000 puzzles of 9 x 9, 24.3 cells given, ratings 0 to 31 (median 2)"."""
    size = len(puzzles[0].question)
    ratings = [puzzle.rating for puzzle in puzzles]
    spread = f"{min(ratings)} to {max(ratings)} (median {np.median(ratings):.0f})"
    if isinstance(puzzles[0], Maze):
        return f"{counted(len(puzzles), 'maze')} of {size} x {size}, ratings {spread}"
    given = np.mean([np.count_nonzero(puzzle.question) for puzzle in puzzles])
    return (
        f"{counted(len(puzzles), 'puzzle')} of {size} x {size}, {given:.1f} cells given, "
        f"ratings {spread}"
    )


def _varied(augment: int, dataset: PuzzleDataset | None) -> str:
    return f"; with {counted(augment, 'variation')} of each: {len(dataset or ())}" * bool(augment)


def _arc(place: Path, sources: list[Path], held: list[Path], augment: int, seed: int) -> Built:
    tasks = [(read_arc(path), False) for path in sources]
    tasks += [(read_arc(path), True) for path in held]
    made = arc_datasets(tasks, augment, seed)
    counts = [sum(len(found) for found, out in tasks if out is split) for split in (False, True)]
    lines = [
        f"train: {counted(sum(counts), 'task')} (train pairs only of {counts[1]}), "
        f"{counted(made.train.total_puzzles, 'puzzle')}, {counted(len(made.train), 'pair')}"
    ]
    if made.test is not None:
        lines.append(
            f"test: {counted(counts[1], 'task')}, {counted(made.test.total_puzzles, 'puzzle')}, "
            f"{counted(len(made.test), 'pair')}"
        )
    if made.short:
        lines.append(
            f"note: {counted(len(made.short), 'task')} with fewer than {augment} variations: "
            "others give the same pairs"
        )
    unknown = [
        name
        for found, out in tasks
        if out
        for name, task in found.items()
        if any(not pair[1].size for pair in task["test"])
    ]
    if unknown:
        lines.append(
            f"note: {counted(len(unknown), 'task')} of the test set without outputs, which are "
            "taken for [[0]]: a submission can be made, a score means nothing"
        )
    return Built(place, made.train, made.test, lines, made.identifiers, made.test_puzzles)


def _write(made: Built, overwrite: bool) -> None:
    """Writes the folder beside its place, then moves its parts there."""
    names = ["train", "test", IDENTIFIERS_FILE, TEST_PUZZLES_FILE]
    with output(made.folder, names, overwrite=overwrite):
        beside = temporary_beside(made.folder / "puzzles")
        try:
            for split, dataset in (("train", made.train), ("test", made.test)):
                if dataset is not None:
                    dataset.save(beside, split, made.identifiers)
            if made.test_puzzles is not None:
                write_json(beside / TEST_PUZZLES_FILE, made.test_puzzles)
            for name in os.listdir(beside):
                os.rename(beside / name, made.folder / name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
