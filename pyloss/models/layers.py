"""The layers of the decoder: attention, MLPs, and their order; on packed sequences.

Modules and parameters have Hugging Face's names, under which adapters are saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss import ops
from pyloss.autograd.tape import data
from pyloss.models.batch_cache import BatchCache, PromptCache
from pyloss.models.cache import KVCache
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.moe import SparseMoe, renamed
from pyloss.models.rope import RopeTable
from pyloss.nn import Linear, Module, RMSNorm, project_each, run_recorded
from pyloss.runtime.device import on_device_of

Cache = KVCache | PromptCache | BatchCache


@dataclass
class Packing:
    """The positions of the tokens of a packed batch.

    Attributes:
        offsets: int32 [S + 1]: the first token of each sequence, and the number of all tokens.
        positions: int32 [N]: each token's row in the rotary tables, see `RopeTable`.
        rotary: the tables (cos, sin) of layers without a window, and of layers with one; where the
            scale of queries grows with their position, also those of queries.
    """

    offsets: np.ndarray
    positions: np.ndarray
    rotary: tuple[tuple[np.ndarray, np.ndarray], ...]

    def of_last(self) -> Packing:
        """The packing of only the last token, which sees all earlier tokens in a cache."""
        return Packing(np.array([0, 1], np.int32), self.positions[-1:], self.rotary)

    def on_device_of(self, x: Any, tables: Sequence[RopeTable]) -> Packing:
        """This packing on the device of `x`, with the copies that `tables` have there."""
        if isinstance(x, np.ndarray):
            return self
        return Packing(
            on_device_of(x, self.offsets),
            on_device_of(x, self.positions),
            tuple(table.on_device_of(x) for table in tables),
        )


class Attention(Module):
    """Causal grouped-query attention: x [N, hidden] -> [N, hidden].

    Most layers have rotary positions. `q_norm` and `k_norm` act before the rotation: on each head,
    or on all heads together, depending on their sizes. With a cache, `last_row`, the packing of the
    last row, requests only that row: [1, hidden].
    """

    recordable = True
    taps = 0  # of a convolution in place of attention

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        q_proj: Linear,
        k_proj: Linear,
        v_proj: Linear,
        o_proj: Linear,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj
        self._settle(config, layer, q_norm, k_norm)

    def _settle(
        self,
        config: ModelConfig,
        layer: int,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        """Sets what does not depend on the projections."""
        self.q_norm, self.k_norm = q_norm, k_norm
        self._head_dim = config.head_dim
        self._scale = config.attention_scale
        self._softcap = config.attn_logit_softcapping or 0.0
        self._window = config.window(layer)
        self._kv_heads = config.num_key_value_heads
        self._rotated = config.rotated(layer)

    @property
    def window(self) -> int:
        """How many keys a query sees; 0 for all."""
        return self._window

    @property
    def rotated(self) -> bool:
        """Whether queries and keys have rotary positions."""
        return self._rotated

    @property
    def cached(self) -> tuple[int, int]:
        """The numbers that a cache keeps, of each row and of each sequence."""
        return 2 * self._kv_heads * self._head_dim, 0

    def projected(self, x: Any, last_query: bool) -> Any:
        """Queries, keys and values of x, and the result's gate if there is one.

        With `last_query` only the last row's query and gate.
        """
        if not last_query:
            return project_each(x, self.q_proj, self.k_proj, self.v_proj)
        return self.q_proj(x[-1:]), *project_each(x, self.k_proj, self.v_proj)

    def rotate(self, where: Packing, table: int, *projected: Any) -> Any:
        """Queries or keys at these positions, in place, by one of the packing's tables."""
        if not self._rotated:
            return projected
        rotary = where.rotary[table]
        return ops.rope_all(
            projected, where.positions, *rotary, in_place=True, head_dim=self._head_dim
        )

    def mixed(self, q: Any, k: Any, v: Any, where: Packing, k_offsets: Any = None) -> Any:
        """What the queries of `where` get of the values; `k_offsets` as in `ops.attention`."""
        return ops.attention(
            q, k, v, where.offsets, self._head_dim, self._scale, k_offsets, self._window,
            softcap=self._softcap,
        )  # fmt: skip

    def __call__(
        self,
        x: Any,
        packing: Packing,
        cache: Cache | None = None,
        layer: int = 0,
        last_row: Packing | None = None,
    ) -> Any:
        q, k, v, *gate = self.projected(x, last_row is not None)
        where = packing if last_row is None else last_row
        of_keys = int(self._window > 0)
        of_queries = of_keys if len(packing.rotary) == 2 else 2
        q, k = normed_heads(q, self.q_norm), normed_heads(k, self.k_norm)
        if last_row is None and of_queries == of_keys:
            q, k = self.rotate(packing, of_keys, q, k)
        else:
            (q,) = self.rotate(where, of_queries, q)
            (k,) = self.rotate(packing, of_keys, k)
        k_offsets = None
        if cache is not None:
            k, v, k_offsets = cache.append(layer, data(k), data(v))
        mixed = self.mixed(q, k, v, where, k_offsets)
        return self.o_proj(ops.glu(gate[0], mixed) if gate else mixed)


class FusedAttention(Attention):
    """`Attention` whose queries, keys and values are one projection, as in Phi-3."""

    recordable = True

    def __init__(self, config: ModelConfig, layer: int, qkv_proj: Linear, o_proj: Linear):
        Module.__init__(self)
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        self._settle(config, layer)
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        self._q, self._k, self._v = columns(*(count * config.head_dim for count in heads))

    def projected(self, x: Any, last_query: bool) -> Any:
        """See `Attention`."""
        q, k, v = ops.split_columns(self.qkv_proj(x), self._q, self._k, self._v)
        return q[-1:] if last_query else q, k, v


def columns(*widths: int) -> list[np.ndarray]:
    """The columns of parts that lie side by side, for `ops.split_columns`."""
    ends = np.cumsum([0, *widths])
    return [np.arange(*ends[i : i + 2], dtype=np.int32) for i in range(len(widths))]


def normed_heads(projected: Any, norm: RMSNorm | None) -> Any:
    """Queries or keys [N, heads * D] after their norm, which may act on each head."""
    if norm is None:
        return projected
    return norm(projected.reshape(-1, len(norm.weight))).reshape(*projected.shape)


# activation(gate) * up, by transformers' names of the activations.
GATED_UNITS = {"silu": ops.swiglu, "gelu_pytorch_tanh": ops.geglu}


class MLP(Module):
    """down(activation(gate(x)) * up(x))"""

    recordable = True

    def __init__(
        self, gate_proj: Linear, up_proj: Linear, down_proj: Linear, activation: str = "silu"
    ):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self._gated = GATED_UNITS[activation]

    def __call__(self, x: Any) -> Any:
        gate, up = project_each(x, self.gate_proj, self.up_proj)
        return self.down_proj(self._gated(gate, up, in_place=True))


class FusedMLP(MLP):
    """An `MLP` whose gate and up are one projection, as in Phi-3."""

    recordable = True

    def __init__(self, gate_up_proj: Linear, down_proj: Linear, activation: str = "silu"):
        Module.__init__(self)
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self._gated = GATED_UNITS[activation]
        inner = gate_up_proj.shape[0] // 2
        self._gate, self._up = columns(inner, inner)

    def __call__(self, x: Any) -> Any:
        gate, up = ops.split_columns(self.gate_up_proj(x), self._gate, self._up)
        return self.down_proj(self._gated(gate, up, in_place=True))


class SharedMLP(FusedMLP):
    """A `FusedMLP` under the names of Granite's shared expert."""

    recordable = True
    gate_up_proj, down_proj = renamed("input_linear"), renamed("output_linear")


# Up to this many tokens, layers are checkpointed in halves and attention is remembered. The tokens
# are those of a part of a batch, see tuner.losses.
HALF_CHECKPOINT_TOKENS = 1024


class DecoderLayer(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the mlp may be a mixture of experts.

    `self_attn` is an `Attention`, or what mixes tokens in its place with its attributes.
    """

    recordable = True
    recomputed = False  # set by `tuner.trainer.grad_checkpoint`

    def __init__(
        self,
        self_attn: Any,
        mlp: MLP | SparseMoe,
        input_layernorm: RMSNorm,
        post_attention_layernorm: RMSNorm,
    ):
        super().__init__()
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm, self.post_attention_layernorm = (
            input_layernorm,
            post_attention_layernorm,
        )

    # Where the norms are; families differ. A half is x + after(block(before(x))).

    def before_mixing(self, x: Any) -> Any:
        """What the block that mixes tokens gets of x."""
        return self.input_layernorm(x)

    def after_mixing(self, mixed: Any) -> Any:
        """What is added of the block's result."""
        return mixed

    def before_mlp(self, x: Any) -> Any:
        """What the MLP gets of x."""
        return self.post_attention_layernorm(x)

    def after_mlp(self, fed: Any) -> Any:
        """What is added of the MLP's result."""
        return fed

    def mix(
        self,
        x: Any,
        packing: Packing,
        cache: Cache | None = None,
        layer: int = 0,
        last_row: Packing | None = None,
    ) -> Any:
        """The first half: attention and the sum after it; `last_row` as in `Attention`."""
        mixed = self.self_attn(self.before_mixing(x), packing, cache, layer, last_row)
        return ops.add(x if last_row is None else x[-1:], self.after_mixing(mixed))

    def feed(self, x: Any) -> Any:
        """The second half: the MLP and the sum after it, row by row."""
        return ops.add(x, self.after_mlp(self.mlp(self.before_mlp(x))))

    def __call__(
        self,
        x: Any,
        packing: Packing,
        cache: Cache | None = None,
        layer: int = 0,
        last_row: Packing | None = None,
    ) -> Any:
        return self.feed(self.mix(x, packing, cache, layer, last_row))

    def train_on(self, x: Any, packing: Packing) -> Any:
        """`self(x, packing)`, by recorded calls of the core where that is possible."""
        tables = (array for pair in packing.rotary for array in pair)
        arrays = packing.offsets, packing.positions, *tables
        return run_recorded(self, lambda value: self(value, packing), x, arrays)


class BlockSparseLayer(DecoderLayer):
    """A `DecoderLayer` whose mixture of experts is called block_sparse_moe, as in Mixtral."""

    recordable = True
    mlp = renamed("block_sparse_moe")


class SharedMLPLayer(DecoderLayer):
    """A `DecoderLayer` whose MLP is a shared expert alone, as in Granite 4."""

    recordable = True
    mlp = renamed("shared_mlp")


class SharedExpertLayer(BlockSparseLayer):
    """A `BlockSparseLayer` with an MLP beside it, `shared_mlp`, that every token visits."""

    recordable = True

    def __init__(
        self,
        self_attn: Any,
        block_sparse_moe: SparseMoe,
        shared_mlp: MLP,
        input_layernorm: RMSNorm,
        post_attention_layernorm: RMSNorm,
    ):
        super().__init__(self_attn, block_sparse_moe, input_layernorm, post_attention_layernorm)
        self.shared_mlp = shared_mlp

    def feed(self, x: Any) -> Any:
        inner = self.before_mlp(x)
        return ops.add(x, ops.add(self.mlp(inner), self.shared_mlp(inner)))


class PostNormLayer(DecoderLayer):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    recordable = True

    def __init__(
        self,
        self_attn: Attention,
        mlp: MLP,
        input_layernorm: RMSNorm,
        post_attention_layernorm: RMSNorm,
        pre_feedforward_layernorm: RMSNorm,
        post_feedforward_layernorm: RMSNorm,
    ):
        super().__init__(self_attn, mlp, input_layernorm, post_attention_layernorm)
        self.pre_feedforward_layernorm = pre_feedforward_layernorm
        self.post_feedforward_layernorm = post_feedforward_layernorm

    def after_mixing(self, mixed: Any) -> Any:
        return self.post_attention_layernorm(mixed)

    def before_mlp(self, x: Any) -> Any:
        return self.pre_feedforward_layernorm(x)

    def after_mlp(self, fed: Any) -> Any:
        return self.post_feedforward_layernorm(fed)


class AfterNormLayer(DecoderLayer):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    recordable = True

    def __init__(
        self,
        self_attn: Attention,
        mlp: MLP,
        post_attention_layernorm: RMSNorm,
        post_feedforward_layernorm: RMSNorm,
    ):
        Module.__init__(self)
        self.self_attn, self.mlp = self_attn, mlp
        self.post_attention_layernorm, self.post_feedforward_layernorm = (
            post_attention_layernorm,
            post_feedforward_layernorm,
        )

    def before_mixing(self, x: Any) -> Any:
        return x

    def after_mixing(self, mixed: Any) -> Any:
        return self.post_attention_layernorm(mixed)

    def before_mlp(self, x: Any) -> Any:
        return x

    def after_mlp(self, fed: Any) -> Any:
        return self.post_feedforward_layernorm(fed)
