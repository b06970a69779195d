"""Layers that are trained as a whole beside adapters: PEFT's `modules_to_save` and `bias`.

Each is an adapter whose weight, bias or both are trained copies of the base's. Files hold them
under the layer's own names (`lm_head.weight`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pyloss import ops
from pyloss.nn import Embedding, Linear, Module, Projecting, RMSNorm
from pyloss.tuner.adapters.adapter import Adapter
from pyloss.tuner.adapters.merging import Fused, dense, with_weight

if TYPE_CHECKING:
    from pyloss.tuner.adapters.layout import StoredLayer

WHOLE = "whole"


class WholeLayer(Adapter):
    """A layer with trained copies of its arrays, in float32.

    Attributes:
        trained: the names of the trained arrays.
        weight: the weight, or the base's where it is not trained.
        bias: the bias, likewise; None where there is none.
    """

    kind, base_name = WHOLE, "base_layer"
    parts: ClassVar[Mapping[str, int]] = {"weight": 2, "bias": 1}
    base_layer: Any
    weight: Any
    bias: Any = None

    @classmethod
    def shapes(cls, layer: Any) -> dict[str, tuple[int, ...]]:  # type: ignore[override]
        bias = getattr(layer, "bias", None)
        found = {"weight": tuple(layer.weight.shape)}
        return found if bias is None else found | {"bias": tuple(bias.shape)}

    @classmethod
    def from_stored(cls, layer: Module, stored: StoredLayer) -> Any:
        """The layer with the arrays of a file; those that the file lacks stay the base's."""
        expected = cls.shapes(layer)
        for name, array in stored.arrays.items():
            if array.shape != expected.get(name):
                has = f"has shape {expected[name]}" if name in expected else "is missing"
                raise ValueError(f"{name} {array.shape}, and the layer's {name} {has}")
        adapter = cls.from_base(layer, trained=tuple(stored.arrays))
        adapter._take_arrays(stored.arrays)
        return adapter

    def _attach(self, layer: Module, trained: Collection[str] = ("weight", "bias")) -> None:  # type: ignore[override]
        self._check_base(layer)
        self._take_base(layer)
        own = self.shapes(layer)
        self.trained = tuple(name for name in own if name in trained)
        for name in own:
            value = getattr(layer, name)
            setattr(self, name, dense(value).copy() if name in trained else value)
        self._take_more(layer)
        fixed = [name for name in own if name not in trained]
        self.freeze(
            recurse=False, keys=[n for n in fixed if isinstance(getattr(self, n), np.ndarray)]
        )

    def _take_more(self, layer: Any) -> None:
        """Takes what else the base computes with."""

    def parameter_names(self) -> tuple[str, ...]:
        return self.trained

    def merged(self, weight: np.ndarray) -> np.ndarray:
        return np.asarray(dense(self.weight), np.float32).copy()

    def _fused(self, dequantize: bool) -> Fused:
        """The trained layer itself: the base's format would lose most of a small change."""
        base = self.base
        weight = self.weight.copy() if "weight" in self.trained else base.weight
        layer = with_weight(base, weight)
        if getattr(base, "bias", None) is not None:
            layer.bias = np.asarray(self.bias).copy()
        return Fused(layer.freeze(), 1.0)


class WholeLinear(Projecting, WholeLayer):
    """A linear layer: x weight^T + bias."""

    recordable = True
    base_type = Linear

    def projection(self) -> ops.Projection:
        return ops.Projection(self.weight, self.bias)


class WholeEmbedding(WholeLayer):
    """A table of embeddings, which may also be the head."""

    base_type = Embedding

    def __call__(self, ids: Any) -> Any:
        return ops.embedding(ids, self.weight)

    def projection(self) -> ops.Projection:
        """The arrays of `as_linear`."""
        return ops.Projection(self.weight)

    def as_linear(self, x: Any) -> Any:
        """x [..., D] against the table as a tied head: [..., V]."""
        return ops.project(x, self.projection())


class WholeNorm(WholeLayer, RMSNorm):
    """A norm with a trained weight."""

    recordable = True
    base_type = RMSNorm
    parts: ClassVar[Mapping[str, int]] = {"weight": 1}

    def _take_more(self, layer: Any) -> None:
        self.eps, self._offset, self._ones = layer.eps, layer._offset, layer._ones

    @property
    def shape(self) -> Any:
        return self.base.weight.shape

    def _fused(self, dequantize: bool) -> Fused:
        layer = copy.copy(self.base)
        layer.weight = np.asarray(self.weight).copy()
        return Fused(layer.freeze(), 1.0)


WholeNorm.__call__ = RMSNorm.__call__  # type: ignore[method-assign]
