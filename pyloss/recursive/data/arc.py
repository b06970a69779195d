"""ARC: its JSON, and data sets of augmented tasks with an identifier for each.

A grid has up to 30 x 30 colors 0 to 9. It becomes a sequence of 900 tokens: a canvas of padding (0)
with the grid's colors + 2 somewhere on it and a border of end marks (1) below it and to its right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyloss.checks.numbers import shown, whole
from pyloss.errors import FormatError
from pyloss.io.bars import bar
from pyloss.io.files import PathLike, kind_of, read_json, user_path
from pyloss.recursive.data.dataset import BLANK, PuzzleDataset
from pyloss.recursive.data.dihedral import SYMMETRIES, dihedral, inverse_dihedral

SIDE = 30
COLORS = 10
END, FIRST_COLOR = 1, 2
VOCAB_SIZE = FIRST_COLOR + COLORS
_SEPARATOR = "|||"
#: How many augmentations are drawn for each that is wanted, since some give what is there already.
_DRAWS = 5

#: An input with its output.
Pair = tuple[np.ndarray, np.ndarray]
#: The pairs of a task under "train" and "test", in the order of its file.
Task = dict[str, list[Pair]]


def read_arc(path: PathLike) -> dict[str, Task]:
    """The tasks of a file or folder by their names.

    A file has one task ({"train": [{"input", "output"}, ...], "test": [...]}, named like the file,
    or by its key "name") or many by their names. The outputs of the test pairs may be in a file of
    solutions beside it: `..._solutions.json` for `..._challenges.json`. Of a folder all files
    `*.json` are read, without solutions. A test pair without an output has an empty one, of shape
    (0, 0).

    Raises:
        FormatError: names the task, the pair and the row of what is no ARC.
        OSError: a file cannot be read.
    """
    place = user_path(path)
    if not place.is_dir():
        return _of_file(place)
    files = [file for file in sorted(place.glob("*.json")) if not _is_solution(file)]
    if not files:
        raise FormatError(place, None, "has no file *.json")
    found: dict[str, Task] = {}
    for file in files:
        tasks = _of_file(file)
        if twice := sorted(set(tasks) & set(found)):
            raise FormatError(file, f"task {twice[0]}", "is in another file of the folder, too")
        found |= tasks
    return found


def _is_solution(file: Path) -> bool:
    return file.stem.endswith("solutions")


def _of_file(file: Path) -> dict[str, Task]:
    content = read_json(file)
    if {"train", "test"} <= set(content):
        name = content.get("name", file.stem)
        return {str(name): _task(file, str(name), content)}
    if not content:
        raise FormatError(file, None, "holds no task")
    solutions: dict[str, Any] = {}
    if file.stem.endswith("challenges"):
        beside = file.with_name(file.name.replace("challenges", "solutions"))
        if beside.is_file():
            solutions = read_json(beside)
    tasks = {}
    for name, task in content.items():
        if not isinstance(task, dict) or not {"train", "test"} <= set(task):
            raise FormatError(
                file,
                f"task {name}",
                f"is {kind_of(task)}; ARC's tasks are objects with train and test, or a file "
                "has one such task",
            )
        tasks[name] = _task(file, name, task, solutions.get(name))
    return tasks


def _task(file: Path, name: str, content: Mapping[str, Any], solutions: Any = None) -> Task:
    found: Task = {}
    for part in content:
        if part not in ("train", "test"):
            continue
        pairs = content[part]
        if not isinstance(pairs, list) or not pairs:
            raise FormatError(file, f"task {name}: {part}", "must be a list of pairs, at least one")
        if part == "test" and solutions is not None:
            if not isinstance(solutions, list) or len(solutions) != len(pairs):
                raise FormatError(
                    file,
                    f"task {name}",
                    f"has {len(pairs)} test pairs, and its solutions are "
                    f"{len(solutions) if isinstance(solutions, list) else kind_of(solutions)}",
                )
        found[part] = []
        for number, pair in enumerate(pairs):
            where = f"task {name}: {part} pair {number + 1}"
            if not isinstance(pair, dict) or "input" not in pair:
                raise FormatError(file, where, "must be an object with input and output")
            output = pair.get("output")
            if part == "test" and solutions is not None:
                output = solutions[number]
            if output is None and part == "train":
                raise FormatError(file, where, "has no output")
            both = (
                _grid(file, f"{where}: input", pair["input"]),
                (
                    np.zeros((0, 0), np.uint8)
                    if output is None
                    else _grid(file, f"{where}: output", output)
                ),
            )
            found[part].append(both)
    return found


def _grid(file: Path, where: str, rows: Any) -> np.ndarray:
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) for r in rows):
        raise FormatError(file, where, "must be a list of rows, each a list of colors")
    width = len(rows[0])
    if not 1 <= width <= SIDE or len(rows) > SIDE:
        raise FormatError(file, where, f"is {len(rows)} x {width}; grids have 1 to {SIDE} a side")
    for number, row in enumerate(rows):
        if len(row) != width:
            text = f"has {len(row)} cells, and row 1 has {width}"
            raise FormatError(file, f"{where}: row {number + 1}", text)
        for color in row:
            if type(color) is not int or not 0 <= color < COLORS:
                text = f"has the color {shown(color)}; colors are 0 to {COLORS - 1}"
                raise FormatError(file, f"{where}: row {number + 1}", text)
    return np.array(rows, np.uint8)


class Variation(NamedTuple):
    """A symmetry and a permutation of colors.

    Attributes:
        symmetry: a number of `dihedral`.
        colors: uint8 [10], the new color of each; 0 stays.
    """

    symmetry: int
    colors: np.ndarray

    @classmethod
    def drawn(cls, rng: Any) -> Variation:
        """Draws one from a RandomState, as the authors' code does after `np.random.seed`."""
        symmetry = int(rng.randint(0, SYMMETRIES))
        colors = rng.permutation(np.arange(1, COLORS, dtype=np.uint8))
        return cls(symmetry, np.concatenate([np.zeros(1, np.uint8), colors]))

    def of(self, grid: np.ndarray) -> np.ndarray:
        return dihedral(self.colors[grid], self.symmetry)

    def name(self, task: str) -> str:
        """The name of the identifier of this variation of a task."""
        digits = "".join(map(str, self.colors))
        return f"{task}{_SEPARATOR}t{self.symmetry}{_SEPARATOR}{digits}"


def inverse_augmentation(name: str) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """The task of an identifier's name, and the function that undoes its variation of a grid.

    ValueError if the name has marks of a variation that are none.
    """
    if _SEPARATOR not in name:
        return name, lambda grid: grid
    task, *marks = name.split(_SEPARATOR)
    digits = marks[-1]
    valid = len(marks) > 1 and marks[-2][:1] == "t" and marks[-2][1:] in set("01234567")
    if not valid or sorted(digits) != sorted("0123456789"):
        raise ValueError(
            f"the identifier {shown(name)} must end in {_SEPARATOR}t and a number up to 7, "
            f"{_SEPARATOR} and the ten colors"
        )
    colors = np.argsort([int(c) for c in digits]).astype(np.uint8)
    symmetry = int(marks[-2][1:])
    return task, lambda grid: colors[inverse_dihedral(grid, symmetry)]


def variations(task: Task, count: int, rng: Any) -> list[Variation | None]:
    """The task itself (None) and up to `count` variations that give other pairs than those before.

    A task with much symmetry may have fewer.
    """
    found: list[Variation | None] = [None]
    seen = {_digest(task, None)}
    for _ in range(_DRAWS * count):
        variation = Variation.drawn(rng)
        digest = _digest(task, variation)
        if digest not in seen:
            seen.add(digest)
            found.append(variation)
        if len(found) > count:
            break
    return found


def _digest(task: Task, variation: Variation | None) -> bytes:
    """Equal for the same pairs in any order."""
    pairs = [
        b"".join(bytes(grid.shape) + grid.tobytes() for grid in _varied(pair, variation))
        for part in task.values()
        for pair in part
    ]
    return hashlib.sha256(b"|".join(sorted(pairs))).digest()


def _varied(pair: Pair, variation: Variation | None) -> Pair:
    return pair if variation is None else (variation.of(pair[0]), variation.of(pair[1]))


def tokens(grid: np.ndarray, down: int = 0, right: int = 0) -> np.ndarray:
    """The sequence uint8 [900] of a grid, `down` rows and `right` columns from the corner."""
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    bottom, side = down + grid.shape[0], right + grid.shape[1]
    canvas[down:bottom, right:side] = grid + FIRST_COLOR
    canvas[bottom : bottom + 1, right:side] = END
    canvas[down:bottom, side : side + 1] = END
    return canvas.reshape(-1)


def grid_of(sequence: np.ndarray) -> np.ndarray:
    """The grid of a sequence [900]: the largest rectangle of colors in the upper left corner."""
    canvas = np.asarray(sequence).reshape(SIDE, SIDE)
    colors = (canvas >= FIRST_COLOR) & (canvas < VOCAB_SIZE)
    widths = np.minimum.accumulate(np.where(colors.all(1), SIDE, colors.argmin(1)))
    height = int(np.argmax(widths * np.arange(1, SIDE + 1))) + 1
    width = int(widths[height - 1])
    return (canvas[: height if width else 0, :width] - FIRST_COLOR).astype(np.uint8)


class ArcData(NamedTuple):
    """The data sets of tasks.

    Attributes:
        train: all pairs of the training tasks, and the "train" pairs of those held out.
        test: the "test" pairs of the tasks held out; None if there are none.
        identifiers: the names of the puzzle identifiers, the blank first.
        test_puzzles: the tasks held out, as their JSON, for the voting.
        short: the tasks with fewer variations than wanted, and how many they have.
    """

    train: PuzzleDataset
    test: PuzzleDataset | None
    identifiers: list[str]
    test_puzzles: dict[str, Any]
    short: dict[str, int]


def arc_datasets(
    sources: Sequence[tuple[Mapping[str, Task], bool]], augment: int = 0, seed: Any = 42
) -> ArcData:
    """The data sets of sources of tasks, each with whether its tasks are held out.

    Each task and each of its `augment` variations is a puzzle with an identifier; a task's are one
    group. Grids of training puzzles are moved on the canvas at random, but for one pair of each
    puzzle. The draws are those of the authors' script for a seed and the order of sources.

    Raises:
        ValueError: no tasks, or one that is both trained and held out.
    """
    whole(augment, "augment", 0)
    rng: Any = seed if hasattr(seed, "randint") else np.random.RandomState(whole(seed, "seed", 0))
    trained, held_out = (
        {name for tasks, held in sources if held == wanted for name in tasks}
        for wanted in (False, True)
    )
    if both := sorted(trained & held_out):
        raise ValueError(f"the task {both[0]} is trained, and held out, too")
    puzzles: list[tuple[str, Task, bool, list[Variation | None]]] = []
    with bar("augmenting", sum(len(tasks) for tasks, _ in sources), "task") as progress:
        for tasks, held in sources:
            items = list(tasks.items())
            rng.shuffle(items)
            for name, task in items:
                puzzles.append((name, task, held, variations(task, augment, rng)))
                progress.step()
    if not puzzles:
        raise ValueError("there are no tasks")
    identifiers: dict[str, int] = {}
    for name, _, _, group in puzzles:
        for each in group:
            identifiers.setdefault(_name(name, each), len(identifiers) + 1)
    train = _dataset(puzzles, identifiers, False, rng)
    assert train is not None  # each task has "train" pairs
    return ArcData(
        train,
        _dataset(puzzles, identifiers, True, rng),
        [BLANK, *identifiers],
        {name: _json(task) for name, task, held, _ in puzzles if held},
        {name: len(group) - 1 for name, _, _, group in puzzles if len(group) <= augment},
    )


def _name(task: str, variation: Variation | None) -> str:
    return task if variation is None else variation.name(task)


def _dataset(
    puzzles: Sequence[tuple[str, Task, bool, list[Variation | None]]],
    identifiers: Mapping[str, int],
    test: bool,
    rng: Any,
) -> PuzzleDataset | None:
    """A split; None if it has no pairs."""
    chosen = []
    for name, task, held, group in puzzles:
        if test and not held:
            continue
        parts = [part for part in task if not held or (part == "test") == test]
        # There is nothing to learn from a training pair without its output.
        pairs = [pair for part in parts for pair in task[part] if held or pair[1].size]
        chosen.append((name, pairs, group))
    total = sum(len(pairs) * len(group) for _, pairs, group in chosen)
    if not total:
        return None
    arrays = np.empty((2, total, SIDE * SIDE), np.uint8)
    numbers, puzzle_ends, group_ends, row = [], [0], [0], 0
    with bar("writing grids", total, "pair") as progress:
        for name, pairs, group in chosen:
            for variation in group:
                unmoved = rng.randint(0, len(pairs))
                for number, pair in enumerate(pairs):
                    grids = _varied(pair, variation)
                    place = _place(grids, rng) if not test and number != unmoved else (0, 0)
                    # An output that is not known is the smallest grid, as in the authors' data.
                    shown_out = grids[1] if grids[1].size else np.zeros((1, 1), np.uint8)
                    arrays[0, row], arrays[1, row] = (
                        tokens(grids[0], *place),
                        tokens(shown_out, *place),
                    )
                    row += 1
                numbers.append(identifiers[_name(name, variation)])
                puzzle_ends.append(row)
                progress.step(len(pairs))
            group_ends.append(len(numbers))
    return PuzzleDataset(
        arrays[0],
        arrays[1],
        VOCAB_SIZE,
        numbers,
        puzzle_ends,
        group_ends,
        num_puzzle_identifiers=len(identifiers) + 1,
    )


def _place(grids: Pair, rng: Any) -> tuple[int, int]:
    """A random place of both grids on the canvas."""
    down, right = (
        int(rng.randint(0, SIDE - max(grid.shape[axis] for grid in grids) + 1)) for axis in (0, 1)
    )
    return down, right


def _json(task: Task) -> dict[str, Any]:
    return {
        part: [
            {"input": inp.tolist(), "output": out.tolist() if out.size else [[0]]}
            for inp, out in pairs
        ]
        for part, pairs in task.items()
    }
