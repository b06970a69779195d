"""LoRA layers: a frozen base and a trained product of two thin matrices (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from .. import ops, random
from ..nn import Linear, Module, uniform
from ..weights import Weight


class LoRALinear(Module):
    """y = base(x) + scale * dropout(x) lora_a lora_b, over a float or quantised `Linear`.

    `lora_a` [in, r] begins uniform in +-1/sqrt(in), `lora_b` [r, out] begins zero, so that the layer begins as its base. `scale`
    multiplies the product as it is (PEFT's lora_alpha / r).
    """

    def __init__(
        self, input_dims: int, output_dims: int, r: int = 8, dropout: float = 0.0, scale: float = 20.0, bias: bool = False
    ):
        super().__init__()
        self._attach(Linear(input_dims, output_dims, bias), r, dropout, scale)

    @classmethod
    def from_base(cls, linear: Linear, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> LoRALinear:
        """The adapter over an existing layer, which is shared, not copied, and frozen.

        Raises TypeError for a layer that is not a `Linear`, ValueError for a rank below 1 or above both dimensions or a dropout
        outside [0, 1).
        """
        if not isinstance(linear, Linear):
            raise TypeError(f"LoRALinear goes over a Linear, not {type(linear).__name__}")
        layer = cls.__new__(cls)
        Module.__init__(layer)
        layer._attach(linear, r, dropout, scale)
        return layer

    def _attach(self, linear: Linear, r: int, dropout: float, scale: float) -> None:
        output_dims, input_dims = linear.shape
        if isinstance(r, bool) or not isinstance(r, int | np.integer) or not 1 <= r <= max(input_dims, output_dims):
            raise ValueError(f"rank must be an integer from 1 to {max(input_dims, output_dims)}, the larger dimension, not {r!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {dropout!r}")
        self.linear = linear
        self.linear.freeze()
        self.dropout = float(dropout)
        self.scale = float(scale)
        self.lora_a = uniform((input_dims, int(r)), 1 / math.sqrt(input_dims))
        self.lora_b = np.zeros((int(r), output_dims), np.float32)

    def __call__(self, x: Any) -> Any:
        p = self.dropout if self.training else 0.0
        seed = random.next_seed() if p else 0
        return ops.lora_linear(x, self.linear.weight, self.linear.bias, self.lora_a, self.lora_b, self.scale, p, seed)

    def delta(self) -> np.ndarray:
        """What the adapter adds to the base's weight: float32 [out, in]."""
        return (self.scale * self.lora_b.T) @ self.lora_a.T

    def fuse(self, dequantize: bool = False) -> Linear:
        """The base with the adapter merged into its weight, as a plain layer, frozen as its base was.

        A float base keeps its type; over a quantised base the sum is quantised again to the base's format, or left in float32
        with `dequantize=True`. Warns when rounding loses most of the adapter.
        """
        base = self.linear.weight
        delta = self.delta()
        if not isinstance(base, Weight):
            return self._plain(base + delta)
        fused = base.dequantize()
        fused += delta
        if base.format == "f32" or (dequantize and isinstance(base, Weight) and base.format not in ("bf16", "f16")):
            return self._plain(Weight.quantize(fused, "f32"))
        stored = Weight.quantize(fused, base.format, base.head_dim)
        kept = _kept(base, stored, delta)
        if kept < 0.5:
            warnings.warn(
                f"storing the fused weight as {base.format} keeps {max(kept, 0):.0%} of the adapter; "
                "fuse(dequantize=True) keeps all of it",
                stacklevel=2,
            )
        return self._plain(stored)

    def _plain(self, weight: np.ndarray | Weight) -> Linear:
        layer = Linear.from_weight(weight, self.linear.bias)
        layer.freeze()
        return layer

    def __repr__(self) -> str:
        return f"LoRALinear(r={self.lora_a.shape[1]}, scale={self.scale}, dropout={self.dropout}, base={self.linear!r})"


def _kept(base: Weight, stored: Weight, delta: np.ndarray) -> float:
    """The share of `delta` that storing left: 1 - |error|^2 / |delta|^2."""
    size = float(np.sum(delta.astype(np.float64) ** 2))
    if size == 0:
        return 1.0
    error = stored.dequantize() - base.dequantize() - delta
    return 1 - float(np.sum(error.astype(np.float64) ** 2)) / size
