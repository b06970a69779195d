"""GGUF files of transformers' models, with llama.cpp's names and order of rows."""

import numpy as np
import pytest
from parity_models import head_size, torch, transformers


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
