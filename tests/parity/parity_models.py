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


def ragged(vocabulary, *lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths]
