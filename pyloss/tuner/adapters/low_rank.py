"""Adapters of low rank: a product of two thin matrices, added to the base's weight.

LoRA (Hu et al., arXiv:2106.09685): W' = W + scale A B. `lora.py`, `dora.py` and `switch.py` have
the classes for each type of layer.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from pyloss import ops, random
from pyloss.autograd.recorded import records_layer
from pyloss.autograd.tape import data
from pyloss.checks.numbers import real, shown
from pyloss.nn import Module, uniform
from pyloss.tuner.adapters.adapter import Adapter, misfit
from pyloss.tuner.adapters.lora_parameters import LoraParameters

if TYPE_CHECKING:
    from pyloss.tuner.adapters.layout import StoredLayer

L = TypeVar("L", bound="LowRankAdapter")

#: Ranks may be larger than a layer, as in PEFT; far larger ones are mistakes that only take memory.
MOST_RANK = 1 << 16


class LowRankAdapter(Adapter):
    """An adapter whose change is `scale` times the product of `lora_a` and `lora_b`.

    `lora_a` begins uniform and `lora_b` zero, so that the adapter changes nothing at first. A
    subclass computes with `factors()`.

    Attributes:
        lora_a: the trained factor on the input's side.
        lora_b: the trained factor on the output's side.
        scale: the factor of the product (PEFT's lora_alpha / r).
        dropout: dropout of the adapter's input, in training alone.
        origin_a: a fixed factor of the shape of `lora_a`, or None; see `subtract_initial_product`.
        origin_b: a fixed factor of the shape of `lora_b`, or None.
        m: the trained lengths of the rows, of kinds that have them (DoRA).
    """

    parts: ClassVar[Mapping[str, int]] = {"lora_a": 2, "lora_b": 2}
    parameters_type = LoraParameters
    results: ClassVar[frozenset[str]] = frozenset(("_seed",))
    origin_a: np.ndarray | None = None
    origin_b: np.ndarray | None = None
    m: Any = None

    @classmethod
    def from_base(  # type: ignore[override]
        cls: type[L], layer: Module, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> L:
        """The adapter over an existing layer, which is shared and frozen, not copied.

        Raises TypeError for a layer of another type, ValueError for a rank below 1 or above
        MOST_RANK, a dropout outside [0, 1) or a scale that is not finite.
        """
        return super().from_base(layer, r=r, dropout=dropout, scale=scale)

    @classmethod
    def from_stored(cls: type[L], layer: Module, stored: StoredLayer) -> L:
        rank = stored.arrays["lora_a"].shape[1]
        expected = cls.shapes(layer, rank)
        if {name: array.shape for name, array in stored.arrays.items()} != expected:
            # -1 cannot be another dimension.
            any_rank = {
                name: tuple("r" if n < 0 else n for n in shape)
                for name, shape in cls.shapes(layer, -1).items()
            }
            raise ValueError(misfit(stored.arrays, any_rank))
        adapter = cls.from_base(layer, r=rank, **stored.options)
        adapter._take_arrays(stored.arrays)
        return adapter

    def _attach(  # type: ignore[override]
        self, layer: Module, r: int, dropout: float, scale: float
    ) -> None:
        self._check_base(layer)
        if isinstance(r, bool) or not isinstance(r, int | np.integer) or not 1 <= r <= MOST_RANK:
            raise ValueError(f"rank must be an integer from 1 to {MOST_RANK}, not {shown(r)}")
        dropout, scale = real(dropout, "dropout", 0, below=1), real(scale, "scale")
        self._take_base(layer)
        self.dropout = dropout
        self.scale = scale
        self._rank = int(r)
        self._initialize(self.shapes(layer, int(r)))

    def _initialize(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Makes the parameters within mlx-lm's bounds: 1 / sqrt(in), 1 / sqrt(rows) of a table."""
        shape = shapes["lora_a"]
        self.lora_a = uniform(shape, 1 / math.sqrt(shape[0] if len(shape) == 2 else shape[-1]))
        self.lora_b = np.zeros(shapes["lora_b"], np.float32)

    @classmethod
    @abstractmethod
    def shapes(cls, layer: Any, r: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the adapter's parts over `layer`, by name."""

    @property
    def rank(self) -> int:
        """The inner dimension of the product of `lora_a` and `lora_b`."""
        return self._rank

    def factors(self) -> tuple[Any, Any]:
        """The factors of the product: `lora_a` and `lora_b`, with the fixed factors appended."""
        if self.origin_a is None or self.origin_b is None:
            return self.lora_a, self.lora_b
        a_axis, b_axis = self.rank_axes()
        return (
            ops.append(self.lora_a, self.origin_a, a_axis),
            ops.append(self.lora_b, self.origin_b, b_axis),
        )

    def rank_axes(self) -> tuple[int, int]:
        """The axes of `lora_a` and `lora_b` that are as long as the rank."""
        return (1, 0) if self.lora_a.ndim == 2 else (1, 2)

    def subtract_initial_product(self) -> None:
        """Subtracts the current product of `lora_a` and `lora_b` for good, by fixed factors.

        An adapter that begins with a part of the base's weight (PiSSA) then needs no base without
        that part.
        """
        self.origin_a, self.origin_b = self.lora_a.copy(), -self.lora_b
        self.freeze(recurse=False, keys=("origin_a", "origin_b"))

    def reset_magnitude(self) -> None:
        """Sets DoRA's `m` to the row norms of the adapted weight; LoRA has none."""

    def fixed_arrays(self) -> dict[str, np.ndarray]:
        if self.origin_a is None or self.origin_b is None:
            return {}
        return {"origin_a": self.origin_a, "origin_b": self.origin_b}

    def storable(self: L) -> L:
        """This adapter on the host and without fixed factors; with them its rank doubles."""
        adapter = super().storable()
        if adapter.origin_a is None:
            return adapter
        a, b = adapter.factors()
        adapter = copy.copy(adapter)
        adapter.origin_a = adapter.origin_b = None
        adapter.lora_a, adapter.lora_b, adapter._rank = data(a), data(b), 2 * adapter.rank
        return adapter

    def storable_arrays(
        self, arrays: Mapping[str, np.ndarray], parameters: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        """`arrays` with the fixed factors appended.

        A file has one scale for all layers: another scale is multiplied into `lora_b`.
        """
        found = dict(arrays)
        fixed = self.fixed_arrays()
        for part, axis in zip(("a", "b"), self.rank_axes(), strict=True):
            if (tail := fixed.get(f"origin_{part}")) is not None:
                found[f"lora_{part}"] = np.concatenate((arrays[f"lora_{part}"], tail), axis)
        common = parameters.get("scale")
        if common and self.scale != common and "lora_b" in found:
            found["lora_b"] = found["lora_b"] * np.float32(self.scale / common)
        return found

    def _dropout(self) -> tuple[float, int]:
        """The current dropout and the seed of its mask."""
        p = self.dropout if self.training else 0.0
        if p and records_layer():
            return p, self._seed
        return p, random.next_seed() if p else 0

    def recorded_inputs(self) -> list[Any]:
        if not (self.dropout and self.training):
            return []
        self._seed = random.next_seed()
        return [self._seed]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(r={self.rank}, scale={self.scale}, dropout={self.dropout}, "
            f"base={self.base!r})"
        )
