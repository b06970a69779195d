"""Reductions of an axis and gradients of rows, against float64."""

import numpy as np
import pytest
from kernel_checks import on_threads

from pyloss import _core

pytestmark = pytest.mark.usefixtures("place")

# [O, N, D]: runs of several blocks and tails, columns of several blocks and tiles, empty axes.
SHAPES = [(1, 1, 1), (3, 7, 1), (5, 33, 1), (2, 20_001, 1), (1, 5, 3), (3, 70, 9), (2, 200, 1030), (3, 0, 2),
          (0, 3, 2), (2, 3, 0), (4, 0, 1)]  # fmt: skip
NUMPY = {"axis_max": np.max, "axis_min": np.min}


@pytest.mark.parametrize("shape", SHAPES)
def test_sums(memory, rng, shape):
    x = memory.put(rng.standard_normal(shape))
    y = memory.new((shape[0], shape[2]))
    _core.axis_sum(x, 0.5, y)
    wide = x.astype(np.float64)
    error = 4e-7 * np.abs(wide).sum(axis=1) + 1e-30
    assert (np.abs(y - 0.5 * wide.sum(axis=1)) <= error).all()


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("shape", SHAPES)
def test_extremes(memory, rng, name, shape):
    x = memory.put(rng.standard_normal(shape))
    y = memory.new((shape[0], shape[2]))
    getattr(_core, name)(x, y)
    if shape[1]:
        assert np.array_equal(y, NUMPY[name](x, axis=1))
    else:
        assert np.isnan(y).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_an_extremes_gradient_is_shared(memory, rng, shape):
    x = memory.put(rng.integers(-3, 4, shape))
    dy, dx = memory.put(rng.standard_normal((shape[0], shape[2]))), memory.new(shape)
    y = memory.put(x.max(axis=1) if shape[1] else dy)
    _core.axis_extreme_grad(dy, x, y, dx)
    chosen = x == y[:, None]
    count = np.maximum(chosen.sum(axis=1, keepdims=True), 1)
    np.testing.assert_allclose(dx, np.where(chosen, dy[:, None] / count, 0), rtol=3e-7)


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("at", [0, 1, 30, 8200, 20_000])
def test_extremes_of_nan_and_infinity(memory, rng, name, at):
    for bad in (np.nan, np.inf, -np.inf):
        x = memory.put(rng.standard_normal((2, 20_001)))
        x[1, at] = bad
        for axes in ((2, 20_001, 1), (1, 20_001, 2)):
            values = memory.put(x.reshape(axes) if axes[2] == 1 else x.T.reshape(axes))
            y = memory.new((axes[0], axes[2]))
            getattr(_core, name)(values, y)
            assert np.array_equal(y.reshape(-1), NUMPY[name](x, axis=1), equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33), (9, 1001), (0, 3), (3, 0)])
@pytest.mark.parametrize("reverse", [0, 1])
def test_running_sums(memory, rng, shape, reverse):
    x, y = memory.put(rng.standard_normal(shape)), memory.new(shape)
    _core.row_cumsum(x, reverse, y)
    wide = x.astype(np.float64)[:, :: -1 if reverse else 1]
    want = wide.cumsum(axis=1)[:, :: -1 if reverse else 1]
    np.testing.assert_allclose(y, want, rtol=2e-7, atol=1e-6)


def log_sum(x):
    largest = x.max(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        shifted = np.where(np.isinf(largest), 0, largest)
        return (shifted + np.log(np.exp(x - shifted).sum(axis=-1, keepdims=True)))[..., 0]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33), (2, 4097), (2, 20_001), (0, 3)])
def test_logsumexp_and_its_gradient(memory, rng, shape):
    x = memory.put(rng.standard_normal(shape) * 20)
    y, dy = memory.new(shape[:1]), memory.put(rng.standard_normal(shape[:1]))
    dx = memory.new(shape)
    _core.row_logsumexp(x, y)
    want = log_sum(x.astype(np.float64)) if shape[0] else np.zeros(0)
    np.testing.assert_allclose(y, want, rtol=4e-7, atol=2e-7)
    _core.row_logsumexp_grad(dy, x, y, dx)
    exact = dy[:, None] * np.exp(x.astype(np.float64) - want[:, None])
    np.testing.assert_allclose(dx, exact, rtol=2e-5, atol=1e-7)


def test_logsumexp_of_infinite_rows(memory):
    inf = np.inf
    rows = [[-inf, -inf, -inf], [inf, 1, 2], [inf, -inf, 0], [np.nan, inf, 1], [-inf, 1, 1]]
    x, y = memory.put(rows), memory.new((5,))
    _core.row_logsumexp(x, y)
    want = [-inf, inf, inf, np.nan, 1 + np.log(2)]
    np.testing.assert_allclose(y, want, rtol=1e-6)
    dx = memory.new((5, 3))
    _core.row_logsumexp_grad(memory.put(np.ones(5)), x, y, dx)
    np.testing.assert_allclose(dx[0], 0)
    np.testing.assert_allclose(dx[4], [0, 0.5, 0.5], rtol=1e-6)
    empty = memory.new((2,))
    _core.row_logsumexp(memory.new((2, 0)), empty)
    assert (empty == -inf).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33), (2, 4097), (0, 3), (3, 0)])
@pytest.mark.parametrize("logarithm", [False, True])
def test_gradients_of_softmax_by_its_result(memory, rng, shape, logarithm):
    y = rng.standard_normal(shape) * 3
    y -= log_sum(y)[:, None] if y.size else 0
    y = memory.put(y if logarithm else np.exp(y))
    dy, dx = memory.put(rng.standard_normal(shape)), memory.new(shape)
    getattr(_core, "row_log_softmax_grad" if logarithm else "row_softmax_grad")(dy, y, dx)
    p, d = y.astype(np.float64), dy.astype(np.float64)
    if logarithm:
        want = d - np.exp(p) * d.sum(axis=1, keepdims=True)
    else:
        want = p * (d - (p * d).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(dx, want, rtol=2e-6, atol=2e-6)


def test_bits_do_not_depend_on_threads(rng, place):
    if "opencl" in place:
        pytest.skip("threads of the core")
    x = rng.standard_normal((300, 9001)).astype(np.float32)

    def run():
        found = [np.empty(shape, np.float32) for shape in ((300, 1), (1, 9001), (1, 1), (300,))]
        _core.axis_sum(x.reshape(300, 9001, 1), 1.0, found[0])
        _core.axis_sum(x.reshape(1, 300, 9001), 1.0, found[1])
        _core.axis_sum(x.reshape(1, -1, 1), 1.0, found[2])
        _core.row_logsumexp(x, found[3])
        return found

    on_threads(run)
