"""Granite 4's layers with the scan of Mamba-2 in place of attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyloss import ops
from pyloss.autograd.tape import data
from pyloss.models.config.mamba import Mamba2
from pyloss.models.layers import (
    BlockSparseLayer,
    Cache,
    Packing,
    SharedExpertLayer,
    SharedMLPLayer,
    columns,
)
from pyloss.models.mixers import Mixer, Taps
from pyloss.models.moe import renamed
from pyloss.nn import Linear, RMSNorm


class GroupedNorm(RMSNorm):
    """An RMS norm of each of `groups` parts of the columns, under one weight."""

    recordable = True

    def __init__(self, dims: int, groups: int, eps: float):
        super().__init__(dims, eps)
        self._unit = np.ones(dims // groups, np.float32)

    def __call__(self, x: Any) -> Any:
        rows, dims = x.shape
        size = len(self._unit)
        parts = ops.rms_norm(x.reshape(rows * (dims // size), size), self._unit, self.eps)
        return ops.scale_heads(parts.reshape(rows, dims), self.weight)


class MambaMixer(Mixer):
    """The scan of Mamba-2 between projections: x [N, hidden] -> [N, hidden].

    in_proj has the gate, the columns of the convolution and the time steps; the convolution's are
    values, keys and queries of the scan. A cache keeps the last rows before the convolution, and
    the state of each sequence.
    """

    recordable = True

    def __init__(
        self,
        sizes: Mamba2,
        rotated: bool,
        in_proj: Linear,
        conv1d: Taps,
        dt_bias: np.ndarray,
        A_log: np.ndarray,
        D: np.ndarray,
        norm: RMSNorm,
        out_proj: Linear,
    ):
        super().__init__()
        self.in_proj, self.conv1d, self.norm, self.out_proj = in_proj, conv1d, norm, out_proj
        self.dt_bias, self.A_log, self.D = dt_bias, A_log, D
        self._rotated = rotated
        self._shape = sizes.heads, sizes.state, sizes.head_dim
        self._limits = sizes.limits
        shared = sizes.groups * sizes.state
        self._parts = columns(sizes.inner, sizes.columns, sizes.heads)
        self._x, self._b, self._c = columns(sizes.inner, shared, shared)

    @property
    def rotated(self) -> bool:  # type: ignore[override]
        """Whether the model's attention has rotary positions; the scan itself has none."""
        return self._rotated

    @property
    def state_size(self) -> int:  # type: ignore[override]
        """See `Mixer`."""
        return math.prod(self._shape)

    def __call__(
        self,
        x: Any,
        packing: Packing,
        cache: Cache | None = None,
        layer: int = 0,
        last_row: Packing | None = None,
    ) -> Any:
        z, mixed, dt = ops.split_columns(self.in_proj(x), *self._parts)
        offsets, state = packing.offsets, self._shape[1]
        mixed = self.convolved(mixed, offsets, cache, layer)
        values, b, c = ops.split_columns(mixed, self._x, self._b, self._c)
        steps, g = ops.scan_gates(dt, self.A_log, self.dt_bias, self._limits)
        if cache is None:
            out = ops.state_scan(values, steps, g, b, c, offsets, state_dim=state)
        else:
            values, steps, g, b, c = map(data, (values, steps, g, b, c))
            states, here, there = cache.states(layer, values, self._shape)
            out = ops.state_scan_step(values, steps, g, b, c, offsets, state, states, here, there)
        out = ops.add(out, ops.scale_heads(values, self.D))
        normed = self.norm(ops.swiglu(z, out, in_place=True))
        return self.out_proj(normed if last_row is None else normed[-1:])


class MambaMLPLayer(SharedMLPLayer):
    """A `SharedMLPLayer` with a `MambaMixer` in place of attention."""

    recordable = True
    self_attn = renamed("mamba")


class MambaExpertsLayer(BlockSparseLayer):
    """A `BlockSparseLayer` with a `MambaMixer` in place of attention."""

    recordable = True
    self_attn = renamed("mamba")


class MambaSharedExpertLayer(SharedExpertLayer):
    """A `SharedExpertLayer` with a `MambaMixer` in place of attention."""

    recordable = True
    self_attn = renamed("mamba")
