"""The library's random state: dropout masks, shuffles and samples draw their seeds from it.

The state is a seed and a counter. A run's checkpoint stores both; gradient checkpointing resets
them for its second run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pyloss.checks.numbers import whole

_state = {"seed": 0, "counter": 0}


def seed(value: int) -> None:
    """Starts a new sequence of seeds from `value`, an integer from 0 to 2^63 - 1.

    ValueError or TypeError for other values.
    """
    _state.update(seed=whole(value, "seed", 0), counter=0)


def state() -> dict[str, int]:
    """The state as plain numbers, for `set_state`."""
    return dict(_state)


def set_state(state: dict[str, int]) -> None:
    """Restores the result of `state`. Raises ValueError for anything else."""
    found = {name: state.get(name) if isinstance(state, dict) else None for name in _state}
    if not all(isinstance(number, int) and number >= 0 for number in found.values()):
        raise ValueError(f"the random state is {state!r:.80}; it must be what state() gave")
    _state.update({name: int(number or 0) for name, number in found.items()})


class Seed(int):
    """A drawn seed. A recorded program knows it by its identity and takes another on each run."""


def next_seed() -> Seed:
    """A new 63-bit seed; advances the counter."""
    words = np.random.SeedSequence((_state["seed"], _state["counter"])).generate_state(1, np.uint64)
    _state["counter"] += 1
    return Seed(words[0] >> np.uint64(1))


@contextmanager
def branch(number: int) -> Iterator[None]:
    """In the block, seeds come from a sequence of this `number`'s own, which begins here.

    Afterwards the state has moved on by one seed, however many the block drew. So processes that
    draw unlike numbers of seeds keep the same state.
    """
    own = np.random.SeedSequence((next_seed(), number)).generate_state(1, np.uint64)
    before = state()
    _state.update(seed=int(own[0] >> np.uint64(1)), counter=0)
    try:
        yield
    finally:
        set_state(before)


def generator() -> np.random.Generator:
    """A NumPy generator over a new seed."""
    return np.random.Generator(np.random.PCG64(next_seed()))
