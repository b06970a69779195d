"""Layers against float64 formulas and their central differences."""

import numpy as np
import pytest
from kernel_checks import assert_close, element_gradient, on_threads, row_gradient

from pyloss import _core

pytestmark = pytest.mark.usefixtures("place")

SHAPES = [
    (0, 5),
    (1, 1),
    (3, 7),
    (7, 33),
    (33, 15),
    (70, 16),
    (65, 17),
    (1, 31),
    (2, 127),
    (4, 257),
    (5, 0),
]
LENGTHS = [0, 1, 3, 4, 5, 7, 8, 15, 16, 17, 33, 127, 1031, 8191, 8192, 8193, 20011]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64)


# Embeddings and rows


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_embedding(memory, rng, n, d):
    w, dy, dw0 = normal(rng, 11, d), normal(rng, n, d), normal(rng, 11, d)
    ids = rng.integers(0, 11, n)
    y, dw = memory.new((n, d)), memory.put(dw0)
    _core.embedding_forward(memory.put(ids, np.int32), memory.put(w), y)
    assert (y == w[ids]).all()
    _core.embedding_grad(memory.put(dy), memory.put(ids, np.int32), dw)
    want = dw0.copy()
    np.add.at(want, ids, dy)
    assert_close(dw, want, n)


def test_embedding_of_a_stored_half_precision_matrix(memory, rng):
    w = normal(rng, 9, 37).astype(np.float16)
    ids = np.array([8, 0, 3, 3], np.int32)
    y = memory.new((2, 2, 37))
    _core.embedding_forward(ids.reshape(2, 2), (w.view(np.uint8).ravel(), 2, 9, 37, 0), y)
    assert (y.reshape(4, 37) == w[ids]).all()


def test_embedding_without_a_vocabulary(memory):
    _core.embedding_forward(np.zeros(0, np.int32), np.zeros((0, 4), np.float32), memory.new((0, 4)))


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_gather_and_scatter_add_rows(memory, rng, n, d):
    x, dy = normal(rng, n, d), normal(rng, 2 * n, d)
    rows = rng.integers(0, max(n, 1), 2 * n)
    y, dx = memory.new((2 * n, d)), memory.new((n, d))
    _core.gather_rows(memory.put(x), memory.put(rows, np.int32), y)
    assert (y == x[rows]).all()
    _core.scatter_add_rows(memory.put(dy), memory.put(rows, np.int32), dx)
    want = np.zeros((n, d))
    np.add.at(want, rows, dy)
    assert_close(dx, want, n)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_put_rows(memory, rng, n, d):
    x, rows, y = normal(rng, n, d), rng.permutation(2 * n)[:n], memory.new((2 * n, d))
    y[...] = want = normal(rng, 2 * n, d)
    _core.put_rows(memory.put(x), memory.put(rows, np.int32), y)
    want[rows] = x
    assert (y == want).all()


@pytest.mark.parametrize("n", [0, 1, 63, 300_000])
def test_same_bits(memory, rng, n):
    def same(x, y):
        out = memory.new((1,), np.uint8)
        _core.same_bits(x, y, out)
        return out[0]

    x = normal(rng, n).astype(np.float32)
    x[n // 2 : n // 2 + 1] = np.nan
    assert same(memory.put(x), memory.put(x)) == 1
    for at in {0, n // 2, n - 1} - {-1} if n else ():
        y = x.copy()
        y.view(np.uint32)[at] ^= 1 << 31
        assert same(memory.put(x), memory.put(y)) == 0


@pytest.mark.parametrize("n", [0, 1, 31, 100_003])
def test_ratio(memory, rng, n):
    a, b = memory.put(normal(rng, n)), memory.put(normal(rng, n))
    a[n // 3 :: 4], b[::5] = np.nan, 0

    def run():
        y = memory.new(n)
        _core.ratio(a, b, y)
        _core.ratio(a, b, same := memory.put(b))
        np.testing.assert_array_equal(same, y)
        return (y,)

    np.testing.assert_array_equal(
        on_threads(run)[0], np.divide(a, b, out=np.zeros(n, np.float32), where=b != 0)
    )


@pytest.mark.parametrize(("n", "d"), [(0, 3), (3, 0), (1, 1), (5, 33), (33, 5), (700, 65)])
def test_columns_and_turning(memory, rng, n, d):
    x, factor = memory.put(normal(rng, n, d)), memory.put(normal(rng, d))

    def run():
        y, turned = memory.new((n, d)), memory.new((d, n))
        _core.scale_columns(x, factor, y)
        _core.transpose(x, turned)
        return y, turned

    y, turned = on_threads(run)
    np.testing.assert_array_equal(y, x * factor)
    np.testing.assert_array_equal(turned, x.T)


@pytest.mark.parametrize(("e", "n", "d"), [(0, 3, 2), (2, 0, 3), (3, 5, 33), (4, 33, 5)])
def test_turning_each_of_several(memory, rng, e, n, d):
    x = memory.put(normal(rng, e, n, d))

    def run():
        turned = memory.new((e, d, n))
        _core.transpose(x, turned)
        return (turned,)

    np.testing.assert_array_equal(on_threads(run)[0], x.swapaxes(1, 2))


def test_scatter_of_no_rows_gives_zeros(memory):
    dx = memory.new((4, 3))
    _core.scatter_add_rows(np.zeros((0, 3), np.float32), np.zeros(0, np.int32), dx)
    assert (dx == 0).all()


# Norm


def norm(x, w, eps=1e-5):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * w


@pytest.mark.parametrize(("n", "d"), SHAPES[:-1])
def test_rms_norm(memory, rng, n, d):
    x, w, dy = normal(rng, n, d), normal(rng, d), normal(rng, n, d)
    y, rstd = memory.new((n, d)), memory.new((n,))
    _core.rms_norm_forward(memory.put(x), memory.put(w), 1e-5, y, rstd)
    assert_close(y, norm(x, w), d)
    assert_close(rstd, 1 / np.sqrt((x**2).mean(axis=-1) + 1e-5), d)
    dx, dx_alone, dw = memory.new((n, d)), memory.new((n, d)), memory.new((d,))
    inputs = [memory.put(a) for a in (dy, x, w)]
    _core.rms_norm_grad(*inputs, rstd, dx, dw)
    _core.rms_norm_grad(*inputs, rstd, dx_alone, None)
    assert (dx == dx_alone).all()
    # Terms of dx that cancel are as large as dy w rstd.
    scale = 1 + np.abs(dy * w).max(initial=0) * np.abs(rstd).max(initial=0)
    assert_close(dx / scale, row_gradient(lambda x: norm(x, w), x, dy) / scale, d)
    assert_close(dw, row_gradient(lambda w: norm(x, w[0])[None], w[None], dy[None])[0], n + d)


def test_rms_norm_of_long_rows_keeps_its_digits(memory, rng):
    x = 1 + normal(rng, 2, 65536) / 16
    y, rstd = memory.new(x.shape), memory.new((2,))
    _core.rms_norm_forward(memory.put(x), np.ones(65536, np.float32), 0.0, y, rstd)
    x = x.astype(np.float32).astype(np.float64)
    assert np.abs(rstd / (1 / np.sqrt((x**2).mean(axis=1))) - 1).max() < 1e-6


def test_nan_stays_in_its_row(memory, rng):
    x = normal(rng, 3, 19)
    x[1, 17] = np.nan
    y, rstd = memory.new(x.shape), memory.new((3,))
    _core.rms_norm_forward(memory.put(x), np.ones(19, np.float32), 1e-5, y, rstd)
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


# Rotary positions


def rotate(x, positions, cos, sin):
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[positions][:, None], sin[positions][:, None]
    return np.concatenate([a * c - b * s, b * c + a * s, rest], axis=-1)


@pytest.mark.parametrize(
    ("n", "h", "d", "half"),
    [
        (0, 2, 4, 2), (1, 1, 2, 1), (3, 2, 6, 3), (5, 3, 64, 32), (2, 1, 34, 17), (7, 2, 30, 15), (2, 2, 0, 0),
        (3, 2, 6, 2), (5, 3, 64, 24), (2, 2, 33, 16), (4, 1, 40, 3), (3, 2, 5, 0),
    ],
)  # fmt: skip
def test_rope(memory, rng, n, h, d, half):
    x, dy, angles = normal(rng, n, h, d), normal(rng, n, h, d), normal(rng, 13, half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = rng.integers(0, 13, n)
    tables = memory.put(positions, np.int32), memory.put(cos), memory.put(sin)
    y = memory.new(x.shape)
    _core.rope(memory.put(x), *tables, 0, y)
    cos, sin = cos.astype(np.float64), sin.astype(np.float64)
    assert_close(y, rotate(x, positions, cos, sin))
    dx = memory.put(dy)
    _core.rope(dx, *tables, 1, dx)
    flat = x.reshape(n, h * d)
    f = lambda x: rotate(x.reshape(n, h, d), positions, cos, sin).reshape(n, h * d)
    assert_close(dx.reshape(n, h * d), row_gradient(f, flat, dy.reshape(n, h * d)))


# Elementwise


def silu_product(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def gelu_product(gate, up):
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


def sigmoid_product(gate, up):
    return up / (1 + np.exp(-gate))


GATED = [("swiglu", silu_product), ("geglu", gelu_product), ("glu", sigmoid_product)]


def gated(name):
    return getattr(_core, f"{name}_forward"), getattr(_core, f"{name}_grad")


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("name", "product"), GATED)
def test_gated_units(memory, rng, n, name, product):
    forward, grad = gated(name)
    gate, up, dy = 3 * normal(rng, n), normal(rng, n), normal(rng, n)
    gate, up, dy = (a.astype(np.float32).astype(np.float64) for a in (gate, up, dy))
    y, dgate, dup = (memory.new((n,)) for _ in range(3))
    forward(memory.put(gate), memory.put(up), y)
    assert_close(y, product(gate, up))
    inputs = [memory.put(a) for a in (dy, gate, up)]
    grad(*inputs, dgate, dup)
    assert_close(dgate, element_gradient(lambda g: product(g, up), gate, dy))
    assert_close(dup, element_gradient(lambda u: product(gate, u), up, dy))
    grad(*inputs, inputs[1], inputs[2])
    assert (inputs[1] == dgate).all() and (inputs[2] == dup).all()


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gated_units_far_out(memory, name):
    forward, grad = gated(name)
    gate = np.array([-1e30, -1e4, -200, -89, -88, 88, 200, 1e4, 1e30, 0, np.nan], np.float32)
    ones = np.ones_like(gate)
    y, dgate, dup = (memory.new(gate.shape) for _ in range(3))
    forward(gate, ones, y)
    assert (
        np.abs(y[:5]).max() < 1e-35
        and (y[5:9] == gate[5:9]).all()
        and y[9] == 0
        and np.isnan(y[10])
    )
    grad(ones, gate, ones, dgate, dup)
    assert (
        np.abs(dgate[:5]).max() < 1e-35
        and (dgate[5:9] == 1).all()
        and dgate[9] == 0.5
        and np.isnan(dgate[10])
    )


@pytest.mark.parametrize("n", LENGTHS)
def test_add_axpy_scale(memory, rng, n):
    a, b = normal(rng, n), normal(rng, n)
    y = memory.new((n,))
    _core.add(memory.put(a), memory.put(b), y)
    assert (y == (a + b).astype(np.float32)).all()
    y = memory.put(b)
    _core.axpy(0.37, memory.put(a), y)
    assert_close(y, 0.37 * a + b)
    x = memory.put(a)
    _core.scale(-1.5, x, x)
    assert (x == (-1.5 * a).astype(np.float32)).all()


@pytest.mark.parametrize("n", LENGTHS)
def test_sum_squares(memory, rng, n):
    x, out = normal(rng, n), memory.new((1,), np.float64)
    _core.sum_squares(memory.put(x), out)
    assert abs(out[0] - (x**2).sum()) <= 1e-14 * (x**2).sum()


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_column_sum(memory, rng, n, d):
    x, y = normal(rng, n, d), memory.new((d,))
    _core.column_sum(memory.put(x), y)
    assert_close(y, x.sum(axis=0), n)


def test_column_sum_of_many_rows_keeps_its_digits(memory, rng):
    x, y = 1 + normal(rng, 200_003, 3), memory.new((3,))
    _core.column_sum(memory.put(x), y)
    want = x.astype(np.float32).astype(np.float64).sum(axis=0)
    assert np.abs(y / want - 1).max() < 1e-6


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_column_dot(memory, rng, n, d):
    dy, y, offset, out = normal(rng, n, d), normal(rng, n, d), normal(rng, d), memory.new((d,))
    for minus in (None, memory.put(offset)):
        _core.column_dot(memory.put(dy), memory.put(y), minus, out)
        want = dy * (y - (0 if minus is None else offset))
        assert (np.abs(out - want.sum(axis=0)) <= 1e-6 * (1e-6 + np.abs(want).sum(axis=0))).all()


# Dropout


@pytest.mark.parametrize("n", LENGTHS)
def test_dropout_depends_on_seed_and_index_alone(memory, rng, n):
    whole = memory.new((20011,))
    _core.dropout(np.ones(20011, np.float32), -5, 0.3, whole)
    x = normal(rng, n)
    y = memory.put(x)
    _core.dropout(y, -5, 0.3, y)
    assert_close(y, x * whole[:n].astype(np.float64))


def test_dropout_is_the_same_on_every_instruction_set(memory):
    x = np.ones(5000, np.float32)
    y, other = memory.new(x.shape), memory.new(x.shape)
    _core.dropout(x, 12345678901234, 0.5, y)
    _core.use_isa("baseline")
    _core.dropout(x, 12345678901234, 0.5, other)
    assert (y == other).all()


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_is_random(memory, p):
    n = 1 << 18
    kept = []
    for seed in range(4):
        y = memory.new((n,))
        _core.dropout(np.ones(n, np.float32), seed, p, y)
        assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - p))}
        kept.append((y > 0) - (1 - p))
    noise = 5 * p * (1 - p) / np.sqrt(n)
    for k in kept:
        assert abs(k.mean()) < 5 * np.sqrt(p * (1 - p) / n)
        for lag in (1, 2, 3, 4, 16, 64, 576, 4096, 65536):
            assert abs((k[lag:] * k[:-lag]).mean()) < noise * 1.5
    for i in range(3):
        assert abs((kept[i] * kept[i + 1]).mean()) < noise


def test_dropout_of_all_and_of_nothing(memory, rng):
    x, y = memory.put(normal(rng, 100)), memory.new((100,))
    _core.dropout(x, 1, 0.0, y)
    assert (x == y).all()
    _core.dropout(x, 1, 1.0, y)
    assert (y == 0).all()


# Any number of threads


def test_threads_do_not_change_a_bit(rng):
    n, d, v = 301, 577, 97
    x, dy, up = (rng.standard_normal((n, d), dtype=np.float32) for _ in range(3))
    w, ids = rng.standard_normal(d, dtype=np.float32), rng.integers(0, v, n).astype(np.int32)
    heads, positions = x[:, :576].reshape(n, 9, 64).copy(), ids
    cos, sin = rng.standard_normal((2, v, 32), dtype=np.float32)
    table = rng.standard_normal((v, d), dtype=np.float32)

    def run():
        y, dx, dup, rows, turned = (np.zeros_like(a) for a in (x, x, x, x, heads))
        rstd, dw, sums = np.zeros(n, np.float32), np.zeros(d, np.float32), np.zeros(d, np.float32)
        dtable, scattered, squares, gate = (
            np.zeros_like(table),
            np.zeros_like(table),
            np.zeros(1),
            np.zeros_like(x),
        )
        _core.rms_norm_forward(x, w, 1e-5, y, rstd)
        _core.rms_norm_grad(dy, x, w, rstd, dx, dw)
        _core.geglu_grad(dy, x, up, gate, dup)
        _core.embedding_forward(ids, table, rows)
        _core.embedding_grad(dy, ids, dtable)
        _core.scatter_add_rows(dy, ids, scattered)
        _core.rope(heads, positions, cos, sin, 0, turned)
        _core.column_sum(dy, sums)
        _core.sum_squares(dy, squares)
        _core.dropout(up, 3, 0.1, up_dropped := np.zeros_like(up))
        return (
            y,
            dx,
            dw,
            rstd,
            gate,
            dup,
            rows,
            dtable,
            scattered,
            turned,
            sums,
            squares,
            up_dropped,
        )

    on_threads(run)
