"""DoRA: LoRA with rows scaled to a trained length (Liu et al., arXiv:2402.09353)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from pyloss import _core
from pyloss.autograd.recorded import records_layer
from pyloss.autograd.scope import current_tape
from pyloss.autograd.tape import data
from pyloss.ops.arrays import (
    core_weight,
    empty,
    f32,
    first_array,
    in_stored_order,
    multiply_columns,
    same_bits,
    transpose,
)
from pyloss.ops.projection import quotient
from pyloss.runtime.device import DeviceArray, on_device_of
from pyloss.tuner.adapters.low_rank import LowRankAdapter
from pyloss.tuner.lora import EmbeddingAdapter, LinearAdapter


class Magnitude(LowRankAdapter):
    """The trained lengths `m` of the rows of the adapted weight, which begin as the base's.

    The norms that divide m are constants to the gradient (section 4.3). They are kept until the
    base or a factor changes. A copy of the factors is compared with the current ones, so in-place
    writes are seen. Over a base that is an array, which may be written to, they are computed on
    every call.
    """

    parts: ClassVar[Mapping[str, int]] = {**LowRankAdapter.parts, "m": 1}

    results = LowRankAdapter.results | {"_squares", "_norms", "_factors"}

    @classmethod
    def shapes(cls, layer: Any, r: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(layer, r), "m": tuple(layer.shape[:-1])}

    def _initialize(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super()._initialize(shapes)
        self._squares: tuple[Any, np.ndarray] | None = None
        self._norms: tuple[Any, tuple[float, np.ndarray, np.ndarray], np.ndarray] | None = None
        self._factors: tuple[Any, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]] | None = (
            None
        )
        self.m = np.sqrt(self.squares()).astype(np.float32)

    def squares(self) -> np.ndarray:
        """The base's squared row norms, float64 of the shape of `m`; kept for a stored base."""
        weight = self.base.weight
        if (
            self._squares is None
            or self._squares[0] is not weight
            or isinstance(weight, np.ndarray | DeviceArray)
        ):
            self._squares = weight, self._row_squares(weight)
        return self._squares[1]

    def norms(self) -> Any:
        """The row norms of the adapted weight, float32 of the shape of `m`."""
        weight = self.base.weight
        a, b = map(data, self.factors())
        if isinstance(a, DeviceArray):
            return self._adapted_norms(weight, a, b)
        known = self._norms
        if known is not None and records_layer():
            return known[2]
        if (
            known is None
            or known[0] is not weight
            or isinstance(weight, np.ndarray)
            or not self._as_before(*known[1], a, b)
        ):
            known = self._norms = (
                weight,
                (self.scale, a.copy(), b.copy()),
                self._adapted_norms(weight, a, b),
            )
        return known[2]

    def recorded_inputs(self) -> list[Any]:
        return [*super().recorded_inputs(), self.norms()]

    def _as_before(
        self, scale: float, old_a: np.ndarray, old_b: np.ndarray, a: np.ndarray, b: np.ndarray
    ) -> bool:
        return self.scale == scale and same_bits(old_a, a) and same_bits(old_b, b)

    def _row_squares(self, weight: Any) -> Any:
        stored = core_weight(weight)
        found = on_device_of(first_array(stored), np.empty(weight.shape[:-1]))
        _core.row_squares(stored, found)
        return found

    def _adapted_norms(self, weight: Any, a: Any, b: Any, squares: Any = None) -> Any:
        """Row norms of `weight` [O, I] plus the product of a [I, R] and b [R, O].

        `squares` are the squared row norms of `weight`.
        """
        found, squares = (
            empty(weight.shape[0], like=a),
            self.squares() if squares is None else squares,
        )
        if not isinstance(a, DeviceArray):
            a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
        a = in_stored_order(a, weight)
        _core.adapted_norm(core_weight(weight), a, b, self.scale, squares, found)
        return found

    def reset_magnitude(self) -> None:
        """Sets `m` to the row norms, so that m / norm is 1."""
        self.m[...] = self.norms()

    def set_base(self, layer: Any) -> None:
        """Puts the adapter over another layer of the same shape; `m` begins with its row norms.

        TypeError for a layer of another type, ValueError for another shape.
        """
        self._check_base(layer)
        if tuple(layer.shape) != tuple(self.base.shape):
            raise ValueError(
                f"the layer has the shape {tuple(layer.shape)}, and the adapter is made for "
                f"{tuple(self.base.shape)}"
            )
        self._take_base(layer)
        self._squares = self._norms = self._factors = None
        self.m[...] = np.sqrt(self.squares())

    def _magnitude(self) -> tuple[Any, ...]:
        return self.m, self.norms()

    def merged(self, weight: np.ndarray) -> np.ndarray:
        return quotient(f32(data(self.m), "m"), self.norms())[..., None] * super().merged(weight)  # type: ignore[safe-super]

    def _delta(self) -> np.ndarray:
        return LowRankAdapter._delta(self)


class DoRALinear(Magnitude, LinearAdapter):
    """y = m / norm * (base(x) - bias + scale * dropout(x) lora_a lora_b) + bias.

    norm has the row norms of the adapted weight.
    """

    kind = "dora"
    recordable = True

    set_linear = Magnitude.set_base

    def _magnitude(self) -> tuple[Any, ...]:
        m, norm = super()._magnitude()
        return m, norm, self._known(norm)

    def _known(self, norm: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """m / norm, and lora_b times it, kept while generating; None while a tape records."""
        m, b = self.m, self.factors()[1]
        if current_tape() is not None or isinstance(norm, DeviceArray):
            return None
        kept = self._factors
        if (
            kept is None
            or kept[0] is not norm
            or not same_bits(kept[1], m)
            or not same_bits(kept[2], b)
        ):
            factor = quotient(f32(m, "m"), norm)
            kept = self._factors = (
                norm,
                m.copy(),
                b.copy(),
                (factor, multiply_columns(f32(b, "lora_b"), factor)),
            )
        return kept[3]


class DoRAEmbedding(Magnitude, EmbeddingAdapter):
    """y = m[ids] / norm[ids] * (base(ids) + scale * dropout(lora_a[ids] lora_b))."""

    kind = "dora"

    set_embedding = Magnitude.set_base

    def _adapted_norms(self, weight: Any, a: Any, b: Any, squares: Any = None) -> Any:
        return super()._adapted_norms(weight, transpose(b), transpose(a), squares)
