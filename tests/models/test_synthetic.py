"""Models with random weights compute, in every shape that a configuration may have."""

import json
import tracemalloc

import numpy as np
import pytest
from tiny import DENSE

from pyloss.errors import FormatError
from pyloss.models import synthetic
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.synthetic import (
    SMALL,
    STORED_TYPES,
    lacks_weights,
    random_model,
    shape_of,
    type_name,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 8,
}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("family", [*DENSE, "mixtral"])
@pytest.mark.parametrize("format", ["f32", "q4_1"])
def test_logits_are_of_a_useful_size(family, format):
    mixture = Mixture(4, 2, 64, True) if family == "mixtral" else None
    model = random_model(
        ModelConfig(family, tie_word_embeddings=family == "llama", mixture=mixture, **SIZES), format
    )
    logits = model(np.arange(12).reshape(2, 6))
    assert logits.shape == (2, 6, 64) and np.isfinite(logits).all() and 0.1 < logits.std() < 10
    assert not model.trainable_parameters()


def test_the_same_numbers_each_time_in_memory_of_their_own():
    first, second = (random_model(ModelConfig("llama", **SIZES), "q8_0") for _ in range(2))
    up = [model.layers[i].mlp.up_proj.weight for model, i in ((first, 0), (first, 1), (second, 0))]
    np.testing.assert_array_equal(up[0].raw, up[1].raw)
    np.testing.assert_array_equal(up[0].raw, up[2].raw)
    assert not np.shares_memory(up[0].raw, up[1].raw)


def test_the_default_shape_is_the_embedded_models():
    numbers = SMALL.vocab_size * SMALL.hidden_size + SMALL.num_hidden_layers * SMALL.hidden_size * (
        2 * SMALL.num_attention_heads * SMALL.head_dim
        + 2 * SMALL.num_key_value_heads * SMALL.head_dim
        + 3 * SMALL.intermediate_size
    )
    assert round(numbers / 1e6) == 134


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(ValueError, match="q4_9"):
        random_model(ModelConfig("llama", **SIZES), "q4_9")


@pytest.mark.parametrize("stored", STORED_TYPES)
def test_every_stored_type(stored):
    format = STORED_TYPES[stored]
    assert type_name(format) == stored
    sizes = SIZES | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "vocab_size": 300,
        "head_dim": 64,
    }
    model = random_model(ModelConfig("llama", **sizes), format)
    formats = {name: weight.format for name, weight in model.stored().items()}
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {formats[name] for name in formats if name not in tables} == {format}
    # bitsandbytes quantizes neither of them
    assert {formats[name] for name in tables} == {"bf16" if format == "nf4" else format}
    for weight in model.stored().values():
        values = weight.dequantize()
        assert np.isfinite(values).all() and 0.2 < values.std() * np.sqrt(values.shape[1]) < 5


def test_rows_beyond_the_drawn_ones_repeat_them(monkeypatch):
    monkeypatch.setattr(synthetic, "_DRAWN", 640)
    for format in ("f32", "q4_1", "affine4", "nf4"):
        sizes = SIZES | {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
        weight = random_model(ModelConfig("llama", **sizes), format).layers[0].mlp.up_proj.weight
        values = weight.dequantize()
        assert weight.shape == (192, 64)
        np.testing.assert_array_equal(values[10:20], values[:10])
        np.testing.assert_array_equal(values[190:], values[:2])


def test_the_float32_size_is_never_needed():
    shape = ModelConfig("llama", tie_word_embeddings=True, **SIZES | {"vocab_size": 1 << 20})
    tracemalloc.start()
    model = random_model(shape, "q8_0")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 36 MB are stored, 134 MB would be float32; a million values are drawn at a time
    stored = sum(weight.nbytes for weight in model.stored().values())
    assert stored > 35e6 and peak < stored + 32e6


def test_weights_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(synthetic, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"need 0 MB as bf16, and 0 MB .* free; 4 bits"):
        random_model(ModelConfig("llama", **SIZES), "bf16")
    monkeypatch.setattr(synthetic, "free_memory", lambda: None)
    random_model(ModelConfig("llama", **SIZES), "bf16")


@pytest.mark.parametrize(
    ("content", "format"),
    [
        ({"torch_dtype": "bfloat16"}, "bf16"),
        ({"torch_dtype": "float16"}, "f16"),
        ({"dtype": "float32"}, "f32"),
        ({}, "bf16"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "affine4"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "nf4"),
    ],
)
def test_the_shape_of_a_configuration_alone(tmp_path, content, format):
    config = ModelConfig("qwen3", **SIZES)
    said = config.to_hf()
    del said["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(said | content))
    for place in (tmp_path / "config.json", tmp_path):
        assert lacks_weights(place)
        assert shape_of(place) == (config, format)


def test_the_shape_of_a_model_with_weights(tmp_path):
    model = random_model(ModelConfig("qwen3", **SIZES), "bf16")
    model.save(tmp_path / "folder")
    assert not lacks_weights(tmp_path / "folder")
    assert shape_of(tmp_path / "folder") == (model.config, "bf16")


def test_configurations_that_are_none(tmp_path):
    assert not lacks_weights(tmp_path) and not lacks_weights(tmp_path / "model.gguf")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        shape_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(FormatError, match="vocab_size"):
        shape_of(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(
        json.dumps(
            ModelConfig("llama", **SIZES).to_hf()
            | {"quantization_config": {"quant_method": "gptq"}}
        )
    )
    with pytest.raises(ValueError, match="gptq"):
        shape_of(tmp_path)
