"""LoRA: a frozen base and a trained product of two thin matrices (arXiv:2106.09685)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pyloss import ops
from pyloss.autograd.tape import data
from pyloss.nn import Embedding, Linear, Module, Projecting
from pyloss.tuner.adapters.layout import BIAS
from pyloss.tuner.adapters.low_rank import LowRankAdapter

if TYPE_CHECKING:
    from pyloss.tuner.adapters.layout import StoredLayer


class DenseAdapter(LowRankAdapter):
    """A low-rank adapter over one matrix, against experts' stacks of matrices."""

    @abstractmethod
    def product(self) -> np.ndarray:
        """scale lora_a lora_b in the layout of the base's weight, float32."""

    @abstractmethod
    def projection(self) -> ops.Projection:
        """The arguments of the product, also for a loss fused with a head."""

    def _delta(self) -> np.ndarray:
        return self.product()

    def merged(self, weight: np.ndarray) -> np.ndarray:
        return weight + self.product()

    def _magnitude(self) -> tuple[Any, ...]:
        """`Projection`'s last arguments: m, norm and optionally known."""
        return None, None


class LinearAdapter(Projecting, DenseAdapter):
    """Over a float or quantized `Linear`: lora_a [in, r], lora_b [r, out].

    With `train_bias` the base's bias is trained, too, as a copy.
    """

    base_name, base_type = "linear", Linear
    linear: Linear
    _below: Linear | None = None

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        r: int = 8,
        dropout: float = 0.0,
        scale: float = 20.0,
        bias: bool = False,
    ):
        Module.__init__(self)
        self._attach(Linear(input_dims, output_dims, bias), r, dropout, scale)

    @classmethod
    def shapes(cls, layer: Linear, r: int) -> dict[str, tuple[int, ...]]:
        output_dims, input_dims = layer.shape
        return {"lora_a": (input_dims, r), "lora_b": (r, output_dims)}

    @classmethod
    def from_stored(cls, layer: Module, stored: StoredLayer) -> Any:
        arrays = {name: array for name, array in stored.arrays.items() if name != BIAS}
        adapter = super().from_stored(layer, replace(stored, arrays=arrays))
        if (bias := stored.arrays.get(BIAS)) is not None:
            own = adapter.linear.bias
            if own is None or own.shape != bias.shape:
                has = "no bias" if own is None else f"a bias of shape {own.shape}"
                raise ValueError(f"{BIAS} {bias.shape}, and the layer has {has}")
            adapter.train_bias()
            trained: Any = adapter.linear.bias
            trained[...] = bias
        return adapter

    def train_bias(self) -> None:
        """Trains a copy of the base's bias. Raises ValueError for a base without one."""
        below = self.linear
        if below.bias is None:
            raise ValueError("the layer has no bias")
        self._below = below
        self.linear = Linear.from_weight(below.weight, below.bias.copy())
        self.linear.freeze().unfreeze(keys=("bias",)).train(self.training)

    def original(self) -> Linear:
        return self.linear if self._below is None else self._below

    def parameter_names(self) -> tuple[str, ...]:
        own = super().parameter_names()
        return own if self._below is None else (*own, BIAS)

    def projection(self) -> ops.Projection:
        p, seed = self._dropout()
        a, b = self.factors()
        return ops.Projection(
            self.linear.weight, self.linear.bias, a, b, self.scale, p, seed, *self._magnitude()
        )

    def product(self) -> np.ndarray:
        a, b = map(data, self.factors())
        return (self.scale * b.T) @ a.T


class EmbeddingAdapter(DenseAdapter):
    """Over a float or quantized `Embedding` of V rows: lora_a [V, r], lora_b [r, D].

    As in mlx-lm, dropout acts on the adapter's result in `layer(ids)`, on its input in
    `as_linear(x)`.
    """

    base_name, base_type = "embedding", Embedding
    embedding: Embedding

    def __init__(
        self, num_embeddings: int, dims: int, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ):
        Module.__init__(self)
        self._attach(Embedding(num_embeddings, dims), r, dropout, scale)

    @classmethod
    def shapes(cls, layer: Embedding, r: int) -> dict[str, tuple[int, ...]]:
        rows, dims = layer.shape
        return {"lora_a": (rows, r), "lora_b": (r, dims)}

    def projection(self) -> ops.Projection:
        """The arguments of `as_linear`'s product."""
        p, seed = self._dropout()
        a, b = map(ops.transposed, self.factors())
        return ops.Projection(
            self.embedding.weight, None, b, a, self.scale, p, seed, *self._magnitude()
        )

    def as_linear(self, x: Any) -> Any:
        """The logits [..., V] of x [..., D] by the adapted table, as a tied head."""
        return ops.project(x, self.projection())

    def __call__(self, ids: Any) -> Any:
        p, seed = self._dropout()
        a, b = self.factors()
        return ops.adapted_embedding(ids, self.embedding.weight, a, b, self.scale, p, seed, self.m)

    def product(self) -> np.ndarray:
        a, b = map(data, self.factors())
        return (self.scale * a) @ b


class LoRALinear(LinearAdapter):
    """y = base(x) + scale * dropout(x) lora_a lora_b."""

    kind = "lora"
    recordable = True


class LoRAEmbedding(EmbeddingAdapter):
    """y = base(ids) + scale * dropout(lora_a[ids] lora_b)."""

    kind = "lora"


def __getattr__(name: str) -> Any:
    """`LoRASwitchLinear` under mlx-lm's path; `adapters.switch` imports this module."""
    if name == "LoRASwitchLinear":
        from pyloss.tuner.adapters.switch import LoRASwitchLinear

        return LoRASwitchLinear
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
