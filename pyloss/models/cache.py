"""Keys and values of a sequence that grows, for generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import _core
from ..replay import Replay

_LEAST = 64  # rows of the first stores


class _Span:
    """The rows that layers of one window hold: `held` of `capacity`; those that come next go to the rows `to`.

    `bounds` int32 [2] are 0 and how many there are with these.
    """

    def __init__(self, window: int):
        self.window, self.held, self.capacity = window, 0, 0
        self.bounds = np.zeros(2, np.int32)
        self.one = self.to = np.zeros(1, np.int32)


@dataclass
class NextToken:
    """The step of one token: the arrays it is given in, and the calls it comes to. `state` is what these calls hold for."""

    state: tuple[Any, ...]
    token: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int32))
    position: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int32))
    offsets: np.ndarray = field(default_factory=lambda: np.array([0, 1], np.int32))
    replay: Replay = field(default_factory=Replay)

    def holds(self, state: tuple[Any, ...]) -> bool:
        return len(state) == len(self.state) and all(a is b for a, b in zip(state, self.state, strict=True))


class KVCache:
    """Keys and values of one sequence, per layer float32 [capacity, kv heads * head_dim].

    Grown by doubling; layers with a window (`windows`, 0 for none) give up what lies before it instead. `length` counts the
    tokens of the sequence. A step of n tokens is `reserve(n)`, `append` in every layer, `advance(n)`; one that fails before the
    last can be taken again.
    """

    def __init__(self, windows: list[int]):
        self.length = 0
        self.next: NextToken | None = None
        self._spans = {window: _Span(window) for window in windows}
        self._of_layer = [self._spans[window] for window in windows]
        self._stores: list[tuple[np.ndarray, ...]] = [()] * len(windows)

    def reserve(self, n: int) -> None:
        """Makes room for the next n tokens."""
        for span in self._spans.values():
            if span.held + n > span.capacity:
                self._move(span, n)
            span.to = span.one if n == 1 else np.empty(n, np.int32)
            span.to[:] = range(span.held, span.held + n)
            span.bounds[1] = span.held + n

    def _move(self, span: _Span, n: int) -> None:
        kept = min(span.held, span.window - 1) if span.window else span.held
        span.capacity = max(kept + n, 2 * kept, _LEAST)
        for layer, stores in enumerate(self._stores):
            if self._of_layer[layer] is span and stores:
                self._stores[layer] = self._grown(stores, span, kept)
        span.held = kept
        self.next = None

    def _grown(self, stores: tuple[np.ndarray, ...], span: _Span, kept: int) -> tuple[np.ndarray, ...]:
        grown = tuple(np.empty((span.capacity, store.shape[1]), np.float32) for store in stores)
        for store, new in zip(stores, grown, strict=True):
            new[:kept] = store[span.held - kept : span.held]
        return grown

    def append(self, layer: int, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Adds [n, D] in one layer; returns the stores of both, and int32 [2]: 0 and how many of their rows are in use."""
        span = self._of_layer[layer]
        if not self._stores[layer]:
            self._stores[layer] = tuple(np.empty((span.capacity, new.shape[1]), np.float32) for new in (keys, values))
        for store, new in zip(self._stores[layer], (keys, values), strict=True):
            _core.put_rows(new, span.to, store)
        k, v = self._stores[layer]
        return k, v, span.bounds

    def advance(self, n: int) -> None:
        """All layers have the n tokens."""
        self.length += n
        for span in self._spans.values():
            span.held += n
