"""Products of layers in the order of sums of the tile unit (amx_bf16): to the bit what an oracle in
NumPy gives, and near float64, on every instruction set; by the unit too where there is one.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import TILES_EMULATED, on_threads
from stored_weights import stored
from test_matmul import RANKS, SIZES, factors, near, normal, shapes, unaligned, wide

from pyloss import _core
from pyloss.weights.weight import FORMATS, Weight

pytestmark = pytest.mark.usefixtures("tiles")

#: about the 16 rows and columns and the 32 depths of a tile, and primes
EDGES = [1, 15, 16, 17, 31, 32, 33, 53, 97, 131]
STEP = 32  # depths
FLOAT_ROWS = 32  # forward products of up to so many rows are float32's


def flushed(x):
    """Numbers below 2^-126 are 0 of their sign."""
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def rounded(x):
    with np.errstate(over="ignore", invalid="ignore"):
        return flushed(x).astype(ml_dtypes.bfloat16).astype(np.float32)


def fused(a, b, c):
    """a b + c in one rounding to float32, for a and b of 8 bits. float64 holds their product; the
    sum is rounded to odd there (Boldo and Melquiond, 2008), so that the second rounding is right.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        product, c = a.astype(np.float64) * b, c.astype(np.float64)
        total = product + c
        other = total - product
        error = (product - (total - other)) + (c - other)
        even = (np.ascontiguousarray(total).view(np.int64) & 1) == 0
        toward = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        odd = np.where((error != 0) & even & np.isfinite(total), toward, total)
        return flushed(odd.astype(np.float32))


def oracle(a, b, start=None):
    """start + a [m, k] b [k, n] of rounded numbers: in each step of 32 depths the even and the odd
    ones are summed apart, by fused multiply-adds from 0; both sums are added, then their sum to the
    result.
    """
    (m, k), n = a.shape, b.shape[1]
    a, b = np.pad(a, ((0, 0), (0, -k % STEP))), np.pad(b, ((0, -k % STEP), (0, 0)))
    total = np.zeros((m, n), np.float32) if start is None else flushed(start)
    for at in range(0, k, STEP):
        sums = [np.zeros((m, n), np.float32) for _ in range(2)]
        for i in range(at, at + STEP):
            sums[i % 2] = fused(a[:, i : i + 1], b[i], sums[i % 2])
        with np.errstate(over="ignore", invalid="ignore"):
            total = flushed(total + flushed(sums[0] + sums[1]))
    return total


def assert_bits(got, want):
    """All NaNs are one."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert np.nan_to_num(got).tobytes() == np.nan_to_num(want).tobytes()


def forward(x, weight, factor=None, rows=None):
    y = np.full((len(x), rows or len(weight)), np.nan, np.float32)
    _core.linear_forward(x, weight, None, None, None, 0.0, factor, y)
    return y


def backward(dy, weight, start, factor=None, accumulate=0):
    dx = start.copy()
    _core.linear_input_grad(dy, weight, None, None, accumulate, factor, dx)
    return dx


def weight_gradient(dy, x, start=None):
    dw = np.full((dy.shape[1], x.shape[1]), np.nan, np.float32) if start is None else start.copy()
    _core.linear_weight_grad(dy, x, int(start is not None), dw)
    return dw


def check_bits(memory, rng, m, n, k):
    x, w, dy, start = normal(rng, m, k), normal(rng, n, k), normal(rng, m, n), normal(rng, m, k)
    y, dx, more = memory.new((m, n)), memory.new((m, k)), memory.put(start)
    x, w, dy = memory.put(x), memory.put(w), memory.put(dy)
    _core.linear_forward(x, w, None, None, None, 0.0, None, y)
    _core.linear_input_grad(dy, w, None, None, 0, None, dx)
    _core.linear_input_grad(dy, w, None, None, 1, None, more)
    if m > FLOAT_ROWS:
        assert_bits(y, oracle(rounded(x), rounded(w).T))
    assert_bits(dx, oracle(rounded(dy), rounded(w)))
    assert_bits(more, oracle(rounded(dy), rounded(w), start))


@pytest.mark.parametrize("size", EDGES)
def test_the_bits_at_the_edges_of_tiles(memory, rng, size):
    check_bits(memory, rng, max(size, 5), 40, 70)
    check_bits(memory, rng, FLOAT_ROWS + size, 40, 70)
    check_bits(memory, rng, 37, size, 70)
    check_bits(memory, rng, 37, 40, size)
    check_bits(memory, rng, FLOAT_ROWS + size, size, size)


@pytest.mark.parametrize("size", [s for s in SIZES if s > 4])
def test_the_bits_of_a_float_matrix(memory, rng, size):
    for i, (m, n, k) in enumerate(shapes(size)):
        check_bits(memory, rng, max(m, 5 if i % 2 else 33), n, k)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    # several blocks of rows, of depth and of both; groups of columns; rows in several turns
    [(1100, 33, 31), (39, 40, 1601), (70, 33, 2305), (35, 70, 2310), (66, 150, 353)],
)
def test_the_bits_of_several_blocks(memory, rng, m, n, k):
    check_bits(memory, rng, m, n, k)


def check_weight_gradient(memory, rng, rows, outputs, inputs):
    dy, x = memory.put(normal(rng, rows, outputs)), memory.put(normal(rng, rows, inputs))
    dw, more = memory.new((outputs, inputs)), memory.put(normal(rng, outputs, inputs))
    start = more.copy()
    _core.linear_weight_grad(dy, x, 0, dw)
    _core.linear_weight_grad(dy, x, 1, more)
    if min(rows, outputs) > FLOAT_ROWS:
        assert_bits(dw, oracle(rounded(dy).T, rounded(x)))
        assert_bits(more, oracle(rounded(dy).T, rounded(x), start))
        return
    for got, before in ((dw, None), (more, start)):
        want = np.zeros_like(dw) if before is None else before
        _core.matmul_tn(dy, x, 1.0, int(before is not None), want)
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("size", EDGES)
def test_the_bits_of_gradients_by_weights(memory, rng, size):
    check_weight_gradient(memory, rng, FLOAT_ROWS + size, 40, 70)
    check_weight_gradient(memory, rng, 37, FLOAT_ROWS + size, 70)
    check_weight_gradient(memory, rng, 37, 40, size)
    check_weight_gradient(memory, rng, size, 40, 33)
    check_weight_gradient(memory, rng, 40, size, 33)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(4700, 33, 3), (35, 1100, 5), (70, 33, 1100)]
)
def test_gradients_by_weights_of_several_blocks(memory, rng, rows, outputs, inputs):
    check_weight_gradient(memory, rng, rows, outputs, inputs)


def test_gradients_by_weights_of_special_numbers(rng):
    """Infinities, NaN and numbers below the smallest normal one are those of the other products."""
    dy, x = tiny(rng, 40, 37), normal(rng, 40, 35)
    dy[2, 3], dy[5, 8], x[7, 1], x[9, 2] = np.inf, np.nan, -np.inf, 3.4e38
    want = oracle(rounded(dy).T, rounded(x))
    assert np.isnan(want).any() and np.isinf(want).any() and np.isfinite(want).any()
    assert_bits(weight_gradient(dy, x), want)


@pytest.mark.parametrize("head_dim", [0, 6])
@pytest.mark.parametrize("format", list(FORMATS))
def test_the_bits_of_every_format(rng, format, head_dim):
    weight = unaligned(stored(rng, 36, 256, format, head_dim))
    n, k = weight.shape
    dense, factor = weight.dequantize(), factors(n)
    for m in (5, 33):
        x, dy, start = normal(rng, m, k), normal(rng, m, n), normal(rng, m, k)
        for f, values in ((None, dense), (factor, dense * factor[:, None])):
            if m > FLOAT_ROWS:
                y = forward(x, weight.handle, f, n)
                assert_bits(y, oracle(rounded(x), rounded(values).T))
            dx = backward(dy, weight.handle, start, f)
            assert_bits(dx, oracle(rounded(dy), rounded(values)))


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize(
    ("n", "k", "sizes"), [(96, 32, [(5, 8), (48, 33)]), (96, 288, [(33, 1), (65, 8)])]
)
def test_layers_and_adapters_of_every_format(memory, rng, format, n, k, sizes):
    weight = unaligned(stored(rng, n, k, format))
    dense = weight.dequantize()
    for m, r in sizes:
        check_layer(memory, rng, m, r, weight.handle, dense)


@pytest.mark.parametrize("size", [s for s in SIZES if s > 4] + ["long"])
def test_layers_and_adapters_over_a_float_matrix(memory, rng, size):
    for i, (m, n, k) in enumerate(shapes(size)):
        if n and k:
            w = memory.put(normal(rng, n, k))
            rows = max(m, 5 if i % 2 else 33)
            check_layer(memory, rng, rows, RANKS[i % len(RANKS)], w, w)


def parts(x):
    """A float32 array as the sum of two of bfloat16."""
    x = np.asarray(x, np.float32)
    first = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    return rounded(x), rounded(x - first)


def low(x, a, factor=1.0):
    """factor x a for an adapter's matrix a: x is rounded, a is not."""
    first, second = parts(np.float32(factor) * a)
    return oracle(rounded(x), first) + oracle(rounded(x), second)


def layer(x, w, low, up, start=None):
    """start + x w + low up: the adapter's products are more depth."""
    (low1, low2), (up1, up2) = parts(low), parts(up)
    pad = -len(w) % STEP
    left = [np.pad(rounded(x), ((0, 0), (0, pad))), low1, low1, low2]
    right = [np.pad(rounded(w), ((0, pad), (0, 0))), up1, up2, up1]
    return oracle(np.concatenate(left, 1), np.concatenate(right), start)


def check_layer(memory, rng, m, r, weight, dense):
    """A layer's operations with bias, factors and adapter against float64, whose inputs are rounded
    too; if few, to the bit. Large gradients are added if there are factors, else stored.
    """
    n, k = dense.shape
    small = m * n * k < 60_000
    x, dy, bias = (memory.put(normal(rng, *s)) for s in ((m, k), (m, n), (n,)))
    a, b, dx0 = memory.put(normal(rng, k, r)), memory.put(normal(rng, r, n)), normal(rng, m, k)
    factor = memory.put(factors(n))
    for f, values in ((None, dense), (factor, dense * factor[:, None])):
        if m > FLOAT_ROWS:
            y, h = memory.new((m, n)), memory.new((m, r))
            _core.lora_forward(x, weight, bias, a, b, -1.5, f, h, y)
            if small:
                assert_bits(h, low(x, a))
                assert_bits(
                    y, layer(x, values.T, h, np.float32(-1.5) * b, np.broadcast_to(bias, (m, n)))
                )
            close(h, wide(rounded(x)) @ wide(a))
            close(y, wide(rounded(x)) @ wide(rounded(values)).T + bias - 1.5 * wide(h) @ wide(b))
            given = memory.new((m, n))
            _core.linear_forward(x, weight, bias, h, b, -1.5, f, given)
            assert given.tobytes() == y.tobytes()
            _core.linear_forward(x, weight, bias, None, None, 0.0, f, given)
            close(given, wide(rounded(x)) @ wide(rounded(values)).T + bias)
        for accumulate in (0, 1) if small else (int(f is not None),):
            dx, dh = memory.put(dx0), memory.new((m, r))
            _core.lora_input_grad(dy, weight, a, b, -1.5, accumulate, f, dh, dx)
            if small:
                assert_bits(dh, low(dy, b.T, -1.5))
                assert_bits(dx, layer(dy, values, dh, a.T, dx0 if accumulate else None))
            close(dh, -1.5 * wide(rounded(dy)) @ wide(b).T)
            back = wide(rounded(dy)) @ wide(rounded(values))
            close(dx, accumulate * dx0 + back + wide(dh) @ wide(a).T)


def close(got, want):
    """Within what the second parts and products of two of them leave out."""
    assert np.abs(got - want).max() <= 3e-5 * np.abs(want).max()


def test_the_bits_of_experts(rng):
    """Each has the bits of a layer of its own; one of three rows, which is float32's, is among
    them.
    """
    m, n, k, r, offsets = 100, 40, 100, 8, np.array([0, 40, 40, 43, 100], np.int32)
    x, dy, stack = normal(rng, m, k), normal(rng, m, n), normal(rng, 4, n, k)
    a, b = normal(rng, 4, r, k), normal(rng, 4, n, r)
    h, y, dh, dx = (np.empty(s, np.float32) for s in ((m, r), (m, n), (m, r), (m, k)))
    _core.experts_lora_forward(x, stack, None, offsets, a, b, 0.5, None, h, y)
    _core.experts_lora_input_grad(dy, stack, offsets, a, b, 0.5, 0, None, dh, dx)
    for e in range(4):
        rows = slice(offsets[e], offsets[e + 1])
        count = rows.stop - rows.start
        if count == 3:
            near(y[rows], wide(x[rows]) @ wide(stack[e]).T + 0.5 * wide(h[rows]) @ wide(b[e]).T, k)
            continue
        ownh, owny, owndh, owndx = (
            np.empty(s, np.float32) for s in ((count, r), (count, n), (count, r), (count, k))
        )
        down, up = a[e].T.copy(), b[e].T.copy()
        _core.lora_forward(x[rows].copy(), stack[e], None, down, up, 0.5, None, ownh, owny)
        _core.lora_input_grad(dy[rows].copy(), stack[e], down, up, 0.5, 0, None, owndh, owndx)
        for got, want in ((h, ownh), (y, owny), (dh, owndh), (dx, owndx)):
            np.testing.assert_array_equal(got[rows], want)


def tiny(rng, *shape):
    """Numbers about the smallest normal one: some below it, their products about it."""
    return np.ldexp(normal(rng, *shape), rng.integers(-133, -120, shape)).astype(np.float32)


@pytest.mark.parametrize("large", [1.0, 2.0**-3, 2.0**60])
def test_numbers_below_the_smallest_normal_one_are_zero(rng, large):
    m, n, k = 33, 35, 70
    x, w = tiny(rng, m, k), normal(rng, n, k) * np.float32(large)
    x[1:4] = np.float32([[1.17549421e-38], [-1e-45], [1e-38]])
    dy, start = tiny(rng, m, n), tiny(rng, m, k)
    want = oracle(rounded(x), rounded(w).T)
    assert large > 1 or (want == 0).any()
    assert_bits(forward(x, w), want)
    assert_bits(backward(dy, w, start, accumulate=1), oracle(rounded(dy), rounded(w), start))
    root = normal(rng, m, k) * np.float32(2.0**-63), normal(rng, n, k) * np.float32(2.0**-63)
    want = oracle(rounded(root[0]), rounded(root[1]).T)
    assert (want == 0).any() and (want != 0).any()
    assert_bits(forward(*root), want)
    # A weight of each sign, and zeros of each sign: none is lost or made.
    signs = np.where(rng.random((m, k)) < 0.5, np.float32(-0.0), np.float32(0.0))
    assert_bits(forward(signs, w), oracle(signs, rounded(w).T))


def test_infinities_and_nan(rng):
    m, n, k = 39, 41, 67
    x, w = normal(rng, m, k), normal(rng, n, k)
    x[2, 5], x[3, 6], x[4, 7], x[5, 8:10] = np.inf, -np.inf, np.nan, (np.inf, -np.inf)
    x[6, 11] = np.float32(3.4e38)  # infinite in bfloat16
    x[7, 12] = np.float32(3.38e38)  # the largest one there
    w[8, 1], w[9, 2], w[10, 5] = np.nan, np.inf, 0
    want = oracle(rounded(x), rounded(w).T)
    assert np.isinf(want).any() and np.isnan(want).any()
    assert_bits(forward(x, w), want)
    finite = np.isfinite(want)
    plain = [i for i in range(m) if i not in range(2, 8)]
    columns = [j for j in range(n) if j not in (8, 9)]
    assert finite[np.ix_(plain, columns)].all()


def everything(rng, m, n, k):
    """The results of all operations of a layer and its adapter, as a function without arguments."""
    weight = Weight.quantize(normal(rng, n, k), "f16")
    x, dy, bias, start = normal(rng, m, k), normal(rng, m, n), normal(rng, n), normal(rng, m, k)
    a, b = normal(rng, k, 8), normal(rng, 8, n)

    def run():
        h, y, dh, dx = (np.empty(s, np.float32) for s in ((m, 8), (m, n), (m, 8), (m, k)))
        _core.lora_forward(x, weight.handle, bias, a, b, 0.5, None, h, y)
        dx[...] = start
        _core.lora_input_grad(dy, weight.handle, a, b, 0.5, 1, None, dh, dx)
        return h, y, dh, dx, weight_gradient(dy, x)

    return run


@pytest.mark.parametrize(("m", "n", "k"), [(40, 300, 97), (600, 40, 33), (36, 33, 2400)])
def test_any_number_of_threads_gives_the_same_bits(rng, m, n, k):
    run = everything(rng, m, n, k)
    first = on_threads(run)
    before = _core.num_threads()
    try:
        _core.set_num_threads(64)
        for got, want in zip(run(), first, strict=True):
            assert got.tobytes() == want.tobytes()
    finally:
        _core.set_num_threads(before)


def test_calls_from_eight_threads_with_other_work_between(rng):
    run = everything(rng, 70, 97, 65)
    want = run()
    p, q = normal(rng, 50, 60), normal(rng, 60, 40)
    exact = wide(p) @ wide(q)

    def work(_):
        for _ in range(5):
            for got, expected in zip(run(), want, strict=True):
                assert got.tobytes() == expected.tobytes()
            c = np.empty((50, 40), np.float32)
            _core.matmul_nn(p, q, 1.0, 0, c)
            near(c, exact, 60)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_computes_the_same(rng):
    run = everything(rng, 70, 97, 65)
    want = run()
    child = os.fork()
    if child == 0:
        same = all(g.tobytes() == w.tobytes() for g, w in zip(run(), want, strict=True))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for got, expected in zip(run(), want, strict=True):
        assert got.tobytes() == expected.tobytes()


def test_the_unit_is_refused_where_there_is_none():
    missing = _core.amx_missing(True)
    if missing is None:
        _core.set_matmul_precision("bfloat16-tiles")
        return
    for function in (_core.set_matmul_precision, _core.try_matmul_precision):
        with pytest.raises(ValueError, match=missing):
            function("bfloat16-tiles")
    assert _core.matmul_precision() == TILES_EMULATED
