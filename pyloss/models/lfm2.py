"""LFM2's layers: gated short convolutions and attention, under its own names of modules.

The classes are those of `layers`, whose names are properties over the family's.
"""

from __future__ import annotations

from typing import Any

from pyloss import ops
from pyloss.autograd.tape import data
from pyloss.models.layers import MLP, Attention, Cache, DecoderLayer, Packing
from pyloss.models.mixers import Mixer, Taps
from pyloss.models.moe import renamed
from pyloss.models.transformer import Decoder
from pyloss.nn import Linear

#: LFM2's names of modules, by those of other families.
NAMES = {
    "o_proj": "out_proj",
    "q_norm": "q_layernorm",
    "k_norm": "k_layernorm",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "norm": "embedding_norm",
}


class ShortConv(Mixer):
    """out(c * conv(b * v)), where b, c and v are the parts of in(x): x [N, hidden] -> [N, hidden].

    A cache keeps the products b * v as it keeps the keys of attention with a window of K tokens.
    """

    recordable = True
    taps_name = "conv"

    def __init__(self, in_proj: Linear, conv: Taps, out_proj: Linear):
        super().__init__()
        self.in_proj, self.conv, self.out_proj = in_proj, conv, out_proj

    def __call__(
        self,
        x: Any,
        packing: Packing,
        cache: Cache | None = None,
        layer: int = 0,
        last_row: Packing | None = None,
    ) -> Any:
        parts, conv = self.in_proj(x), self.conv
        if cache is None:
            mixed = ops.short_conv(parts, conv.weight, conv.bias, packing.offsets)
        else:
            parts = data(parts)
            held = cache.rows(layer, parts, conv.weight.shape[0])
            mixed = ops.short_conv_step(parts, conv.weight, conv.bias, packing.offsets, *held)
        return self.out_proj(mixed if last_row is None else mixed[-1:])


class Lfm2Attention(Attention):
    """`Attention` under LFM2's names."""

    recordable = True
    o_proj, q_norm, k_norm = (renamed(NAMES[name]) for name in ("o_proj", "q_norm", "k_norm"))


class Lfm2MLP(MLP):
    """`MLP` under LFM2's names."""

    recordable = True
    gate_proj, up_proj = renamed(NAMES["gate_proj"]), renamed(NAMES["up_proj"])
    down_proj = renamed(NAMES["down_proj"])


class Lfm2Layer(DecoderLayer):
    """A `DecoderLayer` with attention, under LFM2's names."""

    recordable = True
    mlp = renamed("feed_forward")
    input_layernorm = renamed("operator_norm")
    post_attention_layernorm = renamed("ffn_norm")


class Lfm2ConvLayer(Lfm2Layer):
    """An `Lfm2Layer` with a convolution in place of attention."""

    recordable = True
    self_attn = renamed("conv")


class Lfm2Decoder(Decoder):
    """`Decoder` under LFM2's names."""

    norm = renamed(NAMES["norm"])
