"""Gemma 4: embeddings of each layer, keys and values that layers share, global heads of a size."""

import dataclasses
import json

import numpy as np
import pytest
from mixer_checks import with_lora
from slopes import gradient_error

import pyloss
from pyloss.errors import FormatError
from pyloss.models.config import ModelConfig
from pyloss.models.config.gemma4 import Gemma4
from pyloss.models.files.gguf_writer import _hyperparameters
from pyloss.models.pruning import prune_model
from pyloss.models.synthetic import random_model

TYPES = ["sliding_attention", "full_attention"] * 3
OPTIONS = Gemma4(12, 3, True, 5, 17)
SIZES = {
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "sliding_window": 3,
    "layer_types": TYPES,
    "rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "final_logit_softcapping": 3.0,
}


def config(**changes):
    return ModelConfig("gemma4_text", **{**SIZES, "gemma4": OPTIONS, **changes})


def test_layers_of_a_configuration():
    c = config()
    assert [c.shared_from(i) for i in range(6)] == [None, None, None, 1, 2, 1]
    assert [c.inner_size(i) for i in range(6)] == [12] * 3 + [24] * 3
    assert [c.head_dim_of(c.window(i)) for i in range(6)] == [4, 12] * 3
    net = random_model(c)
    assert net.cached_windows == [3, 0, 3]
    rows = 10 + 3 + 10 + 3  # both lengths without a window; less with one
    assert net.cache_bytes([10, 3]) >= 4 * 2 * (rows * 12 // 2)
    assert "k_proj" in vars(net.layers[2].self_attn)
    assert "k_proj" not in vars(net.layers[3].self_attn)


def test_gradients_of_a_model_in_float64():
    small = {"hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 4}
    options = Gemma4(6, 2, True, 3, 17)
    pyloss.random.seed(0)
    net = with_lora(random_model(config(**small, layer_types=TYPES[:4], gemma4=options)), rank=1)
    names = net.trainable_parameters()
    for part in ("per_layer_input_gate", "per_layer_projection", "self_attn.q_proj", "mlp.up_proj"):
        assert f"model.layers.3.{part}.lora_a" in names
    assert "model.layers.1.self_attn.k_proj.lora_a" in names
    assert "model.layers.3.self_attn.k_proj.lora_a" not in names
    tokens = np.random.default_rng(1).integers(0, 17, 7).astype(np.int32)
    offsets = np.array([0, 1, 7], np.int32)
    assert gradient_error(net, tokens, offsets) < 1e-6


def test_layer_scalars_are_saved_and_not_trained(tmp_path):
    net = random_model(config())
    net.layers[1].layer_scalar[...] = 0.25
    tokens = np.arange(10)[None]
    logits = np.asarray(net(tokens))
    net.layers[1].layer_scalar[...] = 1
    assert np.abs(np.asarray(net(tokens)) - logits).max() > 1e-3
    net.layers[1].layer_scalar[...] = 0.25
    net.unfreeze()
    assert not any("layer_scalar" in name for name in net.trainable_parameters())
    net.save(tmp_path)
    again = pyloss.load_model(tmp_path)
    assert again.config == net.config
    np.testing.assert_array_equal(np.asarray(again(tokens)), logits)


def test_layers_cannot_be_taken_away():
    with pytest.raises(ValueError, match="they share keys and values"):
        prune_model(random_model(config()), [0, 1, 2])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"num_kv_shared_layers": 6}, "num_kv_shared_layers 6 leaves no layer of 6"),
        ({"num_kv_shared_layers": 5}, "layer 1 shares keys and values of type full_attention"),
        ({"global_head_dim": 5}, "global_head_dim must be even, got 5"),
        (
            {"vocab_size_per_layer_input": 0},
            "vocab_size_per_layer_input is 0; it must be a whole number of at least 1",
        ),
    ],
)
def test_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        config(gemma4=dataclasses.replace(OPTIONS, **options))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"enable_moe_block": True}, "num_experts: this key is missing, and enable_moe_block is true"),
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5, "moe_intermediate_size": 8},
            "a token cannot visit 5 of 4 experts of size 8",
        ),
        (
            {"attention_k_eq_v": True, "num_global_key_value_heads": 3},
            "is not a multiple of num_global_key_value_heads 3",
        ),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all'"),
        ({"per_layer_config": {"1": {"head_dim": 12}}}, "per_layer_config: must give all layers"),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"rope_parameters": {"full_attention": {"rope_type": "proportional", "factor": 2.0}, "sliding_attention": {}}}, "factor 2.0 of proportional"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(changes, said, tmp_path):
    content = config().to_hf()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    assert ModelConfig.from_hf(path) == config()
    path.write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match=said):
        ModelConfig.from_hf(path)


EXPERTS = Gemma4(12, attention_k_eq_v=True, num_experts=3, top_k_experts=2, moe_intermediate_size=6)


def test_experts_beside_the_mlp():
    """One expert for every token: the choice of experts has no gradient, but jumps."""
    options = dataclasses.replace(EXPERTS, num_experts=1, top_k_experts=1)
    small = {"num_hidden_layers": 2, "layer_types": TYPES[:2]}
    pyloss.random.seed(0)
    net = with_lora(random_model(config(gemma4=options, **small)), rank=1)
    names = net.trainable_parameters()
    for part in ("switch_mlp.down_proj.lora_a", "mlp.down_proj.lora_a", "self_attn.k_proj.lora_b"):
        assert f"model.layers.1.{part}" in names
    assert "model.layers.1.self_attn.v_proj.lora_a" not in names
    tokens = np.random.default_rng(1).integers(0, 17, 8).astype(np.int32)
    assert gradient_error(net, tokens, np.array([0, 3, 4, 8], np.int32)) < 1e-6


@pytest.mark.parametrize("name", ["4", "04"])
def test_head_sizes_per_layer_as_transformers_writes_them(name, tmp_path):
    content = config().to_hf()
    del content["global_head_dim"]
    each = {"head_dim": 12}
    content["per_layer_config"] = {"1": each, "3": each, "5": each}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert ModelConfig.from_hf(tmp_path / "config.json") == config()


def gguf(**changes):
    values = {
        "block_count": 6,
        "context_length": 64,
        "embedding_length": 8,
        "feed_forward_length": [12] * 3 + [24] * 3,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 12,
        "attention.value_length": 12,
        "attention.key_length_swa": 4,
        "attention.value_length_swa": 4,
        "attention.shared_kv_layers": 3,
        "attention.sliding_window": 3,
        "attention.sliding_window_pattern": [True, False] * 3,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "embedding_length_per_layer_input": 5,
        "rope.dimension_count": 12,
        "rope.freq_base": 1e4,
        "rope.freq_base_swa": 1e4,
        "rope.dimension_count_swa": 4,
        "final_logit_softcapping": 3.0,
        **changes,
    }
    return {
        "general.architecture": "gemma4",
        **{f"gemma4.{key}": value for key, value in values.items() if value is not None},
    }


class Stored:
    """A tensor of a file, for readers of metadata."""

    def __init__(self, name, array):
        self.name, self.shape, self._array = name, array.shape, array

    def array(self):
        return self._array


def stored(divisors):
    arrays = {
        "token_embd.weight": np.zeros((17, 8)),
        "per_layer_token_embd.weight": np.zeros((17, 30)),
        "rope_freqs.weight": np.array(divisors, np.float32),
        **{f"blk.{i}.attn_q.weight": np.zeros(1) for i in range(6)},
    }
    return {name: Stored(name, array) for name, array in arrays.items()}


DIVISORS = [1, 1, 1, 1e30, 1e30, 1e30]


def test_experts_and_keys_that_are_values_in_gguf():
    options = dataclasses.replace(EXPERTS, num_global_key_value_heads=2)
    c = config(gemma4=options, tie_word_embeddings=True)
    metadata = _hyperparameters_of(c)
    assert metadata["gemma4.attention.head_count_kv"] == [1, 2] * 3
    tensors = stored(DIVISORS)
    for i, kind in enumerate(TYPES):
        for name in ["attn_k"] + ["attn_v"] * (kind == "sliding_attention"):
            tensors[f"blk.{i}.{name}.weight"] = Stored(name, np.zeros(1))
    assert ModelConfig.from_gguf(metadata, tensors) == c


def test_metadata_of_gguf():
    found = ModelConfig.from_gguf(gguf(), stored(DIVISORS))
    assert found == config(max_position_embeddings=64, tie_word_embeddings=True)
    capped = ModelConfig.from_gguf(gguf(final_logit_softcapping=None), stored(DIVISORS))
    assert capped.final_logit_softcapping == 30.0  # llama.cpp's


@pytest.mark.parametrize(
    "changes, divisors, said",
    [
        ({"feed_forward_length": [12, 24] * 3}, DIVISORS, "twice it in layers that share keys"),
        (
            {"attention.head_count_kv": [1, 2, 1, 1, 1, 1]},
            DIVISORS,
            "head_count_kv .* is not supported; supported is one number for each type of layer",
        ),
        ({"expert_count": 4}, DIVISORS, "a token cannot visit 0 of 4 experts of size 0"),
        ({"attention.value_length_swa": 6}, DIVISORS, "value_length_swa 6 is not supported"),
        ({"rope.dimension_count_swa": 2}, DIVISORS, "dimension_count_swa 2 is not supported"),
        ({}, [1, 1e30, 1, 1e30, 1e30, 1e30], "not the rotary factors of Gemma 4"),
        ({}, [2, 2, 2, 2, 2, 2], "not the rotary factors of Gemma 4"),
    ],
)
def test_metadata_of_gguf_that_is_refused(changes, divisors, said):
    with pytest.raises((ValueError, FormatError), match=said):
        ModelConfig.from_gguf(gguf(**changes), stored(divisors))


@pytest.mark.parametrize("types", [TYPES, None])
def test_a_configuration_goes_through_gguf(types):
    window = 3 if types else None
    c = config(layer_types=types, sliding_window=window, tie_word_embeddings=True)
    again = ModelConfig.from_gguf(_hyperparameters_of(c), stored(DIVISORS))
    assert again == c


def _hyperparameters_of(c):
    return {"general.architecture": "gemma4", **_hyperparameters(c)}


def test_a_null_cap_cannot_be_written_as_gguf():
    with pytest.raises(ValueError, match="final_logit_softcapping null cannot be written"):
        _hyperparameters(config(final_logit_softcapping=None))
