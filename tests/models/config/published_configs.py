"""Published configurations, with only lists shortened: `HF` config.json, `GGUF` metadata."""

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
_LLAMA3 = {
    **_LLAMA, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
_SMOLLM2 = {
    **_LLAMA, "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
}  # fmt: skip
_MISTRAL = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 32768,
}  # fmt: skip
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
_QWEN3 = {
    **_QWEN2, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rope_scaling": None, "sliding_window": None,
}  # fmt: skip
_QWEN3_MOE = {
    **_QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048,
    "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN2_MOE = {
    **_QWEN2, "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632,
    "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe", "moe_intermediate_size": 1408,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 16, "output_router_logits": False, "qkv_bias": True, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632, "tie_word_embeddings": False,
}  # fmt: skip
_MIXTRAL = {
    **_MISTRAL, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8,
    "output_router_logits": False, "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.0, "vocab_size": 32000,
}  # fmt: skip
_OLMOE = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "eos_token_id": 50279,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024, "max_position_embeddings": 4096,
    "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 50304,
}  # fmt: skip
_GRANITE = {
    "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1, "attention_multiplier": 0.015625,
    "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "granite", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
    "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5000000.0, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.47.0", "use_cache": True, "vocab_size": 49155,
}  # fmt: skip
_GRANITE_MOE = {
    **_GRANITE, "architectures": ["GraniteMoeForCausalLM"], "embedding_multiplier": 12.0, "hidden_size": 1536, "intermediate_size": 512,
    "logits_scaling": 6.0, "model_type": "granitemoe", "num_attention_heads": 24, "num_experts_per_tok": 8, "num_hidden_layers": 32,
    "num_local_experts": 40, "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
_GRANITE4 = {
    **_GRANITE, "architectures": ["GraniteMoeHybridForCausalLM"], "bos_token_id": 100257, "embedding_multiplier": 12, "eos_token_id": 100257,
    "hidden_size": 2560, "init_method": "mup", "intermediate_size": 8192, "layer_types": ["attention"] * 40, "logits_scaling": 10,
    "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 256, "mamba_expand": 2,
    "mamba_n_groups": 1, "mamba_n_heads": 80, "mamba_proj_bias": False, "model_type": "granitemoehybrid",
    "normalization_function": "rmsnorm", "num_attention_heads": 40, "num_experts_per_tok": 0, "num_local_experts": 0,
    "output_router_logits": False, "position_embedding_type": "rope", "rope_theta": 10000000, "router_aux_loss_coef": 0.01,
    "shared_intermediate_size": 8192, "vocab_size": 100352,
}  # fmt: skip
_GRANITE4_H = {
    **_GRANITE4, "hidden_size": 1536, "intermediate_size": 4096, "layer_types": [*["mamba"] * 5, "attention"] * 6 + ["mamba"] * 4,
    "logits_scaling": 6, "mamba_d_state": 128, "mamba_n_heads": 48, "num_attention_heads": 12, "num_key_value_heads": 4,
    "position_embedding_type": "nope", "shared_intermediate_size": 4096, "time_step_floor": 0.0001, "time_step_max": 0.1,
    "time_step_min": 0.001,
}  # fmt: skip
_SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
    "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0", "use_cache": False, "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
_OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "olmo2",
    "num_attention_heads": 16, "num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 100277, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0", "use_cache": True, "vocab_size": 100352,
}  # fmt: skip
_OLMO3 = {
    **_OLMO2, "architectures": ["Olmo3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8, "max_position_embeddings": 65536, "model_type": "olmo3",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rope_theta": 500000, "sliding_window": 4096,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
        "original_max_position_embeddings": 8192, "rope_type": "yarn",
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.57.0", "vocab_size": 100278,
}  # fmt: skip
_GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
    "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 107], "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26,
    "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "torch_dtype": "bfloat16", "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
_PHI3 = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000,
    "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2", "use_cache": True, "vocab_size": 32064,
}  # fmt: skip
_PHI35 = {
    **_PHI3, "max_position_embeddings": 131072, "sliding_window": 262144,
    "rope_scaling": {"long_factor": [1.08] * 47 + [64.0], "short_factor": [1.0] * 47 + [1.48], "type": "longrope"},
}  # fmt: skip
_PHI4 = {
    **_PHI35, "embd_pdrop": 0.0, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
    "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "vocab_size": 200064,
}  # fmt: skip
_MINISTRAL3 = {
    "architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16", "image_token_index": 10, "model_type": "mistral3",
    "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 262144, "model_type": "ministral3", "num_attention_heads": 32,
        "num_hidden_layers": 26, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384, "rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn",
        },
        "sliding_window": None, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 131072,
    },
    "transformers_version": "5.0.0.dev0", "vision_config": {"hidden_size": 1024, "model_type": "pixtral"}, "vision_feature_layer": -1,
}  # fmt: skip
_GEMMA3_TEXT = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
    "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
_GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106],
    "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3", "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "transformers_version": "4.50.0.dev0", "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
}  # fmt: skip
_GEMMA4 = {
    "architectures": ["Gemma4ForConditionalGeneration"], "audio_config": {"model_type": "gemma4_audio"}, "audio_token_id": 258881,
    "boa_token_id": 256000, "boi_token_id": 255999, "dtype": "bfloat16", "eoa_token_index": 258883, "eoi_token_id": 258882,
    "eos_token_id": [1, 106], "image_token_id": 258880, "initializer_range": 0.02, "model_type": "gemma4",
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": False, "enable_moe_block": False,
        "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1536, "hidden_size_per_layer_input": 256, "intermediate_size": 6144,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7, "max_position_embeddings": 131072,
        "model_type": "gemma4_text", "moe_intermediate_size": None, "num_attention_heads": 8, "num_experts": None,
        "num_global_key_value_heads": None, "num_hidden_layers": 35, "num_key_value_heads": 1, "num_kv_shared_layers": 20,
        "rms_norm_eps": 1e-06, "sliding_window": 512, "tie_word_embeddings": True, "top_k_experts": None,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "use_bidirectional_attention": None, "use_cache": True, "use_double_wide_mlp": True, "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
    },
    "tie_word_embeddings": True, "transformers_version": "5.5.0.dev0", "vision_config": {"model_type": "gemma4_vision"},
    "vision_soft_tokens_per_image": 280,
}  # fmt: skip
_GEMMA4_EXPERTS = {
    **_GEMMA4,
    "text_config": {
        **_GEMMA4["text_config"], "attention_k_eq_v": True, "enable_moe_block": True, "hidden_size": 2816, "hidden_size_per_layer_input": 0,
        "intermediate_size": 2112, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5, "max_position_embeddings": 262144,
        "moe_intermediate_size": 704, "num_attention_heads": 16, "num_experts": 128, "num_global_key_value_heads": 2,
        "num_hidden_layers": 30, "num_key_value_heads": 8, "num_kv_shared_layers": 0, "sliding_window": 1024, "top_k_experts": 8,
        "use_double_wide_mlp": False,
    },
}  # fmt: skip
_BNB = {
    "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0, "load_in_4bit": True,
    "load_in_8bit": False, "quant_method": "bitsandbytes",
}  # fmt: skip
_MLX = {"group_size": 64, "bits": 4, "mode": "affine"}

_LFM2 = {
    "architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": True, "block_dim": 2048, "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0, "block_mlp_init_scale": 1.0, "block_multiple_of": 256, "block_norm_eps": 1e-05,
    "block_out_init_scale": 1.0, "block_use_swiglu": True, "block_use_xavier_init": True, "bos_token_id": 1, "conv_L_cache": 3,
    "conv_bias": False, "conv_dim": 2048, "conv_dim_out": 2048, "conv_use_xavier_init": True, "eos_token_id": 7,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14], "hidden_size": 2048, "initializer_range": 0.02, "max_position_embeddings": 128000,
    "model_type": "lfm2", "norm_eps": 1e-05, "num_attention_heads": 32, "num_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pad_token_id": 0, "rope_theta": 1000000.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0", "use_cache": True, "use_pos_enc": True, "vocab_size": 65536,
}  # fmt: skip

_LFM2_MOE = {
    "architectures": ["Lfm2MoeForCausalLM"], "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": False, "dtype": "bfloat16",
    "eos_token_id": 7, "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 7168,
    "layer_types": ["conv", "conv", "full_attention", "conv"] * 6, "max_position_embeddings": 128000, "model_type": "lfm2_moe",
    "moe_intermediate_size": 1792, "norm_eps": 1e-05, "norm_topk_prob": True, "num_attention_heads": 32, "num_dense_layers": 2,
    "num_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "pad_token_id": 0,
    "rope_theta": 1000000.0, "routed_scaling_factor": 1.0, "transformers_version": "4.57.0.dev0", "use_cache": True,
    "use_expert_bias": True, "vocab_size": 65536,
}  # fmt: skip

_QWEN3_5 = {
    "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056, "model_type": "qwen3_5", "tie_word_embeddings": True,
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16", "eos_token_id": 248044,
        "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 3584, "layer_types": [*["linear_attention"] * 3, "full_attention"] * 6, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_attention_heads": 8, "num_hidden_layers": 24,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 248320,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25, "rope_theta": 10000000,
            "rope_type": "default",
        },
    },
    "transformers_version": "4.57.0.dev0", "video_token_id": 248057, "vision_config": {"depth": 12, "hidden_size": 768},
    "vision_end_token_id": 248054, "vision_start_token_id": 248053,
}  # fmt: skip

_QWEN3_5_MOE = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "image_token_id": 248056, "model_type": "qwen3_5_moe", "tie_word_embeddings": False,
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16", "eos_token_id": 248044,
        "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 10, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 512,
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_attention_heads": 16, "num_experts": 256,
        "num_experts_per_tok": 8, "num_hidden_layers": 40, "num_key_value_heads": 2, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": 248320, "rope_parameters": _QWEN3_5["text_config"]["rope_parameters"],
    },
    "transformers_version": "4.57.0.dev0", "video_token_id": 248057, "vision_config": {"depth": 27, "hidden_size": 1152},
    "vision_end_token_id": 248054, "vision_start_token_id": 248053,
}  # fmt: skip

_QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262144,
    "mlp_only_layers": [], "model_type": "qwen3_next", "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16,
    "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.57.0.dev0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip

HF = {
    "qwen3.5": _QWEN3_5,
    "qwen3.5-35b-a3b": _QWEN3_5_MOE,
    "qwen3-next": _QWEN3_NEXT,
    "lfm2": _LFM2,
    "lfm2-8b-a1b": _LFM2_MOE,
    "lfm2.5": {
        **{key: value for key, value in _LFM2.items() if key not in ("full_attn_idxs", "rope_theta")},
        "intermediate_size": 12288, "layer_types": ["conv", "conv", "full_attention", "conv"] * 4, "tie_embedding": True,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "bfloat16", "theta": 1000000.0,
    },
    "llama-2": {**_LLAMA, "_name_or_path": "meta-llama/Llama-2-7b-hf", "max_length": 4096},
    "llama-3.2": _LLAMA3,
    "smollm2": _SMOLLM2,
    "mistral": _MISTRAL,
    "mistral with a window": {**_MISTRAL, "sliding_window": 4096},
    "qwen2.5": _QWEN2,
    "qwen2.5 with yarn": {**_QWEN2, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
    "qwen3": _QWEN3,
    "qwen3-moe": _QWEN3_MOE,
    "qwen1.5-moe": _QWEN2_MOE,
    "mixtral": _MIXTRAL,
    "olmoe": _OLMOE,
    "granite-3.1-2b": _GRANITE,
    "granite-3.1-3b-a800m": _GRANITE_MOE,
    "granite-4.0-micro": _GRANITE4,
    "granite-4.0-h-1b": _GRANITE4_H,
    "smollm3": _SMOLLM3,
    "olmo-2": _OLMO2,
    "olmo-3": _OLMO3,
    "gemma2-2b": _GEMMA2,
    "phi-3-mini-4k": _PHI3,
    "phi-3-mini-128k of 2024": {**_PHI35, "rope_scaling": {**_PHI35["rope_scaling"], "type": "su"}},
    "phi-3.5-mini": _PHI35,
    "phi-4-mini": _PHI4,
    "ministral-3-3b": _MINISTRAL3,
    "gemma3-1b": _GEMMA3_TEXT,
    "gemma3-4b": _GEMMA3,
    "gemma-4-e2b": _GEMMA4,
    "gemma-4-26b-a4b": _GEMMA4_EXPERTS,
    "by mlx": {**_LLAMA3, "quantization": _MLX, "quantization_config": _MLX, "dtype": "bfloat16"},
    "by bitsandbytes and unsloth": {**_LLAMA3, "quantization_config": _BNB, "unsloth_version": "2024.9", "unsloth_fixed": True, "pad_token_id": 128004},
    "with code beside": {**_QWEN2, "auto_map": {"AutoModelForCausalLM": "modeling_qwen2.Qwen2ForCausalLM"}},
    "trained by transformers 4": {
        **_LLAMA, "return_dict": True, "output_hidden_states": False, "torchscript": False, "use_bfloat16": False, "pruned_heads": {},
        "is_decoder": False, "min_length": 0, "do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0}, "tokenizer_class": None, "task_specific_params": None, "problem_type": None, "sep_token_id": None,
        "tie_encoder_decoder": False, "_attn_implementation_autoset": True,
    },
}  # fmt: skip


def _gguf(arch, **own):
    general = {
        "general.architecture": arch, "general.type": "model", "general.name": "Model", "general.basename": "Model", "general.size_label": "1B",
        "general.license": "apache-2.0", "general.languages": ["en"], "general.base_model.count": 1, "general.base_model.0.name": "Base",
        "general.tags": ["text-generation"], "general.file_type": 15, "general.quantization_version": 2, "general.alignment": 32,
        "quantize.imatrix.file": "imatrix.dat", "quantize.imatrix.dataset": "calibration.txt", "quantize.imatrix.entries_count": 224,
        "quantize.imatrix.chunks_count": 128, "split.no": 0, "split.count": 0, "split.tensors.count": 290, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "x", "tokenizer.ggml.fim_pre_token_id": 5, "tokenizer.chat_template": "", "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    usual = {
        "vocab_size": 49152, "context_length": 8192, "embedding_length": 576, "block_count": 30, "feed_forward_length": 1536,
        "attention.head_count": 9, "attention.head_count_kv": 3, "attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "rope.dimension_count": 64, "rope.freq_base": 100000.0, "attention.key_length": 64, "attention.value_length": 64,
    }  # fmt: skip
    return general | {
        f"{arch}.{key.replace('__', '.')}": value for key, value in {**usual, **own}.items()
    }


GGUF = {
    "llama": _gguf("llama"),
    "llama of older converters": _gguf("llama", tensor_data_layout="Meta AI original pth"),
    "mixtral": _gguf("llama", expert_count=8, expert_used_count=2),
    "not a mixture, and said": _gguf("llama", expert_count=0, expert_used_count=0),
    "yarn": _gguf(
        "qwen2",
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=32768,
        rope__scaling__finetuned=True,
    ),
    "qwen3": _gguf("qwen3"),
    "qwen3-moe": _gguf(
        "qwen3moe", expert_count=128, expert_used_count=8, expert_feed_forward_length=768
    ),
    "olmoe": _gguf("olmoe", expert_count=64, expert_used_count=8),
    "smollm3": _gguf("smollm3"),
    "olmo2": _gguf("olmo2"),
    "olmo3": _gguf(
        "olmo2",
        attention__sliding_window=4096,
        attention__sliding_window_pattern=([True] * 3 + [False]) * 7 + [True] * 2,
        rope__scaling__type="yarn",
        rope__scaling__factor=8.0,
        rope__scaling__original_context_length=8192,
        rope__scaling__yarn_attn_factor=1.2079441547393799,
        rope__scaling__yarn_beta_fast=32.0,
        rope__scaling__yarn_beta_slow=1.0,
    ),
    "granite": _gguf(
        "granite",
        attention__scale=0.015625,
        embedding_scale=12.0,
        residual_scale=0.22,
        logit_scale=8.0,
    ),
    "gemma2": _gguf(
        "gemma2",
        attention__sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "lfm2": _gguf("lfm2", shortconv__l_cache=3, attention__head_count_kv=[0, 0, 3] * 10),
    "qwen3.5": _gguf(
        "qwen35",
        full_attention_interval=4,
        rope__dimension_count=64,
        rope__dimension_sections=[11, 11, 10, 0],
        ssm__conv_kernel=4,
        ssm__state_size=128,
        ssm__group_count=16,
        ssm__time_step_rank=16,
        ssm__inner_size=2048,
    ),
    "phi3": _gguf(
        "phi3",
        rope__scaling__original_context_length=4096,
        attention__sliding_window=2047,
        rope__dimension_count=48,
    ),
    "gemma3": _gguf(
        "gemma3",
        attention__sliding_window=512,
        rope__scaling__type="linear",
        rope__scaling__factor=8.0,
    ),
    "gemma3 with images": _gguf(
        "gemma3", attention__sliding_window=1024, vision__block_count=27, mm__tokens_per_image=256
    ),
}
