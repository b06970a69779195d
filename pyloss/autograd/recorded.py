"""Functions whose calls of the core are recorded, forward and backward, and then repeated.

A decoder layer makes some 60 calls for a part of a batch, and the Python between them would take a
third of a step's time on 16 cores. The core repeats the calls on arrays of any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyloss import _core
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
from pyloss.runtime.program import NotReplayable, Step, Writer, finished, slots_of


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


class Recorded:
    """A function of one traced array x, of other arrays, and of parameters.

    It must make the same calls for all values and numbers of rows of these. Its first run is
    recorded, for each choice of the arrays that get gradients. If a program cannot repeat the calls
    (see `program.Writer`), every run calls the function.

    Args:
        parameters: arrays that may get gradients.
        constants: other arrays that its calls read, and handles of weights.
    """

    def __init__(self, parameters: Sequence[np.ndarray], constants: Iterable[Any]):
        self.parameters, self.constants = list(parameters), [*parameters, *constants]
        self._programs: dict[tuple[bool, ...], _Program | None] = {}

    def __call__(self, function: Callable[[Any], Any], x: Any, arrays: Sequence[np.ndarray]) -> Any:
        """`function(x)`, which is always the same function; `arrays` are what else it is given."""
        tape = current_tape()
        if tape is None or tape.probing or tape.replaying or _core.recording():
            return function(x)
        nodes = nodes_of(x, *self.parameters)
        if nodes is None or not isinstance(data(x), np.ndarray):
            return function(x)
        kind = tuple([node is not None for node in nodes])
        if kind not in self._programs:
            return self._record(kind, nodes, function, x, arrays)
        program = self._programs[kind]
        return function(x) if program is None else _run(program, nodes, x, arrays)

    def _record(
        self,
        kind: tuple[bool, ...],
        nodes: Nodes,
        function: Callable[[Any], Any],
        x: Any,
        arrays: Sequence[np.ndarray],
    ) -> Any:
        """The function's output, an operation of its own, whose passes are recorded."""
        inner, xd = Tape(), data(x)
        leaves = [Node(inner.root) if traced else None for traced in kind]
        for array, leaf in zip(self.parameters, leaves[1:], strict=True):
            if leaf is not None:
                inner.leaves[id(array)] = leaf
        writer: Writer | None = Writer(self.constants)
        assert writer is not None
        for array in (xd, *arrays):
            writer.add(array)
        _core.record(True)
        try:
            with inner:
                result = function(xd if leaves[0] is None else Tensor(xd, leaves[0]))
        finally:
            calls = _core.record(False) or []
        end, y = result._node, result.data
        del result
        try:
            forward, y_slot = writer.steps(calls), writer.slot(y)
        except NotReplayable:
            self._programs[kind] = writer = None
        del calls  # else all arrays of the pass would live until the backward pass

        def vjp(dy: np.ndarray, grads: Gradients) -> None:
            dy_slot = -1 if writer is None else writer.add(dy)
            if writer is not None and not _core.recording():
                _core.record(True)
                try:
                    inner.backward_from(end, dy)
                finally:
                    calls = _core.record(False) or []
                try:
                    self._programs[kind] = _program(
                        writer, forward, writer.steps(calls), y_slot, dy_slot, leaves
                    )
                except NotReplayable:
                    self._programs[kind] = None
            else:
                inner.backward_from(end, dy)
            for i, leaf in enumerate(leaves):
                if leaf is not None and leaf.grad is not None:
                    grads.put(i, leaf.grad, leaf.owned)

        return record_on(nodes, y, vjp)


def _program(
    writer: Writer,
    forward: list[tuple[int, str, tuple[Any, ...]]],
    backward: list[tuple[int, str, tuple[Any, ...]]],
    y: int,
    dy: int,
    leaves: list[Node | None],
) -> _Program:
    found = [
        None if leaf is None or leaf.grad is None else writer.slot(leaf.grad) for leaf in leaves
    ]
    if any(leaf.grad is not None and not leaf.owned for leaf in leaves[1:] if leaf is not None):
        raise NotReplayable("a gradient is an array that others read")
    read = {slot for _, kinds, values in backward for slot in slots_of(kinds, values)}
    results = {slot for slot in found if slot is not None}
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


def _run(program: _Program, nodes: Nodes, x: Any, arrays: Sequence[np.ndarray]) -> Tensor:
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
