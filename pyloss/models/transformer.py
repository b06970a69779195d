"""The decoder-only transformer, built from its configuration; it runs on packed sequences.

Modules and parameters have Hugging Face's names, under which adapters are saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss import ops
from pyloss.autograd.checkpointing import checkpoint
from pyloss.autograd.scope import no_grad
from pyloss.autograd.tape import data
from pyloss.checks.numbers import whole
from pyloss.models.batch_cache import BatchCache, PromptCache, rows_needed
from pyloss.models.cache import PREFILL, KVCache, NextTokens
from pyloss.models.config.fields import CONV, FULL, SLIDING
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.config.rope_scaling import long_from
from pyloss.models.fusing import fuse_modules
from pyloss.models.moe import SparseMoe
from pyloss.models.rope import RopeTable
from pyloss.nn import Embedding, Linear, Module, RMSNorm, project_each, recorded_module
from pyloss.ops.arrays import empty, i32
from pyloss.runtime.device import on_device_of
from pyloss.weights.weight import Weight

#: Sequences of one step of `Model.step_each`: the core sums products of up to so many rows in the
#: order of one row (SKINNY_M of csrc/kernels/matmul/product.h).
MOST_ROWS = 32

Cache = KVCache | PromptCache | BatchCache


@dataclass
class Packing:
    """The positions of the tokens of a packed batch.

    Attributes:
        offsets: int32 [S + 1]: the first token of each sequence, and the number of all tokens.
        positions: int32 [N]: each token's row in the rotary tables, see `RopeTable`.
        rotary: the tables (cos, sin) of layers without a window, and of layers with one.
    """

    offsets: np.ndarray
    positions: np.ndarray
    rotary: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

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
            (tables[0].on_device_of(x), tables[1].on_device_of(x)),
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
        self._rotated = config.rotated(layer)

    @property
    def window(self) -> int:
        """How many keys a query sees; 0 for all."""
        return self._window

    @property
    def rotated(self) -> bool:
        """Whether queries and keys have rotary positions."""
        return self._rotated

    def projected(self, x: Any, last_query: bool) -> Any:
        """Queries, keys and values of x; with `last_query` only the last row's query."""
        if not last_query:
            return project_each(x, self.q_proj, self.k_proj, self.v_proj)
        return self.q_proj(x[-1:]), *project_each(x, self.k_proj, self.v_proj)

    def __call__(
        self,
        x: Any,
        packing: Packing,
        cache: Cache | None = None,
        layer: int = 0,
        last_row: Packing | None = None,
    ) -> Any:
        def rotated(where: Packing, *projected: Any) -> Any:
            if not self._rotated:
                return projected
            rotary = where.rotary[self._window > 0]
            return ops.rope_all(
                projected, where.positions, *rotary, in_place=True, head_dim=self._head_dim
            )

        q, k, v = self.projected(x, last_row is not None)
        if last_row is None:
            where = packing
            q, k = rotated(packing, _normed(q, self.q_norm), _normed(k, self.k_norm))
        else:
            where = last_row
            (q,) = rotated(where, _normed(q, self.q_norm))
            (k,) = rotated(packing, _normed(k, self.k_norm))
        k_offsets = None
        if cache is not None:
            k, v, k_offsets = cache.append(layer, data(k), data(v))
        mixed = ops.attention(
            q, k, v, where.offsets, self._head_dim, self._scale, k_offsets, self._window,
            softcap=self._softcap,
        )  # fmt: skip
        return self.o_proj(mixed)


class FusedAttention(Attention):
    """`Attention` whose queries, keys and values are one projection, as in Phi-3."""

    recordable = True

    def __init__(self, config: ModelConfig, layer: int, qkv_proj: Linear, o_proj: Linear):
        Module.__init__(self)
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        self._settle(config, layer)
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        self._q, self._k, self._v = _columns(*(count * config.head_dim for count in heads))

    def projected(self, x: Any, last_query: bool) -> Any:
        """See `Attention`."""
        q, k, v = ops.split_columns(self.qkv_proj(x), self._q, self._k, self._v)
        return q[-1:] if last_query else q, k, v


def _columns(*widths: int) -> list[np.ndarray]:
    """The columns of parts that lie side by side, for `ops.split_columns`."""
    ends = np.cumsum([0, *widths])
    return [np.arange(*ends[i : i + 2], dtype=np.int32) for i in range(len(widths))]


def _normed(projected: Any, norm: RMSNorm | None) -> Any:
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
        self._gate, self._up = _columns(inner, inner)

    def __call__(self, x: Any) -> Any:
        gate, up = ops.split_columns(self.gate_up_proj(x), self._gate, self._up)
        return self.down_proj(self._gated(gate, up, in_place=True))


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

    def mix(
        self,
        x: Any,
        packing: Packing,
        cache: Cache | None = None,
        layer: int = 0,
        last_row: Packing | None = None,
    ) -> Any:
        """The first half: attention and the sum after it; `last_row` as in `Attention`."""
        mixed = self.self_attn(self.input_layernorm(x), packing, cache, layer, last_row)
        return ops.add(x if last_row is None else x[-1:], mixed)

    def feed(self, x: Any) -> Any:
        """The second half: the MLP and the sum after it, row by row."""
        return ops.add(x, self.mlp(self.post_attention_layernorm(x)))

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
        kept = vars(self).get("_recorded")
        if kept is None or kept[0] is not Module.structure:
            kept = Module.structure, recorded_module(self)
            object.__setattr__(self, "_recorded", kept)
        if kept[1] is None:
            return self(x, packing)
        arrays = packing.offsets, packing.positions, *packing.rotary[0], *packing.rotary[1]
        return kept[1](lambda value: self(value, packing), x, arrays)


class BlockSparseLayer(DecoderLayer):
    """A `DecoderLayer` whose mixture of experts is called block_sparse_moe, as in Mixtral."""

    recordable = True

    @property
    def mlp(self) -> Any:
        """The block."""
        return self.block_sparse_moe

    @mlp.setter
    def mlp(self, block: MLP | SparseMoe) -> None:
        self.block_sparse_moe = block


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

    def mix(
        self,
        x: Any,
        packing: Packing,
        cache: Cache | None = None,
        layer: int = 0,
        last_row: Packing | None = None,
    ) -> Any:
        mixed = self.self_attn(self.input_layernorm(x), packing, cache, layer, last_row)
        return ops.add(x if last_row is None else x[-1:], self.post_attention_layernorm(mixed))

    def feed(self, x: Any) -> Any:
        return ops.add(
            x, self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        )


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

    def mix(
        self,
        x: Any,
        packing: Packing,
        cache: Cache | None = None,
        layer: int = 0,
        last_row: Packing | None = None,
    ) -> Any:
        mixed = self.self_attn(x, packing, cache, layer, last_row)
        return ops.add(x if last_row is None else x[-1:], self.post_attention_layernorm(mixed))

    def feed(self, x: Any) -> Any:
        return ops.add(x, self.post_feedforward_layernorm(self.mlp(x)))


class Decoder(Module):
    """Embedding, layers and the last norm."""

    def __init__(self, embed_tokens: Embedding, layers: list[DecoderLayer], norm: RMSNorm):
        super().__init__()
        self.embed_tokens, self.layers, self.norm = embed_tokens, layers, norm


class Model(Module):
    """A causal language model.

    `model(tokens)` returns the logits of a batch. Losses that never hold all logits use `hidden`
    and `head_layer`; generation uses `step`.

    Attributes:
        adapter_config: the settings of the adapters, as adapter_config.json has them.
        kept_of_adapter: the share of the adapters that fusing into quantized weights kept, if it
            is small.
    """

    def __init__(self, config: ModelConfig, decoder: Decoder, lm_head: Linear | None):
        super().__init__()
        self.config = config
        self.model = decoder
        self.lm_head = lm_head
        self.adapter_config: dict[str, Any] | None = None
        self.kept_of_adapter: float | None = None
        self._rope = (RopeTable(config), RopeTable(config, local=True))
        self._long_from = long_from(config.rope_scaling)
        self._checkpoint = False

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, first to last."""
        return self.model.layers

    @property
    def vocab_size(self) -> int:
        """The number of logits."""
        return self.config.vocab_size

    @property
    def softcap(self) -> float | None:
        """c where logits x are replaced by c tanh(x / c); losses under the head need it."""
        return self.config.final_logit_softcapping

    @property
    def head_layer(self) -> Any:
        """The layer that makes logits, with its adapter: lm_head, or the embedding if tied."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    @property
    def head_weight(self) -> np.ndarray | Weight:
        """The output head [V, hidden]; the embedding's table if they are tied.

        Raises ValueError if the head has an adapter, which is not part of the weight.
        """
        layer = self.head_layer
        if not isinstance(layer, Linear | Embedding):
            raise ValueError(
                "the head has an adapter, which is not in its weight: "
                "use model.head_layer, or fuse() first"
            )
        return layer.weight

    def set_grad_checkpoint(self, on: bool = True) -> None:
        """Keep only the inputs of layers for the backward pass, and recompute each layer there.

        For few tokens, which take little memory, also keep the sum after attention, attention's
        output, and keys and values that several query heads share.
        """
        self._checkpoint = on
        for layer in self.layers:
            layer.recomputed = False

    @property
    def grad_checkpoint(self) -> bool:
        """Whether layers are recomputed for the backward pass."""
        return self._checkpoint or any(layer.recomputed for layer in self.layers)

    def _pack(self, lengths: np.ndarray, past: int = 0, least: int = 0) -> Packing:
        """The packing of sequences that have these lengths and `past` tokens before them.

        `least`: how many tokens they will have at least.
        """
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        if offsets[-1] == 0:
            positions = np.empty(0, np.int32)
        else:
            positions = (np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) + past).astype(
                np.int32
            )
        longest = max(int(lengths.max(initial=0)) + past, least)
        shifts = np.repeat(self._shift(np.maximum(lengths + past, least)), lengths)
        return Packing(offsets, positions + shifts, self._rotary(longest))

    def _shift(self, lengths: np.ndarray) -> np.ndarray:
        """How far the rotary rows of sequences of these lengths are after their positions."""
        short = self._long_from
        long = np.zeros(len(lengths), bool) if short is None else lengths > short
        return (long * (short or 0)).astype(np.int32)

    def _rotary(
        self, longest: int
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return self._rope[0].upto(longest), self._rope[1].upto(longest)

    def _run(
        self,
        tokens: np.ndarray,
        packing: Packing,
        cache: Cache | None = None,
        last_row: Packing | None = None,
        between: dict[int, Any] | None = None,
    ) -> Any:
        """The last hidden states [N, hidden]; with `last_row` as in `Attention`, [1, hidden].

        `between` gets the outputs of the layers that are its keys.

        A residual multiplier m costs nothing: layers add their outputs as they are to hidden states
        divided by m, whose norms are the same with an eps divided by m^2 (see `building`).
        """
        multiplier = self.config.residual_multiplier or 1.0
        factor = self.config.embedding_factor / multiplier
        x = self.model.embed_tokens(tokens)
        if last_row is not None:
            last_row = last_row.on_device_of(data(x), self._rope)
        packing = packing.on_device_of(data(x), self._rope)
        if factor != 1:
            x = ops.scale(x, factor)
        for i, layer in enumerate(self.model.layers):
            if not self.grad_checkpoint or cache is not None:
                if cache is None:
                    x = layer.train_on(x, packing)
                else:
                    last = i == len(self.model.layers) - 1
                    x = layer(x, packing, cache, i, last_row if last else None)
            elif len(tokens) <= HALF_CHECKPOINT_TOKENS:
                x = checkpoint(
                    lambda value, layer=layer: layer.mix(value, packing), x, remember=True
                )
                x = checkpoint(layer.feed, x)
            else:
                x = checkpoint(lambda value, layer=layer: layer(value, packing), x)
            if between is not None and i in between:
                between[i] = x if multiplier == 1 else ops.scale(x, multiplier)
        x = self.model.norm(x)
        # Here, and not on logits: all losses and heads take these hidden states.
        scaling = self.config.logits_scaling or 1.0
        return x if scaling == 1 else ops.scale(x, 1 / scaling)

    def hidden(self, tokens: Any, offsets: Any) -> Any:
        """Last hidden states [N, hidden] of packed token ids [N], divided by logits_scaling.

        int32 `offsets` [S + 1] bound the sequences, from 0 to N.
        """
        return self._run(*self._packed(tokens, offsets))

    def hidden_states(
        self, tokens: Any, offsets: Any, layers: Sequence[int]
    ) -> tuple[Any, list[Any]]:
        """`hidden`, and the outputs [N, hidden] of the decoder layers with these numbers."""
        count = len(self.layers)
        between: dict[int, Any] = {whole(i, "layers", 0, count - 1): None for i in layers}
        last = self._run(*self._packed(tokens, offsets), between=between)
        return last, [between[i] for i in layers]

    def _packed(self, tokens: Any, offsets: Any) -> tuple[np.ndarray, Packing]:
        """The arguments of `hidden`, checked."""
        tokens, offsets = self._tokens(tokens, 1), i32(offsets, "offsets")
        lengths = np.diff(offsets)
        if (
            offsets.ndim != 1
            or not len(offsets)
            or offsets[0] != 0
            or offsets[-1] != len(tokens)
            or (lengths < 0).any()
        ):
            raise ValueError(
                "offsets must begin with 0, never decrease and end with the number of tokens, "
                f"{len(tokens)}; got {offsets}"
            )
        return tokens, self._pack(lengths)

    def head(self, x: Any) -> Any:
        """Hidden states [..., hidden] -> logits [..., V]."""
        logits = ops.project(x, self.head_layer.projection())
        return logits if self.softcap is None else ops.capped(logits, self.softcap)

    def __call__(self, tokens: Any) -> Any:
        """Logits [B, T, V] of token ids [B, T]; each row is a sequence."""
        tokens = self._tokens(tokens, 2)
        batch, length = tokens.shape
        x = self._run(tokens.reshape(-1), self._pack(np.full(batch, length)))
        return self.head(x).reshape(batch, length, self.vocab_size)

    def step(self, tokens: Any, cache: KVCache | PromptCache) -> np.ndarray:
        """Logits [V] after token ids [n], n >= 1, which continue the sequence in `cache`."""
        tokens = self._tokens(tokens, 1)
        if not len(tokens):
            raise ValueError("step needs at least one token")
        if self._long_from is not None:
            if self._outgrown(len(cache.history), len(tokens), cache.length, cache.least):
                return self._recomputed(tokens, cache)
        cache.reserve(len(tokens))
        if len(tokens) == 1:
            cache.next, found = self._next(
                tokens,
                np.array([cache.length]),
                np.array([cache.least]),
                cache.offsets,
                cache,
                cache.next,
            )
            logits = found[0].copy()
        else:
            packing = self._pack(np.array([len(tokens)]), cache.length, cache.least)
            logits = self._logits(tokens, packing, cache, packing.of_last())[0]
        cache.advance(len(tokens))
        if self._long_from is not None:
            cache.history.extend(tokens.tolist())
        return logits

    def _recomputed(self, tokens: np.ndarray, cache: KVCache | PromptCache) -> np.ndarray:
        """`step` that computes the keys and values of all earlier tokens again."""
        earlier = list(cache.history)
        tokens = np.concatenate([np.array(earlier, np.int32), tokens])
        cache.restart()
        cache.history.clear()
        cache.least = len(tokens)
        try:
            for begin in range(0, len(tokens), PREFILL):
                logits = self.step(tokens[begin : begin + PREFILL], cache)
        except BaseException:
            cache.restart()
            cache.history[:] = earlier  # the next step computes all again
            raise
        return logits

    def _outgrown(self, known: int, more: int, held: int, least: int) -> bool:
        """Whether `more` tokens after `known` ones need other keys than the cache has of these.

        longrope rotates all keys of a sequence otherwise once it is longer than its original length
        (transformers drops its cache there, too). `held` is less than `known` after a step that
        failed.
        """
        short = self._long_from
        assert short is not None
        return held < known or (known > 0 and max(known, least) <= short < known + more)

    def step_each(self, tokens: Any, cache: BatchCache, slots: Sequence[int]) -> np.ndarray:
        """Logits [n, V] after one more token [n] of each sequence in these slots, which ascend.

        They have the bits of `step`, whatever the other sequences are. The next step may overwrite
        the array.
        """
        tokens, here = self._tokens(tokens, 1), np.asarray(slots)
        if self._long_from is not None:
            return self._step_each_long(tokens, cache, here)
        return self._step_held(tokens, cache, here)

    def _step_each_long(
        self, tokens: np.ndarray, cache: BatchCache, here: np.ndarray
    ) -> np.ndarray:
        """`step_each` of a model with longrope.

        The keys of sequences that outgrow the original length are computed again, each by itself.
        """
        outgrown = np.array(
            [
                self._outgrown(
                    len(cache.history[slot]), 1, int(cache.lengths[slot]), int(cache.least[slot])
                )
                for slot in here
            ],
            bool,
        )
        logits = empty(len(here), self.vocab_size)
        for i in np.flatnonzero(outgrown):
            logits[i] = self.step(tokens[i : i + 1], cache.prompt(int(here[i])))
        rest = np.flatnonzero(~outgrown)
        if len(rest):
            logits[rest] = self._step_held(tokens[rest], cache, here[rest])
            for i in rest:
                cache.history[here[i]].append(int(tokens[i]))
        return logits

    def _step_held(self, tokens: np.ndarray, cache: BatchCache, here: np.ndarray) -> np.ndarray:
        """`step_each` with the keys that the cache holds."""
        parts = np.array_split(np.arange(len(here)), -(-len(here) // MOST_ROWS))
        logits = empty(len(here), self.vocab_size) if len(parts) > 1 else None
        for part in parts:
            n, own = len(part), here[part].tolist()
            cache.reserve(own)
            cache.next[n], found = self._next(
                tokens[part],
                cache.lengths[own],
                cache.least[own],
                cache.offsets,
                cache,
                cache.next.get(n),
            )
            cache.advance(own)
            if logits is None:
                return found
            logits[part] = found
        assert logits is not None
        return logits

    def _logits(
        self, tokens: np.ndarray, packing: Packing, cache: Cache, last_row: Packing | None = None
    ) -> np.ndarray:
        with no_grad():
            return np.asarray(data(self.head(data(self._run(tokens, packing, cache, last_row)))))

    def _next(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        least: np.ndarray,
        offsets: np.ndarray,
        cache: Cache,
        step: NextTokens | None,
    ) -> tuple[NextTokens, np.ndarray]:
        """Logits [n, V] after one more token [n] of each of n sequences of these lengths.

        Every such step makes the same calls of the core, so they are replayed: `step` is the one
        before. The result is overwritten by the next one. `least` as in `KVCache`.
        """
        longest = np.maximum(lengths + 1, least)
        rotary = self._rotary(int(longest.max()))
        state = (self, Module.assignments, *rotary[0], *rotary[1])
        if step is None or not step.holds(state):
            step = NextTokens(state, len(tokens))
        step.tokens[:], step.positions[:] = tokens, lengths + self._shift(longest)
        packing = Packing(offsets, step.positions, rotary)
        return step, step.replay(lambda: self._logits(step.tokens, packing, cache))

    def make_cache(self) -> KVCache:
        """An empty key-value cache for `step`."""
        return KVCache(self.windows)

    def make_batch_cache(self, slots: int) -> BatchCache:
        """An empty cache of up to `slots` sequences for `step_each`."""
        return BatchCache(self.windows, slots)

    def cache_bytes(self, lengths: Sequence[int]) -> int:
        """What keys and values of sequences of up to these lengths take at most, together."""
        c, total = self.config, 0
        for layer in self.layers:
            rows = sum(rows_needed(layer.self_attn.window, n) for n in lengths)
            both = 2 * c.num_key_value_heads * c.head_dim
            total += 4 * rows * (c.hidden_size if layer.self_attn.taps else both)
        return total

    @property
    def windows(self) -> list[int]:
        """The window of each layer's attention, 0 for none; of a convolution its taps."""
        return [layer.self_attn.window for layer in self.layers]

    def config_of_layers(self) -> ModelConfig:
        """The configuration, for the layers that the model has: some may have been taken away."""
        config, mixture, windows = self.config, self.config.mixture, self.windows
        rotated = [layer.self_attn.rotated for layer in self.layers]
        dense = tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.mlp, MLP))
        count = config.num_hidden_layers
        if windows == [config.window(i) for i in range(count)] and rotated == [
            config.rotated(i) for i in range(count)
        ]:
            if mixture is None or dense == mixture.dense_layers:
                return config
        types = None
        if config.sliding_window is not None:
            types = [SLIDING if window else FULL for window in windows]
        elif config.family.short_conv:
            types = [CONV if layer.self_attn.taps else FULL for layer in self.layers]
        if mixture is not None:
            mixture = dataclasses.replace(mixture, dense_layers=dense)
        return dataclasses.replace(
            config,
            num_hidden_layers=len(windows),
            layer_types=types,
            no_rope_layers=None if all(rotated) else [int(one) for one in rotated],
            mixture=mixture,
        )

    def _tokens(self, tokens: Any, ndim: int) -> np.ndarray:
        array = i32(tokens, "tokens")
        if array.ndim != ndim:
            raise ValueError(
                f"tokens must have {ndim} dimension{'s' * (ndim > 1)}, got shape {array.shape}"
            )
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            where = tuple(int(i) for i in np.argwhere(outside)[0])
            shown = where[0] if ndim == 1 else where
            raise ValueError(
                f"token id {array[where]} at position {shown} is outside the vocabulary "
                f"[0, {self.vocab_size})"
            )
        return array

    def fuse(self, dequantize: bool = False) -> Model:
        """Merges all adapters into their base layers, see `fusing.fuse_modules`."""
        fuse_modules(self, dequantize)
        return self

    def save(self, path: Any, tokenizer: Any = None, overwrite: bool = False) -> None:
        """Writes a Hugging Face folder: config.json, model.safetensors and the tokenizer's files.

        See `saving.save_model`. A model in the folder is moved to `previous-N`; `overwrite`
        replaces it.
        """
        from pyloss.models.saving import save_model

        save_model(self, path, tokenizer, overwrite=overwrite)
