"""Keys and values of a sequence that grows, for generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.ops.arrays import empty
from pyloss.runtime.device import on_device_of
from pyloss.runtime.replay import Replay

_SPARE = 64  # rows that are free after a move


class _Span:
    """The rows that layers of one window hold: `held` of `capacity`; those that come next go to the rows `to`.

    `bounds` int32 [2] are 0 and how many there are with these. `store` [layers, 2, capacity, kv heads * head_dim] is one for
    all of the layers, so that it lies in large pages, which are read a third faster.
    """

    def __init__(self, window: int, layers: int):
        self.window, self.layers, self.held, self.capacity = window, layers, 0, 0
        self.store: np.ndarray | None = None
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
        """Whether these are the very objects that the calls were made with."""
        return len(state) == len(self.state) and all(
            a is b for a, b in zip(state, self.state, strict=True)
        )


class KVCache:
    """Keys and values of one sequence, per layer float32 [capacity, kv heads * head_dim].

    Grown by doubling; layers with a window (`windows`, 0 for none) give up what lies before it instead. `length` counts the
    tokens of the sequence. A step of n tokens is `reserve(n)`, `append` in every layer, `advance(n)`; one that fails before the
    last can be taken again.
    """

    def __init__(self, windows: list[int]):
        self.length = 0
        self.next: NextToken | None = None
        self._spans = {window: _Span(window, windows.count(window)) for window in windows}
        self._places = [
            (self._spans[window], windows[:i].count(window)) for i, window in enumerate(windows)
        ]

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
        span.capacity = max(2 * kept, kept + n + _SPARE)
        if span.store is not None:
            grown = empty(span.layers, 2, span.capacity, span.store.shape[-1], like=span.store)
            for layer in range(span.layers):
                for store, new in zip(span.store[layer], grown[layer], strict=True):
                    new[:kept] = store[span.held - kept : span.held]
            span.store = grown
        span.held = kept
        self.next = None

    def append(
        self, layer: int, keys: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Adds [n, D] in one layer; returns the stores of both, and int32 [2]: 0 and how many of their rows are in use."""
        span, place = self._places[layer]
        if span.store is None:
            span.store = empty(span.layers, 2, span.capacity, keys.shape[1], like=keys)
        (k, v), to = span.store[place], on_device_of(keys, span.to)
        _core.put_rows(keys, to, k)
        _core.put_rows(values, to, v)
        return k, v, on_device_of(keys, span.bounds)

    def advance(self, n: int) -> None:
        """All layers have the n tokens."""
        self.length += n
        for span in self._spans.values():
            span.held += n
