"""`FAMILIES`: one record per model family, with everything but its sizes.

The readers of configurations use it. `building` and `transformer` handle each option in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyloss.models.config.gemma4 import DEFAULTS as GEMMA4_DEFAULTS


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that a family has in place of MLPs.

    Attributes:
        block: the block's name in a decoder layer.
        matrices: the names of an expert's gate, up and down in Hugging Face's files.
        own_size: experts have a size of their own, and some layers may have an MLP.
        normalize: whether the weights of a token's experts are divided by their sum; None: the
            file's norm_topk_prob decides.
        gguf_normalize: whether llama.cpp divides them; GGUF files do not say.
        shared: the key of config.json for the size of a further expert, which every token visits.
            A gate scales its result by the sigmoid of one number per token, unless `fused`.
        fused: experts' gates and ups are one tensor, and so are those of the shared expert, which
            is beside the block, without a gate. The router is router.layer.
        stacked: Hugging Face's files have the stacks experts.gate_up_proj, gates above ups, and
            experts.down_proj, where those of others have a matrix per expert.
        sigmoid: weights are sigmoids of the router's logits; use_expert_bias, routed_scaling_factor
            and num_dense_layers are in the configuration, see `Mixture`.
    """

    block: str = "mlp"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    own_size: bool = False
    normalize: bool | None = None
    gguf_normalize: bool = True
    shared: str | None = None
    fused: bool = False
    stacked: bool = False
    sigmoid: bool = False


@dataclass(frozen=True)
class Family:
    """A model family, which config.json names in model_type.

    Attributes:
        architecture: the class in transformers.
        gguf: general.architecture in GGUF.
        gguf_dense: the same of models without experts, whose shared expert is then the MLP; None:
            all models have experts, or none.
        gguf_interleaved: GGUF stores the rows of q and k with rotary pairs interleaved.
        qkv_bias: q, k and v always have biases, and o has none.
        qk_norm: RMS norms of q and k before the rotation, over each "head" or the whole "width".
        pre_norms: norms precede attention and the MLP.
        post_norms: norms follow attention and the MLP, and the names of the norms differ.
        norm_offset: the number that norms add to their weight; GGUF stores the sum.
        activation: the activation of the MLP's gate, by its name in transformers.
        fused: q, k and v are one matrix, and so are gate and up.
        partial_rotary: only the share partial_rotary_factor of each head rotates.
        longrope: positions are scaled by longrope or not at all.
        query_growth: llama_4_scaling_beta in rope_parameters, see `ModelConfig`.
        gguf_window: GGUF has the window of all layers, which llama.cpp does not apply.
        scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
        multipliers: embedding_multiplier, attention_multiplier, residual_multiplier and
            logits_scaling are in the configuration, see `ModelConfig`.
        unrotated_layers: no_rope_layers, or every no_rope_layer_interval-th layer, have no rotary
            positions.
        position_switch: position_embedding_type says whether layers have rotary positions.
        windows: the layers that may have a sliding window: "all"; "from": max_window_layers and
            later ones; "alternate": every second one before max_window_layers, from the first on;
            "periodic": all but every sliding_window_pattern-th; "fourth": all but every fourth;
            "unrotated": those without rotary positions; None: no layer.
        window_switch: there are windows only if use_sliding_window says so.
        local_rope: layers with a window have unscaled rotary positions. "own": their base is
            rope_local_base_freq; "same": it is rope_theta, unless rope_parameters have two.
        query_scalar: query_pre_attn_scalar, not head_dim, scales attention scores.
        softcaps: attention scores and logits have caps, attn_logit_softcapping and
            final_logit_softcapping.
        short_conv: layers have LFM2's names, and those of type "conv" a gated short convolution in
            place of attention.
        gemma4: layers are Gemma 4's, see `gemma4.Gemma4`; attention scores are not scaled.
        mamba: layers of type "mamba" have the scan of Mamba-2 in place of attention, see `Mamba2`.
        linear_attention: layers of type "linear_attention" have the gated delta rule in place of
            attention, see `DeltaNet`; the others' attention has a gate.
        delta_fused: the delta rule's projections are in_proj_qkvz and in_proj_ba, which have the
            rows of one head of keys after those of another, in GGUF too.
        experts: the mixture of experts; None if MLPs are dense.
        defaults: transformers' values for missing keys of config.json that differ from
            `fields.DEFAULTS`. Only numbers: the fields above are the family's options.
        gguf_own_windows: llama.cpp has the family's windows where a GGUF file says nothing, and no
            other pattern.
        gguf_largest: the layers of the published model whose query_pre_attn_scalar is hidden_size /
            num_attention_heads in llama.cpp; it is head_dim for others.
        mlx_wrapped: mlx-lm has the family only inside a model with a part for images, so that its
            modules' names begin with language_model.
        gguf_head: llama.cpp needs a head, so a tied one is written as a second tensor.
        gguf_lacks: the names in `gguf_writer.LACKS` of options that llama.cpp does not have for
            this architecture.
    """

    architecture: str
    gguf: str
    gguf_dense: str | None = None
    gguf_interleaved: bool = False
    qkv_bias: bool = False
    qk_norm: str | None = None
    pre_norms: bool = True
    post_norms: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    fused: bool = False
    partial_rotary: bool = False
    longrope: bool = False
    query_growth: bool = False
    gguf_window: bool = False
    scaled_embedding: bool = False
    multipliers: bool = False
    unrotated_layers: bool = False
    position_switch: bool = False
    windows: str | None = None
    window_switch: bool = False
    local_rope: str | None = None
    query_scalar: bool = False
    softcaps: bool = False
    short_conv: bool = False
    gemma4: bool = False
    mamba: bool = False
    linear_attention: bool = False
    delta_fused: bool = False
    experts: Experts | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    gguf_own_windows: bool = False
    gguf_largest: int | None = None
    mlx_wrapped: bool = False
    gguf_head: bool = False
    gguf_lacks: tuple[str, ...] = ()

    def gguf_of(self, experts: bool) -> str | None:
        """general.architecture of models with experts, or without; None: there are no such."""
        if self.gemma4:  # whose experts are options of its own
            return self.gguf
        if experts or self.experts is None:
            return self.gguf if experts == bool(self.experts) else None
        return self.gguf_dense

    @property
    def window_period(self) -> int | None:
        """The p whose every p-th layer has no window, unless the file says otherwise."""
        if self.windows == "fourth":
            return 4
        return self.defaults["sliding_window_pattern"] if self.windows == "periodic" else None


# What llama.cpp lacks for most architectures but llama.
_GGUF_LACKS = ("attention_bias", "mlp_bias", "rope_scaling of type llama3")
_OLMO2: dict[str, Any] = {
    "qk_norm": "width",
    "pre_norms": False,
    "post_norms": True,
    "gguf_head": True,
    "gguf_lacks": (*_GGUF_LACKS, "head_dim other than hidden_size / num_attention_heads"),
}
_GEMMA: dict[str, Any] = {
    "post_norms": True,
    "norm_offset": 1.0,
    "activation": "gelu_pytorch_tanh",
    "scaled_embedding": True,
    "windows": "periodic",
    "query_scalar": True,
}
# Published configurations rely on many of these.
_GEMMA_SIZES = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GRANITE: dict[str, Any] = {"gguf_interleaved": True, "multipliers": True}
_GRANITE_NUMBERS = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
_GRANITE_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}

_DELTA: dict[str, Any] = {
    "qk_norm": "head",
    "norm_offset": 1.0,
    "partial_rotary": True,
    "linear_attention": True,
    "gguf_lacks": _GGUF_LACKS,
}
_DELTA_SIZES = {
    "num_attention_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}

# A family with the same layers is one more record.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", gguf_interleaved=True),
    "mistral": Family(
        "MistralForCausalLM",
        "llama",
        gguf_interleaved=True,
        windows="all",
        defaults={"sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        "mistral3",
        gguf_interleaved=True,
        query_growth=True,
        windows="all",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        gguf_lacks=_GGUF_LACKS,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        gguf_interleaved=True,
        unrotated_layers=True,
        windows="unrotated",
        window_switch=True,
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        gguf_lacks=_GGUF_LACKS,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        qkv_bias=True,
        windows="from",
        window_switch=True,
        defaults=_QWEN,
        gguf_lacks=_GGUF_LACKS,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        qk_norm="head",
        windows="from",
        window_switch=True,
        defaults={"head_dim": 128, **_QWEN},
        gguf_lacks=_GGUF_LACKS,
    ),
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        "qwen35",
        **_DELTA,
        mlx_wrapped=True,
        defaults={
            **_DELTA_SIZES,
            "vocab_size": 248320,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_key_value_heads": 4,
        },
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM",
        "qwen35moe",
        **_DELTA,
        mlx_wrapped=True,
        experts=Experts(
            own_size=True,
            normalize=True,
            shared="shared_expert_intermediate_size",
            stacked=True,
        ),
        defaults={
            **_DELTA_SIZES,
            "vocab_size": 248320,
            "hidden_size": 2048,
            "intermediate_size": None,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        "qwen3next",
        **_DELTA,
        delta_fused=True,
        experts=Experts(own_size=True, shared="shared_expert_intermediate_size"),
        defaults={
            **_DELTA_SIZES,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 48,
            "num_key_value_heads": 2,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "llama",
        gguf_interleaved=True,
        windows="all",
        experts=Experts("block_sparse_moe", ("w1", "w3", "w2"), normalize=True),
        defaults={
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        "qwen2moe",
        qkv_bias=True,
        windows="alternate",
        window_switch=True,
        experts=Experts(
            own_size=True,
            gguf_normalize=False,
            shared="shared_expert_intermediate_size",
        ),
        defaults={
            **_QWEN,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        gguf_lacks=_GGUF_LACKS,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        qk_norm="head",
        windows="all",
        window_switch=True,
        experts=Experts(own_size=True),
        defaults={
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        gguf_lacks=_GGUF_LACKS,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        "olmoe",
        qk_norm="width",
        experts=Experts(gguf_normalize=False),
        gguf_head=True,
        gguf_lacks=_GGUF_LACKS,
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "olmo2",
        **_OLMO2,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        "olmo2",
        **_OLMO2,
        windows="fourth",
        local_rope="same",
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
    ),
    "granite": Family(
        "GraniteForCausalLM",
        "granite",
        **_GRANITE,
        defaults=_GRANITE_NUMBERS,
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        "granitemoe",
        **_GRANITE,
        experts=Experts("block_sparse_moe", normalize=True, fused=True),
        defaults={**_GRANITE_NUMBERS, **_GRANITE_EXPERTS},
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedForCausalLM",
        "granitemoe",
        **_GRANITE,
        experts=Experts(
            "block_sparse_moe", normalize=True, fused=True, shared="shared_intermediate_size"
        ),
        defaults={**_GRANITE_NUMBERS, **_GRANITE_EXPERTS, "shared_intermediate_size": 0},
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        "granitemoe",
        "granite",
        **_GRANITE,
        position_switch=True,
        mamba=True,
        experts=Experts(
            "block_sparse_moe", normalize=True, fused=True, shared="shared_intermediate_size"
        ),
        defaults={**_GRANITE_NUMBERS, **_GRANITE_EXPERTS, "shared_intermediate_size": 1024},
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        "lfm2",
        qk_norm="head",
        short_conv=True,
        defaults={
            "vocab_size": 65536,
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "conv_L_cache": 3,
            "conv_bias": False,
        },
        gguf_lacks=(*_GGUF_LACKS, "conv_bias"),
    ),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        "lfm2moe",
        qk_norm="head",
        short_conv=True,
        experts=Experts("feed_forward", ("w1", "w3", "w2"), own_size=True, sigmoid=True),
        defaults={
            "vocab_size": 65536,
            "hidden_size": 2048,
            "intermediate_size": 7168,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "conv_L_cache": 3,
            "conv_bias": False,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1792,
            "num_dense_layers": 2,
            "norm_topk_prob": True,
            "use_expert_bias": True,
            "routed_scaling_factor": 1.0,
        },
        gguf_lacks=(*_GGUF_LACKS, "conv_bias", "an output head of its own"),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "gemma2",
        **_GEMMA,
        softcaps=True,
        gguf_own_windows=True,
        gguf_largest=46,
        gguf_lacks=("attention_bias", "an output head of its own"),
        defaults={
            **_GEMMA_SIZES,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "phi3",
        fused=True,
        partial_rotary=True,
        longrope=True,
        gguf_window=True,
        windows="all",
        gguf_lacks=(
            "attention_bias",
            "mlp_bias",
            "head_dim other than hidden_size / num_attention_heads",
        ),
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
        },
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "gemma3",
        **_GEMMA,
        qk_norm="head",
        local_rope="own",
        gguf_largest=62,
        defaults={
            **_GEMMA_SIZES,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
        gguf_lacks=_GGUF_LACKS,
    ),
    "gemma4_text": Family(
        "Gemma4ForCausalLM",
        "gemma4",
        post_norms=True,
        activation="gelu_pytorch_tanh",
        scaled_embedding=True,
        windows="periodic",
        softcaps=True,
        qk_norm="head",
        local_rope="own",
        gemma4=True,
        gguf_lacks=_GGUF_LACKS,
        defaults={
            **_GEMMA_SIZES,
            **GEMMA4_DEFAULTS,
            "num_hidden_layers": 30,
            "sliding_window": 512,
            "vocab_size": 262144,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1e6,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}
