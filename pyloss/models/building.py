"""`build_model`: the transformer's modules over the tensors of a source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pyloss import ops
from pyloss.io.bars import watched
from pyloss.models.config.gemma4 import Gemma4
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.files.sources import Source
from pyloss.models.gemma4 import (
    Gemma4Attention,
    Gemma4Decoder,
    Gemma4Layer,
    Gemma4Model,
    Gemma4Router,
)
from pyloss.models.layers import (
    GATED_UNITS,
    MLP,
    AfterNormLayer,
    Attention,
    BlockSparseLayer,
    DecoderLayer,
    FusedAttention,
    FusedMLP,
    PostNormLayer,
    SharedExpertLayer,
    SharedMLP,
    SharedMLPLayer,
)
from pyloss.models.lfm2 import (
    NAMES as LFM2_NAMES,
    Lfm2Attention,
    Lfm2ConvLayer,
    Lfm2Decoder,
    Lfm2Layer,
    Lfm2MLP,
    ShortConv,
)
from pyloss.models.mamba import (
    GroupedNorm,
    MambaExpertsLayer,
    MambaMixer,
    MambaMLPLayer,
    MambaSharedExpertLayer,
)
from pyloss.models.mixers import Taps
from pyloss.models.moe import GraniteMoe, Router, SharedMoe, SigmoidMoe, SparseMoe, SwitchGLU
from pyloss.models.qwen3_5 import DeltaLayer, FusedDeltaNet, GatedAttention, GatedDeltaNet
from pyloss.models.transformer import Decoder, Model
from pyloss.nn import Embedding, Linear, RMSNorm, SwitchLinear
from pyloss.weights.weight import Weight

# The norms of a layer that has them before and after both halves, in the order of `PostNormLayer`.
_BOTH_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def build_model(config: ModelConfig, source: Source) -> Model:
    """A model over the tensors of `source`, its parameters frozen, in evaluation mode.

    Raises FormatError naming the first tensor that is missing or that no module takes.
    """
    source.refuse_missing_layers(config.num_hidden_layers)
    builder = _Builder(config, source)
    table = source.matrix("model.embed_tokens", config.vocab_size, config.hidden_size)
    embedding = Embedding.from_weight(table)
    numbers = watched(range(config.num_hidden_layers), "loading the model", "layer")
    layers = [builder.layer(i) for i in numbers]
    norm = builder.layer_norm(builder.named("model", "norm"))
    decoder: Decoder
    if config.gemma4 is not None:
        decoder = Gemma4Decoder(embedding, layers, norm, builder.layer_tables(config.gemma4))
    else:
        decoder = (Lfm2Decoder if config.family.short_conv else Decoder)(embedding, layers, norm)
    head = builder.head(table)
    config = replace(config, tie_word_embeddings=head is None)
    source.refuse_leftovers()
    model = (Model if config.gemma4 is None else Gemma4Model)(config, decoder, head)
    model.freeze()
    return model.eval()  # type: ignore[return-value]


class _Builder:
    """The parts of a model; `at` is the name of the module that is built."""

    def __init__(self, config: ModelConfig, source: Source) -> None:
        self.config = config
        self.source = source
        self.lfm2 = config.family.short_conv

    def named(self, at: str, name: str) -> str:
        """The module `name` of a block in the file."""
        return f"{at}.{LFM2_NAMES.get(name, name) if self.lfm2 else name}"

    def linear(
        self, at: str, rows: int, cols: int, bias: bool = False, rotary: bool = False
    ) -> Linear:
        offset = self.source.array(f"{at}.bias", rows, rotary=rotary) if bias else None
        return Linear.from_weight(self.source.matrix(at, rows, cols, rotary=rotary), offset)

    def head(self, table: Weight) -> Linear | None:
        """The output head, or None if it shares the embedding's `table`.

        As in transformers, `tie_word_embeddings` yields to a head in the file that differs from it.
        """
        c = self.config
        if c.tie_word_embeddings and not self.source.has("lm_head.weight"):
            return None
        if self.source.lacks_head():
            raise ValueError(
                f"{self.source.file.path}: there is no output head (lm_head.weight), and "
                "tie_word_embeddings is false: an embedding model without a head of its own is "
                "not supported"
            )
        weight = self.source.matrix("lm_head", c.vocab_size, c.hidden_size)
        return (
            None if c.tie_word_embeddings and _same(weight, table) else Linear.from_weight(weight)
        )

    def norm(self, at: str, dims: int) -> RMSNorm:
        layer = RMSNorm(dims, self.config.rms_norm_eps, self.config.family.norm_offset)
        layer.weight = self.source.norm(at, dims)
        return layer

    def layer_norm(self, at: str) -> RMSNorm:
        """A norm of hidden states, which `Model` divides by the residual multiplier."""
        layer = self.norm(at, self.config.hidden_size)
        layer.eps /= (self.config.residual_multiplier or 1.0) ** 2
        return layer

    def attention(self, at: str, i: int) -> Attention:
        c, family = self.config, self.config.family
        width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        bias = c.attention_bias or family.qkv_bias
        o_proj = (self.named(at, "o_proj"), c.hidden_size, width, c.attention_bias)
        if family.fused:
            rows = width + 2 * kv_width
            qkv_proj = self.linear(f"{at}.qkv_proj", rows, c.hidden_size, bias)
            return FusedAttention(c, i, qkv_proj, self.linear(*o_proj))
        q_norm = k_norm = None
        if family.qk_norm:
            each = family.qk_norm == "head"
            q_norm = self.norm(self.named(at, "q_norm"), c.head_dim if each else width)
            k_norm = self.norm(self.named(at, "k_norm"), c.head_dim if each else kv_width)
        gated = family.linear_attention
        cls = Lfm2Attention if self.lfm2 else GatedAttention if gated else Attention
        q_width = 2 * width if gated else width
        return cls(
            c,
            i,
            self.linear(f"{at}.q_proj", q_width, c.hidden_size, bias, rotary=True),
            self.linear(f"{at}.k_proj", kv_width, c.hidden_size, bias, rotary=True),
            self.linear(f"{at}.v_proj", kv_width, c.hidden_size, bias),
            self.linear(*o_proj),
            q_norm,
            k_norm,
        )

    def mlp(self, at: str, inner: int | None = None) -> MLP:
        """An MLP of the size `inner`, or of intermediate_size."""
        c = self.config
        hidden, bias = c.hidden_size, c.mlp_bias
        inner = c.intermediate_size if inner is None else inner
        if c.family.fused:
            return FusedMLP(
                self.linear(f"{at}.gate_up_proj", 2 * inner, hidden),
                self.linear(f"{at}.down_proj", hidden, inner),
                c.family.activation,
            )
        return (Lfm2MLP if self.lfm2 else MLP)(
            self.linear(self.named(at, "gate_proj"), inner, hidden, bias),
            self.linear(self.named(at, "up_proj"), inner, hidden, bias),
            self.linear(self.named(at, "down_proj"), hidden, inner, bias),
            c.family.activation,
        )

    def experts(self, at: str, mixture: Mixture) -> SparseMoe:
        hidden = self.config.hidden_size
        family = self.config.family.experts
        fused = family is not None and family.fused
        # The gate first: its shape bounds the number of experts, which may have single tensors.
        gate = self.linear(f"{at}.{'router.layer' if fused else 'gate'}", mixture.count, hidden)
        switch_mlp = self.switch_glu(at, mixture.count, mixture.size)
        if fused:
            return GraniteMoe(Router(gate), switch_mlp, mixture.active, mixture.normalize)
        routed = gate, switch_mlp, mixture.active, mixture.normalize
        if family is not None and family.sigmoid:
            bias = self.source.array(f"{at}.expert_bias", mixture.count) if mixture.bias else None
            return SigmoidMoe(*routed, bias, mixture.scaling)
        if not mixture.shared_size:
            return SparseMoe(*routed)
        shared_expert = self.mlp(f"{at}.shared_expert", mixture.shared_size)
        shared_gate = self.linear(f"{at}.shared_expert_gate", 1, hidden)
        return SharedMoe(*routed, shared_expert, shared_gate)

    def convolution(self, at: str) -> ShortConv:
        c = self.config
        size, bias = c.hidden_size, c.conv_bias
        taps = self.source.taps(f"{at}.conv", size, c.conv_L_cache or 0)
        return ShortConv(
            self.linear(f"{at}.in_proj", 3 * size, size, bias),
            Taps(taps, self.source.array(f"{at}.conv.bias", size) if bias else None),
            self.linear(f"{at}.out_proj", size, size, bias),
        )

    def delta_net(self, at: str) -> GatedDeltaNet:
        c, delta = self.config, self.config.delta
        assert delta is not None
        hidden, values, width = c.hidden_size, delta.values, delta.values * delta.value_dim
        taps = self.source.taps(f"{at}.conv1d", delta.columns, delta.taps)
        norm = RMSNorm(delta.value_dim, c.rms_norm_eps)  # without an offset
        norm.weight = self.source.plain_norm(f"{at}.norm", delta.value_dim)
        rest = (
            Taps(taps, None),
            self.source.array(f"{at}.dt_bias", values),
            self.source.rates(f"{at}.A_log", values),
            norm,
            self.linear(f"{at}.out_proj", hidden, width),
        )
        if c.family.delta_fused:
            return FusedDeltaNet(
                c,
                self.linear(f"{at}.in_proj_qkvz", delta.columns + width, hidden),
                self.linear(f"{at}.in_proj_ba", 2 * values, hidden),
                *rest,
            )
        return GatedDeltaNet(
            c,
            self.linear(f"{at}.in_proj_qkv", delta.columns, hidden),
            self.linear(f"{at}.in_proj_z", width, hidden),
            self.linear(f"{at}.in_proj_b", values, hidden),
            self.linear(f"{at}.in_proj_a", values, hidden),
            *rest,
        )

    def mamba(self, at: str, i: int) -> MambaMixer:
        c, sizes = self.config, self.config.mamba
        assert sizes is not None
        hidden, inner, bias = c.hidden_size, sizes.inner, sizes.proj_bias
        taps = self.source.taps(f"{at}.conv1d", sizes.columns, sizes.taps)
        offset = self.source.array(f"{at}.conv1d.bias", sizes.columns) if sizes.conv_bias else None
        norm = RMSNorm(inner, c.rms_norm_eps)
        if sizes.groups > 1:
            norm = GroupedNorm(inner, sizes.groups, c.rms_norm_eps)
        norm.weight = self.source.plain_norm(f"{at}.norm", inner)
        return MambaMixer(
            sizes,
            c.rotated(i),
            self.linear(f"{at}.in_proj", inner + sizes.columns + sizes.heads, hidden, bias),
            Taps(taps, offset),
            self.source.array(f"{at}.dt_bias", sizes.heads),
            self.source.rates(f"{at}.A_log", sizes.heads),
            self.source.array(f"{at}.D", sizes.heads),
            norm,
            self.linear(f"{at}.out_proj", hidden, inner, bias),
        )

    def lfm2_layer(self, at: str, i: int) -> DecoderLayer:
        mixture, mlp = self.config.mixture, f"{at}.feed_forward"
        fed: MLP | SparseMoe
        if mixture is None or i in mixture.dense_layers:
            fed = self.mlp(mlp)
        else:
            fed = self.experts(mlp, mixture)
        norms = [self.layer_norm(f"{at}.{name}") for name in ("operator_norm", "ffn_norm")]
        if self.config.convolved(i):
            return Lfm2ConvLayer(self.convolution(f"{at}.conv"), fed, *norms)
        return Lfm2Layer(self.attention(f"{at}.self_attn", i), fed, *norms)

    def shared_mlp(self, at: str, inner: int) -> SharedMLP:
        hidden = self.config.hidden_size
        return SharedMLP(
            self.linear(f"{at}.input_linear", 2 * inner, hidden),
            self.linear(f"{at}.output_linear", hidden, inner),
            self.config.family.activation,
        )

    def granite_layer(self, at: str, i: int) -> DecoderLayer:
        """A layer of a Granite with experts, or with a shared expert in their place."""
        mixture, shared_mlp = self.config.mixture, f"{at}.shared_mlp"
        scanned = self.config.scanned(i)
        mixer = self.mamba(f"{at}.mamba", i) if scanned else self.attention(f"{at}.self_attn", i)
        norms = [
            self.layer_norm(f"{at}.{name}")
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        if mixture is None:
            alone = self.shared_mlp(shared_mlp, self.config.intermediate_size)
            return (MambaMLPLayer if scanned else SharedMLPLayer)(mixer, alone, *norms)
        moe = self.experts(f"{at}.block_sparse_moe", mixture)
        if not mixture.shared_size:
            return (MambaExpertsLayer if scanned else BlockSparseLayer)(mixer, moe, *norms)
        shared = self.shared_mlp(shared_mlp, mixture.shared_size)
        cls = MambaSharedExpertLayer if scanned else SharedExpertLayer
        return cls(mixer, moe, shared, *norms)

    def layer_tables(self, options: Gemma4) -> tuple[Embedding, Linear, RMSNorm] | None:
        """The table of each layer's embeddings, the projection to its width, and their norm."""
        c, size = self.config, options.hidden_size_per_layer_input
        if not size:
            return None
        width = c.num_hidden_layers * size
        table = self.source.matrix(
            "model.embed_tokens_per_layer", options.vocab_size_per_layer_input, width
        )
        return (
            Embedding.from_weight(table),
            self.linear("model.per_layer_model_projection", width, c.hidden_size),
            self.norm("model.per_layer_projection_norm", size),
        )

    def gemma4_attention(self, at: str, i: int) -> Gemma4Attention:
        c = self.config
        dims, hidden = c.head_dim_of(c.window(i)), c.hidden_size
        width, kv_width = c.num_attention_heads * dims, c.key_value_heads_of(c.window(i)) * dims
        parts = ("k_proj", "v_proj", "k_norm")
        own = None
        if c.shared_from(i) is None:
            k, v = self.linear(f"{at}.k_proj", kv_width, hidden), None
            if c.window(i) or c.gemma4 is None or not c.gemma4.attention_k_eq_v:
                v = self.linear(f"{at}.v_proj", kv_width, hidden)
            own = k, v, self.norm(f"{at}.k_norm", dims)
        else:  # files may have them
            self.source.ignore([f"{at}.{name}.weight" for name in parts])
        return Gemma4Attention(
            c,
            i,
            self.linear(f"{at}.q_proj", width, hidden),
            self.linear(f"{at}.o_proj", hidden, width),
            self.norm(f"{at}.q_norm", dims),
            own,
        )

    def gemma4_layer(self, at: str, i: int, options: Gemma4) -> Gemma4Layer:
        hidden, size, own = self.config.hidden_size, options.hidden_size_per_layer_input, None
        if size:
            own = (
                self.linear(f"{at}.per_layer_input_gate", size, hidden),
                self.linear(f"{at}.per_layer_projection", hidden, size),
                self.layer_norm(f"{at}.post_per_layer_input_norm"),
            )
        return Gemma4Layer(
            self.gemma4_attention(f"{at}.self_attn", i),
            self.mlp(f"{at}.mlp", self.config.inner_size(i)),
            [self.layer_norm(f"{at}.{name}") for name in _BOTH_NORMS],
            self.source.array(f"{at}.layer_scalar", 1),
            own,
            self.gemma4_experts(at, options) if options.num_experts else None,
        )

    def gemma4_experts(
        self, at: str, options: Gemma4
    ) -> tuple[Gemma4Router, SwitchGLU, list[RMSNorm]]:
        hidden, count, inner = (
            self.config.hidden_size,
            options.num_experts,
            options.moe_intermediate_size,
        )
        router = Gemma4Router(
            self.linear(f"{at}.router.proj", count, hidden),
            self.source.array(f"{at}.router.scale", hidden),
            self.source.array(f"{at}.router.per_expert_scale", count),
            options.top_k_experts,
            self.config.rms_norm_eps,
        )
        norms = [
            self.layer_norm(f"{at}.{name}")
            for name in (
                "post_feedforward_layernorm_1",
                "pre_feedforward_layernorm_2",
                "post_feedforward_layernorm_2",
            )
        ]
        activation = GATED_UNITS[self.config.family.activation]
        return router, self.switch_glu(at, count, inner, activation), norms

    def switch_glu(
        self, at: str, count: int, inner: int, gated: Callable[..., Any] = ops.swiglu
    ) -> SwitchGLU:
        """The matrices of `count` experts in the block `at`."""
        hidden = self.config.hidden_size
        shapes = {
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }
        stacks = [
            self.source.experts(f"{at}.switch_mlp.{name}", count, *shape)
            for name, shape in shapes.items()
        ]
        gate, up, down = map(SwitchLinear.from_weight, stacks)
        return SwitchGLU(gate, up, down, gated)

    def layer(self, i: int) -> DecoderLayer:
        at = f"model.layers.{i}"
        if self.config.family.experts and self.config.family.experts.fused:
            return self.granite_layer(at, i)
        if self.config.gemma4 is not None:
            return self.gemma4_layer(at, i, self.config.gemma4)
        if self.lfm2:
            return self.lfm2_layer(at, i)
        cls: type[DecoderLayer] = DecoderLayer
        names: tuple[str, ...] = _BOTH_NORMS[:2]
        if self.config.family.post_norms:
            cls, names = PostNormLayer, _BOTH_NORMS
        if not self.config.family.pre_norms:
            cls, names = AfterNormLayer, (_BOTH_NORMS[1], _BOTH_NORMS[3])
        norms = [self.layer_norm(f"{at}.{name}") for name in names]
        mixer: Attention | GatedDeltaNet
        if self.config.linear(i):
            cls, mixer = DeltaLayer, self.delta_net(f"{at}.linear_attn")
        else:
            mixer = self.attention(f"{at}.self_attn", i)
        mixture, experts = self.config.mixture, self.config.family.experts
        if mixture is None or experts is None or i in mixture.dense_layers:
            return cls(mixer, self.mlp(f"{at}.mlp"), *norms)
        if experts.block == "block_sparse_moe":
            cls = BlockSparseLayer
        return cls(mixer, self.experts(f"{at}.{experts.block}", mixture), *norms)


def _same(a: Weight, b: Weight) -> bool:
    """Whether two matrices of the same shape hold the same values, compared some rows at a time."""
    if (
        a.format == b.format
        and a.groups is None
        and b.groups is None
        and not (a.head_dim or b.head_dim)
    ):
        return np.array_equal(a.raw, b.raw)
    rows = a.shape[0]
    return all(
        np.array_equal(
            a.slice_rows(i, min(i + 1024, rows)).dequantize(),
            b.slice_rows(i, min(i + 1024, rows)).dequantize(),
        )
        for i in range(0, rows, 1024)
    )
