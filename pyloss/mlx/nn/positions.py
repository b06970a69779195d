"""MLX's positions and attention, and the convolution along tokens."""

from __future__ import annotations

import math
from typing import Any

from pyloss.mlx.core import fast, random
from pyloss.mlx.core.arrays import array
from pyloss.mlx.core.convolution import conv1d
from pyloss.mlx.core.creation import arange, zeros
from pyloss.mlx.core.dtypes import finfo, float32
from pyloss.mlx.core.elementwise import abs, cos, exp, sin
from pyloss.mlx.core.shaping import concatenate, expand_dims, unflatten
from pyloss.mlx.nn.layers import Linear
from pyloss.mlx.nn.module import Module


class RoPE(Module):
    """Rotary positions of x [B, ..., T, D], see `mx.fast.rope`."""

    def __init__(
        self, dims: int, traditional: bool = False, base: float = 10000, scale: float = 1.0
    ):
        super().__init__()
        self.dims, self.traditional, self.base, self.scale = dims, traditional, base, scale

    def __call__(self, x: Any, offset: Any = 0) -> array:
        return fast.rope(
            x,
            self.dims,
            traditional=self.traditional,
            base=self.base,
            scale=self.scale,
            offset=offset,
        )

    def _extra_repr(self) -> str:
        return f"{self.dims}, traditional={self.traditional}"


class SinusoidalPositionalEncoding(Module):
    """Sines and cosines of numbers times frequencies between two bounds."""

    def __init__(
        self,
        dims: int,
        min_freq: float = 0.0001,
        max_freq: float = 1,
        scale: float | None = None,
        cos_first: bool = False,
        full_turns: bool = False,
    ):
        super().__init__()
        if dims <= 0 or dims % 2:
            raise ValueError(
                f"[SinusoidalPositionalEncoding] dims must be positive and even but got {dims}."
            )
        share = array([1.0]) if dims == 2 else 1 - arange(0, dims // 2) / (dims // 2 - 1)
        low, high = math.log(min_freq), math.log(max_freq)
        self._sigmas = exp(share * (high - low) + low) * (2 * math.pi if full_turns else 1)
        self.scale = scale if scale is not None else (2 / dims) ** 0.5
        self.cos_first = cos_first

    def __call__(self, x: Any) -> array:
        y = x[..., None] * self._sigmas
        parts = [cos(y), sin(y)] if self.cos_first else [sin(y), cos(y)]
        return concatenate(parts, axis=-1) * self.scale


class ALiBi(Module):
    """Attention scores less the distance of the tokens, by a slope of each head."""

    @staticmethod
    def create_alibi_matrix(
        q_sequence_length: int,
        k_sequence_length: int,
        num_heads: int,
        offset: int = 0,
        dtype: Any = float32,
    ) -> array:
        """What is added to the scores."""
        distance = arange(offset, q_sequence_length)[:, None] - arange(0, k_sequence_length)[None]
        slopes = ALiBi.create_alibi_slope(num_heads, dtype)
        return (-abs(expand_dims(distance, (0, 1))) * slopes).astype(dtype)

    @staticmethod
    def create_alibi_slope(num_heads: int, dtype: Any = float32) -> array:
        """The slopes of the heads."""

        def slopes(n: int) -> list[float]:
            if math.log2(n).is_integer():
                start = 2 ** -(2 ** -(math.log2(n) - 3))
                return [start ** (i + 1) for i in range(n)]
            most = 2 ** math.floor(math.log2(n))
            return slopes(most) + slopes(2 * most)[0::2][: n - most]

        return expand_dims(array(slopes(num_heads), dtype), (-1, -2))

    def __call__(self, attention_scores: Any, offset: int = 0, mask: Any = None) -> array:
        added = ALiBi.create_alibi_matrix(
            attention_scores.shape[-2] + offset,
            attention_scores.shape[-1],
            attention_scores.shape[1],
            offset,
            attention_scores.dtype,
        )
        return attention_scores + (added if mask is None else added + mask)


class MultiHeadAttention(Module):
    """Attention with projections of queries, keys, values and results."""

    def __init__(
        self,
        dims: int,
        num_heads: int,
        query_input_dims: int | None = None,
        key_input_dims: int | None = None,
        value_input_dims: int | None = None,
        value_dims: int | None = None,
        value_output_dims: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if dims % num_heads:
            raise ValueError(
                "The input feature dimensions should be divisible by the number of heads "
                f"({dims} % {num_heads}) != 0"
            )
        keys = key_input_dims or dims
        inner = value_dims or dims
        self.num_heads = num_heads
        self.query_proj = Linear(query_input_dims or dims, dims, bias)
        self.key_proj = Linear(keys, dims, bias)
        self.value_proj = Linear(value_input_dims or keys, inner, bias)
        self.out_proj = Linear(inner, value_output_dims or dims, bias)

    def __call__(self, queries: Any, keys: Any, values: Any, mask: Any = None) -> array:
        q, k, v = (
            unflatten(layer(x), -1, (self.num_heads, -1)).transpose(0, 2, 1, 3)
            for layer, x in (
                (self.query_proj, queries),
                (self.key_proj, keys),
                (self.value_proj, values),
            )
        )
        scale = math.sqrt(1 / q.shape[-1])
        y = fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return self.out_proj(y.transpose(0, 2, 1, 3).flatten(-2, -1))

    @staticmethod
    def create_additive_causal_mask(N: int, dtype: Any = float32) -> array:
        """The least number where a key comes after a query, else 0."""
        places = arange(N)
        return (places[:, None] < places[None]).astype(dtype) * finfo(dtype).min


class Conv1d(Module):
    """Convolution along the tokens of x [B, T, in]; `weight` is [out, kernel, in / groups]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        if in_channels % groups:
            raise ValueError(
                f"The number of input channels ({in_channels}) must be divisible by the number of "
                f"groups ({groups})"
            )
        scale = math.sqrt(1 / (in_channels * kernel_size))
        shape = (out_channels, kernel_size, in_channels // groups)
        self.weight = random.uniform(-scale, scale, shape)
        if bias:
            self.bias = zeros((out_channels,))
        self.stride, self.padding = stride, padding
        self.dilation, self.groups = dilation, groups

    def __call__(self, x: Any) -> array:
        y = conv1d(x, self.weight, self.stride, self.padding, self.dilation, self.groups)
        return y + self.bias if "bias" in self else y
