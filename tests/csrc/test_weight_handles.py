"""The binding's checks of a weight: (bytes, format, rows, cols, head_dim[, groups])."""

import numpy as np
import pytest
from kernel_checks import f32, i32

from pyloss import _core
from pyloss.weights.weight import FORMATS

WHOLE = {name: layout for name, layout in FORMATS.items() if not layout.bits}
CODE = {name: layout.code for name, layout in FORMATS.items()}
NO_FORMAT = len(FORMATS)


def embed(handle, rows=4, cols=256):
    _core.embedding_forward(i32(0, rows - 1), handle, f32(2, cols))


def raw(size):
    return np.zeros(size, np.uint8)


@pytest.mark.parametrize("layout", WHOLE.values(), ids=WHOLE)
def test_weight_sizes(layout):
    code, row = layout.code, 256 // layout.elements * layout.bytes
    embed((raw(4 * row), code, 4, 256, 0))
    embed((raw(4 * row), code, 4, 256, 2))
    for size in (4 * row - 1, 4 * row + 1, 0, 8 * row):
        with pytest.raises(ValueError, match=f"w has {size} bytes; its 4 rows need {row} each"):
            embed((raw(size), code, 4, 256, 0))
    if layout.elements > 1:
        with pytest.raises(ValueError, match=f"needs a multiple of {layout.elements}"):
            embed((raw(4 * row), code, 4, 256 + 16, 0))
    with pytest.raises(ValueError, match="must come without groups"):
        embed((raw(4 * row), code, 4, 256, 0, AFFINE))


# Four rows of 256 in groups of 64: 16 groups.
AFFINE = (64, 0, raw(32), raw(32), 1, None, None, None, 0, 0.0)
NF4 = (64, 0, raw(64), None, 0, raw(64), None, None, 0, 0.0)
DOUBLE = (64, 0, raw(16), None, 0, raw(64), raw(1024), raw(4), 256, 0.5)


def grouped(groups, code=CODE["affine4"], row=128):
    return (raw(4 * row), code, 4, 256, 0, groups)


def changed(groups, **parts):
    names = (
        "size",
        "first",
        "scales",
        "offsets",
        "type",
        "table",
        "map",
        "nested",
        "nested_size",
        "nested_offset",
    )
    return tuple(parts.get(name, part) for name, part in zip(names, groups, strict=True))


def test_weights_with_groups():
    affine = [code for name, code in CODE.items() if name.startswith("affine")]
    for code, row in zip(affine, (64, 96, 128, 160, 192, 256), strict=True):
        embed(grouped(AFFINE, code, row))
    embed(grouped(NF4, CODE["nf4"]))
    embed(grouped(DOUBLE, CODE["nf4"]))
    embed(grouped(changed(DOUBLE, first=64 * 16, scales=raw(32)), CODE["nf4"]))
    embed(grouped(changed(AFFINE, type=0, scales=raw(64), offsets=raw(64))))


@pytest.mark.parametrize(
    ("handle", "error", "message"),
    [
        (grouped(AFFINE)[:5], ValueError, "must come with groups"),
        (grouped(AFFINE, NO_FORMAT), ValueError, f"the format of w is {NO_FORMAT}; it must be a whole number from 0 to {NO_FORMAT - 1}"),
        (grouped(AFFINE, CODE["affine5"]), ValueError, "has 512 bytes; its 4 rows need 160 each"),
        (grouped(None), TypeError, "groups of w must be a tuple"),
        (grouped(AFFINE[:9]), TypeError, "groups of w must be a tuple"),
        (grouped(changed(AFFINE, size=0)), ValueError, "the group size of w is 0; it must be a power of two from 32 on"),
        (grouped(changed(AFFINE, size=48)), ValueError, "the group size of w is 48; it must be"),
        (grouped(changed(AFFINE, size=16)), ValueError, "the group size of w is 16; it must be"),
        (grouped(changed(AFFINE, size=-64)), ValueError, "the group size of w is -64; it must be"),
        (grouped(changed(AFFINE, size=2**62)), ValueError, "the group size of w is"),
        (grouped(changed(AFFINE, first=-32)), ValueError, "the first element of w is -32; it must be"),
        (grouped(changed(AFFINE, first=16)), ValueError, "the first element of w is 16; it must be a multiple of 32"),
        (grouped(changed(AFFINE, first=2**62)), ValueError, "the first element of w is"),
        (grouped(changed(AFFINE, first=64)), ValueError, "scales of w has 32 bytes; it must have 34"),
        (grouped(changed(AFFINE, first=2**39)), ValueError, "scales of w has 32 bytes"),
        (grouped(changed(AFFINE, type=3)), ValueError, "the scales of w have format Q8_0; they must be floats"),
        (grouped(changed(AFFINE, type=-1)), ValueError, "the scales' format of w is -1; it must be"),
        (grouped(changed(AFFINE, type=0)), ValueError, "scales of w has 32 bytes; it must have 64"),
        (grouped(changed(AFFINE, scales=raw(31))), ValueError, "scales of w has 31 bytes; it must have 32"),
        (grouped(changed(AFFINE, offsets=raw(31))), ValueError, "offsets of w has 31 bytes; it must have 32"),
        (grouped(changed(AFFINE, scales=None)), TypeError, "w must be a numpy.ndarray"),
        (grouped(changed(AFFINE, scales=f32(64))), TypeError, "must have dtype uint8, not float32"),
        (grouped(changed(AFFINE, scales=raw(64)[::2])), ValueError, "C-contiguous"),
        (grouped(changed(AFFINE, offsets=None)), ValueError, "the groups of w must have"),
        (grouped(changed(AFFINE, table=raw(64))), ValueError, "the groups of w must have"),
        (grouped(changed(AFFINE, map=raw(1024), nested=raw(4), nested_size=256)), ValueError, "the groups of w must have"),
        (grouped(changed(AFFINE, size="64")), TypeError, "the group size of w must be a whole number .*, not str"),
        (grouped(changed(AFFINE, nested_offset=None)), TypeError, "the nested offset of w must be a number, not None"),
        (grouped(NF4), ValueError, "the groups of w must have"),
        (grouped(changed(NF4, table=raw(60)), CODE["nf4"]), ValueError, "table of w has 60 bytes; it must have 64"),
        (grouped(changed(NF4, table=None), CODE["nf4"]), ValueError, "the groups of w must have"),
        (grouped(changed(NF4, offsets=raw(64)), CODE["nf4"]), ValueError, "the groups of w must have"),
        (grouped(changed(NF4, map=raw(1024), nested_size=256), CODE["nf4"]), ValueError, "the groups of w must have"),
        (grouped(changed(NF4, nested=raw(1024), nested_size=256), CODE["nf4"]), ValueError, "the groups of w must have"),
        (grouped(changed(DOUBLE, map=raw(1020)), CODE["nf4"]), ValueError, "map of w has 1020 bytes"),
        (grouped(changed(DOUBLE, nested=raw(0)), CODE["nf4"]), ValueError, "nested of w has 0 bytes; it must have 4"),
        (grouped(changed(DOUBLE, nested_size=8), CODE["nf4"]), ValueError, "nested of w has 4 bytes; it must have 8"),
        (grouped(changed(DOUBLE, nested_size=0), CODE["nf4"]), ValueError, "the nested group size of w is 0; it must be"),
        (grouped(changed(DOUBLE, nested_size=3), CODE["nf4"]), ValueError, "the nested group size of w is 3; it must be"),
    ],
)  # fmt: skip
def test_malformed_groups(handle, error, message):
    with pytest.raises(error, match=message):
        embed(handle)


@pytest.mark.parametrize(
    ("handle", "error", "message"),
    [
        (
            (raw(1024), NO_FORMAT, 4, 64, 0),
            ValueError,
            f"the format of w is {NO_FORMAT}; it must be",
        ),
        ((raw(1024), -1, 4, 64, 0), ValueError, "the format of w is -1; it must be"),
        ((raw(1024), 2**40, 4, 64, 0), ValueError, "the format of w is"),
        (
            (raw(1024), 2**70, 4, 64, 0),
            ValueError,
            "the format of w is 1180591620717411303424; it must be a whole number",
        ),
        ((raw(1024), 0, -4, -64, 0), ValueError, "the number of rows of w is -4; it must be"),
        ((raw(1024), 0, 4, -64, 0), ValueError, "the number of columns of w is -64; it must be"),
        ((raw(0), 0, 2**62, 4, 0), ValueError, "the number of rows of w is"),
        ((raw(0), 0, 2**40, 2**40, 0), ValueError, "has 0 bytes"),
        (
            (raw(136), 3, 4, 33, 0),
            ValueError,
            "the number of columns of w is 33; format Q8_0 needs a multiple of 32",
        ),
        (
            (raw(1024), 0, 4, 64, 3),
            ValueError,
            "head_dim of w is 3; it must be 0 or an even divisor of its 4 rows",
        ),
        ((raw(1024), 0, 4, 64, 8), ValueError, "head_dim of w is 8; it must be"),
        ((raw(1024), 0, 4, 64, -2), ValueError, "head_dim of w is -2; it must be"),
        ((raw(1024), 0, 4, 64), TypeError, "must be a tuple"),
        ((raw(1024), 0, 4, 64, 0, 0, 0), TypeError, "must be a tuple"),
        ((), TypeError, "must be a tuple"),
        ((raw(1024), "f32", 4, 64, 0), TypeError, None),
        ((raw(1024), 0.0, 4, 64, 0), TypeError, None),
        ((raw(1024), None, 4, 64, 0), TypeError, None),
        ((f32(256), 0, 4, 64, 0), TypeError, "w must have dtype uint8, not float32"),
        ((bytes(1024), 0, 4, 64, 0), TypeError, "w must be a numpy.ndarray"),
        ((memoryview(bytes(1024)), 0, 4, 64, 0), TypeError, "w must be a numpy.ndarray"),
        ((None, 0, 4, 64, 0), TypeError, "w must be a numpy.ndarray"),
        ((raw(2048)[::2], 0, 4, 64, 0), ValueError, "w must be C-contiguous"),
        ((raw(1280), 0, 5, 64, 0), None, ""),
        (
            (raw(1280), 0, 4, 80, 0),
            ValueError,
            "its axis 1 must be 80, not 64, to go with w of shape",
        ),
        (f32(256), ValueError, "w has 1 dimensions, expected 2"),
        (np.zeros((4, 64)), TypeError, "w must have dtype float32"),
        ([0] * 5, TypeError, "w must be a numpy.ndarray"),
    ],
)
def test_malformed_weights(handle, error, message):
    if error is None:
        embed(handle, cols=64)
        return
    with pytest.raises(error, match=message):
        embed(handle, cols=64)


def test_weights_over_foreign_memory():
    buffer = np.arange(256, dtype=np.float32).tobytes()
    y = f32(1, 64)
    _core.embedding_forward(i32(3), (np.frombuffer(buffer, np.uint8), 0, 4, 64, 0), y)
    assert (y[0] == np.arange(192, 256)).all()


def test_rotary_rows_are_read_in_file_order():
    w = np.arange(8, dtype=np.float32).reshape(8, 1)
    y = f32(8, 1)
    _core.embedding_forward(np.arange(8, dtype=np.int32), (w.view(np.uint8).ravel(), 0, 8, 1, 4), y)
    assert y.ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_an_output_may_not_overlap_a_weight():
    store = raw(1024)
    with pytest.raises(ValueError, match="y overlaps w"):
        _core.embedding_forward(
            i32(0), (store, 0, 4, 64, 0), store[:256].view(np.float32).reshape(1, 64)
        )
