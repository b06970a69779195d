"""Updates whose optimizer state is divided among ranks: each updates its part of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pyloss.distributed import Group
from pyloss.optim import clip_scale
from pyloss.optim.clipping import squared_norms
from pyloss.tuner.run.args import TrainingArgs
from pyloss.tuner.run.updates import Updates


def bounds_of(sizes: Sequence[int], ranks: int) -> list[int]:
    """Indices of arrays at which the ranks' parts begin, and their number at the end.

    Parts are runs of whole arrays, so that every optimizer can update them, with like sums of the
    arrays' sizes.
    """
    ends = np.cumsum([0, *sizes])
    wanted = ends[-1] * np.arange(ranks + 1) / ranks
    bounds = [int(np.abs(ends - place).argmin()) for place in wanted]
    bounds[-1] = len(sizes)
    return np.maximum.accumulate(bounds).tolist()


class ShardedUpdates(Updates):
    """`Updates` in which a rank receives the sum of its part's gradients, and sends its new values.

    The bits are those of `Updates`: sums have the order of the ranks, and optimizers update one
    parameter at a time.
    """

    def __init__(self, trained: Any, optimizer: Any, args: TrainingArgs, group: Group) -> None:
        super().__init__(trained, optimizer, args, group)
        names = list(self.parameters)
        sizes = [int(array.size) for array in self.parameters.values()]
        parts = bounds_of(sizes, group.size())
        ends = np.cumsum([0, *sizes])
        self.bounds = [int(ends[part]) for part in parts]
        begin, end = parts[group.rank()], parts[group.rank() + 1]
        self.own = names[begin:end]

    def apply(self, weight: float, not_finite: Callable[[str], str]) -> float:
        assert self.flat is not None
        flat, parts = self.flat.flat, self.flat.parts
        self.group.scatter_sum(flat, self.bounds)
        grads = {name: parts[name] for name in self.own}
        total = 0.0
        for squares in self.group.all_gather(squared_norms(grads)):  # in the order of parameters
            for square in squares:
                total += square
        norm = math.sqrt(total) * (1.0 / weight)
        if not math.isfinite(norm):
            raise FloatingPointError(not_finite(f"the norm of the gradients is {norm}"))
        scale = 1.0 / weight * clip_scale(norm, self.max_norm)
        self.optimizer.update(self.trained, grads, grad_scale=scale)
        for name in self.own:
            parts[name][...] = np.asarray(self.parameters[name])
        self.group.gather_parts(flat, self.bounds)
        for name, array in self.parameters.items():
            if name not in grads:
                array[...] = parts[name]
        return norm

    def optimizer_state(self) -> dict[str, Any]:
        """The state of all parts on rank 0, and of its own on the others."""
        parts = self.group.gather(self.optimizer.state_dict(copy=False))
        state: dict[str, Any] = {}
        for part in parts or [self.optimizer.state_dict(copy=False)]:
            state |= part
        return state

    def restore_optimizer(self, state: Mapping[str, Any]) -> None:
        """Load the part of a whole state that this rank's parameters need."""
        others = set(self.parameters) - set(self.own)
        kept = {key: value for key, value in state.items() if _name_in(key, others) is None}
        self.optimizer.load_state_dict(kept)


def _name_in(key: str, names: set[str]) -> str | None:
    """The parameter of a key of an optimizer's state, such as "m.NAME" or "0.m.NAME"."""
    while "." in key:
        key = key.partition(".")[2]
        if key in names:
            return key
    return None
