"""Adapters over the linear layers of experts, each expert with matrices of its own."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from .. import expert_ops
from ..autograd import data
from ..nn import Module, SwitchLinear
from ..projection import Projection
from ..weight_stack import WeightStack
from .adapter import Adapter, Fused, merge_stored, share_kept, with_weight


class SwitchAdapter(Adapter):
    """What adapters over a `SwitchLinear` share: lora_a [E, r, in], lora_b [E, out, r] as mlx-lm has them."""

    base_name, base_type = "linear", SwitchLinear
    linear: SwitchLinear

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        num_experts: int,
        r: int = 8,
        dropout: float = 0.0,
        scale: float = 20.0,
        bias: bool = False,
    ):
        Module.__init__(self)
        self._attach(SwitchLinear(input_dims, output_dims, num_experts, bias), r, dropout, scale)

    @property
    def bias(self) -> np.ndarray | None:
        """The base's."""
        return self.linear.bias

    @classmethod
    def shapes(cls, layer: SwitchLinear, r: int) -> dict[str, tuple[int, ...]]:
        experts, output_dims, input_dims = layer.shape
        return {"lora_a": (experts, r, input_dims), "lora_b": (experts, output_dims, r)}

    @abstractmethod
    def merged_expert(self, expert: int, weight: np.ndarray) -> np.ndarray:
        """The base's dense float32 `weight` [out, in] of one expert with the adapter in it, a new array."""

    def merged(self, weight: np.ndarray) -> np.ndarray:
        return np.stack([self.merged_expert(expert, matrix) for expert, matrix in enumerate(weight)])

    def fused(self, dequantize: bool = False) -> Fused:
        """See `Adapter`. Stored experts are merged one after the other, so that one alone is dense at a time."""
        base = self.linear.weight
        if not isinstance(base, WeightStack):
            return super().fused(dequantize)
        matrices, change, error = [], 0.0, 0.0
        for expert, matrix in enumerate(base.matrices):
            stored, *sizes = merge_stored(matrix, lambda weight, e=expert: self.merged_expert(e, weight), dequantize)
            matrices.append(stored)
            change, error = change + sizes[0], error + sizes[1]
        return Fused(with_weight(self.linear, WeightStack(matrices)).freeze(), share_kept(change, error))


class LoRASwitchLinear(SwitchAdapter):
    """y = base(x) + scale * lora_b[e] lora_a[e] dropout(x) for rows x of expert e, over a float or quantised `SwitchLinear`."""

    kind = "lora"

    def __call__(self, x: Any, offsets: np.ndarray) -> Any:
        projection = Projection(self.linear.weight, self.linear.bias, *self.factors(), self.scale, *self._dropout())
        return expert_ops.expert_project(x, offsets, projection)

    def delta(self) -> np.ndarray:
        a, b = map(data, self.factors())
        return np.matmul(self.scale * b, a)

    def merged_expert(self, expert: int, weight: np.ndarray) -> np.ndarray:
        a, b = map(data, self.factors())
        return weight + (self.scale * b[expert]) @ a[expert]
