"""Activations in bfloat16: each operation gives the bits that float32 arrays of the same numbers
give, rounded once.
"""

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import TILE_FORMS, Memory, products

from pyloss import _core

SPECS = dict(_core.ops())
#: sizes by letter; those of `SIZES` hold for all operations
SIZES = {
    "N": 70,
    "D": 32,
    "H": 4,
    "G": 2,
    "M": 70,
    "S": 3,
    "E": 2,
    "R": 16,
    "P": 80,
    "A": 8,
    "B": 8,
    "C": 16,
}
LINEAR = {"I": 97, "O": 131, "R": 5}
CASES = {
    "linear_forward": [
        LINEAR,
        LINEAR | {"N": 3},
        {"I": 64, "O": 64, "R": 8},
        {"I": 4700, "O": 33, "R": 2},
    ],
    "lora_forward": [LINEAR, {"I": 64, "O": 65, "R": 8}],
    "linear_input_grad": [LINEAR, LINEAR | {"N": 2}],
    "lora_input_grad": [LINEAR, {"I": 64, "O": 64, "R": 8}],
    "magnitude_grad": [LINEAR, LINEAR | {"N": 3}],
    "linear_weight_grad": [LINEAR, LINEAR | {"N": 40, "I": 100}],
    "matmul_tn": [
        {"K": 70, "M": 97, "N": 5},
        {"K": 33, "M": 4, "N": 130},
        {"K": 0, "M": 4, "N": 3},
    ],
    "rms_norm_forward": [{}, {"D": 7}, {"D": 1000}],
    "rms_norm_grad": [{}, {"D": 7}, {"D": 1000}],
    "rope": [{}, {"D": 40}, {"D": 37, "R": 15}],
    "attention_forward": [{}, {"D": 17}, {"N": 4, "M": 4}],
    "attention_grad": [{}, {"D": 17}],
    "short_conv_forward": [{"K": 3}],
    "short_conv_grad": [{"K": 3}],
    "experts_forward": [LINEAR],
    "experts_lora_forward": [LINEAR],
    "experts_input_grad": [LINEAR],
    "experts_lora_input_grad": [LINEAR],
    "experts_weight_grad": [LINEAR],
    "combine_rows": [{"K": 3}],
    "gather_columns": [{"V": 40, "M": 11}],
    "concat_columns": [{}],
}
CASES |= {
    name: [{"N": 1037}, {"N": 3}]
    for name, text in SPECS.items()
    if name not in CASES and any(f":{kind}[" in text for kind in ("act", "half"))
}


def arguments(name, sizes, rng, new):
    """(kind, value) of each argument; activations are numbers that bfloat16 holds."""
    made, output, offsets = [], False, None
    for word in SPECS[name].split():
        if word == ">":
            output = True
        if ":" not in word:
            continue
        label, _, rest = word.lstrip("=~+").partition(":")
        kind, _, dims = rest.partition("[")
        dims = dims.partition("]")[0].replace("*", "").split(",")
        if kind == "int":
            made.append((kind, {"ahead": 0, "window": 0}.get(label.rstrip("?"), 0)))
            continue
        if kind == "real":
            made.append((kind, {"eps": 1e-5, "softcap": 0.0}.get(label, 0.5)))
            continue
        shape = [
            sum(int(part) if part.isdigit() else sizes[part] for part in d.split("+")) for d in dims
        ]
        if kind == "i32":
            if "^" in rest:  # the offsets of two sequences
                end = sizes[rest.partition("^")[2][0]]
                offsets = np.array([0, end // 3, end], np.int32)
                made.append((kind, offsets))
            else:
                made.append(
                    (kind, rng.integers(0, sizes[rest.partition("<")[2][0]], shape, np.int32))
                )
            continue
        values = rng.standard_normal(shape).astype(np.float32)
        if kind in ("act", "half"):
            values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        made.append((("out-" if output else "") + kind, values))
    return made


def run(name, made, narrow, new):
    """The outputs, with activations in float32 or in bfloat16."""
    given = []
    for kind, value in made:
        if narrow and kind.endswith(("act", "half")):
            value = value.astype(ml_dtypes.bfloat16).view(np.uint16)
            given.append(
                new.put(value, np.uint16) if kind[0] != "o" else new.new(value.shape, np.uint16)
            )
        elif kind.startswith("out"):
            given.append(new.new(value.shape))
        else:
            given.append(value)
    getattr(_core, name)(*given)
    new.check()
    return [array for (kind, _), array in zip(made, given, strict=True) if kind.startswith("out")]


def rounded(array):
    return array.astype(ml_dtypes.bfloat16).view(np.uint16)


@pytest.fixture(params=["float32", "bfloat16-emulated", *TILE_FORMS])
def precision(request):
    with products(_core.isa(), request.param):
        yield request.param


@pytest.mark.parametrize(
    "name, sizes", [(name, sizes) for name, all_sizes in CASES.items() for sizes in all_sizes]
)
def test_bits_are_those_of_floats_rounded_once(name, sizes, precision, isa, rng):
    new = Memory()
    made = arguments(name, SIZES | sizes, rng, new)
    want, got = run(name, made, False, new), run(name, made, True, new)
    assert any(array.dtype == np.uint16 for array in got) or name in (
        "linear_weight_grad",
        "matmul_tn",
        "add",
        "axpy",
        "column_sum",
        "column_dot",
        "magnitude_grad",
        "experts_weight_grad",
    )
    for expected, array in zip(want, got, strict=True):
        if array.dtype == np.uint16:
            expected = rounded(expected)
        assert np.array_equal(expected.view(np.uint8), array.view(np.uint8))


def test_a_result_may_replace_an_input_of_its_type_alone():
    gate, up, dy = (np.full(9, 0x3F80, np.uint16) for _ in range(3))
    _core.swiglu_grad(dy, gate, up, gate, up)
    x = np.ones(9, np.float32)
    with pytest.raises(ValueError, match="swiglu_grad: dgate overlaps gate"):
        _core.swiglu_grad(dy, x, up, x.view(np.uint16)[:9], up)


def test_calls_make_either_type():
    x = np.ones(5, np.float32)
    assert _core.scale(2.0, x, ...).dtype == np.float32
    half = _core.scale(2.0, x, NotImplemented)
    assert half.dtype == np.uint16 and (half == 0x4000).all()
    with pytest.raises(TypeError, match="row_norms: norms must be a numpy.ndarray"):
        _core.row_norms(np.ones((2, 2), np.float32), NotImplemented)


def test_results_that_are_added_to_are_read_first():
    dy, w = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
    dx = np.full((2, 4), 0x4000, np.uint16)  # 2
    _core.linear_input_grad(dy, w, None, None, 1, None, dx)
    assert (dx == 0x40A0).all()  # 5


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.int16])
def test_other_types_are_refused(kind):
    with pytest.raises(TypeError, match="scale: x must have dtype float32, not"):
        _core.scale(1.0, np.zeros(3, kind), np.zeros(3, np.float32))
