"""The importance of columns: mean squares of the inputs of layers."""

import json

import numpy as np
import pytest
import tiny

import pyloss
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.importance import column_importance
from pyloss.models.synthetic import random_model
from pyloss.nn import Linear

IDS = [[int(i) for i in np.arange(40) * 7 % tiny.TOKENS], [3, 5, 9]]


def test_means_are_those_of_the_inputs(tmp_path):
    model = tiny.load_tiny(tmp_path / "m", vocab_size=tiny.TOKENS, tied=False)
    layers = {name: type(layer) for name, layer in model.named_modules()}
    before = pyloss.autograd.data(model(np.array(IDS[:1])))
    found = column_importance(model, IDS, window=16)
    assert {name: type(layer) for name, layer in model.named_modules()} == layers
    np.testing.assert_array_equal(pyloss.autograd.data(model(np.array(IDS[:1]))), before)
    linear = {name for name, layer in model.named_modules() if isinstance(layer, Linear)}
    assert {f"{name}.weight" for name in linear - {"lm_head"}} == set(found)
    # the first layer's inputs are the norm of the embeddings
    tokens = np.concatenate([np.array(ids) for ids in IDS])
    rows = model.model.embed_tokens.weight.rows(tokens).astype(np.float64)
    rows /= np.sqrt((rows**2).mean(axis=1, keepdims=True) + model.config.rms_norm_eps)
    rows *= np.asarray(model.layers[0].input_layernorm.weight)
    for part in ("q_proj", "k_proj", "v_proj"):
        np.testing.assert_allclose(
            found[f"model.layers.0.self_attn.{part}.weight"], (rows**2).mean(axis=0), rtol=1e-4
        )


def test_experts_share_one(tmp_path):
    config = tiny.config(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        vocab_size=tiny.TOKENS,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = random_model(ModelConfig.from_hf(tmp_path / "config.json"))
    found = column_importance(model, IDS)
    name = "model.layers.1.mlp.switch_mlp"
    assert found[f"{name}.gate_proj.weight"].shape == (32,)
    np.testing.assert_array_equal(
        found[f"{name}.gate_proj.weight"], found[f"{name}.up_proj.weight"]
    )
    assert (found[f"{name}.down_proj.weight"] > 0).all()


def test_nothing_to_measure(tmp_path):
    model = tiny.load_tiny(tmp_path / "m", vocab_size=tiny.TOKENS)
    with pytest.raises(ValueError, match="there is no text to measure"):
        column_importance(model, [[], []])
