"""Layers of small models: norms, dropout, convolution, rotary positions, attention, sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss import ops, random
from pyloss.autograd.tape import data
from pyloss.autograd.tensor import unchanged
from pyloss.checks.numbers import real, whole
from pyloss.nn import init
from pyloss.nn.layers import Linear
from pyloss.nn.module import Module
from pyloss.ops.dot_product_attention import attention
from pyloss.runtime.device import on_device_of


class Sequential(Module):
    """Modules, or other functions of one array, one after the other."""

    def __init__(self, *layers: Callable[[Any], Any]):
        super().__init__()
        self.layers = list(layers)

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Dropout(Module):
    """While training, zeroes each element with probability p and divides the others by 1 - p."""

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = real(p, "p", 0, below=1)

    def __call__(self, x: Any) -> Any:
        if not self.training or not self.p:
            return unchanged(x)
        return ops.dropout(x, self.p, random.next_seed())

    def __repr__(self) -> str:
        return f"Dropout(p={self.p})"


class LayerNorm(Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias along the last axis (arXiv:1607.06450).

    `affine=False` has no weight and no bias.
    """

    def __init__(self, dims: int, eps: float = 1e-5, affine: bool = True, bias: bool = True):
        super().__init__()
        dims = whole(dims, "dims", 1)
        self.eps = real(eps, "eps", 0)
        self.weight = np.ones(dims, np.float32) if affine else None
        self.bias = np.zeros(dims, np.float32) if affine and bias else None
        self._dims = dims

    def __call__(self, x: Any) -> Any:
        if np.shape(x)[-1:] != (self._dims,):
            raise ValueError(f"x has shape {np.shape(x)}; its last axis must have {self._dims}")
        centered = x - np.mean(x, -1, keepdims=True)
        deviation = np.sqrt(np.mean(np.square(centered), -1, keepdims=True) + self.eps)
        y = centered / deviation
        if self.weight is not None:
            y = y * self.weight
        return y if self.bias is None else y + self.bias

    def __repr__(self) -> str:
        return f"LayerNorm({self._dims}, eps={self.eps:g})"


class Conv1d(Module):
    """Convolution along the tokens: x [B, T, in] -> [B, T', out].

    Args:
        groups: inputs and outputs are cut into as many parts; `groups = in = out` is depthwise.
        padding: zeros on both sides, or "causal": (kernel_size - 1) dilation zeros before the first
            token, so that T' = T at stride 1 and no output sees a later token.

    `weight` is [out, kernel_size, in / groups], as in MLX.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        sizes = (in_channels, "in_channels"), (out_channels, "out_channels")
        inputs, outputs = (whole(n, name, 1) for n, name in sizes)
        self.kernel_size, self.stride = (
            whole(kernel_size, "kernel_size", 1),
            whole(stride, "stride", 1),
        )
        self.dilation, self.groups = whole(dilation, "dilation", 1), whole(groups, "groups", 1)
        if inputs % self.groups or outputs % self.groups:
            raise ValueError(
                f"groups is {groups}; it must divide in_channels {inputs} and "
                f"out_channels {outputs}"
            )
        if isinstance(padding, str) and padding != "causal":
            raise ValueError(f"padding must be a number or 'causal', not {padding!r}")
        reach = (self.kernel_size - 1) * self.dilation
        self.padding = (
            (reach, 0) if isinstance(padding, str) else (whole(padding, "padding", 0),) * 2
        )
        fan_in = self.kernel_size * inputs // self.groups
        bound = fan_in**-0.5
        shape = (outputs, self.kernel_size, inputs // self.groups)
        self.weight = init.uniform(shape, -bound, bound)
        self.bias = init.uniform((outputs,), -bound, bound) if bias else None

    def __call__(self, x: Any) -> Any:
        outputs, kernel, part = self.weight.shape
        if np.ndim(x) != 3 or np.shape(x)[2] != part * self.groups:
            raise ValueError(
                f"x has shape {np.shape(x)}; it must be [batch, tokens, {part * self.groups}]"
            )
        if any(self.padding):
            x = np.pad(x, ((0, 0), self.padding, (0, 0)))
        reach = (kernel - 1) * self.dilation
        count = (x.shape[1] - reach - 1) // self.stride + 1
        if x.shape[1] <= reach:
            raise ValueError(
                f"{x.shape[1]} tokens with padding are fewer than the kernel's {reach + 1}"
            )
        taps = [
            x[
                :,
                k * self.dilation : k * self.dilation + (count - 1) * self.stride + 1 : self.stride,
            ]
            for k in range(kernel)
        ]
        if part == 1 and outputs == self.groups:
            y = sum((tap * self.weight[:, k, 0] for k, tap in enumerate(taps)), 0)
        elif self.groups == 1:
            y = np.concatenate(taps, -1) @ np.reshape(self.weight, (outputs, -1)).T
        else:
            batch = x.shape[0]
            stacked = np.reshape(np.stack(taps, 2), (batch, count, kernel, self.groups, part))
            weight = np.reshape(self.weight, (self.groups, -1, kernel, part))
            y = np.reshape(np.einsum("btkgc,gokc->btgo", stacked, weight), (batch, count, outputs))
        return y if self.bias is None else y + self.bias

    def __repr__(self) -> str:
        outputs, kernel, part = self.weight.shape
        return (
            f"Conv1d(in={part * self.groups}, out={outputs}, kernel_size={kernel}, "
            f"groups={self.groups}, bias={self.bias is not None})"
        )


class RoPE(Module):
    """Rotary positions of x [B, T, H, D] or [T, H, D] (Su et al., arXiv:2104.09864).

    Args:
        dims: D, even.
        base: of the angles position / base^(2 i / D).
        traditional: rotates neighbors (0, 1), (2, 3) ...; by default halves, i and i + D / 2.
    """

    def __init__(self, dims: int, base: float = 10000.0, traditional: bool = False):
        super().__init__()
        self.dims, self.traditional = whole(dims, "dims", 2), bool(traditional)
        if self.dims % 2:
            raise ValueError(f"dims is {dims}; it must be even")
        self.base = real(base, "base", above=0)
        self._tables: tuple[np.ndarray, np.ndarray] | None = None

    def _angles(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        if self._tables is None or len(self._tables[0]) < count:
            rates = self.base ** (-np.arange(0, self.dims, 2) / self.dims)
            angles = np.arange(max(count, 64))[:, None] * rates
            tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
            object.__setattr__(self, "_tables", tables)
        assert self._tables is not None
        return self._tables

    def __call__(self, x: Any, offset: int = 0) -> Any:
        """`offset` is the position of the first token."""
        shape = np.shape(x)
        if len(shape) not in (3, 4) or shape[-1] != self.dims:
            raise ValueError(f"x has shape {shape}; it must be [B, T, H, {self.dims}]")
        tokens = shape[-3]
        first = whole(offset, "offset", 0)
        cos, sin = (on_device_of(data(x), table) for table in self._angles(first + tokens))
        positions = np.tile(
            np.arange(first, first + tokens, dtype=np.int32), shape[0] if len(shape) == 4 else 1
        )
        rows = np.reshape(x, (len(positions), shape[-2], self.dims))
        if self.traditional:
            rows = np.concatenate([rows[..., 0::2], rows[..., 1::2]], -1)
        turned = ops.rope(np.reshape(rows, (len(positions), -1)), positions, cos, sin)
        if self.traditional:
            halves = np.split(np.reshape(turned, rows.shape), 2, -1)
            turned = np.stack(halves, -1)
        return np.reshape(turned, shape)

    def __repr__(self) -> str:
        return f"RoPE({self.dims}, base={self.base:g}, traditional={self.traditional})"


class MultiHeadAttention(Module):
    """Attention with projections: queries [B, T, dims], keys and values [B, S, dims].

    Args:
        num_heads: of the queries.
        kv_heads: of keys and values; by default as many.
        head_dim: dims / num_heads by default.
        bias: of the projections.
        causal: a token sees itself and earlier ones.
        rope: a `RoPE` for queries and keys.
        dropout: of the probabilities, while training.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = False,
        rope: RoPE | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        dims, self.num_heads = whole(dims, "dims", 1), whole(num_heads, "num_heads", 1)
        self.kv_heads = whole(self.num_heads if kv_heads is None else kv_heads, "kv_heads", 1)
        if head_dim is None and dims % self.num_heads:
            raise ValueError(f"dims {dims} is no multiple of num_heads {num_heads}: give head_dim")
        self.head_dim = whole(
            dims // self.num_heads if head_dim is None else head_dim, "head_dim", 1
        )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {num_heads} is no multiple of kv_heads {kv_heads}")
        self.causal, self.dropout = bool(causal), real(dropout, "dropout", 0, below=1)
        inner, shared = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        self.query_proj = Linear(dims, inner, bias)
        self.key_proj, self.value_proj = Linear(dims, shared, bias), Linear(dims, shared, bias)
        self.out_proj = Linear(inner, dims, bias)
        self.rope = rope

    def __call__(
        self, queries: Any, keys: Any = None, values: Any = None, mask: Any = None, bias: Any = None
    ) -> Any:
        """[B, T, dims]; `keys` are the queries and `values` the keys if they are not given.

        `mask` and `bias` as in `pyloss.attention`.
        """
        keys = queries if keys is None else keys
        values = keys if values is None else values

        def heads(x: Any, count: int) -> Any:
            return np.reshape(x, (*np.shape(x)[:2], count, self.head_dim))

        q = heads(self.query_proj(queries), self.num_heads)
        k, v = (
            heads(layer(x), self.kv_heads)
            for layer, x in ((self.key_proj, keys), (self.value_proj, values))
        )
        if self.rope is not None:
            if self.causal and np.shape(k)[1] < np.shape(q)[1]:
                raise ValueError(
                    f"causal attention with rope has {np.shape(q)[1]} queries and only "
                    f"{np.shape(k)[1]} keys: the last query has the place of the last key, so "
                    "there must be at least as many keys"
                )
            q, k = self.rope(q, np.shape(k)[1] - np.shape(q)[1] if self.causal else 0), self.rope(k)
        y = attention(
            q,
            k,
            v,
            self.causal,
            mask=mask,
            bias=bias,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out_proj(np.reshape(y, (*np.shape(y)[:2], -1)))
