"""What mixes tokens in place of attention: `Mixer`, a base for blocks with a causal convolution."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import ops
from pyloss.autograd.tape import data
from pyloss.models.layers import Cache
from pyloss.nn import Module


class Taps(Module):
    """The parameters of a causal convolution of each column: weight [D, 1, K], and a bias [D]."""

    recordable = True

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None):
        super().__init__()
        self.weight, self.bias = weight, bias


class Mixer(Module):
    """A block with the attributes that layers and caches know of `Attention`.

    A subclass has the `Taps` under the family's own name, and `taps_name` says which. If it has a
    state, a cache keeps `state_size` numbers of each sequence, twice.
    """

    recordable = True
    rotated = True  # it has no positions that could be left out
    taps_name = "conv1d"
    state_size = 0

    @property
    def taps(self) -> int:
        """How many rows each row of the convolution depends on, its own included."""
        return int(getattr(self, self.taps_name).weight.shape[2])

    @property
    def window(self) -> int:
        """See `Attention`."""
        return self.taps

    @property
    def cached(self) -> tuple[int, int]:
        """See `Attention`: rows before the convolution, and two states."""
        return int(getattr(self, self.taps_name).weight.shape[0]), 2 * self.state_size

    def convolved(self, x: Any, offsets: np.ndarray, cache: Cache | None, layer: int) -> Any:
        """silu(conv(x)) of x [N, D], whose last rows the cache keeps."""
        conv = getattr(self, self.taps_name)
        if cache is None:
            return ops.conv_silu(x, conv.weight, conv.bias, offsets)
        x = data(x)
        held = cache.rows(layer, x, conv.weight.shape[0])
        return ops.conv_silu_step(x, conv.weight, conv.bias, offsets, *held)
