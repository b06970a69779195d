"""Functions whose calls of the core are recorded, forward and backward, and then repeated.

A decoder layer makes some 60 calls for a part of a batch, and the Python between them would take a
third of a step's time on 16 cores. The core repeats the calls on arrays of any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyloss import _core, random
from pyloss.autograd.scope import current_tape
from pyloss.autograd.tape import (
    Gradients,
    Node,
    Nodes,
    Tape,
    data,
    nodes_of,
    record_on,
    record_several,
)
from pyloss.autograd.tensor import Tensor
from pyloss.runtime.precision import keeps_bfloat16
from pyloss.runtime.program import (
    Call,
    NotReplayable,
    Step,
    Writer,
    finished,
    narrowed,
    slots_of,
)


class _Program(NamedTuple):
    """The steps of both passes, and slots. The first ones hold x and what else is given.

    Attributes:
        size: of all slots.
        y, dy: the slots of the output and of its gradient.
        keeps_y: whether the backward pass reads the output.
        dx: the slot of the gradient by x, or None.
        owned: whether that is a new array.
        gradients: the slots of the gradients by the parameters, None for those without one.
    """

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    size: int
    y: int
    keeps_y: bool
    dy: int
    dx: int | None
    owned: bool
    gradients: list[int | None]


def records_layer() -> bool:
    """Whether a `Recorded` is being recorded, so that inputs of its parts stay as they are."""
    return current_tape() is not None and _core.recording()


class Recorded:
    """A function of one traced array x, of other arrays, and of parameters.

    It must make the same calls for all values and numbers of rows of these. Its first run is
    recorded, for each choice of the arrays that get gradients. If a program cannot repeat the calls
    (see `program.Writer`), every run calls the function.

    Args:
        parameters: arrays that may get gradients.
        constants: other arrays that its calls read, and handles of weights.
        changing: returns what else its calls read, arrays and drawn seeds: always as many of them,
            of the same shapes.
    """

    def __init__(
        self,
        parameters: Sequence[np.ndarray],
        constants: Iterable[Any],
        changing: Callable[[], Sequence[Any]] = list,
    ):
        self.parameters, self.constants = list(parameters), [*parameters, *constants]
        self.changing = changing
        self._programs: dict[tuple[bool, ...], _Program | None] = {}

    def __call__(self, function: Callable[[Any], Any], x: Any, arrays: Sequence[Any]) -> Any:
        """`function(x)`, which is always the same function; `arrays` are what else it is given."""
        tape = current_tape()
        if tape is None or tape.probing or tape.replaying or _core.recording():
            return function(x)
        nodes = nodes_of(x, *self.parameters)
        if nodes is None or not isinstance(data(x), np.ndarray):
            return function(x)
        arrays = [*arrays, *self.changing()]
        kind = (keeps_bfloat16(), *[node is not None for node in nodes])
        if kind not in self._programs:
            state = random.state()
            run = _Recording(self, kind[1:], function, x, arrays)
            if not kind[0]:
                return self._recorded(kind, nodes, run)
            # Every run is the program's, so that runs do not depend on which one was the first.
            self._programs[kind] = run.backward(np.zeros_like(run.y), narrow=True)
            random.set_state(state)
        program = self._programs[kind]
        return function(x) if program is None else _run(program, nodes, x, arrays)

    def _recorded(self, kind: tuple[bool, ...], nodes: Nodes, run: _Recording) -> Any:
        """The run's output, an operation of its own, whose backward pass is recorded, too."""

        def vjp(dy: np.ndarray, grads: Gradients) -> None:
            self._programs[kind] = run.backward(dy)
            for i, leaf in enumerate(run.leaves):
                if leaf is not None and leaf.grad is not None:
                    grads.put(i, leaf.grad, leaf.owned)

        if run.writer is None:
            self._programs[kind] = None
        return record_on(nodes, run.y, vjp)


class _Recording:
    """A run of a function, whose calls are recorded in both passes.

    Attributes:
        writer: None where a program cannot repeat the calls.
        leaves: of the passes' tape, for x and the parameters that get gradients.
    """

    def __init__(
        self,
        recorded: Recorded,
        traced: tuple[bool, ...],
        function: Callable[[Any], Any],
        x: Any,
        arrays: Sequence[Any],
    ):
        self.tape, xd = Tape(), data(x)
        self.leaves = [Node(self.tape.root) if wanted else None for wanted in traced]
        for array, leaf in zip(recorded.parameters, self.leaves[1:], strict=True):
            if leaf is not None:
                self.tape.leaves[id(array)] = leaf
        self.writer: Writer | None = Writer(recorded.constants)
        for array in (xd, *arrays):
            self.writer.add(array)
        _core.record(True)
        try:
            with self.tape:
                result = function(xd if self.leaves[0] is None else Tensor(xd, self.leaves[0]))
        finally:
            calls = _core.record(False) or []
        self.end, self.y = result._node, result.data
        try:
            self.forward, self.y_slot = self.writer.steps(calls), self.writer.slot(self.y)
        except NotReplayable:
            self.writer = None

    def backward(self, dy: np.ndarray, narrow: bool = False) -> _Program | None:
        """Fills the gradients of the leaves. Returns the program of both passes, if there is one.

        With `narrow` it keeps arrays in bfloat16 where it can.
        """
        dy_slot = -1 if self.writer is None else self.writer.add(dy)
        if self.writer is None or _core.recording():
            self.tape.backward_from(self.end, dy)
            return None
        _core.record(True)
        try:
            self.tape.backward_from(self.end, dy)
        finally:
            calls = _core.record(False) or []
        try:
            return _program(
                self.writer,
                self.forward,
                self.writer.steps(calls),
                self.y_slot,
                dy_slot,
                self.leaves,
                narrow,
            )
        except NotReplayable:
            return None


def _program(
    writer: Writer,
    forward: list[Call],
    backward: list[Call],
    y: int,
    dy: int,
    leaves: list[Node | None],
    narrow: bool,
) -> _Program:
    found = [
        None if leaf is None or leaf.grad is None else writer.slot(leaf.grad) for leaf in leaves
    ]
    if any(leaf.grad is not None and not leaf.owned for leaf in leaves[1:] if leaf is not None):
        raise NotReplayable("a gradient is an array that others read")
    read = {slot for _, kinds, values in backward for slot in slots_of(kinds, values)}
    results = {slot for slot in found if slot is not None}
    if narrow:
        forward, backward = narrowed((forward, backward), results | {y, dy})
    return _Program(
        finished(forward, set(), read | {y}),
        finished(backward, read, results),
        writer.size,
        y,
        y in read,
        dy,
        found[0],
        leaves[0] is not None and leaves[0].owned and found[0] != dy,
        found[1:],
    )


def _run(program: _Program, nodes: Nodes, x: Any, arrays: Sequence[Any]) -> Tensor:
    slots: list[Any] = [None] * program.size
    slots[0 : 1 + len(arrays)] = data(x), *arrays
    _core.run(program.forward, slots)
    y = slots[program.y]
    if not program.keeps_y:
        slots[program.y] = None

    def vjp(dys: list[Any], grads: Gradients) -> None:
        slots[program.dy] = dys.pop()  # the program drops it after its last use
        _core.run(program.backward, slots)
        if program.dx is not None:
            grads.put(0, slots[program.dx], program.owned)
        grads.put_all(1, [None if i is None else slots[i] for i in program.gradients])
        slots.clear()

    return record_several(nodes, [y], vjp, (False,))[0]
