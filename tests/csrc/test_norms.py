"""Row norms of stored matrices with an adapter against float64, on every instruction set."""

import numpy as np
import pytest
from kernel_checks import on_threads
from stored_weights import stored

from pyloss import _core
from pyloss.runtime.precision import matmul_precision
from pyloss.weights.weight import FORMATS, Weight

pytestmark = pytest.mark.usefixtures("place")


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def norms(memory, weight, dense, a, b, scale):
    squares, norm = memory.new((len(dense),), np.float64), memory.new((len(dense),))
    _core.row_squares(weight, squares)
    _core.adapted_norm(weight, memory.put(a), memory.put(b), scale, squares, norm)
    wide = dense.astype(np.float64)
    np.testing.assert_allclose(squares, (wide**2).sum(axis=1), rtol=1e-14)
    own = memory.new((len(dense),))
    _core.row_norms(weight, own)
    np.testing.assert_array_equal(own, np.sqrt(squares).astype(np.float32))
    return norm


def want(dense, a, b, scale):
    return np.linalg.norm(dense.astype(np.float64) + scale * (a.astype(np.float64) @ b).T, axis=1)


@pytest.mark.parametrize("head_dim", [0, 6])
@pytest.mark.parametrize("format", list(FORMATS))
def test_every_format(memory, rng, format, head_dim):
    weight = stored(rng, 96, 416, format, head_dim)
    for r in (1, 4, 7, 16, 17, 40):
        a, b = normal(rng, weight.shape[1], r), normal(rng, r, 96)
        norm = norms(memory, weight.handle, weight.dequantize(), a, b, -0.7)
        np.testing.assert_allclose(norm, want(weight.dequantize(), a, b, -0.7), rtol=1e-6)


@pytest.mark.parametrize(("o", "i"), [(1, 1), (5, 33), (33, 7), (300, 1601), (0, 4), (4, 0)])
def test_odd_sizes_of_a_float_matrix(memory, rng, o, i):
    for r in (1, 8, 19):
        w, a, b = normal(rng, o, i), normal(rng, i, r), normal(rng, r, o)
        np.testing.assert_allclose(
            norms(memory, memory.put(w), w, a, b, 0.3), want(w, a, b, 0.3), rtol=1e-6
        )


def test_without_a_product_it_is_the_norm_of_the_base(memory, rng):
    w = normal(rng, 70, 576)
    norm = norms(memory, memory.put(w), w, normal(rng, 576, 8), np.zeros((8, 70), np.float32), 20.0)
    assert (
        norm.tobytes()
        == np.sqrt((w.astype(np.float64) ** 2).sum(axis=1)).astype(np.float32).tobytes()
    )


@pytest.mark.parametrize("left", [1e-1, 1e-3, 0])
def test_an_adapter_that_takes_the_base_away(memory, rng, left):
    """Rows nearly cancel: the norm must be that of the difference, not of its rounding error."""
    a, b = normal(rng, 200, 3), normal(rng, 3, 50)
    w = ((left - 2.0) * (a.astype(np.float64) @ b).T).astype(np.float32)
    norm = norms(memory, memory.put(w), w, a, b, 2.0)
    np.testing.assert_allclose(norm, want(w, a, b, 2.0), rtol=1e-6)


def test_what_is_not_finite_stays_in_its_row(memory, rng):
    w, a, b = normal(rng, 9, 40), normal(rng, 40, 2), normal(rng, 2, 9)
    w[2, 3] = np.nan
    b[1, 5] = np.inf
    norm = norms(memory, memory.put(w), w, a, b, 1.0)
    assert list(np.flatnonzero(~np.isfinite(norm))) == [2, 5]


def test_threads_give_the_same_bits(rng):
    weight, a, b = (
        Weight.quantize(normal(rng, 500, 416), "q4_1"),
        normal(rng, 416, 8),
        normal(rng, 8, 500),
    )
    dy, y, bias = normal(rng, 333, 97), normal(rng, 333, 97), normal(rng, 97)

    def run():
        squares, norm, dot = np.empty(500), np.empty(500, np.float32), np.empty(97, np.float32)
        _core.row_squares(weight.handle, squares)
        _core.adapted_norm(weight.handle, a, b, 2.0, squares, norm)
        _core.column_dot(dy, y, bias, dot)
        return squares, norm, dot

    on_threads(run)


def magnitude_grad(memory, weight, dense, m, dy, x, a, b, scale, bias):
    """The gradient by m of y = m / norm (x w^T + scale x a b) + bias, and its float64 formula."""
    norm = want(dense, a, b, scale)
    sums = x.astype(np.float64) @ (dense + scale * (a.astype(np.float64) @ b).T).T
    divisor = np.where(norm == 0, 1, norm)
    y = (m / divisor * sums + (0 if bias is None else bias)).astype(np.float32)
    dots, dm = memory.new((len(dense),)), memory.new((len(dense),))
    held = None if bias is None else memory.put(bias)
    _core.column_dot(memory.put(dy), memory.put(y), held, dots)
    _core.magnitude_grad(
        dots, memory.put(m), memory.put(norm.astype(np.float32)), memory.put(dy), memory.put(x),
        weight, memory.put((x @ a).astype(np.float32)), memory.put(b), scale, dm,
    )  # fmt: skip
    terms = dy * sums / divisor * (norm != 0)
    return dm, terms.sum(axis=0), np.abs(terms).sum(axis=0)


@pytest.mark.parametrize("format", ["f32", "bf16", "q4_1", "q6_k", "nf4"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradient_by_lengths_small_and_zero_ones_included(memory, rng, format, with_bias):
    o, i, r, n = 96, 256, 3, 37
    if format == "f32":
        dense = normal(rng, o, i)
        dense[5] = 0
        weight = memory.put(dense)
    else:
        found = stored(rng, o, i, format, 0)
        weight, dense = found.handle, found.dequantize()
    a, b, x, dy = normal(rng, i, r), normal(rng, r, o), normal(rng, n, i), normal(rng, n, o)
    b[:, 5] = 0
    m = want(dense, a, b, 0.5).astype(np.float32)
    m[7], m[8], m[9] = 0, 1e-9, -1e-4  # what is left of y has no digits of the sum
    bias = normal(rng, o) if with_bias else None
    dm, expected, size = magnitude_grad(memory, weight, dense, m, dy, x, a, b, 0.5, bias)
    assert np.abs(dm - expected).max() <= 3e-6 * size.max()
    assert expected[7] != 0 and abs(dm[7] / expected[7] - 1) < 1e-4


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_norms_in_half_precision(rng, precision):
    """The middle term alone is rounded: some 0.5 % of it."""
    weight = Weight.quantize(normal(rng, 200, 416), "q4_1")
    a, b = normal(rng, 416, 8), 0.1 * normal(rng, 8, 200)
    dense, squares, norm = weight.dequantize(), np.empty(200), np.empty(200, np.float32)
    _core.row_squares(weight.handle, squares)
    with matmul_precision(precision):
        _core.adapted_norm(weight.handle, a, b, 2.0, squares, norm)
    exact = want(dense, a, b, 2.0)
    cross = 2 * 2.0 * np.abs((dense.astype(np.float64) @ a).T * b).sum(axis=0)
    assert (np.abs(norm.astype(np.float64) ** 2 - exact**2) <= 0.02 * cross + 1e-5).all()
    assert np.abs(norm / exact - 1).max() < 3e-3
