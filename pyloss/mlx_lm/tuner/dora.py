"""mlx_lm.tuner.dora: pyloss's adapters with MLX's methods, over layers of both."""

from __future__ import annotations

from typing import Any

from pyloss import tuner
from pyloss.mlx_lm.names import absent
from pyloss.mlx_lm.tuner.lora import plain_layer, shown_adapter

__all__ = ["DoRAEmbedding", "DoRALinear"]

__getattr__ = absent(__name__)

DoRALinear = shown_adapter(tuner.DoRALinear)
DoRAEmbedding = shown_adapter(tuner.DoRAEmbedding)


def _set_base(self: Any, layer: Any) -> None:
    """Puts the adapter over another layer; `m` begins with its row norms.

    Over a layer of another shape all factors begin anew. TypeError for a layer of another type.
    """
    layer = plain_layer(layer)
    if tuple(layer.shape) == tuple(self.base.shape):
        tuner.DoRALinear.set_linear(self, layer)
    else:
        self._attach(layer, self.rank, self.dropout, self.scale)


DoRALinear.set_linear = _set_base
DoRAEmbedding.set_embedding = _set_base
