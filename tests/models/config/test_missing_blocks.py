"""The block that an unknown family needs is named where its configuration shows it."""

import json

import pytest

from pyloss.models.config import ModelConfig
from pyloss.models.config.families import FAMILIES
from pyloss.models.config.missing_blocks import missing_block


@pytest.mark.parametrize(
    ("values", "block"),
    [
        ({"kv_lora_rank": 512}, "latent attention (kv_lora_rank 512)"),
        ({"attention.kv_lora_rank": 512}, "latent attention (attention.kv_lora_rank 512)"),
        ({"kv_lora_rank": 512, "index_topk": 9}, "sparse attention by an indexer (index_topk 9)"),
        ({"text_config": {"lru_width": 8}}, "the RG-LRU recurrence (lru_width 8)"),
        (
            {"layers_block_type": ["mamba", "moe"]},
            "layers of a mixer or an MLP alone (layers_block_type ['mamba', 'moe'])",
        ),
        ({"topk_group": 4}, "experts chosen within groups (topk_group 4)"),
        ({"attention.causal": False}, "attention in both directions (attention.causal False)"),
        (
            {"use_parallel_residual": True, "layer_norm_eps": 1e-5},
            "attention and MLP side by side on one norm (use_parallel_residual True)",
        ),
        ({"hidden_act": "relu2"}, "an MLP with squared ReLU (hidden_act 'relu2')"),
    ],
)
def test_the_first_block_that_is_shown(values, block):
    assert missing_block("new", values) == f": it needs {block}, which pyloss lacks"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4},
        # off
        {"kv_lora_rank": None, "topk_group": 1, "alibi": False, "attention_chunk_size": 0},
        {"layers_block_type": ["mamba", "attention"], "attention.causal": True, "index_topk": None},
        {"use_parallel_residual": False, "text_config": None, "is_encoder_decoder": False},
    ],
)
def test_nothing_is_named_that_is_not_needed(values):
    assert missing_block("new", values) == ""


def test_the_type_alone_may_say_it(tmp_path):
    assert "Mamba-1's selective scan" in missing_block("falcon_mamba", {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "new", "kv_lora_rank": 64}))
    with pytest.raises(ValueError) as raised:
        ModelConfig.from_hf(path)
    assert str(raised.value) == (
        f"{path}: model_type 'new' is not supported: it needs latent attention (kv_lora_rank 64), "
        f"which pyloss lacks; supported are {', '.join(FAMILIES)}"
    )
