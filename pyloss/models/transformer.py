"""`Model`, the causal language model over `layers`: hidden states, logits, steps of generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pyloss import ops
from pyloss.autograd.checkpointing import checkpoint
from pyloss.autograd.scope import no_grad
from pyloss.autograd.tape import data
from pyloss.checks.numbers import whole
from pyloss.models.batch_cache import BatchCache, PromptCache, rows_needed
from pyloss.models.cache import PREFILL, KVCache, NextTokens
from pyloss.models.config.fields import CONV, FULL, LINEAR, MAMBA, SLIDING
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.config.rope_scaling import long_from
from pyloss.models.fusing import fuse_modules
from pyloss.models.layers import HALF_CHECKPOINT_TOKENS, MLP, Cache, DecoderLayer, Packing
from pyloss.models.rope import RopeTable
from pyloss.nn import Embedding, Linear, Module, RMSNorm
from pyloss.ops.arrays import empty, i32
from pyloss.runtime.device import on_device_of
from pyloss.weights.weight import Weight

#: Sequences of one step of `Model.step_each`: the core sums products of up to so many rows in the
#: order of one row (SKINNY_M of csrc/kernels/matmul/product.h).
MOST_ROWS = 32


def _packs(lengths: Sequence[int], most: int) -> list[list[int]]:
    """The places of lengths, in groups whose sum is at most `most`; longer ones are alone."""
    packs: list[list[int]] = []
    free: list[int] = []
    for i, length in enumerate(lengths):
        at = next((j for j, room in enumerate(free) if room >= length), len(packs))
        if at == len(packs):
            packs.append([])
            free.append(most)
        packs[at].append(i)
        free[at] -= length
    return packs


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
        name: of the file or folder that it was read from, or of its place on the hub.
        adapter_config: the settings of the adapters, as adapter_config.json has them.
        trained_from: what is known of the weights before full fine-tuning
            (`tuner.adapters.base.Base`).
        kept_of_adapter: the share of the adapters that fusing into quantized weights kept, if it
            is small.
        own_tables: whether the embedding or the head is another than in the model's files, so that
            adapters carry them.
    """

    def __init__(self, config: ModelConfig, decoder: Decoder, lm_head: Linear | None):
        super().__init__()
        self.config = config
        self.model = decoder
        self.lm_head = lm_head
        self.name: str | None = None
        self.adapter_config: dict[str, Any] | None = None
        self.trained_from: Any = None
        self.kept_of_adapter: float | None = None
        self.own_tables = False
        self._rope = [RopeTable(config), RopeTable(config, local=True)]
        if config.query_growth is not None:
            self._rope.append(RopeTable(config, queries=True))
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
        return self._checkpoint or any(getattr(layer, "recomputed", False) for layer in self.layers)

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

    def _rotary(self, longest: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        return tuple(table.upto(longest) for table in self._rope)

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
        for i, after in enumerate(self._walk(x, tokens, packing, cache, last_row)):
            x = after
            if between is not None and i in between:
                between[i] = x if multiplier == 1 else ops.scale(x, multiplier)
        x = self.model.norm(x)
        # Here, and not on logits: all losses and heads take these hidden states.
        scaling = self.config.logits_scaling or 1.0
        return x if scaling == 1 else ops.scale(x, 1 / scaling)

    def _walk(
        self,
        x: Any,
        tokens: np.ndarray,
        packing: Packing,
        cache: Cache | None,
        last_row: Packing | None,
    ) -> Iterator[Any]:
        """The hidden states after each layer, for embeddings x of the tokens."""
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
            yield x

    def hidden(self, tokens: Any, offsets: Any) -> Any:
        """Last hidden states [N, hidden] of packed token ids [N], divided by logits_scaling.

        int32 `offsets` [S + 1] bound the sequences, from 0 to N.
        """
        return self._run(*self._packed(tokens, offsets))

    def hidden_states(
        self, tokens: Any, offsets: Any = None, layers: Sequence[int] | None = None
    ) -> tuple[Any, list[Any]]:
        """`hidden`, and the outputs [N, hidden] of the decoder layers with these numbers.

        Without `offsets` the tokens are one sequence, without `layers` all layers are meant.
        """
        count = len(self.layers)
        layers = range(count) if layers is None else layers
        offsets = [0, len(self._tokens(tokens, 1))] if offsets is None else offsets
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

    def step_all(self, tokens: Any, cache: KVCache) -> np.ndarray:
        """Logits [n, V] of token ids [n], n >= 1, which continue the sequence in `cache`.

        The last row is that of `step`.
        """
        tokens = self._tokens(tokens, 1)
        if len(tokens) == 1 or self._long_from is not None:
            return np.stack([self.step(tokens[i : i + 1], cache) for i in range(len(tokens))])
        cache.reserve(len(tokens))
        packing = self._pack(np.array([len(tokens)]), cache.length, cache.least)
        logits = self._logits(tokens, packing, cache)
        cache.advance(len(tokens))
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
            cache.reserve(own, [1] * n)
            cache.next[n], found = self._next(
                tokens[part],
                cache.lengths[own],
                cache.least[own],
                cache.offsets,
                cache,
                cache.next.get(n),
            )
            cache.advance(own, [1] * n)
            if logits is None:
                return found
            logits[part] = found
        assert logits is not None
        return logits

    def read_each(
        self, prompts: Sequence[np.ndarray], cache: BatchCache, slots: Sequence[int]
    ) -> np.ndarray:
        """Logits [n, V] after token ids [T], T >= 1, that continue the sequence in each slot.

        They have the bits of `step`. Short prompts are read together: a product of few rows takes
        little longer than one of a single row.
        """
        logits = empty(len(slots), self.vocab_size)
        for part in _packs([len(p) for p in prompts], 1 if self._long_from else MOST_ROWS):
            part.sort(key=lambda i: slots[i])
            own = [int(slots[i]) for i in part]
            if len(part) > 1:
                logits[part] = self._read_together([prompts[i] for i in part], cache, own)
                continue
            for begin in range(0, len(prompts[part[0]]), PREFILL):
                tokens = prompts[part[0]][begin : begin + PREFILL]
                logits[part[0]] = self.step(tokens, cache.prompt(own[0]))
        return logits

    def _read_together(
        self, prompts: Sequence[np.ndarray], cache: BatchCache, slots: list[int]
    ) -> np.ndarray:
        """`read_each` in one pass, for slots that ascend."""
        counts = [len(p) for p in prompts]
        cache.reserve(slots, counts)
        past = cache.lengths[slots]
        positions = np.concatenate([np.arange(n) + at for n, at in zip(counts, past, strict=True)])
        rotary = self._rotary(int((past + counts).max()))
        packing = Packing(cache.offsets, positions.astype(np.int32), rotary)
        tokens = self._tokens(np.concatenate(prompts), 1)
        with no_grad():
            hidden = data(self._run(tokens, packing, cache))
            last = on_device_of(hidden, (np.cumsum(counts) - 1).astype(np.int32))
            logits = np.asarray(data(self.head(ops.gather_rows(hidden, last))))
        cache.advance(slots, counts)
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
        state = (self, Module.assignments, *(array for pair in rotary for array in pair))
        if step is None or not step.holds(state):
            step = NextTokens(state, len(tokens))
        step.tokens[:], step.positions[:] = tokens, lengths + self._shift(longest)
        packing = Packing(offsets, step.positions, rotary)
        return step, step.replay(lambda: self._logits(step.tokens, packing, cache))

    def make_cache(self) -> KVCache:
        """An empty key-value cache for `step`."""
        return KVCache(self.cached_windows)

    def make_batch_cache(self, slots: int) -> BatchCache:
        """An empty cache of up to `slots` sequences for `step_each`."""
        return BatchCache(self.cached_windows, slots)

    def cache_bytes(self, lengths: Sequence[int]) -> int:
        """What keys and values of sequences of up to these lengths take at most, together."""
        total = 0
        for layer, window in zip(self.layers, self.cached_windows, strict=False):
            rows = sum(rows_needed(window, n) for n in lengths)
            of_row, of_sequence = layer.self_attn.cached
            total += 4 * (rows * of_row + len(lengths) * of_sequence)
        return total

    @property
    def windows(self) -> list[int]:
        """The window of each layer's attention, 0 for none; of a convolution its taps."""
        return [layer.self_attn.window for layer in self.layers]

    @property
    def cached_windows(self) -> list[int]:
        """The windows of the layers that a cache has rows for."""
        return self.windows

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
        elif config.family.short_conv or config.family.linear_attention:
            other = CONV if config.family.short_conv else LINEAR
            types = [other if layer.self_attn.taps else FULL for layer in self.layers]
        elif config.mamba is not None:
            types = [MAMBA if layer.self_attn.taps else FULL for layer in self.layers]
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
