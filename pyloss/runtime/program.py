"""Programs: the calls of a function to the core, which run on other arrays without its Python.

`Writer` turns recorded calls into steps of `_core.run`. A step names its arrays by slots and lets
the core make its outputs, so sizes may differ from run to run. A program does not see values that
Python reads or computes between the calls. `Writer` therefore refuses operations whose results
Python reads, and arrays that no call made and nobody gave.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyloss import _core
from pyloss.random import Seed
from pyloss.runtime.replay import Calls

_OPS = _core.ops()
#: operations whose results decide about later calls
_REFUSED = {"same_bits", "columns_above", "argmax"}


class NotReplayable(Exception):
    """The calls alone do not compute what the function computes."""


class _Signature(NamedTuple):
    """The arguments of an operation.

    Attributes:
        outputs: the place of the first output.
        updated: for each argument, whether it is an output whose values are read.
        narrow: for each argument, whether it may be in bfloat16.
        accumulate: the place of the argument that makes outputs such, or -1.
        rows: for each output with axes that no input has, the place of an input with as many rows.
    """

    name: str
    outputs: int
    updated: list[bool]
    narrow: list[bool]
    accumulate: int
    rows: dict[int, int]


def _signature(name: str, text: str) -> _Signature:
    inputs = text.split(">")[0].count(":")
    words = [word for word in text.split() if ":" in word]
    accumulate = [i for i, word in enumerate(words) if word.startswith("accumulate:")]
    return _Signature(
        name,
        inputs,
        [word.startswith("+") for word in words],
        [word.partition(":")[2].partition("[")[0] in ("act", "half") for word in words],
        accumulate[0] if accumulate else -1,
        _row_sources([_axes(word) for word in words], inputs),
    )


def _axes(word: str) -> list[str]:
    """The axes of an argument in a specification."""
    return word.partition("[")[2].partition("]")[0].split(",")


def _row_sources(axes: list[list[str]], inputs: int) -> dict[int, int]:
    def letters(some: list[str]) -> set[str]:
        return {letter for axis in some for letter in axis if letter.isupper()}

    known = {letter for some in axes[:inputs] for letter in letters(some)}
    found: dict[int, int] = {}
    for i in range(inputs, len(axes)):
        places = [place for place in range(inputs) if axes[place][0] == axes[i][0]]
        if places and letters(axes[i]) - known:
            found[i] = places[0]
    return found


_SIGNATURES = [_signature(name, text) for name, text in _OPS]

# (operation, kinds of the arguments, arguments), and slots that are emptied. Kinds and arguments:
# c: a constant; s: a slot; v: (a slot, the axes of a view); n, h: a slot for a new array, in
# bfloat16 if h; m: (a slot for a new array, a slot with as many rows, an array like a row of it)
Call = tuple[int, str, tuple[Any, ...]]
Step = tuple[int, str, tuple[Any, ...], tuple[int, ...]]


def _reads_output(signature: _Signature, i: int, arguments: Sequence[Any]) -> bool:
    """Whether argument i is an output whose values the call reads."""
    accumulates = signature.accumulate >= 0 and bool(arguments[signature.accumulate])
    return signature.updated[i] or (accumulates and i == len(arguments) - 1)


def root(array: np.ndarray) -> np.ndarray:
    """The array whose memory a view shows."""
    return array.base if isinstance(array.base, np.ndarray) else array


class Writer:
    """Writes the steps of recorded calls, of a forward pass and then of its backward pass.

    Args:
        constants: arrays and handles of weights that stay the same objects, with any values.
    """

    def __init__(self, constants: Iterable[Any]):
        self.constants = {id(value): value for value in constants}
        self.size = 0
        # By the identity of an array that owns memory: its slot, shape, and the array, if it lives.
        self.known: dict[int, tuple[int, tuple[int, ...], Any]] = {}

    def add(self, value: np.ndarray | Seed) -> int:
        """A slot for what is given: an array, or a seed; or for an array that a call makes."""
        if isinstance(value, Seed):
            self.known[id(value)] = self.size, (), lambda: value
        else:
            self.known[id(root(value))] = self.size, value.shape, weakref.ref(root(value))
        self.size += 1
        return self.size - 1

    def slot(self, array: Any) -> int:
        """The slot of an array as it is; NotReplayable if there is none."""
        found = self._find(array) if isinstance(array, np.ndarray) else None
        if found is None or found[1] != array.shape or not _whole(array):
            raise NotReplayable("a result was not made by the core")
        return found[0]

    def _find(self, value: np.ndarray | Seed) -> tuple[int, tuple[int, ...]] | None:
        owner = value if isinstance(value, Seed) else root(value)
        found = self.known.get(id(owner))
        return None if found is None or found[2]() is not owner else found[:2]

    def steps(self, calls: Calls) -> list[Call]:
        """The calls' operations, kinds and arguments. NotReplayable if they cannot be repeated."""
        return [self._step(_SIGNATURES[op], op, arguments) for op, *arguments in calls]

    def _step(self, signature: _Signature, op: int, arguments: list[Any]) -> Call:
        if signature.name in _REFUSED:
            raise NotReplayable(f"{signature.name} depends on more than its arguments")
        if signature.name == "dropout" and not isinstance(arguments[1], Seed):
            raise NotReplayable("a seed may have been drawn")
        kinds = ""
        values: list[Any] = []
        for i, value in enumerate(arguments):
            made = i >= signature.outputs and not _reads_output(signature, i, arguments)
            try:
                kind, stored = self._argument(value, made)
            except NotReplayable as error:
                raise NotReplayable(f"argument {i} of {signature.name} {error}") from None
            if kind == "n" and i in signature.rows:
                rows = signature.rows[i]
                if kinds[rows] != "s":
                    raise NotReplayable(f"argument {i} of {signature.name} has no size")
                like = np.empty((1, *value.shape[1:]), value.dtype)
                kind, stored = "m", (stored, values[rows], like)
            kinds += kind
            values.append(stored)
        return op, kinds, tuple(values)

    def _argument(self, value: Any, may_be_made: bool) -> tuple[str, Any]:
        if isinstance(value, Seed):
            found = self._find(value)
            if found is None:
                raise NotReplayable("was drawn")
            return "s", found[0]
        if value is None or isinstance(value, int | float) or id(value) in self.constants:
            return "c", value
        if not isinstance(value, np.ndarray) or not _whole(value):
            raise NotReplayable("is a part of an array")
        found = self._find(value)
        if found is not None:
            slot, shape = found
            return ("s", slot) if value.shape == shape else ("v", (slot, (-1, *value.shape[1:])))
        if not may_be_made:
            raise NotReplayable("was not made by the core")
        return "n", self.add(value)


def _whole(array: np.ndarray) -> bool:
    return array.flags.c_contiguous and array.nbytes == root(array).nbytes


def narrowed(passes: Sequence[list[Call]], wide: set[int]) -> list[list[Call]]:
    """The passes with arrays in bfloat16 wherever all calls that read or write them take it.

    Arrays to which a call adds stay float32, and so do those of the slots `wide`.
    """
    calls = [call for steps in passes for call in steps]
    wide = set(wide)
    made = {slot for _, kinds, values in calls for slot in slots_of(kinds, values, "n")}
    for op, kinds, values in calls:
        signature = _SIGNATURES[op]
        for i, (kind, value) in enumerate(zip(kinds, values, strict=True)):
            if not signature.narrow[i] or _reads_output(signature, i, values):
                wide.update(slots_of(kind, (value,)))
    half = made - wide
    return [
        [
            (
                op,
                "".join(
                    "h" if kind == "n" and value in half else kind
                    for kind, value in zip(kinds, values, strict=True)
                ),
                values,
            )
            for op, kinds, values in steps
        ]
        for steps in passes
    ]


def finished(steps: list[Call], first: set[int], kept: set[int]) -> tuple[Step, ...]:
    """Steps that empty each slot after its last use, but those in `kept`.

    `first` has the slots that are filled before.
    """
    last: dict[int, int] = dict.fromkeys(first, -1)
    for place, (_, kinds, values) in enumerate(steps):
        last |= dict.fromkeys(slots_of(kinds, values), place)
    done: list[list[int]] = [[] for _ in steps]
    for slot, place in last.items():
        if slot not in kept and place >= 0:
            done[place].append(slot)
    return tuple((*step, tuple(some)) for step, some in zip(steps, done, strict=True))


def slots_of(kinds: str, values: tuple[Any, ...], of: str = "svnhm") -> list[int]:
    """The slots that a step reads or fills, by arguments of these kinds."""
    return [
        value[0] if kind in "vm" else value
        for kind, value in zip(kinds, values, strict=True)
        if kind in of
    ]
