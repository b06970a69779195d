"""The random state of the library: a seed and a counter, from which every dropout mask, shuffle and sample draws a seed.

Two numbers are the whole state, so that a checkpoint can bring it back and gradient checkpointing can replay it.
"""

from __future__ import annotations

import numpy as np

_state = {"seed": 0, "counter": 0}


def seed(value: int) -> None:
    """Starts the sequence of seeds anew from `value` (an integer >= 0)."""
    if not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"seed must be an integer >= 0, not {value!r}")
    _state.update(seed=int(value), counter=0)


def state() -> dict[str, int]:
    """The state as plain numbers, for `set_state`."""
    return dict(_state)


def set_state(state: dict[str, int]) -> None:
    """Brings back what `state` returned."""
    _state.update(seed=int(state["seed"]), counter=int(state["counter"]))


def next_seed() -> int:
    """A new 63-bit seed; advances the counter."""
    words = np.random.SeedSequence((_state["seed"], _state["counter"])).generate_state(1, np.uint64)
    _state["counter"] += 1
    return int(words[0] >> np.uint64(1))


def generator() -> np.random.Generator:
    """A NumPy generator over a new seed."""
    return np.random.Generator(np.random.PCG64(next_seed()))
