"""Keys of configurations that pyloss does not read: inert ones, and those that change results."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Set
from typing import Any

from pyloss.checks.numbers import shown
from pyloss.errors import choices

# 0 and 0.0 are equal to False, and 1.0 to 1.
_OFF = (None, False)
_ONE = (None, 1)

# Keys that are read outside `hf_reader`, or only for other families.
_HF_READ = {
    "model_type", "text_config", "quantization", "quantization_config", "hidden_act",
    "hidden_activation", "use_sliding_window", "max_window_layers",
}  # fmt: skip

#: Keys of Mamba layers, which change nothing in models without one.
MAMBA_KEYS = {
    "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv",
    "mamba_expand", "mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit",
    "time_step_min", "time_step_max", "time_step_floor",
}  # fmt: skip

# Unsupported options of models, with the values that switch them off.
_HF_REFUSED: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": _ONE,
    "rotary_pct": _ONE,
    "use_bidirectional_attention": _OFF,
    "rope_interleaved": _OFF,
    "use_mrope": _OFF,
    "normalization_function": (None, "rmsnorm"),
    "use_alibi": _OFF,
    "alibi": _OFF,
    "use_qk_norm": _OFF,
    "qk_layernorm": _OFF,
    "parallel_attn": _OFF,
    "use_parallel_residual": _OFF,
    "attn_output_gate": _OFF,
    "attention_chunk_size": _OFF,
    "first_k_dense_replace": _OFF,
    "lm_head_bias": _OFF,
    "full_attn_mod": _ONE,
    "interpolate_factor": _ONE,
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "attention_multiplier": (None,),
    "compression_config": (None,),
    "block_use_swiglu": (None, True),
    "use_pos_enc": (None, True),
    "layer_norm_eps": (None,),
    "clip_qkv": (None,),
    "router_jitter_noise": _OFF,
    "shared_expert_intermediate_size": _OFF,
    "num_shared_experts": _OFF,
    "n_shared_experts": _OFF,
}

# Keys that change no result here.
_HF_INERT = {
    # names
    "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype",
    "tokenizer_class", "finetuning_task",
    "task_specific_params", "problem_type", "id2label", "label2id", "num_labels", "model_name",
    "name_or_path",
    "is_llama_config", "unsloth_version", "unsloth_fixed", "quantized_by", "license",
    "transformers.js_config",
    # how a program runs it
    "use_cache", "cache_implementation", "return_dict", "output_attentions",
    "output_hidden_states", "torchscript",
    "use_bfloat16", "tf_legacy_loss", "pruned_heads", "chunk_size_feed_forward", "is_decoder",
    "is_encoder_decoder",
    "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder",
    "attn_implementation", "use_flash_attn",
    "use_flash_attention", "pretraining_tp", "model_max_length", "max_sequence_length",
    "seq_length", "max_seq_len",
    "pad_token", "prefix", "neuron", "kv_cache_scheme", "bos_token", "eos_token",
    # how it was trained
    "initializer_range", "init_method", "attention_dropout", "hidden_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "output_router_logits",
    "router_aux_loss_coef",
    "gradient_checkpointing", "training_config",
    "block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init",
    "conv_use_xavier_init",
    # Qwen3.5's layers that guess further tokens, which are not read, and the type of its states
    "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype",
    # LFM2's second names of norm_eps and rope_theta, which transformers ignores
    "block_norm_eps", "theta",
    # how answers are drawn
    "max_length", "max_new_tokens", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores",
    "return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens", "generation_config",
    # parts for images, and adapters that a folder was made with
    "vision_config", "audio_config", "mm_tokens_per_image", "vision_soft_tokens_per_image",
    "vision_feature_layer",
    "vision_feature_select_strategy", "projector_hidden_act",
    "multimodal_projector_bias", "spatial_merge_size", "language_model_only",
    "_attn_implementation_autoset", "peft",
    "lora",
}  # fmt: skip
_HF_INERT_ENDS = ("_token_id", "_token_ids", "_token_index")

# Further keys of rope_scaling, and options that pyloss lacks with the values that switch them off.
_ROPE_READ = {"rope_type", "type", "rope_theta", "finetuned"}
_ROPE_REFUSED: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": _ONE,
    "mscale": (None,),
    "mscale_all_dim": (None,),
    "truncate": (None, True),
    "attn_factor": _ONE,
}


def refuse_hf_keys(
    path: str | os.PathLike[str],
    content: Mapping[str, Any],
    read: Set[str],
    others: Set[str],
    model_type: str,
) -> None:
    """Raises ValueError for a key that asks for an option pyloss lacks; warns of unknown keys.

    `read` are the keys that are read for this family. `others` belong to other families:
    transformers ignores them, and pyloss refuses values that ask for an option. Unknown keys mean
    nothing to transformers and pyloss, but may matter to a model with its own code.
    """
    unknown = []
    for key, value in content.items():
        if key in read or key in _HF_READ or key in _HF_INERT or key.endswith(_HF_INERT_ENDS):
            continue
        if key == "use_bidirectional_attention" and value:
            raise ValueError(
                f"{path}: attention in both directions (use_bidirectional_attention "
                f"{shown(value)}) is not supported; supported are causal models"
            )
        if key in _HF_REFUSED:
            _refuse(path, key, value, _HF_REFUSED[key])
        elif key in others:
            if value not in (*_OFF, []):
                raise ValueError(f"{path}: {key} {shown(value)} is not supported for {model_type}")
        elif not key.startswith("_") and value is not None:
            unknown.append(key)
    if unknown:
        names = choices([shown(key) for key in unknown])
        warnings.warn(f"{path}: pyloss does not know and does not use: {names}", stacklevel=2)


def refuse_rope_keys(
    path: str | os.PathLike[str], scaling: Mapping[str, Any], known: set[str]
) -> None:
    """Raises ValueError for a key of rope_scaling other than `known` and the inert ones."""
    for key, value in scaling.items():
        if key in known:
            continue
        if key in _ROPE_REFUSED:
            _refuse(path, f"{key} of rope_scaling", value, _ROPE_REFUSED[key])
        elif key not in _ROPE_READ and value is not None:
            raise ValueError(f"{path}: {shown(key)} of rope_scaling is not supported")


# GGUF's metadata, without the architecture's name in front. These keys change nothing: the
# embedding has the vocabulary's size, and the last keys belong to norms that these architectures
# lack.
_GGUF_INERT = {
    "vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "decoder_start_token_id",
    "attention.layer_norm_epsilon", "attention.group_norm_epsilon", "attention.group_norm_groups",
}  # fmt: skip
_GGUF_INERT_BEGINS = ("vision.", "mm.", "audio.")
_GGUF_REFUSED: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "router_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "use_parallel_residual": (0,),
    "pooling_type": (0, 1, 2, 3),  # of embeddings; 4 ranks texts by a head of its own
    "nextn_predict_layers": (0,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "attention.output_scale": (0, 1),
    "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_gating_func": (0, 1),  # softmax
    "expert_weights_scale": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
}


def refuse_gguf_keys(
    path: str | os.PathLike[str], arch: str, metadata: Mapping[str, Any], read: Set[str]
) -> None:
    """Raises ValueError for a key of the architecture `arch` that asks for an option pyloss lacks.

    `read` are the keys that are read. Unknown keys might ask for an option, so they are refused
    too.
    """
    for key, value in metadata.items():
        if not key.startswith(f"{arch}."):
            continue
        own = key.removeprefix(f"{arch}.")
        if own in read:
            continue
        if own in _GGUF_REFUSED:
            _refuse(path, key, value, _GGUF_REFUSED[own])
        elif own not in _GGUF_INERT and not own.startswith(_GGUF_INERT_BEGINS):
            raise ValueError(
                f"{path}: {key} {shown(value)} is not known to pyloss, and might change results"
            )


def _refuse(path: str | os.PathLike[str], key: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if value is not None and value not in neutral:
        supported = " or ".join(json.dumps(item) for item in neutral)
        raise ValueError(f"{path}: {key} {shown(value)} is not supported; supported is {supported}")
