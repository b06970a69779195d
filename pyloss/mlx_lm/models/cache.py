"""mlx_lm.models.cache: keys and values of a prompt, one object for each layer.

A list of these objects is the `cache` of `model(tokens, cache=cache)`. pyloss keeps the keys and
values of all layers together (`pyloss.models.cache`); `Sequences` ties both. An object whose
arrays are read, set, copied or saved has them in mlx's layout [B, heads, tokens, head_dim].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss.io.files import write_safetensors
from pyloss.mlx_lm.arrays import array, mx
from pyloss.mlx_lm.models.base import create_causal_mask
from pyloss.mlx_lm.names import absent
from pyloss.models.cache import KVCache as OwnCache

__all__ = [
    "ConcatenateKVCache",
    "KVCache",
    "RotatingKVCache",
    "can_trim_prompt_cache",
    "create_attention_mask",
    "load_prompt_cache",
    "make_prompt_cache",
    "save_prompt_cache",
    "trim_prompt_cache",
]

__getattr__ = absent(__name__)

#: first tokens that a cache of `max_kv_size` never drops
KEPT = 4


class KVCache:
    """The keys and values of a layer.

    Attributes:
        offset: the tokens of the sequence.
    """

    step = 256

    def __init__(self) -> None:
        self.offset = 0
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None
        self._home: Sequences | None = None
        self._layer = 0

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Append keys and values [B, heads, n, head_dim]; return all of them."""
        held, added = self._held(), (np.asarray(keys), np.asarray(values))
        if held is not None:
            added = tuple(  # type: ignore[assignment]
                np.concatenate(both, axis=2) for both in zip(held, added, strict=True)
            )
        self._own(added, self.offset + np.shape(keys)[2])
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        """The keys and values of all tokens."""
        held = self._held()
        if held is None:
            raise ValueError("the cache is empty: it has no keys and values yet")
        return array(held[0]), array(held[1])

    @property
    def keys(self) -> Any:
        """The keys [B, heads, tokens, head_dim]; None while the cache is empty."""
        held = self._held()
        return None if held is None else array(held[0])

    @property
    def values(self) -> Any:
        """The values, as `keys`."""
        held = self._held()
        return None if held is None else array(held[1])

    @property
    def state(self) -> tuple[Any, ...]:
        """`(keys, values, offset)`."""
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, v: tuple[Any, ...]) -> None:
        keys, values, offset = v
        # mlx-lm's arrays have room for more tokens.
        parts = None if keys is None else _upto(keys, values, int(offset))
        self._own(parts, int(offset))

    @classmethod
    def from_state(cls, state: Any) -> Any:
        """The cache with this `state`."""
        cache = cls.__new__(cls)
        KVCache.__init__(cache)
        cache.state = state
        return cache

    def size(self) -> int:
        """The tokens that the cache holds."""
        return self.offset

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be dropped."""
        return True

    def trim(self, n: int) -> int:
        """Drop the last n tokens; return how many were dropped."""
        n = min(self.offset, n)
        if self._arrays is not None:
            keys, values = self._arrays
            kept = keys.shape[2] - n
            self._arrays = keys[:, :, :kept], values[:, :, :kept]
        self.offset -= n
        return n

    def empty(self) -> bool:
        """Whether nothing was ever added."""
        return self._arrays is None and self._home is None

    @property
    def nbytes(self) -> int:
        """The bytes of keys and values."""
        held = self._held()
        return 0 if held is None else held[0].nbytes + held[1].nbytes

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of the next N tokens; see `create_attention_mask`."""
        return create_attention_mask(N, self.offset, return_array, window_size)

    def __copy__(self) -> Any:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        for name, value in vars(self).items():
            setattr(twin, name, value)
        held = self._held()
        twin._home = None
        twin._arrays = None if held is None else (held[0].copy(), held[1].copy())
        return twin

    def _own(self, arrays: tuple[np.ndarray, np.ndarray] | None, offset: int) -> None:
        self._arrays, self._home, self.offset = arrays, None, offset

    def _held(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Keys and values of the tokens up to `offset`."""
        return self._arrays if self._home is None else self._home.arrays(self)


def _upto(keys: Any, values: Any, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(keys)[:, :, :tokens], np.asarray(values)[:, :, :tokens]


class ConcatenateKVCache(KVCache):
    """A `KVCache` whose state has no offset."""

    @property
    def state(self) -> tuple[Any, ...]:
        """`(keys, values)`."""
        return self.keys, self.values

    @state.setter
    def state(self, v: tuple[Any, ...]) -> None:
        keys, values = map(np.asarray, v)
        self._own((keys, values), keys.shape[-2])


class RotatingKVCache(KVCache):
    """A `KVCache` of at most `max_size` tokens: all but the first `keep` are dropped in turn."""

    def __init__(self, max_size: int, keep: int = 0) -> None:
        super().__init__()
        self.max_size, self.keep = max_size, keep

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        if self._home is None and self._arrays is not None:
            # Every new token sees at least max_size tokens.
            more = self._arrays[0].shape[2] + min(np.shape(keys)[2], 1) - self.max_size
            self._forget(more)
        return super().update_and_fetch(keys, values)

    def _forget(self, count: int) -> None:
        if count > 0 and self._arrays is not None:
            first, last = self.keep, self.keep + count
            keys, values = (
                np.concatenate([a[:, :, :first], a[:, :, last:]], axis=2) for a in self._arrays
            )
            self._arrays = keys, values

    @property
    def state(self) -> tuple[Any, ...]:
        """`(keys, values, offset, keep, max_size, place)`; tokens are in order up to `place`."""
        held = self._held()
        place = 0 if held is None else held[0].shape[2]
        return self.keys, self.values, self.offset, self.keep, self.max_size, place

    @state.setter
    def state(self, v: tuple[Any, ...]) -> None:
        keys, values, offset, keep, max_size, place = v
        self.max_size, self.keep = int(max_size), int(keep)
        arrays = None
        if keys is not None:
            parts = _upto(keys, values, int(offset))
            order = np.arange(parts[0].shape[2])
            if place < offset:  # the oldest token is at this place
                order = np.r_[order[:keep], order[place:], order[keep:place]]
            arrays = parts[0][:, :, order], parts[1][:, :, order]
        self._own(arrays, int(offset))

    def size(self) -> int:
        return min(self.offset, self.max_size)

    def make_mask(  # type: ignore[override]
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> Any:
        """The mask of the next N tokens over those that are kept."""
        window = window_size or self.max_size
        if N > 1:
            held = min(self.max_size - 1, self.offset)
            if held + N > window or return_array:
                return create_causal_mask(N, held, window_size=window)
            return "causal"
        if window_size is None or self.offset < window_size or self.max_size <= window_size:
            return None
        # The tokens are in order here; mlx-lm's lie in a ring.
        kept = min(self.offset + 1, self.max_size)
        return array(np.arange(kept) >= kept - window_size)

    def is_trimmable(self) -> bool:
        """Whether no token was dropped yet."""
        return self.offset < self.max_size


class Sequences:
    """The sequences of a batch in pyloss's caches, for the objects of all layers.

    Attributes:
        length: the tokens of each sequence.
        rows: the cache of each sequence.
    """

    def __init__(self, model: Any, layers: list[Any], batch: int) -> None:
        self.layers, self.length = layers, 0
        self.rows: list[OwnCache] = [model.make_cache() for _ in range(batch)]
        self.head_dim = int(getattr(model.config, "head_dim", 0) or 0)
        held = [layer._held() for layer in layers]
        offsets = {layer.offset for layer in layers}
        if len(offsets) != 1:
            raise ValueError(f"the layers of the cache have different lengths: {sorted(offsets)}")
        if held[0] is not None:
            self._take(held)
        for i, layer in enumerate(layers):
            layer._home, layer._arrays, layer._layer = self, None, i

    def _take(self, held: list[Any]) -> None:
        """Puts arrays in mlx's layout into the caches."""
        batch, _, tokens, _ = held[0][0].shape
        if batch != len(self.rows):
            raise ValueError(
                f"the cache has {batch} sequences, and the tokens {len(self.rows)}: give one "
                "cache for each batch"
            )
        if not tokens:
            return
        for i, cache in enumerate(self.rows):
            cache.reserve(tokens)
            for layer, arrays in enumerate(held):
                rows = [a[i].swapaxes(0, 1).reshape(tokens, -1) for a in arrays]
                cache.append(layer, *(np.ascontiguousarray(r, np.float32) for r in rows))
            cache.advance(tokens)
            cache.length = self.layers[0].offset
        self.length = self.layers[0].offset

    def arrays(self, layer: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """The keys and values of a layer, in mlx's layout, up to its offset."""
        if not self.length:
            return None
        dropped, found = self.length - layer.offset, []
        for part in range(2):
            rows = [cache.layer_rows(layer._layer)[part] for cache in self.rows]
            held = np.stack(rows)[:, : len(rows[0]) - dropped]
            shaped = held.reshape(*held.shape[:2], -1, self.head_dim or held.shape[2])
            found.append(shaped.swapaxes(1, 2))
        return found[0], found[1]

    def ready(self) -> None:
        """Drops what was trimmed. ValueError if the layers do not agree, or cannot drop it."""
        offsets = {layer.offset for layer in self.layers}
        if len(offsets) != 1:
            raise ValueError(f"the layers of the cache have different lengths: {sorted(offsets)}")
        (offset,) = offsets
        if offset != self.length:
            for cache in self.rows:
                if not cache.truncate(offset):
                    raise ValueError(
                        f"this model's cache cannot go back from {self.length} tokens to {offset}: "
                        "make a new one by make_prompt_cache"
                    )
            self.length = offset

    def advanced(self, n: int) -> None:
        """Every layer has n more tokens."""
        self.length += n
        for layer in self.layers:
            layer.offset += n

    def most(self) -> tuple[int, int] | None:
        """`(max_size, keep)` of a cache that drops tokens."""
        first = self.layers[0]
        return (first.max_size, first.keep) if isinstance(first, RotatingKVCache) else None


def sequences_of(model: Any, cache: Any, batch: int) -> Sequences:
    """The sequences of a list of layers' objects. ValueError for a list that does not fit."""
    layers = list(cache)
    if len(layers) != len(model.layers) or not all(isinstance(c, KVCache) for c in layers):
        raise ValueError(
            f"the cache has {len(layers)} objects, and the model {len(model.layers)} layers: "
            "make_prompt_cache(model) makes one for each"
        )
    home = layers[0]._home
    if home is None or len(home.rows) != batch or home.layers != layers:
        home = Sequences(model, layers, batch)
    home.ready()
    return home


def own_cache(model: Any, cache: Any) -> OwnCache:
    """pyloss's cache of the one sequence in a list of layers' objects, which goes on using it."""
    return sequences_of(model, cache, 1).rows[0]


def cache_of(model: Any, own: OwnCache) -> list[Any]:
    """The layers' objects of a sequence in pyloss's cache, which becomes theirs."""
    layers = make_prompt_cache(model)
    home = Sequences(model, layers, 1)
    home.rows = [own]
    home.advanced(own.length)
    return layers


def read_tokens(model: Any, tokens: np.ndarray, cache: Any, last: bool = False) -> np.ndarray:
    """Logits [B, T, V] of tokens [B, T] after those in the cache; with `last` only [B, 1, V]."""
    home = sequences_of(model, cache, len(tokens))
    found = []
    for own, row in zip(home.rows, tokens, strict=True):
        most = home.most()
        if most is None:
            found.append(model.step(row, own)[None] if last else model.step_all(row, own))
        else:
            found.append(_rotated(model, row, own, *most)[-1 if last else 0 :])
    home.advanced(tokens.shape[1])
    return np.stack(found)


def _rotated(model: Any, row: np.ndarray, own: OwnCache, most: int, keep: int) -> np.ndarray:
    """`step_all` of a cache with at most so many tokens, one by one once it is full."""
    free = max(most - own.rows_in_use(), 0)
    first = [model.step_all(row[:free], own)] if min(free, len(row)) else []
    for token in row[free:]:
        own.forget(keep, 1)
        first.append(model.step_all(token[None], own))
    return np.concatenate(first)


def make_prompt_cache(model: Any, max_kv_size: int | None = None) -> list[Any]:
    """An empty cache for `model(tokens, cache=cache)`, an object for each layer.

    With `max_kv_size` it holds at most so many tokens: the first 4, and the last ones.
    """
    count = len(model.layers)
    if max_kv_size is None:
        return [KVCache() for _ in range(count)]
    return [RotatingKVCache(max_size=max_kv_size, keep=KEPT) for _ in range(count)]


_KINDS = {kind.__name__: kind for kind in (KVCache, ConcatenateKVCache, RotatingKVCache)}


def save_prompt_cache(
    file_name: str, cache: list[Any], metadata: dict[str, str] | None = None
) -> None:
    """Write a cache and `metadata` to a safetensors file, which mlx-lm reads too."""
    tensors: dict[str, np.ndarray] = {}
    scalars: list[Any] = [""]
    for i, layer in enumerate(cache):
        for j, value in enumerate(layer.state):
            name = f"{i}.{j}"
            if value is None:
                scalars.append((name, "none"))
                tensors[name] = np.zeros(0, np.float32)
            elif isinstance(value, int):
                scalars.append((name, "scalar"))
                tensors[name] = np.array(value, np.int32)
            else:
                tensors[name] = np.ascontiguousarray(np.asarray(value))
    told = {f"0.{key}": str(value) for key, value in (metadata or {}).items()}
    told |= {f"1.{i}": type(layer).__name__ for i, layer in enumerate(cache)}
    told["2.0"] = ""
    for i, (name, kind) in enumerate(scalars[1:], 1):
        told |= {f"2.{i}.0": name, f"2.{i}.1": kind}
    write_safetensors(file_name, tensors, told)


def load_prompt_cache(file_name: str, return_metadata: bool = False) -> Any:
    """The cache of a file that `save_prompt_cache` or mlx-lm wrote; with its metadata if asked.

    Raises ValueError for a kind of cache that pyloss does not have.
    """
    arrays, told = mx.load(str(file_name), return_metadata=True)
    tensors = {name: np.asarray(value) for name, value in arrays.items()}
    kinds = [told[f"1.{i}"] for i in range(sum(key.startswith("1.") for key in told))]
    if unknown := sorted(set(kinds) - set(_KINDS)):
        raise ValueError(
            f"{file_name}: has caches of the kind {unknown[0]}; known are {', '.join(_KINDS)}"
        )
    scalars = {}
    i = 1
    while f"2.{i}.0" in told:
        scalars[told[f"2.{i}.0"]] = told[f"2.{i}.1"]
        i += 1
    cache = []
    for i, kind in enumerate(kinds):
        state: list[Any] = []
        while (name := f"{i}.{len(state)}") in tensors:
            value = tensors[name]
            how = scalars.get(name)
            state.append(None if how == "none" else value.item() if how == "scalar" else value)
        cache.append(_KINDS[kind].from_state(tuple(state)))
    if not return_metadata:
        return cache
    return cache, {key[2:]: value for key, value in told.items() if key.startswith("0.")}


def can_trim_prompt_cache(cache: list[Any]) -> bool:
    """Whether the last tokens of a cache can be dropped."""
    return all(c.is_trimmable() for c in cache)


def trim_prompt_cache(cache: list[Any], num_tokens: int) -> int:
    """Drop the last tokens of a cache; return how many were dropped."""
    if not can_trim_prompt_cache(cache) or not cache:
        return 0
    dropped = [c.trim(num_tokens) for c in cache]
    return int(dropped[0])


def create_attention_mask(N: int, offset: int, return_array: bool, window_size: int | None) -> Any:
    """The mask of N tokens after `offset`: None, "causal", or bool [N, offset + N]."""
    if window_size is None and N == 1:
        return None
    if window_size is None and not return_array:
        return "causal"
    return create_causal_mask(N, offset, window_size)
