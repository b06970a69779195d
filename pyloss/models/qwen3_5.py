"""Layers of Qwen3.5 and Qwen3-Next: the gated delta rule, and attention with a gate."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import ops
from pyloss.autograd.tape import data
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.layers import Attention, Cache, DecoderLayer, Packing, columns
from pyloss.models.mixers import Mixer, Taps
from pyloss.models.moe import renamed
from pyloss.nn import Linear, Module, RMSNorm, project_each


class GatedDeltaNet(Mixer):
    """The gated delta rule between projections: x [N, hidden] -> [N, hidden].

    Queries, keys and values go through a convolution first; the results' norm is multiplied by
    silu(z). A cache keeps the last rows before the convolution, and the state of each sequence.
    """

    recordable = True

    def __init__(
        self,
        config: ModelConfig,
        in_proj_qkv: Linear,
        in_proj_z: Linear,
        in_proj_b: Linear,
        in_proj_a: Linear,
        conv1d: Taps,
        dt_bias: np.ndarray,
        A_log: np.ndarray,
        norm: RMSNorm,
        out_proj: Linear,
    ):
        super().__init__()
        self.in_proj_qkv, self.in_proj_z = in_proj_qkv, in_proj_z
        self.in_proj_b, self.in_proj_a = in_proj_b, in_proj_a
        self._settle(config, conv1d, dt_bias, A_log, norm, out_proj)

    def _settle(
        self,
        config: ModelConfig,
        conv1d: Taps,
        dt_bias: np.ndarray,
        A_log: np.ndarray,
        norm: RMSNorm,
        out_proj: Linear,
    ) -> None:
        """Sets what does not depend on the projections."""
        self.conv1d, self.norm, self.out_proj = conv1d, norm, out_proj
        self.dt_bias, self.A_log = dt_bias, A_log
        delta = config.delta
        assert delta is not None
        self._key_dim, self._value_dim = delta.key_dim, delta.value_dim
        keys = delta.keys * delta.key_dim
        widths = keys, keys, delta.values * delta.value_dim
        self._q, self._k, self._v = columns(*widths)

    @property
    def state_size(self) -> int:  # type: ignore[override]
        """See `Mixer`."""
        return len(self.A_log) * self._key_dim * self._value_dim

    def projected(self, x: Any) -> Any:
        """Queries, keys and values side by side, the gate z, and what b and a are made of."""
        projections = self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a
        return project_each(x, *projections)

    def __call__(
        self,
        x: Any,
        packing: Packing,
        cache: Cache | None = None,
        layer: int = 0,
        last_row: Packing | None = None,
    ) -> Any:
        qkv, z, b, a = self.projected(x)
        offsets = packing.offsets
        mixed = self.convolved(qkv, offsets, cache, layer)
        parts = ops.split_columns(mixed, self._q, self._k, self._v)
        gates = ops.delta_gates(a, b, self.A_log, self.dt_bias)
        scale = self._key_dim**-0.5
        if cache is None:
            out = ops.delta_rule(*parts, *gates, offsets, key_dim=self._key_dim, scale=scale)
        else:
            shape = len(self.A_log), self._key_dim, self._value_dim
            q, k, v, g, beta = map(data, (*parts, *gates))
            states, here, there = cache.states(layer, v, shape)
            out = ops.delta_rule_step(
                q, k, v, g, beta, offsets, self._key_dim, scale, states, here, there
            )
        by_head = out.reshape(out.shape[0] * len(self.A_log), self._value_dim)
        normed = self.norm(by_head).reshape(*out.shape)
        gated = ops.swiglu(z, normed, in_place=True)
        return self.out_proj(gated if last_row is None else gated[-1:])


class FusedDeltaNet(GatedDeltaNet):
    """`GatedDeltaNet` with two projections, as in Qwen3-Next.

    They have the columns of one head of keys after those of another.
    """

    recordable = True

    def __init__(self, config: ModelConfig, in_proj_qkvz: Linear, in_proj_ba: Linear, *rest: Any):
        Module.__init__(self)
        self.in_proj_qkvz, self.in_proj_ba = in_proj_qkvz, in_proj_ba
        self._settle(config, *rest)
        delta = config.delta
        assert delta is not None
        self._qkv, self._z = (rows.astype(np.int32) for rows in delta.fused_rows())
        by_head = np.arange(2 * delta.values, dtype=np.int32).reshape(delta.keys, 2, -1)
        self._b, self._a = by_head.swapaxes(0, 1).reshape(2, -1)

    def projected(self, x: Any) -> Any:
        """See `GatedDeltaNet`."""
        qkvz, ba = project_each(x, self.in_proj_qkvz, self.in_proj_ba)
        parts = ops.split_columns(qkvz, self._qkv, self._z)
        return *parts, *ops.split_columns(ba, self._b, self._a)


class GatedAttention(Attention):
    """`Attention` whose results are multiplied by the sigmoid of a gate, head by head.

    q_proj has queries and gates: of each head the query first.
    """

    recordable = True

    def _settle(self, config: ModelConfig, *rest: Any) -> None:
        super()._settle(config, *rest)
        self._query, self._gate = columns(config.head_dim, config.head_dim)

    def projected(self, x: Any, last_query: bool) -> Any:
        """See `Attention`."""
        if last_query:
            both, (k, v) = self.q_proj(x[-1:]), project_each(x, self.k_proj, self.v_proj)
        else:
            both, k, v = project_each(x, self.q_proj, self.k_proj, self.v_proj)
        rows, half = both.shape[0], both.shape[1] // 2
        by_head = both.reshape(rows * (half // self._head_dim), 2 * self._head_dim)
        parts = ops.split_columns(by_head, self._query, self._gate)
        q, gate = (part.reshape(rows, half) for part in parts)
        return q, k, v, gate


class DeltaLayer(DecoderLayer):
    """A `DecoderLayer` with a `GatedDeltaNet` in place of attention."""

    recordable = True
    self_attn = renamed("linear_attn")
