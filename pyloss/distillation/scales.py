"""Layers over quantized matrices whose scales and offsets are trained.

`train_scales` puts them into a model, `store_scales` replaces them by plain layers over matrices of
the same format and size. In between the layers compute with scales rounded as they will be stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import ops
from pyloss.nn import Embedding, Linear, Module, SwitchLinear
from pyloss.nn.layers import Projecting
from pyloss.ops.scaled import scaled_linear, scaled_matrix, scaled_rows, scaled_stack
from pyloss.weights.scales import Scales, has_scales
from pyloss.weights.stack import WeightStack


class ScaledLinear(Projecting):
    """A `Linear` over a matrix whose scales are trained.

    Attributes:
        change: float32, the relative changes of the scales (`weights.scales`), 0 at first.
    """

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._scales = Scales(layer.weight)  # type: ignore[arg-type]
        self.change = self._scales.zeros()
        self.freeze(keys=[] if self.bias is None else ["bias"])

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)"""
        return self._scales.weight.shape

    def projection(self) -> ops.Projection:
        """The arrays for a loss under a head; the matrix is expanded."""
        return ops.Projection(scaled_matrix(self._scales, self.change), self.bias)

    def __call__(self, x: Any) -> Any:
        return scaled_linear(x, self._scales, self.change, self.bias)

    def stored(self) -> Any:
        """The plain layer with the changed scales; the weight is this one's if none changed."""
        layer = Linear.from_weight(self._scales.weight_of(self.change), self.bias)
        return layer.freeze()


class ScaledEmbedding(Module):
    """An `Embedding` over a table whose scales are trained, see `ScaledLinear`."""

    def __init__(self, layer: Embedding) -> None:
        super().__init__()
        self.weight = layer.weight
        self._scales = Scales(layer.weight)  # type: ignore[arg-type]
        self.change = self._scales.zeros()

    @property
    def shape(self) -> tuple[int, int]:
        """(rows of the table, dimensions)"""
        return self._scales.weight.shape

    def __call__(self, ids: Any) -> Any:
        return scaled_rows(ids, self._scales, self.change)

    def projection(self) -> ops.Projection:
        """The arrays of the table as a tied head; it is expanded."""
        return ops.Projection(scaled_matrix(self._scales, self.change))

    def as_linear(self, x: Any) -> Any:
        """x [..., D] against the table: [..., V]."""
        return ops.project(x, self.projection())

    def stored(self) -> Any:
        """The plain layer with the changed scales."""
        return Embedding.from_weight(self._scales.weight_of(self.change)).freeze()


class ScaledSwitchLinear(Module):
    """A `SwitchLinear` over experts whose scales are trained, see `ScaledLinear`."""

    def __init__(self, layer: SwitchLinear) -> None:
        super().__init__()
        stack: Any = layer.weight
        self.weight, self.bias = layer.weight, layer.bias
        self._scales = [Scales(matrix) for matrix in stack.matrices]
        self.change = np.stack([each.zeros() for each in self._scales])
        self.freeze(keys=[] if self.bias is None else ["bias"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out features, in features)"""
        return (len(self._scales), *self._scales[0].weight.shape)

    def __call__(self, x: Any, offsets: np.ndarray) -> Any:
        matrices = scaled_stack(self._scales, self.change)
        return ops.expert_project(x, offsets, ops.Projection(matrices, self.bias))

    def stored(self) -> Any:
        """The plain layer with the changed scales."""
        pairs = zip(self._scales, self.change, strict=True)
        stack = WeightStack([each.weight_of(change) for each, change in pairs])
        return SwitchLinear.from_weight(stack, self.bias).freeze()


def train_scales(model: Any) -> list[str]:
    """Makes the scales of all quantized layers trainable, in place; returns the layers' names.

    Layers of floats, or of formats without such scales, stay as they are.
    """
    found = []
    for name, layer in list(model.named_modules()):
        kind = _kind_of(layer)
        if kind is not None:
            model.set_module(name, kind(layer).train(model.training))
            found.append(name)
    return found


def store_scales(model: Any) -> None:
    """Replaces the layers of `train_scales` by plain ones with the trained scales, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, ScaledLinear | ScaledEmbedding | ScaledSwitchLinear):
            model.set_module(name, layer.stored().train(model.training))


def _kind_of(layer: Any) -> Any:
    weight = getattr(layer, "weight", None)
    if isinstance(layer, SwitchLinear) and isinstance(weight, WeightStack):
        return ScaledSwitchLinear if all(map(has_scales, weight.matrices)) else None
    if not has_scales(weight):
        return None
    return (
        ScaledLinear
        if isinstance(layer, Linear)
        else ScaledEmbedding
        if isinstance(layer, Embedding)
        else None
    )
