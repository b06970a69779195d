"""mlx_lm.tuner.lora: pyloss's adapters with MLX's methods, over layers of both."""

from __future__ import annotations

from typing import Any

from pyloss import nn, tuner
from pyloss.mlx.nn import Embedding, Linear, with_mlx_methods
from pyloss.mlx.nn.methods import class_with_methods
from pyloss.mlx_lm.names import absent
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

__all__ = ["LoRAEmbedding", "LoRALinear", "LoRASwitchLinear"]

__getattr__ = absent(__name__)


def plain_layer(layer: Any) -> Any:
    """A layer of `pyloss.mlx.nn` as pyloss's, over the same arrays; others as they are."""
    if hasattr(layer, "stored_weight"):
        weight = layer.stored_weight()
    elif isinstance(layer, Linear | Embedding):
        weight = vars(layer)["weight"]
    else:
        return layer
    if hasattr(layer, "as_linear"):
        return nn.Embedding.from_weight(weight)
    return nn.Linear.from_weight(weight, vars(layer).get("bias"))


def with_arrays(layer: Any) -> Any:
    """A layer whose stored float weight becomes a float32 array."""
    weight = vars(layer).get("weight")
    if isinstance(weight, Weight | WeightStack) and weight.is_float:
        layer.weight = weight.dequantize()
    return layer


def shown_adapter(own: Any) -> Any:
    """The class of pyloss's adapters `own` in a model that has MLX's methods."""
    made = own.from_base.__func__

    def from_base(
        kind: Any, layer: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> Any:
        """The adapter over a layer, which is frozen; its arrays are shared.

        Raises TypeError for a layer of another type, ValueError for numbers out of range.
        """
        return with_mlx_methods(made(kind, plain_layer(layer), r, dropout, scale))

    def fuse(self: Any, dequantize: bool = False) -> Any:
        """The layer with the adapter in its weight; floats are arrays."""
        return with_mlx_methods(with_arrays(own.fuse(self, dequantize)))

    cls: Any = class_with_methods(own)
    cls.from_base, cls.fuse = classmethod(from_base), fuse
    return cls


LoRALinear = shown_adapter(tuner.LoRALinear)
LoRAEmbedding = shown_adapter(tuner.LoRAEmbedding)
LoRASwitchLinear = shown_adapter(tuner.LoRASwitchLinear)
