"""LoRA layers: a frozen base and a trained product of two thin matrices (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import ops
from ..autograd import data
from ..nn import Linear, Module
from .adapter import Adapter


class LoRALinear(Adapter):
    """y = base(x) + scale * dropout(x) lora_a lora_b, over a float or quantised `Linear`: lora_a [in, r], lora_b [r, out]."""

    kind, base_name, base_type = "lora", "linear", Linear
    linear: Linear

    def __init__(
        self, input_dims: int, output_dims: int, r: int = 8, dropout: float = 0.0, scale: float = 20.0, bias: bool = False
    ):
        Module.__init__(self)
        self._attach(Linear(input_dims, output_dims, bias), r, dropout, scale)

    @classmethod
    def shapes(cls, layer: Linear, r: int) -> dict[str, tuple[int, ...]]:
        output_dims, input_dims = layer.shape
        return {"lora_a": (input_dims, r), "lora_b": (r, output_dims)}

    def __call__(self, x: Any) -> Any:
        p, seed = self._dropout()
        a, b = self.factors()
        return ops.lora_linear(x, self.linear.weight, self.linear.bias, a, b, self.scale, p, seed)

    def delta(self) -> np.ndarray:
        a, b = map(data, self.factors())
        return (self.scale * b.T) @ a.T

    def merged(self, weight: np.ndarray) -> np.ndarray:
        return weight + self.delta()
