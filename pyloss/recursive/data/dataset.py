"""Puzzles as arrays: the folder format of HRM and TRM, and the batches of an epoch.

A group holds the variants of one puzzle, a puzzle holds examples: an example of a Sudoku is the
whole puzzle, one of ARC a pair of grids. A folder has the splits "train" and "test", a split has
`dataset.json` and five arrays such as `all__inputs.npy`, and `identifiers.json` beside the splits
names the puzzle identifiers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.checks.arrays import as_integers
from pyloss.checks.numbers import shown, whole
from pyloss.errors import FormatError, counted
from pyloss.io.files import PathLike, read_json, replacing, user_path, write_json
from pyloss.io.outputs import make_folder

#: The label of what is not predicted, in batches.
IGNORE_LABEL_ID = -100
BLANK = "<blank>"
IDENTIFIERS_FILE = "identifiers.json"
_METADATA_FILE = "dataset.json"
_ARRAYS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")
#: The keys of dataset.json that are numbers. TRM's code needs total_puzzles, HRM's does not have it
_NUMBERS = ("seq_len", "vocab_size", "pad_id", "blank_identifier_id", "num_puzzle_identifiers")


class PuzzleBatch(dict[str, np.ndarray]):
    """The arrays of a batch: "inputs" and "labels" int32 [B, T], "puzzle_identifiers" int32 [B].

    Attributes:
        count: the rows that are examples; rows after them are padding without labels.
    """

    count: int

    def __init__(self, arrays: dict[str, np.ndarray], count: int):
        super().__init__(arrays)
        self.count = count


@dataclass(eq=False)
class PuzzleDataset:
    """Examples of puzzles, with the authors' names.

    Attributes:
        inputs, labels: integers [N, T] as stored, uint8 over a mapped file where loaded; N is
            `len(dataset)`.
        vocab_size: tokens are below it.
        puzzle_identifiers: int32 [P], the number of each puzzle for its embedding. Left out: all 0.
        puzzle_indices: int32 [P + 1]: puzzle p has examples from puzzle_indices[p] on, up to those
            of the next. Left out: one example each.
        group_indices: int32 [G + 1], the same of groups and puzzles.
        pad_id: the token that fills inputs.
        ignore_label_id: the label that is not predicted, beside -100; None: only -100.
        blank_identifier_id: the identifier of padding.
        num_puzzle_identifiers: identifiers are below it.

    Raises:
        ValueError: arrays that do not fit together, tokens outside the vocabulary, identifiers out
            of range; names the array and the place.
    """

    inputs: np.ndarray
    labels: np.ndarray
    vocab_size: int
    puzzle_identifiers: Any = None
    puzzle_indices: Any = None
    group_indices: Any = None
    pad_id: int = 0
    ignore_label_id: int | None = 0
    blank_identifier_id: int = 0
    num_puzzle_identifiers: int = 1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_puzzle_identifiers"):
            whole(getattr(self, name), name, 1)
        whole(self.pad_id, "pad_id", 0, self.vocab_size - 1)
        whole(self.blank_identifier_id, "blank_identifier_id", 0, self.num_puzzle_identifiers - 1)
        if self.ignore_label_id is not None:
            whole(self.ignore_label_id, "ignore_label_id")
        for name in ("inputs", "labels"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
                setattr(self, name, as_integers(array, name))
        if self.inputs.ndim != 2 or self.inputs.shape != self.labels.shape or not self.inputs.size:
            raise ValueError(
                "inputs and labels must have one shape [examples, tokens] with at least one of "
                f"each, got {self.inputs.shape} and {self.labels.shape}"
            )
        self._check_tokens("inputs", self.inputs, ())
        self._check_tokens("labels", self.labels, (IGNORE_LABEL_ID, self.ignore_label_id))
        count = len(self.inputs)
        self.puzzle_indices = _bounds(self.puzzle_indices, "puzzle_indices", count, "examples")
        puzzles = len(self.puzzle_indices) - 1
        self.group_indices = _bounds(self.group_indices, "group_indices", puzzles, "puzzles")
        if self.puzzle_identifiers is None:
            self.puzzle_identifiers = np.zeros(puzzles, np.int32)
        found = as_integers(self.puzzle_identifiers, "puzzle_identifiers")
        most = self.num_puzzle_identifiers
        if found.shape != (puzzles,) or not 0 <= found.min() <= found.max() < most:
            raise ValueError(
                f"puzzle_identifiers must be {puzzles} numbers below num_puzzle_identifiers "
                f"{most}, got shape {found.shape}"
                + (f" from {found.min()} to {found.max()}" if found.size else "")
            )
        self.puzzle_identifiers = found.astype(np.int32)

    def _check_tokens(self, name: str, array: np.ndarray, others: Sequence[int | None]) -> None:
        """Refuses tokens outside the vocabulary that are none of `others`."""
        if 0 <= array.min() and array.max() < self.vocab_size:
            return
        wrong = (array < 0) | (array >= self.vocab_size)
        for other in others:
            wrong &= array != other
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"{name} of example {row} have {array[row, column]} at position {column}; "
                f"the vocabulary is 0 to {self.vocab_size - 1}"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def seq_len(self) -> int:
        """T, the tokens of a puzzle."""
        return int(self.inputs.shape[1])

    @property
    def total_groups(self) -> int:
        """The number of groups: puzzles that are one another's augmentations."""
        return len(self.group_indices) - 1

    @property
    def total_puzzles(self) -> int:
        """The number of puzzles, each with one example or several."""
        return len(self.puzzle_indices) - 1

    @property
    def mean_puzzle_examples(self) -> float:
        """Examples for each puzzle, in the mean."""
        return len(self) / self.total_puzzles

    @property
    def sets(self) -> list[str]:
        """The names before `__inputs.npy` of the files that `save` writes."""
        return ["all"]

    @property
    def metadata(self) -> dict[str, Any]:
        """The content of dataset.json."""
        names = (
            "pad_id", "ignore_label_id", "blank_identifier_id", "vocab_size", "seq_len",
            "num_puzzle_identifiers", "total_groups", "mean_puzzle_examples", "total_puzzles",
            "sets",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @classmethod
    def load(cls, folder: PathLike, split: str = "train") -> PuzzleDataset:
        """Reads a split of a folder that `save` or the authors' scripts wrote.

        Tokens stay in the mapped files, unless the split has several sets, which become one.

        Raises:
            FormatError: a file that is no such array or has other keys, arrays that do not fit
                together, tokens outside the vocabulary.
            OSError: a file cannot be read.
        """
        place = user_path(folder) / split
        if not place.is_dir() and (known := _splits(place.parent)):
            raise FormatError(place, None, f"no such split; the folder has {', '.join(known)}")
        path = place / _METADATA_FILE
        metadata = read_json(path)
        numbers = {name: _number(path, metadata, name) for name in _NUMBERS}
        ignored = metadata.get("ignore_label_id")
        if ignored is not None:
            ignored = _number(path, metadata, "ignore_label_id")
        sets = metadata.get("sets")
        if not isinstance(sets, list) or not sets or not all(isinstance(x, str) for x in sets):
            raise FormatError(path, "sets", f"is {shown(sets)}; it must be a list of names")
        found = [{name: _array(place / f"{x}__{name}.npy") for name in _ARRAYS} for x in sets]
        seq_len = numbers.pop("seq_len")
        try:
            settings: dict[str, Any] = {**_joined(found), **numbers, "ignore_label_id": ignored}
            made = cls(**settings)
        except (ValueError, TypeError) as error:
            raise FormatError(place, None, str(error)) from None
        if made.seq_len != seq_len:
            raise FormatError(
                path, "seq_len", f"is {seq_len}, and inputs have {made.seq_len} tokens"
            )
        return made

    def save(
        self, folder: PathLike, split: str = "train", identifiers: Sequence[str] | None = None
    ) -> None:
        """Writes a split into `folder`, in the authors' format; each file wholly or not at all.

        `identifiers` are the names of the puzzle identifiers, for `identifiers.json`. Left out, the
        file is written where the blank is the only one.
        """
        place = user_path(folder) / split
        if identifiers is None and self.num_puzzle_identifiers == 1:
            identifiers = [BLANK]
        if identifiers is not None and len(identifiers) != self.num_puzzle_identifiers:
            raise ValueError(
                f"identifiers are {counted(len(identifiers), 'name')} for "
                f"{self.num_puzzle_identifiers} puzzle identifiers"
            )
        make_folder(place)
        for name in _ARRAYS:
            with replacing(place / f"all__{name}.npy") as beside, open(beside, "wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)
        if identifiers is not None:
            write_json(place.parent / IDENTIFIERS_FILE, list(identifiers))
        write_json(place / _METADATA_FILE, self.metadata)

    def examples(self, indices: Any, puzzles: Any = None) -> dict[str, np.ndarray]:
        """The arrays of a batch for some examples, whose `puzzles` are searched if left out."""
        rows = np.asarray(indices)
        if puzzles is None:
            puzzles = np.searchsorted(self.puzzle_indices, rows, side="right") - 1
        labels = self.labels[rows].astype(np.int32)
        if self.ignore_label_id is not None:
            labels[labels == self.ignore_label_id] = IGNORE_LABEL_ID
        return {
            "inputs": self.inputs[rows].astype(np.int32),
            "labels": labels,
            "puzzle_identifiers": self.puzzle_identifiers[puzzles],
        }

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        epochs: int = 1,
        train: bool = True,
        start: int = 0,
    ) -> Iterator[PuzzleBatch]:
        """The batches of `epochs` epochs, each of `batch_size` rows.

        With `train`, all groups come in a random order, a puzzle of each is drawn, and its examples
        fill batches in a random order; a batch takes what fits of the last puzzle. What fills no
        batch at the end is dropped. The order depends on `seed` and `epoch` only, so that a resumed
        run sees the same batches; it is the authors' for a seed and their `epochs_per_iter`, where
        puzzles have one example. Without `train`, all examples come in order, and the last batch is
        padded.

        Args:
            epoch: counts these calls from 0.
            start: the batches that are left out at the beginning, for a resumed run.

        Raises:
            ValueError: numbers out of range, or training batches that are larger than the epochs.
        """
        whole(batch_size, "batch_size", 1)
        for name, value in (("seed", seed), ("epoch", epoch), ("start", start)):
            whole(value, name, 0)
        whole(epochs, "epochs", 1)
        return (
            self._train(batch_size, seed + epoch + 1, epochs, start)
            if train
            else self._test(batch_size, start)
        )

    def _test(self, batch_size: int, start: int) -> Iterator[PuzzleBatch]:
        for begin in range(start * batch_size, len(self), batch_size):
            rows = np.arange(begin, min(begin + batch_size, len(self)))
            arrays = self.examples(rows)
            more = batch_size - len(rows)
            fills = self.pad_id, IGNORE_LABEL_ID, self.blank_identifier_id
            for (name, array), fill in zip(list(arrays.items()), fills, strict=True):
                widths = ((0, more),) + ((0, 0),) * (array.ndim - 1)
                arrays[name] = np.pad(array, widths, constant_values=fill)
            yield PuzzleBatch(arrays, len(rows))

    def _train(self, batch_size: int, seed: int, epochs: int, start: int) -> Iterator[PuzzleBatch]:
        # The authors draw examples from NumPy's global state, so that these have a generator of
        # their own here: the draws of groups and puzzles are theirs.
        rng = np.random.Generator(np.random.Philox(seed=seed))
        inner = np.random.Generator(np.random.Philox(seed=[seed, 1]))
        groups = iter(np.concatenate([rng.permutation(self.total_groups) for _ in range(epochs)]))
        made = 0
        while True:
            rows: list[np.ndarray] = []
            puzzles: list[np.ndarray] = []
            room = batch_size
            while room and (group := next(groups, None)) is not None:
                puzzle = rng.integers(self.group_indices[group], self.group_indices[group + 1])
                first, end = self.puzzle_indices[puzzle : puzzle + 2]
                taken = min(int(end - first), room)
                rows.append(first + inner.choice(int(end - first), taken, replace=False))
                puzzles.append(np.full(taken, puzzle))
                room -= taken
            if room:
                break
            made += 1
            if made > start:
                arrays = self.examples(np.concatenate(rows), np.concatenate(puzzles))
                yield PuzzleBatch(arrays, batch_size)
        if not made:
            raise ValueError(
                f"{counted(epochs, 'epoch')} of {counted(self.total_groups, 'group')} give no "
                f"batch of {batch_size} examples: give a smaller batch_size or more epochs"
            )


def _bounds(given: Any, name: str, end: int, things: str) -> np.ndarray:
    """Checks the bounds of parts that are not empty, from 0 to `end`; makes parts of one thing."""
    if given is None:
        return np.arange(end + 1, dtype=np.int32)
    found = as_integers(given, name)
    if (
        found.ndim != 1
        or len(found) < 2
        or found[0] != 0
        or found[-1] != end
        or (np.diff(found) < 1).any()
    ):
        raise ValueError(
            f"{name} must increase from 0 to the number of {things}, {end}, got "
            f"{shown(found.tolist()) if found.ndim == 1 else f'shape {found.shape}'}"
        )
    return found.astype(np.int32)


def _splits(folder: Path) -> list[str]:
    """The splits of a folder."""
    return sorted(path.parent.name for path in folder.glob(f"*/{_METADATA_FILE}"))


def _number(path: Path, metadata: dict[str, Any], name: str) -> int:
    try:
        return whole(metadata.get(name), name)
    except (TypeError, ValueError) as error:
        raise FormatError(path, None, str(error)) from None


def _array(path: Path) -> np.ndarray:
    """A mapped array. FormatError if the file holds another kind of thing."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged header raises errors of Python's parser, too
        raise FormatError(path, None, f"not an array of NumPy's: {error}") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu":
        kind = getattr(found, "dtype", "an archive")
        raise FormatError(path, None, f"holds {kind}; it must be an array of integers")
    return found


def _joined(sets: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of several sets one after the other."""
    if len(sets) == 1:
        return sets[0]
    shapes = [each["inputs"].shape[1:] for each in sets]
    if len(set(shapes)) > 1:
        raise ValueError(f"the sets have inputs of unlike shapes: {', '.join(map(str, shapes))}")
    found = {name: np.concatenate([each[name] for each in sets]) for name in _ARRAYS[:3]}
    for name in _ARRAYS[3:]:
        bounds = np.zeros(1, np.int64)
        for each in sets:
            bounds = np.concatenate([bounds, bounds[-1] + each[name][1:]])
        found[name] = bounds
    return found
