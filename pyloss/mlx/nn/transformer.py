"""MLX's encoder and decoder layers, and stacks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyloss.mlx.core.arrays import array
from pyloss.mlx.nn.activations import relu
from pyloss.mlx.nn.layers import Linear
from pyloss.mlx.nn.module import Module
from pyloss.mlx.nn.norms import Dropout, LayerNorm
from pyloss.mlx.nn.positions import MultiHeadAttention
from pyloss.mlx.nn.utils import checkpoint as checkpointed


class _Layer(Module):
    """What both kinds of layers share: parts that are added to x, before or after a norm."""

    norm_first: bool

    def _mlp(self, dims: int, mlp_dims: int | None, activation: Callable[[Any], Any]) -> None:
        inner = mlp_dims or dims * 4
        self.linear1, self.linear2 = Linear(dims, inner), Linear(inner, dims)
        self.activation = activation

    def _added(
        self, x: Any, norm: Module, part: Callable[[Any], Any], drop: Module | None
    ) -> array:
        """x plus a part of its norm, or the norm of x plus its part."""
        y = part(norm(x) if self.norm_first else x)  # type: ignore[operator]
        y = x + (y if drop is None else drop(y))  # type: ignore[operator]
        return y if self.norm_first else norm(y)  # type: ignore[operator, no-any-return]

    def _feed(self, x: Any, drop: Module) -> array:
        return self.linear2(drop(self.activation(self.linear1(x))))  # type: ignore[operator]


class TransformerEncoderLayer(_Layer):
    """Attention and two linear layers, each added to x."""

    def __init__(
        self,
        dims: int,
        num_heads: int,
        mlp_dims: int | None = None,
        dropout: float = 0.0,
        activation: Callable[[Any], Any] = relu,
        norm_first: bool = True,
    ):
        super().__init__()
        self.attention = MultiHeadAttention(dims, num_heads)
        self.ln1, self.ln2 = LayerNorm(dims), LayerNorm(dims)
        self._mlp(dims, mlp_dims, activation)
        self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout)
        self.norm_first = norm_first

    def __call__(self, x: Any, mask: Any) -> array:
        x = self._added(x, self.ln1, lambda y: self.attention(y, y, y, mask), self.dropout1)
        return self._added(x, self.ln2, lambda y: self._feed(y, self.dropout2), None)


class TransformerDecoderLayer(_Layer):
    """Attention to itself, attention to a memory and two linear layers, each added to x."""

    def __init__(
        self,
        dims: int,
        num_heads: int,
        mlp_dims: int | None = None,
        dropout: float = 0.0,
        activation: Callable[[Any], Any] = relu,
        norm_first: bool = True,
    ):
        super().__init__()
        self.self_attention = MultiHeadAttention(dims, num_heads)
        self.cross_attention = MultiHeadAttention(dims, num_heads)
        self.ln1, self.ln2, self.ln3 = LayerNorm(dims), LayerNorm(dims), LayerNorm(dims)
        self._mlp(dims, mlp_dims, activation)
        self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout)
        self.dropout3, self.norm_first = Dropout(dropout), norm_first

    def __call__(self, x: Any, memory: Any, x_mask: Any, memory_mask: Any) -> array:
        x = self._added(x, self.ln1, lambda y: self.self_attention(y, y, y, x_mask), self.dropout1)
        x = self._added(
            x,
            self.ln2,
            lambda y: self.cross_attention(y, memory, memory, memory_mask),
            self.dropout2,
        )
        return self._added(x, self.ln3, lambda y: self._feed(y, self.dropout3), None)


class _Stack(Module):
    """Layers, and a norm of the last one's result."""

    def _run(self, x: Any, *more: Any) -> array:
        for layer in self.layers:
            x = (checkpointed(layer) if self.checkpoint else layer)(x, *more)
        return self.ln(x)  # type: ignore[no-any-return]


class TransformerEncoder(_Stack):
    """A stack of `TransformerEncoderLayer`s; with `checkpoint` they run again in backward."""

    def __init__(
        self,
        num_layers: int,
        dims: int,
        num_heads: int,
        mlp_dims: int | None = None,
        dropout: float = 0.0,
        activation: Callable[[Any], Any] = relu,
        norm_first: bool = True,
        checkpoint: bool = False,
    ):
        super().__init__()
        self.layers = [
            TransformerEncoderLayer(dims, num_heads, mlp_dims, dropout, activation, norm_first)
            for _ in range(num_layers)
        ]
        self.ln, self.checkpoint = LayerNorm(dims), checkpoint

    def __call__(self, x: Any, mask: Any) -> array:
        return self._run(x, mask)


class TransformerDecoder(_Stack):
    """A stack of `TransformerDecoderLayer`s; with `checkpoint` they run again in backward."""

    def __init__(
        self,
        num_layers: int,
        dims: int,
        num_heads: int,
        mlp_dims: int | None = None,
        dropout: float = 0.0,
        activation: Callable[[Any], Any] = relu,
        norm_first: bool = True,
        checkpoint: bool = False,
    ):
        super().__init__()
        self.layers = [
            TransformerDecoderLayer(dims, num_heads, mlp_dims, dropout, activation, norm_first)
            for _ in range(num_layers)
        ]
        self.ln, self.checkpoint = LayerNorm(dims), checkpoint

    def __call__(self, x: Any, memory: Any, x_mask: Any, memory_mask: Any) -> array:
        return self._run(x, memory, x_mask, memory_mask)


class Transformer(Module):
    """An encoder and a decoder (Vaswani et al., arXiv:1706.03762)."""

    def __init__(
        self,
        dims: int = 512,
        num_heads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        mlp_dims: int | None = None,
        dropout: float = 0.0,
        activation: Callable[[Any], Any] = relu,
        custom_encoder: Any = None,
        custom_decoder: Any = None,
        norm_first: bool = True,
        checkpoint: bool = False,
    ):
        super().__init__()
        settings = (dims, num_heads, mlp_dims, dropout, activation, norm_first, checkpoint)
        self.encoder = custom_encoder or TransformerEncoder(num_encoder_layers, *settings)
        self.decoder = custom_decoder or TransformerDecoder(num_decoder_layers, *settings)

    def __call__(self, src: Any, tgt: Any, src_mask: Any, tgt_mask: Any, memory_mask: Any) -> array:
        memory = self.encoder(src, src_mask)
        return self.decoder(tgt, memory, tgt_mask, memory_mask)
