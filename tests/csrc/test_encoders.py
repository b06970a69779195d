"""The encoders of formats whose scales are searched for: errors, edges, weights, arguments."""

import gguf
import numpy as np
import pytest

from pyloss import _core
from pyloss.weights.formats import FORMATS, SEARCHED

# Root mean squared errors of ggml's encoders (ggml_quantize_chunk of llama.cpp in 2026) for the
# values of `drawn`.
REFERENCE = {
    "normal": {
        "q2_k": 0.2959, "q3_k": 0.1509, "q4_k": 0.0714, "q5_k": 0.0362, "q6_k": 0.01776,
        "iq4_nl": 0.0763, "iq4_xs": 0.0770,
    },
    "laplace": {
        "q2_k": 0.483, "q3_k": 0.2505, "q4_k": 0.1200, "q5_k": 0.0608, "q6_k": 0.03076,
        "iq4_nl": 0.1249, "iq4_xs": 0.1257,
    },
}  # fmt: skip


def drawn(kind):
    rng = np.random.default_rng(0)
    draw = rng.standard_normal if kind == "normal" else rng.laplace
    return draw(size=(64, 1024)).astype(np.float32)


def encode(format, x, importance=None, like=None):
    return _core.encode(FORMATS[format].code, x, importance, like)


def decode(format, raw):
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[format.upper()])


def rms(error):
    return float(np.sqrt(np.mean(np.square(error, dtype=np.float64))))


@pytest.mark.parametrize("kind", list(REFERENCE))
@pytest.mark.parametrize("format", list(SEARCHED))
def test_values_are_nearer_than_by_the_reference_encoder(format, kind):
    x = drawn(kind)
    assert rms(decode(format, encode(format, x)) - x) < 0.995 * REFERENCE[kind][format]


@pytest.mark.parametrize("format", list(SEARCHED))
def test_codes_are_the_nearest_ones(format):
    """The error of every value is at most that of any other value with the block's scales."""
    x = np.ascontiguousarray(drawn("normal")[:2, :512])
    raw = encode(format, x)
    best = np.abs(decode(format, raw) - x)
    np.testing.assert_array_equal(encode(format, x, like=raw), raw)
    for other in (x + 0.02, x - 0.02, x * 1.3, x * 0.7, -x, np.zeros_like(x), x + 5):
        found = decode(format, encode(format, np.ascontiguousarray(other), like=raw))
        assert (np.abs(found - x) >= best - 1e-6).all()


@pytest.mark.parametrize("format", list(SEARCHED))
def test_importance_moves_errors_to_other_columns(format):
    x = drawn("laplace")
    importance = np.random.default_rng(1).uniform(0, 1, 1024).astype(np.float32) ** 4
    importance[100:140] = 0  # a whole group, too
    even = decode(format, encode(format, x)) - x
    weighed = decode(format, encode(format, x, importance)) - x
    assert np.isfinite(weighed).all()
    assert rms(weighed * np.sqrt(importance)) < 0.97 * rms(even * np.sqrt(importance))
    ones = encode(format, x, np.ones(1024, np.float32))
    np.testing.assert_array_equal(ones, encode(format, x))


@pytest.mark.parametrize("format", list(SEARCHED))
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1, 1e3])
def test_edges(format, size):
    rng = np.random.default_rng(2)
    rows = {
        "zero": np.zeros(256),
        "negative": np.full(256, -1.0),
        "positive": np.full(256, 1.0),
        "one": np.eye(1, 256, 7)[0],
        "ramp": np.linspace(0, 1, 256),
        "below": np.linspace(-2, -1, 256),
        "outlier": np.r_[rng.standard_normal(255) * 0.01, 30],
        "two signs": np.where(rng.random(256) < 0.5, -1, 1),
    }
    for name, row in rows.items():
        x = (size * row).astype(np.float32)[None]
        found = decode(format, encode(format, x))
        assert np.isfinite(found).all(), name
        assert rms(found - x) <= (0.45 if format == "q2_k" else 0.3) * rms(x) + 1e-7, name
        if name == "zero":
            assert not found.any()


@pytest.mark.parametrize("rows, cols", [(1, 32), (3, 32), (5, 96), (1, 288), (9, 256)])
def test_blocks_of_32_in_any_number(rows, cols):
    x = np.random.default_rng(3).standard_normal((rows, cols)).astype(np.float32)
    importance = np.linspace(0.1, 1, cols, dtype=np.float32)
    raw = encode("iq4_nl", x, importance)
    assert raw.shape == (rows, cols // 32 * 18)
    for row in range(rows):
        np.testing.assert_array_equal(encode("iq4_nl", x[row : row + 1], importance)[0], raw[row])
    np.testing.assert_array_equal(encode("iq4_nl", x, None, raw), raw)


@pytest.mark.parametrize("format", list(SEARCHED))
def test_threads_do_not_change_the_bits(format):
    x = drawn("normal")
    before = _core.num_threads()
    try:
        found = []
        for threads in (1, 3):
            _core.set_num_threads(threads)
            found.append(encode(format, x))
    finally:
        _core.set_num_threads(before)
    np.testing.assert_array_equal(*found)


def test_arguments_are_checked():
    x, code = np.ones((2, 256), np.float32), FORMATS["q4_k"].code
    for arguments, message in [
        ((FORMATS["q8_0"].code, x, None, None), "Q8_0 has no encoder here"),
        ((99, x, None, None), "the format"),
        ((code, x[0], None, None), "x must be a matrix"),
        ((code, [1.0], None, None), "x must be a matrix"),
        ((code, np.ones((2, 96), np.float32), None, None), "96 columns, no whole blocks of Q4_K"),
        ((code, x.astype(np.float64), None, None), "x must be a C-contiguous float32"),
        ((code, np.ones((256, 512), np.float32).T, None, None), "x must be a C-contiguous"),
        ((code, x, np.ones(255, np.float32), None), "importance must be .* array of 256 values"),
        ((code, x, 1.0, None), "importance must be"),
        ((code, x, None, np.ones((2, 143), np.uint8)), "like must be .* uint8 array of 288 values"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            _core.encode(*arguments)
