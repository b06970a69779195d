"""The network of recursive models: blocks of attention, or of an MLP over tokens, and an MLP."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import ops
from pyloss.nn import Linear, Module, RMSNorm, init, run_recorded
from pyloss.nn.layers import project_each
from pyloss.recursive.config import RecursiveConfig


class Places:
    """Where the rows of a batch of B sequences of L tokens are.

    Attributes:
        offsets: int32 [B + 1], the first row of each sequence.
        positions: int32 [B L], each row's place in its sequence.
        cos, sin: the rotary tables [L, head_dim / 2].
    """

    def __init__(self, batch: int, config: RecursiveConfig):
        length = config.tokens
        self.shape = batch, length
        self.offsets = np.arange(batch + 1, dtype=np.int32) * np.int32(length)
        self.positions = np.tile(np.arange(length, dtype=np.int32), batch)
        rates = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        angles = np.arange(length)[:, None] * rates
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def linear(inputs: int, outputs: int) -> Linear:
    """A layer without bias, with the authors' first weights: cut normal, deviation in^-0.5."""
    return Linear.from_weight(init.trunc_normal((outputs, inputs), inputs**-0.5))


class SelfAttention(Module):
    """Attention of all tokens of a sequence to all, with rotary positions or none."""

    recordable = True

    def __init__(self, config: RecursiveConfig):
        super().__init__()
        size = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (linear(size, size) for _ in range(3))
        self.o_proj = linear(size, size)
        self._head_dim, self._rotated = config.head_dim, config.pos_encodings == "rope"

    def __call__(self, x: Any, places: Places) -> Any:
        q, k, v = project_each(x, self.q_proj, self.k_proj, self.v_proj)
        if self._rotated:
            q, k = ops.rope_all(
                [q, k],
                places.positions,
                places.cos,
                places.sin,
                in_place=True,
                head_dim=self._head_dim,
            )
        everywhere = np.iinfo(np.int32).max
        mixed = ops.attention(
            q, k, v, places.offsets, self._head_dim, self._head_dim**-0.5, ahead=everywhere
        )
        return self.o_proj(mixed)


class GatedMLP(Module):
    """down(silu(gate(x)) * up(x))"""

    recordable = True

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = linear(size, inner), linear(size, inner)
        self.down_proj = linear(inner, size)

    def __call__(self, x: Any) -> Any:
        gate, up = project_each(x, self.gate_proj, self.up_proj)
        return self.down_proj(ops.swiglu(gate, up, in_place=True))


class AttentionBlock(Module):
    """norm(x + attention(x)), then norm(x + mlp(x)); norms have no weights."""

    recordable = True

    def __init__(self, config: RecursiveConfig):
        super().__init__()
        size = config.hidden_size
        self.self_attn = SelfAttention(config)
        self.mlp = GatedMLP(size, config.inner_size(size))
        self._norm = RMSNorm(size, config.rms_norm_eps, affine=False)

    def __call__(self, x: Any, places: Places) -> Any:
        x = self._norm(ops.add(x, self.self_attn(x, places)))
        return self._norm(ops.add(x, self.mlp(x)))


class TokenMLPBlock(Module):
    """As `AttentionBlock`, with an MLP over the tokens of a sequence in place of attention.

    Its norm is over the tokens, too.
    """

    def __init__(self, config: RecursiveConfig):
        super().__init__()
        length, size = config.tokens, config.hidden_size
        self.mlp_t = GatedMLP(length, config.inner_size(length))
        self.mlp = GatedMLP(size, config.inner_size(size))
        self._norm_t = RMSNorm(length, config.rms_norm_eps, affine=False)
        self._norm = RMSNorm(size, config.rms_norm_eps, affine=False)

    def __call__(self, x: Any, places: Places) -> Any:
        rows, size = x.shape
        turned = np.swapaxes(np.reshape(x, (*places.shape, size)), 1, 2)
        turned = np.reshape(turned, (-1, places.shape[1]))
        turned = self._norm_t(ops.add(turned, self.mlp_t(turned)))
        x = np.swapaxes(np.reshape(turned, (places.shape[0], size, -1)), 1, 2)
        x = np.reshape(x, (rows, size))
        return self._norm(ops.add(x, self.mlp(x)))


class Level(Module):
    """Blocks one after the other, over a state to which another was added."""

    recordable = True

    def __init__(self, config: RecursiveConfig, layers: int, mlp_t: bool = False):
        super().__init__()
        block = TokenMLPBlock if mlp_t else AttentionBlock
        self.layers = [block(config) for _ in range(layers)]

    def __call__(self, z: Any, injection: Any, places: Places) -> Any:
        """The new state [B L, D] of z + injection."""
        arrays = places.offsets, places.positions, places.cos, places.sin
        x = ops.add(z, injection)
        return run_recorded(self, lambda value: self._through(value, places), x, arrays)

    def _through(self, x: Any, places: Places) -> Any:
        for layer in self.layers:
            x = layer(x, places)
        return x
