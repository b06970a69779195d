"""Models, adapters and comparisons for the parity tests."""

import re

import numpy as np
import pytest
from rope_settings import llama3

import pyloss
from pyloss.tuner.adapters.adapter import adapter_modules

torch = pytest.importorskip("torch", reason="compares with torch (parity extra)")
transformers = pytest.importorskip(
    "transformers", reason="compares with transformers (parity extra)"
)

# On busy machines its threads wait for each other far longer than they compute.
torch.set_num_threads(1)

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Llama 3's scaling, changed to act at the length of the test sequences.
LLAMA3 = llama3(8.0, 32)

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
# The window is shorter than the test sequences. Seven layers: the whole pattern and one more.
GEMMA3 = {
    "num_hidden_layers": 7,
    "sliding_window": 24,
    "query_pre_attn_scalar": 16,
    "rope_theta": 1e6,
}

# Caps that scores and logits of tiny models reach.
GEMMA2 = {
    "family": "Gemma2",
    "num_hidden_layers": 4,
    "sliding_window": 24,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
    "attn_implementation": "eager",  # the others of transformers know no cap
}

# All multipliers differ from their defaults.
GRANITE = {
    "family": "Granite",
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.35,
    "residual_multiplier": 0.22,
    "logits_scaling": 2.0,
}

# Every second layer without rotary positions; five layers: llama.cpp's pattern and one more.
SMOLLM3 = {"family": "SmolLM3", "no_rope_layer_interval": 2, "pad_token_id": 0}
SMOLLM3_GGUF = {"family": "SmolLM3", "num_hidden_layers": 5, "pad_token_id": 0}
OLMO2 = {"family": "Olmo2", "pad_token_id": 0}
# The whole pattern and one more layer. Rotary scaling does not act in layers with a window.
OLMO3 = {"family": "Olmo3", "pad_token_id": 0, "num_hidden_layers": 5, "sliding_window": 24}
PHI3 = {"family": "Phi3", "pad_token_id": None}


def longrope(original, pairs=8, **more):
    """Options of a Phi-3 whose positions are scaled by longrope beyond `original` tokens."""
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1 + i / 64 for i in range(pairs)],
        "long_factor": [1.5 + i / 2 for i in range(pairs)],
        **more,
    }
    return {**PHI3, "rope_scaling": scaling, "original_max_position_embeddings": original}


# As Phi-4-mini: three quarters of each head rotate.
PHI4 = {**longrope(256, 6), "partial_rotary_factor": 0.75}

# Convolutions before, between and after layers with attention; the MLP's size is adjusted.
LFM2 = {
    "family": "Lfm2",
    "pad_token_id": 0,
    "num_hidden_layers": 5,
    "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
    "block_multiple_of": 16,
}

# Heads of keys serve two of values; a part of each head rotates. Results of the delta rule may be
# near 0, and their norm then multiplies rounding errors up to 1 / sqrt(eps) times.
QWEN3_5 = {
    "family": "Qwen3_5",
    "pad_token_id": 0,
    "num_hidden_layers": 5,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 24,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-2,
}
QWEN3_5["layer_types"] = QWEN3_5["layer_types"][:5]
# llama.cpp needs one size of all heads.
QWEN3_5_GGUF = {**QWEN3_5, "linear_value_head_dim": 32}
# One head of keys for each of values; in GGUF these are then in order.
QWEN3_5_EVEN = {**QWEN3_5, "linear_num_value_heads": 2, "linear_value_head_dim": 32}

# Queries grow within the test sequences: more than twice the original length.
MINISTRAL3 = {
    "family": "Ministral3",
    "pad_token_id": 0,
    "rope_scaling": {
        **YARN,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.4,
    },
}

GRANITE_MOE = {
    **GRANITE,
    "pad_token_id": 0,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
}
# Granite 4 without experts and Mamba layers: the shared expert is the MLP.
GRANITE4 = {
    **GRANITE,
    "family": "GraniteMoeHybrid",
    "pad_token_id": 0,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 96,
    "layer_types": ["attention"] * 2,
    "position_embedding_type": "rope",
}
# Granite 4 with a Mamba layer, without positions; and with other sizes and options of it.
GRANITE4_MAMBA = {
    **GRANITE4,
    "layer_types": ["mamba", "attention"],
    "position_embedding_type": "nope",
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 20,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
GRANITE4_GROUPS = {
    **GRANITE4_MAMBA,
    "position_embedding_type": "rope",
    "tie_word_embeddings": False,
    "layer_types": ["attention", "mamba"],
    "mamba_n_heads": 6,
    "mamba_d_head": "auto",
    "mamba_expand": 3,
    "mamba_n_groups": 2,
    "mamba_d_conv": 3,
    "mamba_conv_bias": False,
    "mamba_proj_bias": True,
    "time_step_limit": [0.3, 0.9],
}
# Two windows to each layer without; the last layers share keys and values, and have wider MLPs.
GEMMA4 = {
    "family": "Gemma4",
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 24,
    "global_head_dim": 32,
    "rope_theta": 1e4,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 300,
    "final_logit_softcapping": 6.0,
    "pad_token_id": 0,
}

# As the 26B-A4B: experts beside the MLPs, keys that are values in layers without a window, and
# fewer heads of them there; no embeddings for each layer.
GEMMA4_EXPERTS = {
    **GEMMA4,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}

# Mixtures of experts: class names and options of the tiny models.
MIXTURES = {
    "mixtral": {
        "family": "Mixtral",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
    },
    "qwen3_moe": {
        "family": "Qwen3Moe",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "family": "Qwen2Moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "tie_word_embeddings": False,
        "head_dim": 16,
    },
    "lfm2_moe": {
        "family": "Lfm2Moe",
        "pad_token_id": 0,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "granitemoe": {**GRANITE_MOE, "family": "GraniteMoe"},
    "granitemoeshared": {
        **GRANITE_MOE,
        "family": "GraniteMoeShared",
        "shared_intermediate_size": 64,
    },
    "granitemoehybrid": {
        **GRANITE_MOE,
        "family": "GraniteMoeHybrid",
        "shared_intermediate_size": 64,
        "layer_types": ["attention"] * 2,
        "position_embedding_type": "rope",
    },
    "olmoe": {
        "family": "Olmoe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "tie_word_embeddings": False,
    },
}

# Qwen3.5's layers with experts; Qwen3-Next's have fused projections.
_DELTA_MOE = {
    key: QWEN3_5_GGUF[key]
    for key in QWEN3_5_GGUF
    if key not in ("num_hidden_layers", "layer_types", "family", "intermediate_size")
} | {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "tie_word_embeddings": False,
}
MIXTURES |= {
    "qwen3_5_moe": {**_DELTA_MOE, "family": "Qwen3_5Moe"},
    "qwen3_next": {**_DELTA_MOE, "family": "Qwen3Next"},
}

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_tiny(seed=0, family="Llama", **changes):
    """A small random transformers model in float32, with random norms and biases."""
    values = {**TINY, **changes}
    theta, scaling = (
        values.pop("rope_theta"),
        values.pop("rope_scaling", None) or {"rope_type": "default"},
    )
    rope = {"rope_theta": theta, **scaling}
    if "partial_rotary_factor" in values:
        rope["partial_rotary_factor"] = values.pop("partial_rotary_factor")
    if family == "Gemma4":
        rope = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": theta}
    if family in ("Gemma3", "Gemma4", "Olmo3"):
        local = theta if family == "Olmo3" else 1e4
        rope = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    with_parts = ("Gemma3", "Gemma4", "Qwen3_5", "Qwen3_5Moe")  # for images, beside the text's
    name = f"{family}TextConfig" if family in with_parts else f"{family}Config"
    config = getattr(transformers, name)(**values, rope_parameters=rope)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if parameter.ndim == 1 else 1.5 / parameter.shape[1] ** 0.5
            delta = family in ("Qwen3_5", "Qwen3_5Moe", "Qwen3Next")
            centered = family == "Gemma3" or (delta and "linear_attn" not in name)
            parameter.normal_(
                1.0 if "norm" in name and not centered else 0.0, spread, generator=generator
            )
            if family == "Gemma4" and name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(0.5)  # they scale attention's scores
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(0, 0.3, generator=generator)
            if name.endswith("layer_scalar"):
                buffer.fill_(0.75)
        for name, parameter in model.named_parameters():
            if name.endswith(("router.scale", "per_expert_scale")):
                parameter.add_(1)
            if name.endswith("router.scale"):
                parameter.mul_(4)  # so that experts' weights differ
    model.tie_weights()
    return model


def head_size(config):
    """head_dim of a transformers configuration, which some families do not store."""
    said = getattr(config, "head_dim", None)
    return said or config.hidden_size // config.num_attention_heads


def write_gguf(model, path, type_of=lambda name: "F32"):
    """Write a transformers model as llama.cpp's converter does.

    `type_of(name)` gives the type of a matrix; experts are always float32. Afterwards `model` holds
    the values that the file stores.

    Rules of the conversion scripts: `llama` and `granite` interleave the rotary pairs of q and k,
    Llama 3's scaling is a tensor, and norms of `gemma2` and `gemma3` have 1 added. The file has no
    query_pre_attn_scalar.
    """
    gguf = pytest.importorskip("gguf", reason="writes GGUF files with it")
    config, architectures = (
        model.config,
        {
            "mistral": "llama",
            "mixtral": "llama",
            "gemma3_text": "gemma3",
            "qwen3_moe": "qwen3moe",
            "qwen2_moe": "qwen2moe",
            "ministral3": "mistral3",
            "lfm2_moe": "lfm2moe",
            "granitemoeshared": "granitemoe",
            "granitemoehybrid": "granitemoe",
            "olmo3": "olmo2",
            "qwen3_5_text": "qwen35",
            "qwen3_5_moe_text": "qwen35moe",
            "qwen3_next": "qwen3next",
        },
    )
    arch = architectures.get(config.model_type, config.model_type)
    if arch == "granitemoe" and not config.num_local_experts:
        arch = "granite"
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    head_dim = head_size(config)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    mlp = getattr(model.model.layers[0], "feed_forward", None)
    if arch != "qwen35moe":  # whose configurations have no intermediate_size
        writer.add_feed_forward_length(mlp.w1.out_features if mlp else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    heads = config.num_key_value_heads
    if arch in ("lfm2", "lfm2moe"):
        heads = [0 if kind == "conv" else heads for kind in config.layer_types]
        writer.add_shortconv_l_cache(config.conv_L_cache)
    writer.add_head_count_kv(heads)
    usual = head_dim * config.num_attention_heads == config.hidden_size
    if arch != "phi3" and (arch != "llama" or not usual):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if experts := getattr(config, "num_local_experts", getattr(config, "num_experts", None)):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    delta = arch in ("qwen35", "qwen35moe", "qwen3next")
    if arch in ("qwen2moe", "qwen35moe", "qwen3next"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if arch == "lfm2moe":
        writer.add_leading_dense_block_count(config.num_dense_layers)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if arch in ("qwen2moe", "qwen3moe", "lfm2moe", "qwen35moe", "qwen3next"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch in ("gemma2", "gemma3") or config.model_type == "olmo3":
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "olmo3":
        writer.add_sliding_window_pattern(
            [kind == "sliding_attention" for kind in config.layer_types]
        )
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if arch == "mistral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if delta:
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
        if arch != "qwen3next":
            writer.add_rope_dimension_sections([2, 1, 1, 0])
        writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    if arch == "phi3":
        partial = int(head_dim * rope["partial_rotary_factor"])
        writer.add_rope_dimension_count(partial)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["longrope"]
        writer.add_rope_scaling_attn_factors(init(config, device="cpu")[1])
        for kind in ("long", "short"):
            factors = np.array(rope[f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    if shared := getattr(config, "shared_intermediate_size", 0):
        if arch == "granitemoe":
            writer.add_expert_shared_feed_forward_length(shared)
        if getattr(config, "position_embedding_type", "rope") != "rope":
            writer.add_bool(f"{arch}.rope.scaling.finetuned", False)
    if arch in ("granite", "granitemoe"):
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    interleaved = arch in ("llama", "smollm3", "granite", "granitemoe", "mistral3")
    if interleaved:
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(
        {own: key for key, own in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name, array = name.replace(".router.", ".router.layer."), tensor.float().numpy()
        if name.endswith(("conv.weight", "conv1d.weight")):
            array = array.squeeze(1)
        if ".shared_mlp." in name:
            block, halves = f"blk.{name.split('.')[2]}", [array]
            if "input_linear" in name:
                halves = np.split(array, 2)
            end = "_shexp" if arch == "granitemoe" else ""
            for part, value in zip(("gate", "up") if len(halves) > 1 else ("down",), halves):
                value = np.ascontiguousarray(value)
                writer.add_tensor(f"{block}.ffn_{part}{end}.weight", value)
            continue
        if name.endswith(".expert_bias"):
            writer.add_tensor(f"blk.{name.split('.')[2]}.exp_probs_b.bias", array)
            continue
        if ".experts." in name:
            block, halves = f"blk.{name.split('.')[2]}", np.split(array, 2, axis=1)
            parts = (
                {"down": array}
                if name.endswith("down_proj")
                else {"gate": halves[0], "up": halves[1]}
            )
            for part, value in parts.items():
                writer.add_tensor(f"{block}.ffn_{part}_exps.weight", np.ascontiguousarray(value))
            continue
        if (arch in ("gemma2", "gemma3") or delta) and name.endswith("norm.weight"):
            array = array + (not name.endswith("linear_attn.norm.weight"))
        if name.endswith(".A_log"):
            array = -np.exp(array)
        name = name.replace(".dt_bias", ".dt_proj.bias")
        kind = gguf.GGMLQuantizationType[type_of(name) if tensor.ndim == 2 else "F32"]
        stored = gguf.quants.quantize(array, kind)
        if tensor.ndim == 2:
            tensor.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(stored, kind))))
        if "in_proj_qkvz" in name:  # heads of keys lie side by side in transformers
            keys, width = config.linear_num_key_heads, config.linear_key_head_dim
            by_head = stored.reshape(keys, -1, *stored.shape[1:])
            shared = (by_head.shape[1] - 2 * width) // 2
            parts = np.split(by_head, [width, 2 * width, 2 * width + shared], axis=1)
            q, k, v, z = (part.reshape(-1, *stored.shape[1:]) for part in parts)
            block = f"blk.{name.split('.')[2]}"
            writer.add_tensor(f"{block}.attn_qkv.weight", np.concatenate([q, k, v]), raw_dtype=kind)
            writer.add_tensor(f"{block}.attn_gate.weight", z, raw_dtype=kind)
            continue
        if ".linear_attn." in name and arch != "qwen3next":
            stored = np.ascontiguousarray(in_llama_cpps_order(config, name, stored))
        if interleaved and (".q_proj." in name or ".k_proj." in name):
            halves = stored.reshape(-1, 2, head_dim // 2, *stored.shape[1:])
            stored = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(stored.shape)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")), stored, raw_dtype=kind
        )
    if rope["rope_type"] == "llama3":
        plain = 1 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](
            config, device="cpu"
        )
        writer.add_tensor("rope_freqs.weight", (plain / scaled.numpy()).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_llama_cpps_order(config, name, array):
    """The heads of values: the first one of each head of keys, then the second ones."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    at = 1 if "out_proj" in name else 0
    whole = {"in_proj_qkv": 2, "conv1d": 2}.get(name.split(".linear_attn.")[1].split(".")[0], 0)
    if name.endswith("linear_attn.norm.weight"):
        return array
    rest, heads = np.split(array, [whole * keys * config.linear_key_head_dim], axis=at)
    shape = heads.shape
    heads = heads.reshape(*shape[:at], keys, values // keys, -1, *shape[at + 1 :])
    return np.concatenate([rest, heads.swapaxes(at, at + 1).reshape(shape)], axis=at)


def torch_model(folder):
    """The model of a folder in transformers, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def torch_logits(model, ids):
    """float32 [T, V] of one sequence."""
    with torch.no_grad():
        return (
            model(torch.tensor(np.asarray(ids)[None], dtype=torch.long)).logits[0].float().numpy()
        )


def greedy(model, ids, count):
    """The `count` likeliest tokens after `ids`, one by one with the cache."""
    cache, tokens = model.make_cache(), []
    logits = model.step(ids, cache)
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = model.step(tokens[-1:], cache)
    return tokens


def our_logits(model, ids):
    return pyloss.autograd.data(model(np.asarray(ids)[None]))[0]


def load_in_mlx(folder):
    """The model of a folder in mlx-lm, which has Qwen3.5 under the wrapper's name alone."""
    utils = pytest.importorskip("mlx_lm.utils", reason="compares with mlx-lm (parity extra)")
    config = folder / "config.json"
    before = config.read_text()
    config.write_text(re.sub(r'"(qwen3_5\w*)_text"', r'"\1"', before))
    model, _ = utils.load_model(folder)
    config.write_text(before)
    return model


def mlx_logits(model, ids):
    mx = pytest.importorskip("mlx.core", reason="compares with mlx (parity extra)")
    return np.array(model(mx.array(np.asarray(ids)[None].astype(np.int32))).astype(mx.float32))[0]


def add_adapter(
    model, seed=0, rank=8, scale=2.0, keys=None, num_layers=-1, size=0.02, use_dora=False
):
    """Put an adapter with random factors over the model; DoRA's magnitudes stay norms."""
    pyloss.tuner.linear_to_lora_layers(
        model, num_layers, {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}, use_dora
    )
    rng = np.random.default_rng(seed)
    for name, array in model.trainable_parameters().items():
        if name.endswith(".m"):
            continue
        array[...] = (
            rng.uniform(-1, 1, array.shape) / np.sqrt(array.shape[0])
            if name.endswith("a")
            else rng.normal(0, size, array.shape)
        )
    return model


def peft_twin(ours, base):
    """PEFT's adapter over the transformers model `base`, with the values of the one in `ours`."""
    peft = pytest.importorskip("peft", reason="compares with PEFT (parity extra)")
    layers = adapter_modules(ours)
    (rank,) = {layer.lora_a.shape[1] for layer in layers.values()}
    (scale,) = {layer.scale for layer in layers.values()}
    (kind,) = {layer.kind for layer in layers.values()}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=0.0,
        target_modules=sorted(layers),
        use_dora=kind == "dora",
    )
    model = peft.get_peft_model(base, config)
    found = peft_matrices(model)
    assert sorted(found) == sorted(ours.trainable_parameters())
    with torch.no_grad():
        for name, array in ours.trainable_parameters().items():
            found[name].copy_(torch.from_numpy(array.T))
    return model


def fill_adapter(model, part="lora_B", seed=0):
    """Fill PEFT's matrices with `part` in their names at random; PEFT starts lora_B at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.normal_(0, 0.3, generator=generator)


def peft_matrices(model):
    """PEFT's trained parameters by our names; the matrices are transposes of ours."""
    parts = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}
    found = {
        name.removeprefix("base_model.model."): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {
        ".".join(
            parts.get(part, part) for part in name.removesuffix(".default.weight").split(".")
        ): p
        for name, p in found.items()
    }


def torch_loss(model, batch, weights):
    """Weighted mean cross entropy of padded rows; weights [B, T] belong to tokens as targets."""
    ids, weights = torch.tensor(batch, dtype=torch.long), torch.tensor(weights[:, 1:])
    logits = model(input_ids=ids[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum()


def relative(ours, theirs):
    """|ours - theirs| / |theirs| as vectors."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
