"""Gemma 4's decoder: embeddings of tokens for each layer, and keys and values that layers share.

Its layers take more than hidden states, so `Gemma4Model` has a walk over them of its own. The
options are those of `config.gemma4`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pyloss import ops
from pyloss.autograd.checkpointing import checkpoint
from pyloss.autograd.tape import data
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.layers import (
    GATED_UNITS,
    MLP,
    Attention,
    Cache,
    Packing,
    PostNormLayer,
    normed_heads,
)
from pyloss.models.moe import SwitchGLU
from pyloss.models.transformer import Decoder, Model
from pyloss.nn import Embedding, Linear, Module, RMSNorm, project_each
from pyloss.runtime.device import on_device_of, to_device

#: Keys and values [N, kv heads * D] of a layer and the offsets of the sequences among them: of
#: this step's tokens, or a cache's stores.
Held = tuple[Any, Any, Any]


class Gemma4Attention(Attention):
    """`Attention` whose values are normed too, or that takes another layer's keys and values.

    In the latter case it has no `k_proj`, `v_proj` and `k_norm`. Without `v_proj` alone, keys
    before their norm are values too.
    """

    recordable = False

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        q_proj: Linear,
        o_proj: Linear,
        q_norm: RMSNorm,
        own: tuple[Linear, Linear | None, RMSNorm] | None,
    ):
        Module.__init__(self)
        self.q_proj, self.o_proj = q_proj, o_proj
        if own is not None:
            self.k_proj = own[0]
            if own[1] is not None:
                self.v_proj = own[1]
        self._k_is_v = own is not None and own[1] is None
        self._settle(config, layer, q_norm, None if own is None else own[2])
        self._head_dim = config.head_dim_of(self._window)
        self._kv_heads = config.key_value_heads_of(self._window)
        self._shared_from = config.shared_from(layer)
        self._v_norm = RMSNorm(self._head_dim, config.rms_norm_eps, affine=False)

    @property
    def shared_from(self) -> int | None:
        """The layer whose keys and values this one takes; None if it makes its own."""
        return self._shared_from

    def attend(
        self,
        x: Any,
        packing: Packing,
        held: Held | None,
        cache: Cache | None = None,
        layer: int = 0,
        last_row: Packing | None = None,
    ) -> tuple[Any, Held]:
        """The result [N, hidden], and the keys and values: `held`, or new ones."""
        asking = x if last_row is None else x[-1:]
        where, table = packing if last_row is None else last_row, int(self._window > 0)
        if held is None:
            of_keys = (self.k_proj,) if self._k_is_v else (self.k_proj, self.v_proj)
            if last_row is None:
                q, k, *rest = project_each(x, self.q_proj, *of_keys)
            else:
                q, (k, *rest) = self.q_proj(asking), project_each(x, *of_keys)
            v = rest[0] if rest else k
            (k,) = self.rotate(packing, table, normed_heads(k, self.k_norm))
            v = self._v_norm(v.reshape(-1, self._head_dim)).reshape(*k.shape)
            held = k, v, None
            if cache is not None:
                held = cache.append(layer, data(k), data(v))
        else:
            q = self.q_proj(asking)
        (q,) = self.rotate(where, table, normed_heads(q, self.q_norm))
        keys, values, k_offsets = held
        return self.o_proj(self.mixed(q, keys, values, where, k_offsets)), held


class Gemma4Router(Module):
    """Chooses the `k` experts of a token, by its norm times `scale`; the weights have factors.

    `scale` [hidden] and `per_expert_scale` [E] are not trained.
    """

    scale: np.ndarray
    per_expert_scale: np.ndarray

    def __init__(
        self, proj: Linear, scale: np.ndarray, per_expert_scale: np.ndarray, k: int, eps: float
    ):
        super().__init__()
        self.proj, self._k = proj, k
        self.register_buffer("scale", scale)
        self.register_buffer("per_expert_scale", per_expert_scale)
        self._norm = RMSNorm(len(scale), eps, affine=False)

    def __call__(self, x: Any) -> tuple[ops.Routing, Any]:
        """The visits of x [N, hidden], and their weights [M]."""
        scaled = ops.scale_heads(self._norm(x), self.scale)
        logits = self.proj(ops.scale(scaled, x.shape[1] ** -0.5))
        routing, weights = ops.route(logits, self._k, True)
        visits = np.diff(np.asarray(to_device(routing.offsets, "cpu")))
        scales = np.asarray(to_device(self.per_expert_scale, "cpu"))
        factors = on_device_of(data(weights), np.repeat(scales, visits))
        return routing, ops.scale_rows(weights.reshape(-1, 1), factors).reshape(-1)


class Gemma4Layer(PostNormLayer):
    """A `PostNormLayer`, then x + norm(projection(gelu(gate(x)) * inputs)), then a factor.

    The last part needs `own`, the modules of that sum; without it, only the factor follows. With
    `experts` their results are added to the MLP's.
    """

    recordable = False
    layer_scalar: np.ndarray

    def __init__(
        self,
        self_attn: Gemma4Attention,
        mlp: MLP,
        norms: list[RMSNorm],
        layer_scalar: np.ndarray,
        own: tuple[Linear, Linear, RMSNorm] | None,
        experts: tuple[Gemma4Router, SwitchGLU, list[RMSNorm]] | None = None,
    ):
        super().__init__(self_attn, mlp, *norms)
        if experts is not None:
            self.router, self.switch_mlp = experts[:2]
            (
                self.post_feedforward_layernorm_1,
                self.pre_feedforward_layernorm_2,
                self.post_feedforward_layernorm_2,
            ) = experts[2]
        self.register_buffer("layer_scalar", layer_scalar)
        if own is not None:
            self.per_layer_input_gate, self.per_layer_projection = own[:2]
            self.post_per_layer_input_norm = own[2]

    def feed(self, x: Any) -> Any:
        """See `DecoderLayer`; experts get x before the MLP's norm, and have norms of their own."""
        if "router" not in vars(self):
            return super().feed(x)
        fed = self.post_feedforward_layernorm_1(self.mlp(self.before_mlp(x)))
        visited = self.switch_mlp(self.pre_feedforward_layernorm_2(x), *self.router(x))
        return ops.add(x, self.after_mlp(ops.add(fed, self.post_feedforward_layernorm_2(visited))))

    def walk(
        self,
        x: Any,
        inputs: Any,
        packing: Packing,
        held: Held | None,
        cache: Cache | None = None,
        layer: int = 0,
        last_row: Packing | None = None,
    ) -> tuple[Any, Held]:
        """Hidden states after the layer, and keys and values as in `Gemma4Attention`.

        `inputs` [N, P] are the layer's embeddings of the tokens, or None.
        """
        mixed, held = self.self_attn.attend(
            self.before_mixing(x), packing, held, cache, layer, last_row
        )
        x = self.feed(ops.add(x if last_row is None else x[-1:], self.after_mixing(mixed)))
        if inputs is not None:
            inputs = inputs if last_row is None else inputs[-1:]
            gated = GATED_UNITS["gelu_pytorch_tanh"](self.per_layer_input_gate(x), inputs)
            added = self.post_per_layer_input_norm(self.per_layer_projection(gated))
            x = ops.add(x, added)
        factor = float(self.layer_scalar[0])
        return (x if factor == 1 else ops.scale(x, factor)), held


class Gemma4Decoder(Decoder):
    """`Decoder` with a table of each layer's embeddings.

    `tables` are the table [V, layers * P], the projection of hidden states to the same width and
    the norm [P] of its parts; None if layers have no embeddings.
    """

    def __init__(
        self,
        embed_tokens: Embedding,
        layers: list[Any],
        norm: RMSNorm,
        tables: tuple[Embedding, Linear, RMSNorm] | None,
    ):
        super().__init__(embed_tokens, layers, norm)
        if tables is not None:
            self.embed_tokens_per_layer, self.per_layer_model_projection = tables[:2]
            self.per_layer_projection_norm = tables[2]

    def inputs(self, tokens: np.ndarray, x: Any) -> Any:
        """The embeddings [N, layers, P] of all layers, for scaled embeddings x [N, hidden].

        None if layers have none.
        """
        if "per_layer_projection_norm" not in vars(self):
            return None
        norm = self.per_layer_projection_norm
        width, hidden = len(norm.weight), x.shape[1]
        parts = (-1, self.embed_tokens_per_layer.weight.shape[1] // width, width)
        projected = ops.scale(self.per_layer_model_projection(x), hidden**-0.5)
        own = ops.scale(self.embed_tokens_per_layer(tokens), width**0.5)
        return ops.scale(ops.add(norm(projected.reshape(*parts)), own.reshape(*parts)), 0.5**0.5)


class Gemma4Model(Model):
    """`Model` over Gemma 4's layers."""

    model: Gemma4Decoder

    def _walk(
        self,
        x: Any,
        tokens: np.ndarray,
        packing: Packing,
        cache: Cache | None,
        last_row: Packing | None,
    ) -> Iterator[Any]:
        """See `Model`. With checkpointing each layer runs again as a whole."""
        inputs = self.model.inputs(tokens, x)
        made: dict[int, Held] = {}
        layers: list[Any] = self.layers
        for i, layer in enumerate(layers):
            own = None if inputs is None else inputs[:, i]
            last = last_row if i == len(layers) - 1 else None
            source = layer.self_attn.shared_from
            held = None if source is None else made[source]
            if not self.grad_checkpoint or cache is not None:
                x, made[i] = layer.walk(x, own, packing, held, cache, i, last)
            elif held is None:

                def both(x: Any, own: Any, layer: Any = layer) -> Any:
                    x, (k, v, _) = layer.walk(x, own, packing, None)
                    return x, k, v

                x, k, v = checkpoint(both, x, own)
                made[i] = k, v, None
            else:

                def one(x: Any, own: Any, k: Any, v: Any, layer: Any = layer) -> Any:
                    return layer.walk(x, own, packing, (k, v, None))[0]

                x = checkpoint(one, x, own, *held[:2])
            yield x

    @property
    def cached_windows(self) -> list[int]:
        """See `Model`: the first layers make all keys and values."""
        own = [layer for layer in self.layers if layer.self_attn.shared_from is None]
        return [layer.self_attn.window for layer in own]
