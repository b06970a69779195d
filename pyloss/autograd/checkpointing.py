"""Functions that run a second time in the backward pass, so that memory holds less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyloss import random
from pyloss.autograd.tape import (
    Gradients,
    LazyTensor,
    Node,
    Tape,
    Tensor,
    current_tape,
    data,
    keep,
    record,
    recording,
)


def checkpoint(function: Callable, x: Any, remember: bool = False) -> Any:
    """`function(x)`, which runs again in backward and keeps only `x` until then.

    Chen et al., arXiv:1604.06174.

    `function` takes the array or Tensor `x` and returns one of any shape. Parameters that it closes
    over get their gradients too. Random numbers are the same in both runs. With `remember`, results
    that the function passes through `autograd.remembered` are kept. Outside of `value_and_grad`
    this is `function(x)`.
    """
    outer = current_tape()
    if outer is None:
        return function(x)
    traced, kept, state = recording(x), keep(x), random.state()
    memory: list[Any] | None = [] if remember else None
    with Tape(within=outer, probing=True) as probe:
        probe.memory = memory
        result = function(Tensor(data(x), Node(probe.root)) if traced else data(x))
    if not isinstance(result, Tensor):
        return result
    out = result.data
    del result

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        later = random.state()
        random.set_state(state)
        try:
            with Tape(within=outer, replaying=True) as tape:
                tape.memory = memory
                leaf = Node(tape.root) if grads.wanted(0) else None
                end = function(Tensor(kept(), leaf) if leaf is not None else kept())._node
                if end is not None:
                    tape.backward_from(end, dy)
        finally:
            random.set_state(later)
        if leaf is not None and leaf.grad is not None:
            grads.put(0, leaf.grad, own=leaf.owned)

    return record(out, (x,), vjp)


def sum_in_parts(function: Callable, parts: Sequence[Any]) -> Any:
    """The sum of the scalars `function(part)`, float32; memory holds one part at a time.

    Backward runs forward and back through one part before the next, so only one part's saved values
    exist. The value is computed in backward, or earlier if it is read. A loss that is not read
    before backward is computed once.
    """

    def total(visit: Callable[[Any], Any]) -> np.ndarray:
        return np.asarray(sum(float(visit(part)) for part in parts), np.float32)

    outer = current_tape()
    if outer is None:
        return total(function)
    seed = random.next_seed()

    def walk(visit: Callable[[Any], Any]) -> np.ndarray:
        """The sum, with the same random numbers every time."""
        later = random.state()
        random.seed(seed)
        try:
            return total(visit)
        finally:
            random.set_state(later)

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        def back(part: Any) -> Any:
            with Tape(within=outer) as tape:
                value = function(part)
                if isinstance(value, Tensor):
                    tape.backward(value, np.asarray(dy, value.dtype).reshape(value.shape))
            return value

        out.set_data(walk(back))

    out = LazyTensor((), np.dtype(np.float32), lambda: walk(function))
    return record(out, (), vjp)
