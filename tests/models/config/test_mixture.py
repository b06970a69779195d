"""Configurations of mixtures of experts, and options that are refused by name."""

import json

import pytest

from pyloss.errors import FormatError
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MIXTRAL = {**SIZES, "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 3}
QWEN3 = {
    **SIZES,
    "model_type": "qwen3_moe",
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
}
OLMOE = {
    **SIZES,
    "model_type": "olmoe",
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}


def read(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return ModelConfig.from_hf(path)


@pytest.mark.parametrize(
    ("content", "mixture"),
    [
        (MIXTRAL, Mixture(6, 3, 48, True)),
        ({**SIZES, "model_type": "mixtral"}, Mixture(8, 2, 48, True)),
        (QWEN3, Mixture(16, 4, 24, False)),
        ({**QWEN3, "norm_topk_prob": True, "mlp_only_layers": [1]}, Mixture(16, 4, 24, True, (1,))),
        ({**QWEN3, "decoder_sparse_step": 2}, Mixture(16, 4, 24, False, (0, 2))),
        ({**SIZES, "model_type": "qwen3_moe"}, Mixture(128, 8, 768, False)),
        (OLMOE, Mixture(16, 4, 48, True)),
        ({**SIZES, "model_type": "olmoe"}, Mixture(64, 8, 48, False)),
        ({**SIZES, "model_type": "llama"}, None),
    ],
)
def test_what_config_json_says(tmp_path, content, mixture):
    config = read(tmp_path, content)
    assert config.mixture == mixture
    assert read(tmp_path, config.to_hf()) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**OLMOE, "clip_qkv": 8.0}, "clip_qkv 8.0 is not supported; supported is null"),
        (
            {**MIXTRAL, "router_jitter_noise": 0.1},
            "router_jitter_noise 0.1 is not supported; supported is null or false",
        ),
        ({**QWEN3, "shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size 24"),
        ({**QWEN3, "num_experts_per_tok": 17}, "a token cannot visit 17 of 16 experts"),
        ({**QWEN3, "moe_intermediate_size": 0}, "of size 0"),
        ({**QWEN3, "decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, got 0"),
        (
            {**MIXTRAL, "num_local_experts": "8"},
            "num_local_experts: the value is '8'; it must be a whole number",
        ),
    ],
)
def test_what_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)


def test_missing_options_mean_none(tmp_path):
    assert (
        read(tmp_path, {**OLMOE, "clip_qkv": None}).mixture
        and read(tmp_path, {**MIXTRAL, "router_jitter_noise": 0.0}).mixture
    )
    with pytest.raises(FormatError):
        read(tmp_path, {**MIXTRAL, "num_experts_per_tok": 0})
