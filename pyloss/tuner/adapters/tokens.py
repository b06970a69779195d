"""Trained rows of embeddings and heads: PEFT's `trainable_token_indices`.

W' is W with the rows of some tokens replaced by trained ones. It is computed as W + E (T - W_0): E
[V, n] has a 1 for each token, T [n, D] are the trained rows and W_0 the replaced ones. So the base
stays as it is stored, and products are those of an adapter of rank n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pyloss import ops
from pyloss.autograd.tape import data
from pyloss.checks.numbers import shown
from pyloss.nn import Embedding, Linear, Module, Projecting
from pyloss.runtime.device import on_device_of, to_device
from pyloss.tuner.adapters.adapter import Adapter

if TYPE_CHECKING:
    from pyloss.tuner.adapters.layout import StoredLayer

TOKENS = "tokens"


class TokenRows(Adapter):
    """The trained rows of some tokens of a table.

    Attributes:
        tokens: the trained rows, [n, D].
        indices: their tokens, in order, int64 [n].
    """

    kind, base_name = TOKENS, "base_layer"
    parts: ClassVar[Mapping[str, int]] = {"tokens": 2}
    base_layer: Any

    @classmethod
    def shapes(cls, layer: Any, count: int) -> dict[str, tuple[int, ...]]:  # type: ignore[override]
        return {"tokens": (count, layer.shape[1])}

    @classmethod
    def from_stored(cls, layer: Module, stored: StoredLayer) -> Any:
        adapter = cls.from_base(layer, **stored.options)
        rows = stored.arrays["tokens"]
        if rows.shape != adapter.tokens.shape:
            raise ValueError(f"tokens {rows.shape}, expected {adapter.tokens.shape}")
        adapter._take_arrays(stored.arrays)
        return adapter

    def _attach(self, layer: Any, indices: Sequence[int]) -> None:  # type: ignore[override]
        self._check_base(layer)
        count = layer.shape[0]
        if not len(indices) or len(set(indices)) != len(indices):
            raise ValueError(
                f"trainable_token_indices must be different tokens, got {shown(list(indices))}"
            )
        if wrong := [i for i in indices if not 0 <= i < count]:
            raise ValueError(f"token {shown(wrong[0])} is outside [0, {count})")
        self._take_base(layer)
        self.indices = tuple(map(int, indices))
        rows = ops.embedding(np.array(self.indices), layer.weight)
        self.tokens = rows.copy()
        self._before = -to_device(rows, "cpu")
        self._places = np.zeros((count, len(indices)), np.float32)
        self._places[list(self.indices), np.arange(len(indices))] = 1
        self._turned = np.ascontiguousarray(self._places.T)

    def _take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.tokens[...] = arrays["tokens"]

    def change(self) -> Any:
        """T - W_0, [n, D]."""
        return ops.add(self.tokens, on_device_of(data(self.tokens), self._before))

    def factors(self) -> tuple[Any, Any]:
        """`lora_a` and `lora_b` of the product with the transposed table."""
        return ops.transposed(self.change()), on_device_of(data(self.tokens), self._turned)

    def merged(self, weight: np.ndarray) -> np.ndarray:
        found = weight.copy()
        found[list(self.indices)] = np.asarray(self.tokens)
        return found


class TokenEmbedding(TokenRows):
    """Over an embedding, and over a head that is the embedding."""

    base_type = Embedding

    def __call__(self, ids: Any) -> Any:
        places = on_device_of(data(self.tokens), self._places)
        return ops.adapted_embedding(ids, self.base_layer.weight, places, self.change(), 1.0)

    def projection(self) -> ops.Projection:
        """The arrays of `as_linear`."""
        return ops.Projection(self.base_layer.weight, None, *self.factors(), 1.0)

    def as_linear(self, x: Any) -> Any:
        """x [..., D] against the table as a tied head: [..., V]."""
        return ops.project(x, self.projection())


class TokenLinear(Projecting, TokenRows):
    """Over a head of its own."""

    base_type = Linear

    def projection(self) -> ops.Projection:
        base = self.base_layer
        return ops.Projection(base.weight, base.bias, *self.factors(), 1.0)
