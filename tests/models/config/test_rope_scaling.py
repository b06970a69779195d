"""Effects of the scaling types on rotary frequencies, by their published definitions."""

import numpy as np
import pytest
from rope_settings import llama3

from pyloss.models.config.rope_scaling import gguf_scaling, llama3_factors, rotary_frequencies

LLAMA3 = llama3()
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.25,
}
PLAIN = 5e5 ** (-np.arange(0, 64, 2) / 64)


def test_plain_and_linear():
    np.testing.assert_allclose(rotary_frequencies(5e5, 64, None)[0], PLAIN)
    np.testing.assert_allclose(
        rotary_frequencies(5e5, 64, {"rope_type": "linear", "factor": 4.0})[0], PLAIN / 4
    )
    assert rotary_frequencies(5e5, 64, None)[1] == 1


def test_llama3_factors_follow_the_published_cases():
    factors = llama3_factors(LLAMA3, 5e5, 64)
    wavelength = 2 * np.pi * 5e5 ** (np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(factors[wavelength < 8192 / 4], 1)
    np.testing.assert_allclose(factors[wavelength > 8192], 32)
    between = (wavelength >= 8192 / 4) & (wavelength <= 8192)
    smooth = (8192 / wavelength[between] - 1) / 3
    np.testing.assert_allclose(1 / factors[between], (1 - smooth) / 32 + smooth)
    assert between.any()


def test_yarn_slows_what_turns_rarely():
    frequencies, scale = rotary_frequencies(5e5, 64, YARN)
    turns = 4096 * PLAIN / (2 * np.pi)
    assert scale == 1.25
    ratio = frequencies / PLAIN
    np.testing.assert_allclose(ratio[turns > 64], 1)
    np.testing.assert_allclose(ratio[turns < 0.5], 1 / 4)
    between = (turns < 32) & (turns > 1)
    assert (np.diff(ratio[between]) < 0).all() and between.sum() > 4
    # The blend is linear in the index of the pair.
    np.testing.assert_allclose(np.diff(ratio[between], 2), 0, atol=1e-12)


def test_gguf_says_what_it_can():
    assert gguf_scaling(None) == gguf_scaling(LLAMA3) == {}
    assert gguf_scaling({"rope_type": "linear", "factor": 4}) == {
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
    }
    with pytest.raises(ValueError, match="attention_factor 1.25 of yarn cannot be written"):
        gguf_scaling(YARN)
