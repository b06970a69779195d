"""Models with random weights compute, in every shape that a configuration may have."""

import numpy as np
import pytest

from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.synthetic import SMALL, random_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 8,
}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "mixtral"])
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
