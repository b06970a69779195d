"""Keys and values of many sequences that grow side by side, for batched generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.models.cache import PREFILL, SPARE, KVCache, NextTokens, Span
from pyloss.ops.arrays import empty, zeros
from pyloss.runtime.device import on_device_of


def rows_needed(window: int, tokens: int) -> int:
    """Rows that a layer with this window (0: none) keeps for a sequence of up to `tokens`."""
    if not window:
        return tokens
    return min(tokens, max(2 * window, window + min(tokens, PREFILL) + SPARE))


class _Layers:
    """The keys and values of all layers with the same window.

    Slot s owns the rows [begin[s], begin[s] + capacity[s]) of each layer's stores. The first
    held[s] of them are in use.

    Attributes:
        most: per slot, the rows that its sequence needs at most.
        bounds: int32 [2 * slots], per slot its first row and the end of the rows in use with the
            next tokens. `ops.attention` takes the rows between slots as sequences without queries.
        next_rows: int32 [n], the rows of the next tokens.
    """

    def __init__(self, window: int, layers: int, slots: int):
        self.window = window
        self.begin, self.capacity, self.held, self.most = np.zeros((4, slots), np.int64)
        self.bounds = np.zeros(2 * slots, np.int32)
        self.next_rows = np.zeros(0, np.int32)
        self._rows: dict[int, np.ndarray] = {}
        self._stores: list[Any] = [None] * layers

    def store(self, place: int, like: np.ndarray, width: int, parts: int = 2) -> Any:
        """Keys and values of a layer, [2, rows, width], on the device of `like`.

        A convolution has only one part.
        """
        if self._stores[place] is None:
            self._stores[place] = empty(parts, int(self.capacity.sum()), width, like=like)
        return self._stores[place]

    def enter(self, prompts: Mapping[int, tuple[int, int]]) -> bool:
        """Makes room for new sequences; whether rows have moved. See `BatchCache.enter`."""
        wanted = {}
        for slot, (length, most) in prompts.items():
            self.held[slot], self.most[slot] = 0, rows_needed(self.window, most)
            wanted[slot] = self.most[slot] if self.window else min(length + SPARE, most)
        return self._make_room(wanted)

    def make_room(self, slots: Sequence[int], counts: Sequence[int]) -> bool:
        """Makes room for so many next tokens of each of these sequences; whether rows have moved.

        With a window, the rows before it are dropped where there is no room.
        """
        wanted = {slot: self.held[slot] + n for slot, n in zip(slots, counts, strict=True)}
        full = {slot: rows for slot, rows in wanted.items() if rows > self.capacity[slot]}
        if self.window:
            for slot in full:
                self._drop(slot)
            return False
        return self._make_room(full)

    def take(self, slot: int, span: Span) -> None:
        """Copies the rows of a sequence that has entered; with a window, only those in it."""
        kept = min(span.held, self.window - 1) if self.window else span.held
        begin = int(self.begin[slot])
        for place, own in enumerate(() if span.store is None else span.store):
            store = self.store(place, own, own.shape[-1], len(own))
            for rows, new in zip(own, store, strict=True):
                new[begin : begin + kept] = rows[span.held - kept : span.held]
        self.held[slot] = kept

    def give(self, slot: int, span: Span) -> None:
        """Copies the rows of a sequence into an empty span."""
        begin, held = int(self.begin[slot]), int(self.held[slot])
        span.held = span.capacity = held
        for place, store in enumerate(self._stores):
            if store is None:
                continue
            if span.store is None:
                span.store = empty(span.layers, len(store), held, store.shape[-1], like=store)
            for rows, new in zip(store, span.store[place], strict=True):
                new[:held] = rows[begin : begin + held]

    def _drop(self, slot: int) -> None:
        begin, held, kept = int(self.begin[slot]), int(self.held[slot]), self.window - 1
        for store in self._stores:
            for rows in () if store is None else store:
                rows[begin : begin + kept] = rows[begin + held - kept : begin + held].copy()
        self.held[slot] = kept

    def _make_room(self, wanted: Mapping[int, int]) -> bool:
        if all(rows <= self.capacity[slot] for slot, rows in wanted.items()):
            return False
        # Moving one sequence moves all, so those that are half full get their room now. Slots
        # without a sequence give theirs back.
        doubled = np.minimum(self.most, np.maximum(2 * self.held, self.held + SPARE))
        capacity = np.where(self.held > 0, self.capacity, 0)
        capacity = np.where(2 * self.held > capacity, np.maximum(doubled, capacity), capacity)
        for slot, rows in wanted.items():
            capacity[slot] = max(capacity[slot], rows, self.capacity[slot])
        begin = np.cumsum(capacity) - capacity
        if capacity.sum() >= 1 << 31:
            raise MemoryError(f"the cache would have {capacity.sum()} rows, more than 2^31")
        for place, store in enumerate(self._stores):
            if store is None:
                continue
            moved = empty(len(store), int(capacity.sum()), store.shape[-1], like=store)
            for old, new in zip(store, moved, strict=True):
                for to, at, held in zip(begin, self.begin, self.held, strict=True):
                    if held:
                        new[int(to) : int(to + held)] = old[int(at) : int(at + held)]
            self._stores[place] = moved
        self.begin, self.capacity = begin, capacity
        return True

    def reserve(self, counts: np.ndarray) -> None:
        """Sets `next_rows` and `bounds` for so many next tokens of each slot's sequence."""
        ends = self.begin + self.held
        self.bounds[::2], self.bounds[1::2] = self.begin, ends + counts
        n = int(counts.sum())
        # Recorded calls read the same array on every step of as many tokens.
        self.next_rows = self._rows.setdefault(n, np.empty(n, np.int32))
        self.next_rows[:] = np.repeat(ends - np.cumsum(counts) + counts, counts) + np.arange(n)


class BatchCache:
    """Keys and values of up to `slots` sequences, each in a slot.

    `enter` makes room for new sequences, `take` gives one the tokens of a `KVCache`, `prompt(slot)`
    is the cache that reads a prompt. From then on a step adds tokens to each of some sequences:
    `reserve(slots)`, `append` in every layer, `advance(slots)`; the slots ascend. `sequence(slot)`
    is a copy of one, `release(slot)` ends it.

    All sequences share the stores of a layer, so that attention is one call. Where a sequence needs
    more room, all are moved, with twice the room for those that are half full. Layers with a window
    drop the rows before it instead. `windows` has the window of each layer, 0 for none.

    Attributes:
        lengths: the tokens of each slot's sequence.
        least: how many tokens each slot's sequence will have at least.
        history: each slot's token ids, as in `KVCache`.
        offsets: int32 [2 * slots], the first query of each slot in the next step, then of the gap
            after it, as in `_Layers.bounds`.
        next: the replayed steps, by their number of sequences.
    """

    def __init__(self, windows: list[int], slots: int):
        self.lengths, self.least, self._most = np.zeros((3, slots), np.int64)
        self.history: list[list[int]] = [[] for _ in range(slots)]
        self.offsets = np.zeros(2 * slots, np.int32)
        self.next: dict[int, NextTokens] = {}
        self._windows = list(windows)
        self._states: dict[int, Any] = {}
        # Of the sequences between `offsets`: slots, and between them gaps, which have no rows.
        count = max(2 * slots - 1, 0)
        self._turns = np.zeros(count, np.int32), np.zeros(count, np.int32)
        for i in range(2):
            self._turns[i][::2] = 2 * np.arange(slots) + i
        self._groups = {window: _Layers(window, windows.count(window), slots) for window in windows}
        self._places = [
            (self._groups[window], windows[:i].count(window)) for i, window in enumerate(windows)
        ]

    def enter(self, prompts: Mapping[int, tuple[int, int]]) -> None:
        """Makes room for new sequences in free slots.

        `prompts`: per slot the tokens of the prompt, and the most tokens of the whole sequence.
        """
        for slot, (length, most) in prompts.items():
            self.lengths[slot], self.least[slot], self._most[slot] = 0, length, most
            self.history[slot] = []
            for store in self._states.values():
                store[2 * slot : 2 * slot + 2] = zeros(2, *store.shape[1:], like=store)
        self._moved([group.enter(prompts) for group in self._groups.values()])

    def take(self, slot: int, cache: KVCache) -> None:
        """Copies the tokens of a cache into a slot, before its first token; the cache stays."""
        self.lengths[slot], self.history[slot] = cache.length, list(cache.history)
        self.least[slot] = cache.least
        for window, span in cache.spans.items():
            self._groups[window].take(slot, span)
        for layer, state in cache.states_in_use().items():
            self.states(layer, state, state.shape)[0][int(self._turns[0][2 * slot])] = state

    def sequence(self, slot: int) -> KVCache:
        """A copy of a sequence by itself."""
        cache = KVCache(self._windows)
        cache.length, cache.history = int(self.lengths[slot]), list(self.history[slot])
        cache.least = int(self.least[slot])
        for window, span in cache.spans.items():
            self._groups[window].give(slot, span)
        for layer, store in self._states.items():
            states, _, _ = cache.states(layer, store, store.shape[1:])
            states[0] = store[int(self._turns[0][2 * slot])]
        return cache

    def restart(self, slot: int) -> None:
        """Drops the keys and values of a sequence; its `history` stays."""
        history = self.history[slot]
        self.enter({slot: (len(history) + 1, int(self._most[slot]))})
        self.history[slot] = history

    def prompt(self, slot: int) -> PromptCache:
        """The cache that reads the prompt of a sequence that has entered."""
        return PromptCache(self, slot, self._places)

    def release(self, slot: int) -> None:
        """Ends a sequence; its room serves the next one."""
        self.lengths[slot] = 0
        for group in self._groups.values():
            group.held[slot] = 0

    def make_room(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Makes room for so many next tokens of each of these sequences."""
        self._moved([group.make_room(slots, counts) for group in self._groups.values()])

    def _moved(self, groups: Sequence[bool]) -> None:
        """Drops the replayed steps if the rows of any group have moved."""
        if any(groups):
            self.next.clear()

    def reserve(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Prepares so many next tokens of each of these sequences."""
        self.make_room(slots, counts)
        of_slots = np.zeros(len(self.lengths), np.int64)
        of_slots[list(slots)] = counts
        self.offsets[1::2] = np.cumsum(of_slots)
        self.offsets[2::2] = self.offsets[1:-1:2]
        for group in self._groups.values():
            group.reserve(of_slots)

    def append(self, layer: int, keys: np.ndarray, values: np.ndarray) -> tuple[Any, Any, Any]:
        """Adds [n, D] in one layer; returns both stores, and the bounds of the sequences there."""
        group, place = self._places[layer]
        store = group.store(place, keys, keys.shape[1])
        return *_put(store[0], store[1], group.next_rows, keys, values), on_device_of(
            keys, group.bounds
        )

    def rows(self, layer: int, like: np.ndarray, width: int) -> tuple[Any, Any, Any]:
        """As `KVCache.rows`; the bounds are those of all slots."""
        group, place = self._places[layer]
        store = group.store(place, like, width, 1)[0]
        return store, on_device_of(like, group.next_rows), on_device_of(like, group.bounds)

    def states(self, layer: int, like: np.ndarray, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """As `KVCache.states`: two states for each slot, places for each sequence of a step."""
        if layer not in self._states:
            self._states[layer] = zeros(2 * len(self.lengths), *shape, like=like)
        here, there = (on_device_of(like, turns) for turns in self._turns)
        return self._states[layer], here, there

    def states_of(self, slot: int, layer: int, like: Any, shape: tuple[int, ...]) -> Any:
        """As `KVCache.states` of one slot's sequence."""
        store = self.states(layer, like, shape)[0][2 * slot : 2 * slot + 2]
        here, there = (turns[2 * slot : 2 * slot + 1] - 2 * slot for turns in self._turns)
        return store, on_device_of(like, here), on_device_of(like, there)

    def advance(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Ends a step: every layer has so many more tokens of each of these sequences."""
        here = list(slots)
        for turns in self._turns:
            turns[[2 * slot for slot in here]] ^= 1
        self.lengths[here] += counts
        for group in self._groups.values():
            group.held[here] += counts


class PromptCache:
    """A sequence of a `BatchCache`, with the methods of a `KVCache`, for `Model.step`."""

    def __init__(self, cache: BatchCache, slot: int, places: list[tuple[_Layers, int]]):
        self.offsets = np.array([0, 1], np.int32)
        self.next: NextTokens | None = None
        self._cache, self._slot, self._places = cache, slot, places

    @property
    def length(self) -> int:
        """The tokens of the sequence."""
        return int(self._cache.lengths[self._slot])

    @property
    def least(self) -> int:
        """As `KVCache.least`."""
        return int(self._cache.least[self._slot])

    @least.setter
    def least(self, tokens: int) -> None:
        self._cache.least[self._slot] = tokens

    @property
    def history(self) -> list[int]:
        """As `KVCache.history`."""
        return self._cache.history[self._slot]

    def restart(self) -> None:
        """As `KVCache.restart`."""
        self._cache.restart(self._slot)

    def reserve(self, n: int) -> None:
        """Makes room for the next n tokens."""
        self._cache.make_room([self._slot], [n])
        self._n = n

    def append(self, layer: int, keys: np.ndarray, values: np.ndarray) -> tuple[Any, Any, Any]:
        """As `KVCache.append`, in the slot's rows."""
        group, place = self._places[layer]
        begin, store = int(group.begin[self._slot]), group.store(place, keys, keys.shape[1])
        k, v = (rows[begin : begin + int(group.capacity[self._slot])] for rows in store)
        rows, bounds = self._next(group, len(keys))
        return *_put(k, v, rows, keys, values), on_device_of(keys, bounds)

    def rows(self, layer: int, like: np.ndarray, width: int) -> tuple[Any, Any, Any]:
        """As `KVCache.rows`, in the slot's rows."""
        group, place = self._places[layer]
        begin, store = int(group.begin[self._slot]), group.store(place, like, width, 1)[0]
        rows, bounds = (on_device_of(like, each) for each in self._next(group, len(like)))
        return store[begin : begin + int(group.capacity[self._slot])], rows, bounds

    def states(self, layer: int, like: np.ndarray, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """As `KVCache.states`."""
        return self._cache.states_of(self._slot, layer, like, shape)

    def _next(self, group: _Layers, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the next n tokens among the slot's, and the bounds of those in use."""
        held = int(group.held[self._slot])
        return np.arange(held, held + n, dtype=np.int32), np.array([0, held + n], np.int32)

    def advance(self, n: int) -> None:
        """Ends a step of n tokens."""
        self._cache.advance([self._slot], [n])


def _put(k: Any, v: Any, rows: np.ndarray, keys: Any, values: Any) -> tuple[Any, Any]:
    """Writes keys and values [n, D] into `rows` of the stores k and v, and returns these."""
    there = on_device_of(keys, rows)
    _core.put_rows(keys, there, k)
    _core.put_rows(values, there, v)
    return k, v
