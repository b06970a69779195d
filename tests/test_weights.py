"""Stored weights mean what GGUF says they mean, bit for bit."""

import gguf
import ml_dtypes
import numpy as np
import pytest

from pyloss.weights import FORMATS, Weight

QUANTISED = ["q4_0", "q4_1", "q8_0"]


def ggml_type(name):
    return gguf.GGMLQuantizationType[name.upper()]


def matrices():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((48, 96)).astype(np.float32)
    steps = rng.integers(-16, 17, (16, 64)).astype(np.float32) / 2  # ties in every rounding
    outlier = normal.copy()
    outlier[:, ::32] *= 1000
    constant = np.full((4, 32), -0.25, np.float32)
    return {
        "normal": normal,
        "small": normal * np.float32(1e-6),
        "steps": steps,
        "outlier": outlier,
        "constant": constant,
        "zero": np.zeros((2, 64), np.float32),
    }


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("kind", list(matrices()))
def test_quantising_is_bit_for_bit_the_reference(format, kind):
    matrix = matrices()[kind]
    weight = Weight.quantize(matrix, format)
    reference = np.ascontiguousarray(gguf.quants.quantize(matrix, ggml_type(format)))
    np.testing.assert_array_equal(weight.raw, reference.view(np.uint8).reshape(-1))
    restored = gguf.quants.dequantize(reference, ggml_type(format))
    result = weight.dequantize()
    assert result.dtype == np.float32 and result.shape == matrix.shape
    np.testing.assert_array_equal(result, restored)


@pytest.mark.parametrize("format", list(FORMATS))
def test_any_stored_bytes_dequantise_as_the_reference(format):
    rng = np.random.default_rng(1)
    layout = FORMATS[format]
    raw = rng.integers(0, 256, (8, 4 * 32 // layout.elements * layout.bytes), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        expected = gguf.quants.dequantize(raw, ggml_type(format)).astype(np.float32)
    result = Weight(raw.reshape(-1), format, (8, 128)).dequantize()
    np.testing.assert_array_equal(result, expected)


def test_bfloat16_rounds_as_ml_dtypes_and_keeps_special_values():
    values = np.array([[1.00390625, 1.01171875, -0.0, np.inf, -np.inf, np.nan, 3.3e38, 1e-40]], np.float32)
    result = Weight.quantize(values, "bf16").dequantize()
    expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(result, expected)
    assert np.signbit(result[0, 2])
    nan = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)[None]
    assert np.isnan(Weight.quantize(nan, "bf16").dequantize()).all()


@pytest.mark.parametrize("format", list(FORMATS))
def test_head_dim_gives_hugging_face_order(format):
    heads, dim, columns = 3, 8, 64
    matrix = np.random.default_rng(2).standard_normal((heads * dim, columns)).astype(np.float32)
    # How llama.cpp's converter orders the rows of q and k.
    stored = matrix.reshape(heads, 2, dim // 2, columns).swapaxes(1, 2).reshape(matrix.shape)
    plain = Weight.quantize(matrix, format).dequantize()
    weight = Weight(Weight.quantize(stored, format).raw, format, matrix.shape, head_dim=dim)
    np.testing.assert_array_equal(weight.dequantize(), plain)
    rows = np.array([[0, 5], [23, 8]])
    np.testing.assert_array_equal(weight.rows(rows), plain[rows])
    np.testing.assert_array_equal(Weight.quantize(matrix, format, head_dim=dim).raw, weight.raw)


def test_head_dim_row_by_row():
    matrix = np.arange(8, dtype=np.float32)[:, None]
    hf = Weight(matrix.view(np.uint8).reshape(-1), "f32", (8, 1), head_dim=4).dequantize()[:, 0]
    assert hf.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("format", list(FORMATS))
def test_rows_are_rows(format):
    matrix = np.random.default_rng(3).standard_normal((10, 64)).astype(np.float32)
    weight = Weight.quantize(matrix, format)
    whole = weight.dequantize()
    for indices in ([3, 3, 0], np.array([[9], [1]]), 4, np.array([], np.int32), np.array([2], np.uint8)):
        np.testing.assert_array_equal(weight.rows(np.asarray(indices, dtype=np.int64)), whole[np.asarray(indices, int)])


def test_more_values_than_one_chunk():
    matrix = np.random.default_rng(4).standard_normal((600, 4096)).astype(np.float32)
    np.testing.assert_array_equal(
        Weight.quantize(matrix, "q8_0").raw, gguf.quants.quantize(matrix, ggml_type("q8_0")).reshape(-1)
    )
    np.testing.assert_array_equal(Weight.quantize(matrix, "f32").dequantize(), matrix)


def test_read_only_and_unaligned_bytes():
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = np.frombuffer(b"x" + matrix.tobytes(), np.uint8)[1:]
    assert not raw.flags.writeable
    weight = Weight(raw, "f32", (2, 3))
    assert weight.handle[0].ctypes.data % 4 == 0
    aligned = np.frombuffer(matrix.tobytes(), np.uint8)
    assert Weight(aligned, "f32", (2, 3)).raw is aligned
    result = weight.dequantize()
    np.testing.assert_array_equal(result, matrix)
    assert result.flags.writeable and result.flags.aligned


def test_other_float_types_and_strides_are_taken():
    matrix = np.random.default_rng(5).standard_normal((64, 32))
    expected = Weight.quantize(matrix.astype(np.float32).T.copy(), "q4_0").raw
    np.testing.assert_array_equal(Weight.quantize(matrix.T, "q4_0").raw, expected)


def test_what_it_tells():
    weight = Weight.quantize(np.zeros((4, 64), np.float32), "q4_1", head_dim=2)
    assert weight.nbytes == 4 * 2 * 20
    assert weight.dtype_name == "Q4_1"
    assert weight.handle[0] is weight.raw
    assert weight.handle[1:] == (5, 4, 64, 2)
    assert repr(weight) == "Weight(q4_1, shape=(4, 64), 160 bytes, head_dim=2)"
    assert [layout.code for layout in FORMATS.values()] == list(range(6))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros(8, np.uint8), "q2_k", (1, 32)), ValueError, "format must be one of f32, .* got 'q2_k'"),
        ((np.zeros(8, np.float32), "f32", (1, 8)), TypeError, "uint8"),
        ((b"1234", "f32", (1, 1)), TypeError, "bytes"),
        ((np.zeros((2, 4), np.uint8), "f32", (1, 2)), ValueError, "flat"),
        ((np.zeros(8, np.uint8)[::2], "f32", (1, 1)), ValueError, "contiguous"),
        ((np.zeros(7, np.uint8), "f32", (1, 2)), ValueError, "must hold 8 bytes .* got 7"),
        ((np.zeros(18, np.uint8), "q4_0", (1, 33)), ValueError, "multiple of 32"),
        ((np.zeros(18, np.uint8), "q4_0", (32,)), ValueError, "shape"),
        ((np.zeros(4, np.uint8), "f32", (-1, -1)), ValueError, "shape"),
        ((np.zeros(24, np.uint8), "f32", (6, 1), 4), ValueError, "head_dim"),
        ((np.zeros(12, np.uint8), "f32", (3, 1), 3), ValueError, "head_dim"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Weight(*arguments)


def test_bad_rows_are_named():
    weight = Weight(np.zeros(16, np.uint8), "f32", (4, 1))
    with pytest.raises(ValueError, match=r"index 4 at position 1 is outside \[0, 4\)"):
        weight.rows([0, 4])
    with pytest.raises(ValueError, match="index -1"):
        weight.rows([-1])
    with pytest.raises(TypeError, match="integers"):
        weight.rows([0.0])


@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_cannot_be_quantised_is_refused(format, bad):
    matrix = np.zeros((2, 32), np.float32)
    matrix[1, 7] = bad
    with pytest.raises(ValueError, match="array cannot be"):
        Weight.quantize(matrix, format)


@pytest.mark.parametrize("format", QUANTISED)
def test_vanishing_scales_become_zero(format):
    matrix = np.linspace(-1e-39, 1e-39, 32, dtype=np.float32)[None]
    np.testing.assert_allclose(Weight.quantize(matrix, format).dequantize(), 0, atol=1e-38)
