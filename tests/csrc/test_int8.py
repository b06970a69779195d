"""Layer products in int8 against float64 and against each other, on every instruction set.

The expected value takes x as it is rounded: 32 depths at a time, to whole multiples of the largest
number / 127. The bits may depend on nothing but the row and the weight.
"""

import numpy as np
import pytest
from kernel_checks import on_threads, products
from stored_weights import QUANTISED, stored
from test_matmul import factors, normal, unaligned, wide

from pyloss import _core
from pyloss.weights.weight import Weight

#: Formats with integer codes.
FORMATS = [name for name in QUANTISED if name != "nf4"]
#: Settings by whether they need the processor's dots of bytes; they give the same bits.
WITHOUT_DOTS, WITH_DOTS = "int8-emulated", "int8"
#: Every instruction set, with and without its dots of bytes.
PLACES = [(name, WITHOUT_DOTS) for name in _core.isas()] + [
    (name, WITH_DOTS) for name in _core.isas() if _core.int8_dots(name)
]
SIZES = [1, 15, 16, 17, 31, 32, 33, 101]


@pytest.fixture(params=PLACES, ids="-".join)
def place(request):
    """Products in int8 on an instruction set, with or without dots of bytes."""
    name, setting = request.param
    with products(name, setting):
        yield setting


def in_turn(run):
    """The results of `run` in every place."""
    before, found = _core.isa(), {}
    try:
        for name, setting in PLACES:
            _core.use_isa(name)
            _core.set_matmul_precision(setting)
            found[name, setting] = run()
    finally:
        _core.set_matmul_precision("float32")
        _core.use_isa(before)
    return found


def rounded(x):
    """x in float64 as int8 products see it."""
    runs = wide(x).reshape(len(x), -1, 32)
    scale = np.abs(runs).max(-1, keepdims=True).astype(np.float32)
    inverse = np.divide(np.float32(127), scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.rint(runs.astype(np.float32) * inverse)
    return (codes * wide(scale / np.float32(127))).reshape(x.shape)


def forward(x, weight, bias=None, factor=None, given=None, b=None, scale=0.0):
    y = np.full((len(x), weight.shape[0]), np.nan, np.float32)
    _core.linear_forward(x, weight.handle, bias, given, b, scale, factor, y)
    return y


def close(got, x, dense, extra=0.0):
    """Compare with products of the rounded x, relative to the sum of their sizes.

    Unsigned codes and their offset are added apart, so that their sizes count, not the weight's.
    """
    want = rounded(x) @ wide(dense).T + extra
    size = np.abs(rounded(x)) @ np.abs(wide(dense)).T + np.abs(extra) + 1e-6
    assert (np.abs(got - want) <= 2e-6 * size).all(), (np.abs(got - want) / size).max()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("head_dim", [0, 6, 32])
@pytest.mark.parametrize(("n", "k"), [(96, 32), (192, 416)])
def test_every_format(memory, rng, place, format, head_dim, n, k):
    weight = unaligned(stored(rng, n, k, format, head_dim))
    dense = weight.dequantize()
    for m in (1, 2, 5, 7, 40):
        x = memory.put(normal(rng, m, weight.shape[1]))
        y = memory.new((m, n))
        _core.linear_forward(x, weight.handle, None, None, None, 0.0, None, y)
        close(y, x, dense)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", ["q8_0", "q4_1", "q2_k", "affine3"])
def test_sizes(memory, rng, place, size, format):
    for m, n, k in ((size, 37, 96), (3, size, 64), (35, size, 32), (6, 20, 32 * size)):
        weight = stored(rng, n, k, format)
        x = memory.put(normal(rng, m, weight.shape[1]))
        y = memory.new((m, n))
        _core.linear_forward(x, weight.handle, None, None, None, 0.0, None, y)
        close(y, x, weight.dequantize())


@pytest.mark.parametrize("format", FORMATS)
def test_every_place_gives_the_same_bits(rng, format):
    """Also for numbers that are halfway between two bytes, denormal, and far apart."""
    weight = stored(rng, 70, 544, format)
    x = normal(rng, 41, weight.shape[1])
    x[3] = np.rint(127 * rng.uniform(-1, 1, x.shape[1])) + 0.5
    x[3, ::32] = 127
    x[4, :32], x[4, 32:64] = 1e-42, 1e-33
    x[5] *= np.float32(1e30)
    x[6] = 0
    (first, want), *others = in_turn(lambda: forward(x, weight, factor=factors(70))).items()
    assert np.isfinite(want).all() and not want[6].any() and want[4].any(), first
    for place, got in others:
        assert got.tobytes() == want.tobytes(), (first, place)


@pytest.mark.parametrize("scale_format", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_affine_groups(rng, size, scale_format):
    """Slices begin within a group of another row."""
    for format in ("affine2", "affine3", "affine4", "affine5", "affine6", "affine8"):
        weight = Weight.quantize(
            normal(rng, 40, 384), format, group_size=size, scale_format=scale_format
        ).slice_rows(5, 38)
        x = normal(rng, 5, 384)
        found = list(in_turn(lambda w=weight, x=x: forward(x, w)).values())
        close(found[0], x, weight.dequantize())
        assert all(y.tobytes() == found[0].tobytes() for y in found)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_do_not_depend_on_their_neighbors(rng, place, format):
    weight = stored(rng, 67, 800, format)
    x = normal(rng, 310, weight.shape[1])
    y = forward(x, weight)
    for begin, end in ((0, 1), (3, 5), (7, 12), (9, 41), (12, 45), (100, 300), (309, 310)):
        assert forward(x[begin:end].copy(), weight).tobytes() == y[begin:end].tobytes()


def branch(rng, m, n, k, r=8):
    """What an adapter adds: x, bias, factor, a, b."""
    return (
        normal(rng, m, k),
        normal(rng, n),
        factors(n),
        normal(rng, k, r) / np.float32(np.sqrt(k)),
        normal(rng, r, n),
    )


@pytest.mark.parametrize("m", [1, 4, 32, 33, 150])
@pytest.mark.parametrize("format", ["q4_0", "q6_k", "affine4"])
def test_an_adapter_stays_in_float32(rng, place, m, format):
    weight = stored(rng, 45, 320, format)
    k = weight.shape[1]
    x, bias, factor, a, b = branch(rng, m, 45, k)
    dense = weight.dequantize()
    hidden = wide(x) @ wide(a)
    h, y = np.full((m, 8), np.nan, np.float32), np.full((m, 45), np.nan, np.float32)
    _core.lora_forward(x, weight.handle, bias, a, b, -1.5, factor, h, y)
    assert np.abs(h - hidden).max() <= 1e-5
    scaled = wide(dense) * factor[:, None]
    close(y, x, scaled, bias - 1.5 * wide(h) @ wide(b))
    given = forward(x, weight, bias, factor, h, b, -1.5)
    assert given.tobytes() == y.tobytes()
    if m <= 32:
        for i in range(0, m, 3):
            one, low = np.empty((1, 45), np.float32), np.empty((1, 8), np.float32)
            _core.lora_forward(x[i : i + 1], weight.handle, bias, a, b, -1.5, factor, low, one)
            assert one.tobytes() == y[i : i + 1].tobytes()


@pytest.mark.parametrize("format", ["q4_1", "q6_k", "affine8"])
def test_experts(rng, place, format):
    n, k, r = 45, 256, 8
    weights = [stored(rng, n, k, format) for _ in range(5)]
    stack = tuple(w.handle for w in weights)
    offsets = np.array([0, 3, 3, 4, 60, 69], np.int32)
    x, bias = normal(rng, 69, k), normal(rng, 5, n)
    factor = np.abs(normal(rng, 5, n)) + np.float32(0.5)
    a, b = normal(rng, 5, r, k) / np.float32(16), normal(rng, 5, n, r)
    h, y, plain = (np.full((69, s), np.nan, np.float32) for s in (r, n, n))
    _core.experts_lora_forward(x, stack, bias, offsets, a, b, 0.5, factor, h, y)
    _core.experts_forward(x, stack, None, offsets, None, None, 0.0, None, plain)
    for e, weight in enumerate(weights):
        rows = slice(offsets[e], offsets[e + 1])
        own, dense = x[rows], wide(weight.dequantize())
        if not len(own):
            continue
        assert np.abs(h[rows] - wide(own) @ wide(a[e]).T).max() <= 1e-5
        extra = bias[e] + 0.5 * wide(h[rows]) @ wide(b[e]).T
        close(y[rows], own, dense * factor[e][:, None], extra)
        assert plain[rows].tobytes() == forward(own.copy(), weight).tobytes()


@pytest.mark.parametrize("format", ["q8_0", "q4_k"])
@pytest.mark.parametrize("m", [1, 7, 200])
def test_threads_give_the_same_bits(rng, place, format, m):
    weight = stored(rng, 700, 512, format)
    x, bias, factor, a, b = branch(rng, m, 700, 512)

    def run():
        h, y = np.empty((m, 8), np.float32), np.empty((m, 700), np.float32)
        _core.lora_forward(x, weight.handle, bias, a, b, 0.5, factor, h, y)
        return h, y

    on_threads(run)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(rng, place, bad):
    for format in ("q8_0", "q4_1", "q2_k"):
        weight = stored(rng, 50, 256, format)
        for m in (1, 6, 40):
            x = normal(rng, m, 256)
            before = forward(x, weight)
            x[m // 2, 77] = bad
            y = forward(x, weight)
            assert np.isnan(y[m // 2]).all()
            y[m // 2] = before[m // 2]
            assert y.tobytes() == before.tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_the_error_is_that_of_eight_bits(rng, place, format):
    """Beside the exact product: half a step of 1/127 of the largest number of each run."""
    weight = stored(rng, 40, 512, format)
    x, dense = normal(rng, 9, weight.shape[1]), wide(weight.dequantize())
    step = np.abs(x).reshape(9, -1, 32).max(-1).repeat(32, 1) / 127
    found = forward(x, weight) - wide(x) @ dense.T
    assert found.any() and (np.abs(found) <= 0.5001 * step @ np.abs(dense).T).all()
    relative = np.linalg.norm(found) / np.linalg.norm(wide(x) @ dense.T)
    assert 0.001 < relative < 0.01


@pytest.mark.parametrize("format", ["f32", "bf16", "f16", "nf4"])
def test_floats_and_tables_of_floats_keep_their_products(rng, place, format):
    weight, x = stored(rng, 40, 96, format), normal(rng, 40, 96)
    got = [forward(x[:m], weight) for m in (1, 9, 40)]
    _core.set_matmul_precision("float32")
    for y in got:
        assert forward(x[: len(y)], weight).tobytes() == y.tobytes()


def test_gradients_stay_float32(rng, place):
    weight, dy = stored(rng, 40, 96, "q4_1"), normal(rng, 40, 40)

    def run():
        dx = np.empty((40, 96), np.float32)
        _core.linear_input_grad(dy, weight.handle, None, None, 0, None, dx)
        return dx.tobytes()

    found = run()
    _core.set_matmul_precision("float32")
    assert run() == found


@pytest.mark.skipif(_core.amx_missing(True) is not None, reason="needs the tile unit")
def test_many_rows_are_tiles_of_bfloat16_where_they_are_asked_for(rng):
    weight = stored(rng, 64, 256, "q4_1")
    x, dy = normal(rng, 40, 256), normal(rng, 40, 64)

    def run(setting):
        _core.set_matmul_precision(setting)
        try:
            dx = np.empty((40, 256), np.float32)
            _core.linear_input_grad(dy, weight.handle, None, None, 0, None, dx)
            return [forward(x[:32], weight), forward(x, weight), dx]
        finally:
            _core.set_matmul_precision("float32")

    few, many, dx = run("int8-tiles")
    assert few.tobytes() == run("int8")[0].tobytes()
    tiles = run("bfloat16-tiles")
    assert many.tobytes() == tiles[1].tobytes() and dx.tobytes() == tiles[2].tobytes()
