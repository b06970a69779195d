"""Layer products in bfloat16, compared to the bit on every instruction set.

The expected value rounds both operands to bfloat16 and adds in float32, one depth after the other.
Tests that hold for every order of sums also run in the tile unit's; test_amx.py checks its bits.
"""

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import on_threads
from stored_weights import stored
from test_matmul import SIZES, factors, near, normal, shapes, unaligned, wide

from pyloss import _core
from pyloss.weights.weight import FORMATS, Weight

pytestmark = pytest.mark.usefixtures("isa")

ROUNDED = ["bfloat16", "bfloat16-emulated"]
ANY_ORDER = [*ROUNDED, "bfloat16-tiles-emulated"]
CHUNK = 576  # depths summed before the sum is added to memory


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    _core.set_matmul_precision("float32")


def rounded(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def chain(a, b):
    """float32 a [m, k] times b [k, n]: exact products of bfloat16 values, added in order."""
    assert a.shape[1] <= CHUNK
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for k in range(a.shape[1]):
        total += a[:, k : k + 1] * b[k]
    return total


def forward(x, weight, *rest, out):
    y = np.full(out, np.nan, np.float32)
    _core.linear_forward(x, weight, *(rest or (None, None, None, 0.0, None)), y)
    return y


def backward(dy, weight, shape, factor=None):
    dx = np.full(shape, np.nan, np.float32)
    _core.linear_input_grad(dy, weight, None, None, 0, factor, dx)
    return dx


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("size", [s for s in SIZES if s > 4])
def test_the_bits_of_a_float_matrix(memory, rng, size, precision):
    for m, n, k in shapes(size):
        m = max(m, 33)
        x, w, dy = normal(rng, m, k), normal(rng, n, k), normal(rng, m, n)
        _core.set_matmul_precision(precision)
        y, dx = memory.new((m, n)), memory.new((m, k))
        _core.linear_forward(memory.put(x), memory.put(w), None, None, None, 0.0, None, y)
        _core.linear_input_grad(memory.put(dy), memory.put(w), None, None, 0, None, dx)
        np.testing.assert_array_equal(y, chain(rounded(x), rounded(w).T))
        np.testing.assert_array_equal(dx, chain(rounded(dy), rounded(w)))


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_bits_of_gradients_by_weights(memory, rng, size, narrow, precision):
    """Also of operands that are bfloat16 already; sizes above 32 are rounded."""
    _core.set_matmul_precision(precision)
    for rows, inputs, outputs in [(33, size, 40), (33 + size, 70, 33), (35, 19, 33 + size)]:
        dy, x = normal(rng, rows, outputs), normal(rng, rows, inputs)
        start = normal(rng, outputs, inputs)
        want = chain(rounded(dy).T, rounded(x))
        given = [memory.put(v) for v in (dy, x)]
        if narrow:
            halves = [v.astype(ml_dtypes.bfloat16).view(np.uint16) for v in (dy, x)]
            given = [memory.put(v, np.uint16) for v in halves]
        dw, more = memory.new((outputs, inputs)), memory.put(start)
        _core.linear_weight_grad(*given, 0, dw)
        _core.linear_weight_grad(*given, 1, more)
        np.testing.assert_array_equal(dw, want)
        np.testing.assert_array_equal(more, start + want)


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("head_dim", [0, 6])
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "nf4"])
def test_the_bits_of_every_format(rng, format, head_dim, precision):
    weight = unaligned(stored(rng, 36, 256, format, head_dim))
    n, k = weight.shape
    dense, factor = weight.dequantize(), factors(n)
    _core.set_matmul_precision(precision)
    for m in (5, 33, 40):
        x, dy = normal(rng, m, k), normal(rng, m, n)
        for f, values in ((None, dense), (factor, dense * factor[:, None])):
            if m > 32:
                y = forward(x, weight.handle, None, None, None, 0.0, f, out=(m, n))
                np.testing.assert_array_equal(y, chain(rounded(x), rounded(values).T))
            dx = backward(dy, weight.handle, (m, k), f)
            np.testing.assert_array_equal(dx, chain(rounded(dy), rounded(values)))


def everything(rng, m, n, k, format="f32"):
    """A function that returns the results of all operations of a layer, its adapter and experts."""
    weight = Weight.quantize(normal(rng, n, k), format)
    x, dy, bias, factor = normal(rng, m, k), normal(rng, m, n), normal(rng, n), factors(n)
    a, b, start = normal(rng, k, 8), normal(rng, 8, n), normal(rng, m, k)
    stack, offsets = normal(rng, 2, n, k), np.array([0, m // 3, m], np.int32)
    ea, eb = normal(rng, 2, 8, k), normal(rng, 2, n, 8)

    def run():
        h, y, dh, dx, given, back = (
            np.empty(s, np.float32) for s in ((m, 8), (m, n), (m, 8), (m, k), (m, n), (m, k))
        )
        _core.lora_forward(x, weight.handle, bias, a, b, 0.5, factor, h, y)
        dx[...] = start
        _core.lora_input_grad(dy, weight.handle, a, b, 0.5, 1, None, dh, dx)
        _core.linear_forward(x, weight.handle, bias, h, b, 0.5, None, given)
        _core.linear_input_grad(dy, weight.handle, dh, a, 0, factor, back)
        eh, ey, edh, edx = (np.empty_like(v) for v in (h, y, dh, dx))
        _core.experts_lora_forward(x, stack, None, offsets, ea, eb, 0.5, None, eh, ey)
        _core.experts_lora_input_grad(dy, stack, offsets, ea, eb, 0.5, 0, None, edh, edx)
        dw = np.empty((n, k), np.float32)
        _core.linear_weight_grad(dy, x, 0, dw)
        return h, dh, eh, edh, y, dx, given, back, ey, edx, dw

    return run


LARGE = [(1100, 97, 64), (45, 1024, 2401), (333, 97, 500), (36, 33, 1601)]


@pytest.mark.parametrize(("m", "n", "k"), LARGE)
def test_instructions_and_arithmetic_agree_to_the_bit(rng, m, n, k):
    run = everything(rng, m, n, k)
    _core.set_matmul_precision("bfloat16")
    fast = run()
    _core.set_matmul_precision("bfloat16-emulated")
    for got, want in zip(fast, run(), strict=True):
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("precision", ANY_ORDER)
@pytest.mark.parametrize(("m", "n", "k"), LARGE)
def test_threads_give_the_same_bits(rng, m, n, k, precision):
    _core.set_matmul_precision(precision)
    on_threads(everything(rng, m, n, k))


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize(("m", "n", "k"), LARGE)
def test_the_adapter_stays_in_float32(rng, m, n, k, precision):
    """The adapter's own products keep their bits; their part of the result is added in float32.

    Tiles have the adapter in them (test_amx.py).
    """
    x, w, bias, dy = normal(rng, m, k), normal(rng, n, k), normal(rng, n), normal(rng, m, n)
    a, b = normal(rng, k, 8), normal(rng, 8, n)

    def run():
        h, y, dh, dx = (np.empty(s, np.float32) for s in ((m, 8), (m, n), (m, 8), (m, k)))
        _core.lora_forward(x, w, bias, a, b, 0.5, None, h, y)
        _core.lora_input_grad(dy, w, a, b, 0.5, 0, None, dh, dx)
        return h, dh, y, dx

    before = run()
    _core.set_matmul_precision(precision)
    h, dh, y, dx = run()
    assert h.tobytes() == before[0].tobytes() and dh.tobytes() == before[1].tobytes()
    near(y, wide(rounded(x)) @ wide(rounded(w)).T + bias + 0.5 * wide(h) @ wide(b), 9 * k)
    near(dx, wide(rounded(dy)) @ wide(rounded(w)) + wide(dh) @ wide(a).T, 9 * n)


@pytest.mark.parametrize("precision", ["float32", *ANY_ORDER])
@pytest.mark.parametrize(("rows", "outputs"), [(32, 40), (40, 32), (40, 40)])
def test_gradients_by_weights_are_rounded(rng, precision, rows, outputs):
    """Not those of few rows or outputs."""
    dy, x = normal(rng, rows, outputs), normal(rng, rows, 70)
    want, got = (np.empty((outputs, 70), np.float32) for _ in range(2))
    _core.set_matmul_precision(precision)
    _core.matmul_tn(dy, x, 1.0, 0, want)
    _core.linear_weight_grad(dy, x, 0, got)
    same = got.tobytes() == want.tobytes()
    assert same != (precision != "float32" and min(rows, outputs) > 32)
    assert (np.abs(got - want) <= 1.01 * 2.0**-8 * (np.abs(dy).T @ np.abs(x))).all()


@pytest.mark.parametrize("precision", ANY_ORDER)
@pytest.mark.parametrize("format", ["f32", "q4_1", "nf4"])
def test_what_stays_float32(rng, format, precision):
    """Few rows, plain matrix products, and everything after the setting is reset."""
    weight = stored(rng, 40, 96, format)
    x, dy, dense = normal(rng, 33, 96), normal(rng, 33, 40), weight.dequantize()

    def few():
        return forward(x[:32], weight.handle, out=(32, 40)), backward(
            dy[:4], weight.handle, (4, 96)
        )

    def plain():
        found = [np.empty(s, np.float32) for s in ((33, 40), (33, 96), (40, 96))]
        _core.matmul_nt(x, dense, 1.0, 0, found[0])
        _core.matmul_nn(dy, dense, 1.0, 0, found[1])
        _core.matmul_tn(dy, x, 1.0, 0, found[2])
        return found

    def many():
        return forward(x, weight.handle, out=(33, 40)), backward(dy, weight.handle, (33, 96))

    before = [*few(), *plain()], many()
    _core.set_matmul_precision(precision)
    for got, want in zip([*few(), *plain()], before[0], strict=True):
        assert got.tobytes() == want.tobytes()
    sizes = np.abs(x) @ np.abs(dense).T, np.abs(dy) @ np.abs(dense)
    for got, want, size in zip(many(), before[1], sizes, strict=True):
        assert got.tobytes() != want.tobytes()
        # Two roundings, each of half a unit of 8 bits.
        assert (np.abs(got - want) <= 1.01 * 2.0**-8 * size).all()
    _core.set_matmul_precision("float32")
    for got, want in zip(many(), before[1], strict=True):
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("precision", ANY_ORDER)
def test_a_row_does_not_depend_on_its_neighbours(rng, precision):
    weight = stored(rng, 97, 416, "q4_1")
    x, dy = normal(rng, 80, 416), normal(rng, 80, 97)
    _core.set_matmul_precision(precision)
    y, dx = forward(x, weight.handle, out=(80, 97)), backward(dy, weight.handle, x.shape)
    for rows in (slice(0, 33), slice(3, 54), slice(9, 79), slice(47, 80)):
        some = x[rows].copy(), dy[rows].copy()
        assert (
            forward(some[0], weight.handle, out=(len(some[0]), 97)).tobytes() == y[rows].tobytes()
        )
        assert backward(some[1], weight.handle, some[0].shape).tobytes() == dx[rows].tobytes()


@pytest.mark.parametrize("precision", ANY_ORDER)
@pytest.mark.parametrize("bad", [np.nan, np.inf, np.float32(3.4e38)])
def test_what_is_not_finite_stays_in_its_row_and_column(rng, bad, precision):
    """The largest float32 numbers become infinite in bfloat16."""
    m, n, k, row, column = 39, 41, 67, 2, 37
    x, w = normal(rng, m, k), normal(rng, n, k)
    _core.set_matmul_precision(precision)
    x[row, 5] = bad
    y = forward(x, w, out=(m, n))
    assert set(zip(*np.nonzero(~np.isfinite(y)), strict=True)) == {(row, j) for j in range(n)}
    x[row, 5], w[column, 1] = 0, bad
    y = forward(x, w, out=(m, n))
    assert set(zip(*np.nonzero(~np.isfinite(y)), strict=True)) == {(i, column) for i in range(m)}


def test_the_setting_is_one_of_the_known():
    assert _core.matmul_precision() == "float32"
    with pytest.raises(ValueError, match="float32, bfloat16 or int8, not 'tf32'"):
        _core.set_matmul_precision("tf32")


def test_a_precision_can_be_tried_by_one_thread():
    """The others, and the process, keep theirs."""
    rng = np.random.default_rng(0)
    x, w = normal(rng, 40, 96), normal(rng, 50, 96)

    def layer():
        return forward(x, w, out=(40, 50)).tobytes()

    exact = layer()
    _core.try_matmul_precision("bfloat16")
    try:
        tried = layer()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(layer).result() == exact
            assert pool.submit(_core.matmul_precision).result() == "float32"
    finally:
        _core.try_matmul_precision(None)
    assert tried != exact and layer() == exact
    with pytest.raises(ValueError, match="float32, bfloat16 or int8, not 'tf32'"):
        _core.try_matmul_precision("tf32")
