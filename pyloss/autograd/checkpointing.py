"""Functions that run a second time in the backward pass, so that memory holds less."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pyloss import random
from pyloss.autograd.scope import current_tape
from pyloss.autograd.tape import (
    Gradients,
    Node,
    Tape,
    data,
    keep,
    nodes_of,
    record,
    record_on,
    record_several,
)
from pyloss.autograd.tensor import LazyTensor, Tensor, stripped
from pyloss.autograd.trees import tree_map


def checkpoint(function: Callable, *args: Any, remember: bool = False) -> Any:
    """`function(*args)`, which runs again in backward and keeps only the arguments until then.

    Chen et al., arXiv:1604.06174.

    `function` takes arrays or Tensors, and other arguments as they are. It returns an array of any
    shape, or a tuple, list or dict with several. Parameters that it closes over get their gradients
    too. It must compute the same both times; pyloss's random numbers are the same. Its results
    leave it by the return value: others raise TypeError where they are used. With `remember`,
    results that the function passes through `autograd.remembered` are kept. Outside of
    `value_and_grad` this is `function(*args)`.
    """
    outer = current_tape()
    if outer is None:
        result = function(*args)
        return stripped(result) if _tensors(result) else result
    nodes = nodes_of(*args) or (None,) * len(args)
    # Dicts and lists of their own: the function may change those that it gets.
    kept = [
        keep(x) if isinstance(x, Tensor) else partial(tree_map, _same, tree_map(_same, x))
        for x in args
    ]
    state = random.state()
    memory: list[Any] | None = [] if remember else None
    with Tape(within=outer, probing=True) as probe:
        probe.memory = memory
        traced = [
            Tensor(data(x), Node(probe.probe_root)) if node is not None else _constant(x)
            for x, node in zip(args, nodes, strict=True)
        ]
        result = function(*traced)
    del traced
    outs = [value.data for value in _tensors(result)]
    if not outs:
        return result
    single = isinstance(result, Tensor)
    shell = None if single else _numbered(result)
    del result

    def vjp(dys: list[Any], grads: Gradients) -> None:
        later = random.state()
        random.set_state(state)
        try:
            with Tape(within=outer, replaying=True) as tape:
                tape.memory = memory
                leaves = [Node(tape.root) if node is not None else None for node in nodes]
                ends = _tensors(
                    function(
                        *(
                            Tensor(get(), leaf) if leaf is not None else _constant(get())
                            for get, leaf in zip(kept, leaves, strict=True)
                        )
                    )
                )
                if len(ends) != len(dys):
                    raise RuntimeError(
                        f"a checkpointed function gave {len(ends)} differentiable results when it "
                        f"ran again, and {len(dys)} before"
                    )
                tape.backward_from_all(
                    [
                        (end._node, dy)
                        for end, dy in zip(ends, dys, strict=True)
                        if end._node is not None and dy is not None
                    ]
                )
        finally:
            random.set_state(later)
        for i, leaf in enumerate(leaves):
            if leaf is not None and leaf.grad is not None:
                grads.put(i, leaf.grad, own=leaf.owned)

    if single:
        return record_on(nodes, outs[0], lambda dy, grads: vjp([dy], grads))
    tensors = record_several(nodes, outs, vjp, (False,) * len(outs))
    return tree_map(lambda v: tensors[v.number] if isinstance(v, _Number) else v, shell)


def _same(value: Any) -> Any:
    return value


def _number(value: Any) -> float:
    return value.item() if isinstance(value, Tensor) else float(value)


def _constant(x: Any) -> Any:
    return x.data if isinstance(x, Tensor) else x


def _tensors(result: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda value: found.append(value) if isinstance(value, Tensor) else None, result)
    return found


class _Number:
    """Stands for a Tensor among several results."""

    def __init__(self, number: int):
        self.number = number


def _numbered(result: Any) -> Any:
    """The results with a `_Number` for each Tensor, so that nothing holds their data."""
    count = itertools.count()
    return tree_map(lambda v: _Number(next(count)) if isinstance(v, Tensor) else v, result)


def sum_in_parts(function: Callable, parts: Sequence[Any]) -> Any:
    """The sum of the scalars `function(part)`, float32; memory holds one part at a time.

    Backward runs forward and back through one part before the next, so only one part's saved values
    exist. The value is computed in backward, or earlier if it is read. A loss that is not read
    before backward is computed once.
    """

    def total(visit: Callable[[Any], Any]) -> np.ndarray:
        return np.asarray(sum(_number(visit(part)) for part in parts), np.float32)

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
