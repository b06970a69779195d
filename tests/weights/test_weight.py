"""Stored weights have the values that GGUF defines, bit for bit."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from stored_weights import GGUF, GROUPED, stored

from pyloss.weights.formats import SEARCHED
from pyloss.weights.weight import FORMATS, Weight

# Those of SEARCHED come nearer to the values than the reference: tests/csrc/test_encoders.py.
WRITTEN = [name for name in GGUF if FORMATS[name].encodes and name not in SEARCHED]
QUANTISED = [name for name in WRITTEN if name.startswith("q")]
READ_ONLY = [name for name in GGUF if not FORMATS[name].encodes]
AFFINE = [name for name in GROUPED if name != "nf4"]


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


@pytest.mark.parametrize("format", WRITTEN)
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


@pytest.mark.parametrize("format", GGUF)
def test_any_stored_bytes_dequantise_as_the_reference(format):
    rng = np.random.default_rng(1)
    layout = FORMATS[format]
    raw = rng.integers(0, 256, (8, 512 // layout.elements * layout.bytes), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        expected = gguf.quants.dequantize(raw, ggml_type(format)).astype(np.float32)
    result = Weight(raw.reshape(-1), format, (8, 512)).dequantize()
    np.testing.assert_array_equal(result, expected)


def test_bfloat16_rounds_as_ml_dtypes_and_keeps_special_values():
    values = np.array(
        [[1.00390625, 1.01171875, -0.0, np.inf, -np.inf, np.nan, 3.3e38, 1e-40]], np.float32
    )
    result = Weight.quantize(values, "bf16").dequantize()
    expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(result, expected)
    assert np.signbit(result[0, 2])
    nan = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)[None]
    assert np.isnan(Weight.quantize(nan, "bf16").dequantize()).all()


@pytest.mark.parametrize("format", list(FORMATS))
def test_head_dim_gives_hugging_face_order(format):
    heads, dim, rng = 3, 8, np.random.default_rng(2)
    plain = stored(rng, heads * dim, 64, format)
    weight = Weight(plain.raw, format, plain.shape, head_dim=dim, groups=plain.groups)
    # llama.cpp's converter interleaves the two halves of each head's rows of q and k.
    expected = (
        plain.dequantize().reshape(heads, dim // 2, 2, -1).swapaxes(1, 2).reshape(plain.shape)
    )
    np.testing.assert_array_equal(weight.dequantize(), expected)
    rows = np.array([[0, 5], [23, 8]])
    np.testing.assert_array_equal(weight.rows(rows), expected[rows])
    if weight.can_requantize:
        matrix = rng.standard_normal(plain.shape).astype(np.float32)
        ordered = matrix.reshape(heads, 2, dim // 2, -1).swapaxes(1, 2).reshape(matrix.shape)
        again = weight.requantize(matrix)
        np.testing.assert_array_equal(again.raw, plain.requantize(ordered).raw)
        assert (again.format, again.head_dim, again.shape) == (format, dim, plain.shape)


@pytest.mark.parametrize("head_dim", [0, 4])
@pytest.mark.parametrize("format", list(FORMATS))
def test_slices_are_rows_over_the_same_bytes(format, head_dim):
    # nf4's blocks of 64 straddle rows of 96.
    weight = stored(np.random.default_rng(6), 24, 96, format, head_dim)
    whole = weight.dequantize()
    for begin, end in ((0, 24), (4, 20), (12, 12), (20, 24)):
        part = weight.slice_rows(begin, end)
        assert part.shape == (end - begin, weight.shape[1]) and (
            part.raw.size == 0 or np.shares_memory(part.raw, weight.raw)
        )
        np.testing.assert_array_equal(part.dequantize(), whole[begin:end])
    inner = weight.slice_rows(4, 24).slice_rows(8, 16)
    np.testing.assert_array_equal(inner.dequantize(), whole[12:20])
    for begin, end in ((-1, 4), (4, 25), (8, 4)):
        with pytest.raises(ValueError, match=rf"rows \[{begin}, {end}\) are not within the 24"):
            weight.slice_rows(begin, end)
    if head_dim:
        with pytest.raises(ValueError, match="not whole heads of 4"):
            weight.slice_rows(2, 8)


def test_head_dim_row_by_row():
    matrix = np.arange(8, dtype=np.float32)[:, None]
    hf = Weight(matrix.view(np.uint8).reshape(-1), "f32", (8, 1), head_dim=4).dequantize()[:, 0]
    assert hf.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("format", list(FORMATS))
def test_rows_are_rows(format):
    weight = stored(np.random.default_rng(3), 10, 64, format)
    whole = weight.dequantize()
    for indices in (
        [3, 3, 0],
        np.array([[9], [1]]),
        4,
        np.array([], np.int32),
        np.array([2], np.uint8),
    ):
        np.testing.assert_array_equal(
            weight.rows(np.asarray(indices, dtype=np.int64)), whole[np.asarray(indices, int)]
        )


def test_more_values_than_one_chunk():
    matrix = np.random.default_rng(4).standard_normal((600, 4096)).astype(np.float32)
    np.testing.assert_array_equal(
        Weight.quantize(matrix, "q8_0").raw,
        gguf.quants.quantize(matrix, ggml_type("q8_0")).reshape(-1),
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
    assert [layout.code for layout in FORMATS.values()] == list(range(len(FORMATS)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (np.zeros(8, np.uint8), "iq1_s", (1, 32)),
            ValueError,
            "format must be one of f32, .* got 'iq1_s'",
        ),
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


@pytest.mark.parametrize("format", list(SEARCHED))
def test_scales_that_float16_does_not_hold_are_refused(format):
    largest = 0.895 * 65504 * SEARCHED[format]
    values = np.linspace(-largest, largest, 256, dtype=np.float32)[None]
    error = np.abs(Weight.quantize(values, format).dequantize() - values).max()
    assert error < 0.3 * largest
    with pytest.raises(ValueError, match=f"stored as {format}: values are up to .*, and scales in"):
        Weight.quantize(values * 1.01, format)
    values[0, 0] = np.nan
    with pytest.raises(ValueError, match=f"stored as {format}: it holds NaN or infinite values"):
        Weight.quantize(values, format)


def test_what_can_only_be_read_is_refused():
    for format in READ_ONLY:
        with pytest.raises(
            ValueError,
            match=f"{format} can be read but not written; what can be written: f32, .*q6_k, .*nf4",
        ):
            Weight.quantize(np.zeros((2, 256), np.float32), format)
        assert not stored(np.random.default_rng(0), 2, 256, format).can_requantize


@pytest.mark.parametrize("scale_format", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("format", AFFINE)
def test_affine_errors_are_at_most_a_step(format, size, scale_format):
    matrix = np.random.default_rng(7).standard_normal((6, 256)).astype(np.float32)
    weight = Weight.quantize(matrix, format, group_size=size, scale_format=scale_format)
    assert weight.groups.size == size and weight.raw.size == 6 * 256 * FORMATS[format].bits // 8
    item = 4 if scale_format == "f32" else 2
    assert weight.nbytes == weight.raw.size + 2 * item * 6 * 256 // size
    blocks = matrix.reshape(-1, size)
    step = (blocks.max(axis=1) - blocks.min(axis=1)) / (2 ** FORMATS[format].bits - 1)
    error = np.abs(weight.dequantize().reshape(blocks.shape) - blocks).max(axis=1)
    rounding = np.abs(blocks).max(axis=1) * {"f32": 1e-6, "f16": 2e-3, "bf16": 1.6e-2}[scale_format]
    # Half a step, except at the end of the range, which is cut when the step is changed to
    # represent 0 exactly.
    assert (error <= step * 1.01 + rounding).all()
    again = weight.quantize_alike(matrix)
    assert again.raw.tobytes() == weight.raw.tobytes() and again.groups.scale_format == scale_format


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [32, 64, 256])
def test_nf4_is_the_nearest_quantile_of_the_block(size, double):
    from pyloss.weights.groups import NF4_TABLE

    matrix = np.random.default_rng(8).standard_normal((40, 96)).astype(np.float32)
    weight = Weight.quantize(matrix, "nf4", group_size=size, double=double)
    blocks = matrix.reshape(-1, size)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(blocks[:, :, None] / scale[:, :, None] - NF4_TABLE).argmin(axis=2)
    codes = np.stack([weight.raw >> 4, weight.raw & 15], axis=1).reshape(blocks.shape)
    assert (codes == nearest).all()
    tolerance = 0.02 if double else 1e-6
    np.testing.assert_allclose(
        weight.dequantize().reshape(blocks.shape),
        NF4_TABLE[nearest] * scale,
        atol=tolerance * scale.max(),
    )
    assert weight.requantize(matrix).groups.double is double
    per_block = 1 if double else 4
    assert abs(weight.nbytes - weight.raw.size - per_block * len(blocks)) <= 4 * (
        1 + len(blocks) // 256
    )


@pytest.mark.parametrize("format", GROUPED)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_groups_of_what_is_not_finite_are_refused(format, bad):
    matrix = np.zeros((2, 64), np.float32)
    matrix[1, 7] = bad
    with pytest.raises(ValueError, match=f"cannot be stored as {format}"):
        Weight.quantize(matrix, format)
    if format != "nf4":
        with pytest.raises(ValueError, match="does not fit in f16"):
            Weight.quantize(np.full((1, 64), 1e6, np.float32), format, scale_format="f16")


@pytest.mark.parametrize("format", GROUPED)
def test_groups_of_zeros_and_constants(format):
    for value in (0.0, -0.25, 1e-39):
        matrix = np.full((2, 64), value, np.float32)
        np.testing.assert_allclose(
            Weight.quantize(matrix, format).dequantize(), matrix, rtol=1e-6, atol=1e-38
        )


@pytest.mark.parametrize(
    ("format", "shape", "options", "message"),
    [
        ("affine4", (2, 96), {"group_size": 64}, "multiple of the group size 64, got 96"),
        ("affine4", (2, 48), {"group_size": 16}, "multiple of 32 values, got 48"),
        ("affine4", (2, 64), {"group_size": 48}, "power of two of at least 32, got 48"),
        ("nf4", (2, 64), {"group_size": 16}, "power of two of at least 32, got 16"),
        ("nf4", (2, 48), {}, "multiple of 32 values, got 48"),
    ],
)
def test_groups_that_do_not_fit(format, shape, options, message):
    with pytest.raises(ValueError, match=message):
        Weight.quantize(np.zeros(shape, np.float32), format, **options)


@pytest.mark.parametrize(
    ("format", "parts", "message"),
    [
        ("affine4", {"scales": np.zeros(3, np.uint8)}, "scales must hold 8 bytes, got 3"),
        ("affine4", {"offsets": np.zeros(3, np.uint8)}, "offsets must hold 8 bytes, got 3"),
        ("affine4", {"offsets": None}, "affine4 must come with offsets"),
        ("affine4", {"table": np.zeros(64, np.uint8)}, "affine4 must come without table"),
        (
            "affine4",
            {"scales": np.zeros(2, np.float32)},
            "scales must be flat contiguous uint8, got float32",
        ),
        ("affine4", {"size": 48}, "power of two of at least 32 elements, got 48"),
        ("affine4", {"first": 8}, "got 64 from 8"),
        ("affine4", {"scale_format": "q8_0"}, "one of f32, bf16, f16, got 'q8_0'"),
        ("nf4", {"table": None}, "nf4 must come with table"),
        ("nf4", {"map": np.zeros(9, np.uint8)}, "map must hold 1024 bytes, got 9"),
        ("nf4", {"nested": None}, "nf4 must come with nested"),
        ("nf4", {"nested_size": 3}, "power of two of scales, got 3"),
        ("nf4", {"map": None, "scales": np.zeros(8, np.uint8)}, "nf4 must come without nested"),
    ],
)
def test_bad_groups_are_named(format, parts, message):
    weight = Weight.quantize(np.ones((2, 64), np.float32), format)
    with pytest.raises(ValueError, match=message):
        Weight(weight.raw, format, weight.shape, groups=weight.groups._replace(**parts))


def test_groups_come_with_their_formats():
    weight = Weight.quantize(np.ones((2, 64), np.float32), "affine4")
    with pytest.raises(ValueError, match="affine4 must come with groups"):
        Weight(weight.raw, "affine4", (2, 64))
    with pytest.raises(ValueError, match="f32 must come without groups"):
        Weight(np.zeros(512, np.uint8), "f32", (2, 64), groups=weight.groups)
    assert repr(weight) == "Weight(affine4 in groups of 64, shape=(2, 64), 80 bytes)"
    assert not weight.is_float and Weight.quantize(np.ones((1, 1)), "bf16").is_float


def test_an_empty_matrix_has_no_groups():
    for format in GROUPED:
        assert Weight.quantize(np.zeros((0, 64), np.float32), format).dequantize().shape == (0, 64)


@pytest.mark.parametrize("head_dim", [0, 8])
@pytest.mark.parametrize(
    "format", [name for name, layout in FORMATS.items() if layout.encodes and name != "f32"]
)
def test_a_small_change_leaves_a_matrix_as_it_was_and_a_large_one_takes_new_scales(
    format, head_dim
):
    rng = np.random.default_rng(9)
    matrix = rng.standard_normal((16, 256)).astype(np.float32)
    weight = Weight.quantize(matrix, format, head_dim)
    before = weight.dequantize()
    same = weight.requantize(before)
    np.testing.assert_array_equal(same.dequantize(), before)
    changed = before + 1e-4 * rng.standard_normal(before.shape).astype(np.float32)
    error, change = (
        np.linalg.norm(x - changed) for x in (weight.requantize(changed).dequantize(), before)
    )
    assert error <= change
    large = 40 * matrix[::-1]
    np.testing.assert_array_equal(
        weight.requantize(large).dequantize(), Weight.quantize(large, format, head_dim).dequantize()
    )


@pytest.mark.parametrize(
    "format",
    [
        name
        for name, layout in FORMATS.items()
        if layout.encodes and not layout.bits and layout.elements == 32
    ],
)
def test_a_change_of_some_steps_is_followed_under_the_same_scales(format):
    rng = np.random.default_rng(10)
    weight = Weight.quantize(rng.standard_normal((4, 128)).astype(np.float32), format)
    before = weight.dequantize()
    changed = before + 0.1 * np.abs(before).max() * np.sign(
        rng.standard_normal(before.shape)
    ).astype(np.float32) * (rng.random(before.shape) < 0.1)
    error, change = (
        np.linalg.norm(x - changed) for x in (weight.requantize(changed).dequantize(), before)
    )
    assert error < 0.5 * change
