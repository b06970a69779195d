"""Row norms of stored matrices with an adapter against float64, on every instruction set."""

import numpy as np
import pytest
from kernel_checks import on_threads
from stored_weights import stored

from pyloss import _core
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
