"""Keys and values of a sequence that grows, for generation."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import _core
from pyloss.ops.arrays import empty, zeros
from pyloss.runtime.device import on_device_of
from pyloss.runtime.replay import Replay

SPARE = 64  # free rows after the stores have moved
PREFILL = 512  # prompt tokens per forward pass: bounds the memory of long prompts


class Span:
    """The keys and values of all layers with the same window.

    They share one array: it then lies in large pages, which are read a third faster.

    Attributes:
        held: rows in use, of `capacity`.
        store: [layers, 2, capacity, kv heads * head_dim], keys before values; of convolutions
            [layers, 1, capacity, hidden].
        next_rows: int32 [n], the rows of the tokens that come next.
        bounds: int32 [2], [0, rows in use with these tokens].
    """

    def __init__(self, window: int, layers: int):
        self.window, self.layers, self.held, self.capacity = window, layers, 0, 0
        self.store: np.ndarray | None = None
        self.bounds = np.zeros(2, np.int32)
        self.one_row = self.next_rows = np.zeros(1, np.int32)


class NextTokens:
    """The replayed step of a token each of n sequences.

    Attributes:
        tokens, positions: int32 [n], the step's input.
        replay: the recorded calls, which read these arrays.
    """

    def __init__(self, state: tuple[Any, ...], n: int = 1):
        """`state`: the objects that the recorded calls depend on."""
        self.state = state
        self.tokens, self.positions = np.zeros((2, n), np.int32)
        self.replay = Replay()

    def holds(self, state: tuple[Any, ...]) -> bool:
        """Whether the recorded calls depend on these very objects."""
        return len(state) == len(self.state) and all(
            a is b for a, b in zip(state, self.state, strict=True)
        )


class KVCache:
    """Keys and values of one sequence, per layer float32 [capacity, kv heads * head_dim].

    The stores grow by doubling. Layers with a window (`windows`, 0 for none) drop the rows before
    it instead. A step of n tokens is `reserve(n)`, `append` in every layer, `advance(n)`; a step
    that fails before `advance` can be repeated.

    Attributes:
        length: the tokens of the sequence.
        least: how many it will have at least, if that is known before they come.
        history: its token ids; only where a longer sequence needs other keys (longrope).
        offsets: int32 [2], the queries of a step of one token.
        next: the replayed step of one token, if one was recorded.
        spans: the keys and values of the layers with each window.
    """

    def __init__(self, windows: list[int]):
        self.length = self.least = 0
        self.history: list[int] = []
        self.offsets = np.array([0, 1], np.int32)
        self.next: NextTokens | None = None
        self._states: dict[int, Any] = {}
        self._turns = np.zeros(1, np.int32), np.ones(1, np.int32)
        self.spans = {window: Span(window, windows.count(window)) for window in windows}
        self._places = [
            (self.spans[window], windows[:i].count(window)) for i, window in enumerate(windows)
        ]

    def reserve(self, n: int) -> None:
        """Makes room for the next n tokens."""
        for span in self.spans.values():
            if span.held + n > span.capacity:
                self._move(span, n)
            span.next_rows = span.one_row if n == 1 else np.empty(n, np.int32)
            span.next_rows[:] = range(span.held, span.held + n)
            span.bounds[1] = span.held + n

    def restart(self) -> None:
        """Drops all keys and values; `history` stays."""
        self.length, self.next = 0, None
        self._states.clear()
        for span in self.spans.values():
            span.held = 0

    def truncate(self, n: int) -> bool:
        """Drops the tokens after the first n; False, and no change, if it cannot.

        It cannot where a layer has a state of all tokens, where the rows before a window are gone,
        and where a shorter sequence needs other keys (longrope).
        """
        dropped = self.length - n
        if not dropped:
            return True
        if (
            self._states
            or self.history
            or any(
                span.held - dropped < (min(n, span.window - 1) if span.window else n)
                for span in self.spans.values()
            )
        ):
            return False
        self.length = n
        for span in self.spans.values():
            span.held -= dropped
        return True

    def forget(self, first: int, count: int) -> None:
        """Drops `count` rows from row `first` on; `length`, and so the next position, stays.

        ValueError where a layer has a window or a state of all tokens.
        """
        if self._states or self.history or any(span.window for span in self.spans.values()):
            raise ValueError(
                "tokens in the middle can be dropped only where all layers attend to all tokens"
            )
        for span in self.spans.values():
            if span.store is not None:
                for store in span.store.reshape(-1, *span.store.shape[2:]):
                    store[first : span.held - count] = store[first + count : span.held].copy()
            span.held -= count

    def rows_in_use(self) -> int:
        """The rows of the layers that attend to all tokens; see `forget`."""
        return max((span.held for span in self.spans.values()), default=0)

    def layer_rows(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The keys and the values of a layer that are in use, [rows, kv heads * head_dim] each."""
        span, place = self._places[layer]
        if span.store is None:
            raise ValueError("the cache is empty")
        keys, values = span.store[place]
        return keys[: span.held], values[: span.held]

    def _move(self, span: Span, n: int) -> None:
        kept = min(span.held, span.window - 1) if span.window else span.held
        span.capacity = max(2 * kept, kept + n + SPARE)
        if span.store is not None:
            layers, parts, _, width = span.store.shape
            grown = empty(layers, parts, span.capacity, width, like=span.store)
            for layer in range(span.layers):
                for store, new in zip(span.store[layer], grown[layer], strict=True):
                    new[:kept] = store[span.held - kept : span.held]
            span.store = grown
        span.held = kept
        self.next = None

    def states(
        self, layer: int, like: np.ndarray, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The state of a layer that has one for the sequence, 0 before its first token.

        Returns [2, *shape], which of them this step begins with, and where it leaves its last one,
        int32 [1] each, so that a step that fails can be repeated. On the device of `like`.
        """
        if layer not in self._states:
            self._states[layer] = zeros(2, *shape, like=like)
        here, there = (on_device_of(like, turn) for turn in self._turns)
        return self._states[layer], here, there

    def states_in_use(self) -> dict[int, np.ndarray]:
        """The states that the next token begins with, by the layers that have one."""
        return {layer: held[int(self._turns[0][0])] for layer, held in self._states.items()}

    def append(
        self, layer: int, keys: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Adds [n, D] in one layer; returns both stores, and int32 [2]: [0, rows in use]."""
        span, place = self._places[layer]
        if span.store is None:
            span.store = empty(span.layers, 2, span.capacity, keys.shape[1], like=keys)
        (k, v), rows = span.store[place], on_device_of(keys, span.next_rows)
        _core.put_rows(keys, rows, k)
        _core.put_rows(values, rows, v)
        return k, v, on_device_of(keys, span.bounds)

    def rows(
        self, layer: int, like: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Room for one array in a layer without values, which the caller fills.

        Returns its store [capacity, width], the rows of the next tokens, and int32 [2]: [0, rows
        in use]. On the device of `like`.
        """
        span, place = self._places[layer]
        if span.store is None:
            span.store = empty(span.layers, 1, span.capacity, width, like=like)
        return (
            span.store[place][0],
            on_device_of(like, span.next_rows),
            on_device_of(like, span.bounds),
        )

    def advance(self, n: int) -> None:
        """Ends a step: every layer has the n tokens."""
        self.length += n
        for turn in self._turns:
            turn ^= 1
        for span in self.spans.values():
            span.held += n
