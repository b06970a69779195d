"""Reductions over NumPy's axes, broadcasting and its adjoint, rows of probabilities."""

import itertools

import numpy as np
import pytest

import pyloss
from pyloss.arithmetic import (
    ROW_MAPS,
    cumsum,
    expanded,
    extreme_grad,
    logsumexp_grad,
    reduced,
    row_map,
    row_map_grad,
    summed_to,
)

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 3, 4, 5), (1, 5, 1), (0, 3), (3, 0), (300, 40)]


def normal(*shape, seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


def all_axes(rank):
    yield None
    for count in range(1, rank + 1):
        yield from itertools.combinations(range(rank), count)
    yield from range(-rank, rank)


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("shape", SHAPES)
def test_reductions_are_numpys(name, shape):
    x = normal(*shape)
    for axis, keepdims in itertools.product(all_axes(len(shape)), (False, True)):
        got = reduced(name, x, axis, keepdims)
        if got is None:
            assert x.size == 0 and name != "sum"
            continue
        want = getattr(np, name)(x.astype(np.float64), axis=axis, keepdims=keepdims)
        assert got.shape == want.shape and got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)


def test_logsumexp_takes_the_last_axes():
    x = normal(3, 4, 5)
    for axis in (-1, 2, (1, 2), None):
        want = np.log(np.exp(x.astype(np.float64)).sum(axis=axis))
        y = reduced("logsumexp", x, axis)
        np.testing.assert_allclose(y, want, rtol=1e-6)
        dx = logsumexp_grad(np.ones_like(y), x, y)
        shares = np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)
        np.testing.assert_allclose(dx, shares, rtol=1e-5)
    assert reduced("logsumexp", x, 0) is None


@pytest.mark.parametrize(
    "shapes",
    [((3,), (2, 3)), ((), (4,)), ((2, 1, 3), (2, 5, 3)), ((1,), (7,)), ((3, 1), (3, 4)), ((3,), (3,)), ((1, 3), (0, 3))],
)  # fmt: skip
def test_expanding_and_its_adjoint(shapes):
    x = normal(*shapes[0])
    y = expanded(x, shapes[1])
    assert np.array_equal(y, np.broadcast_to(x, shapes[1]))
    np.testing.assert_allclose(summed_to(y, shapes[0]), x * (y.size / x.size), rtol=1e-6)


@pytest.mark.parametrize("name", ROW_MAPS)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4, 33)])
def test_rows_of_probabilities(name, shape):
    x, dy = normal(*shape), normal(*shape, seed=1)
    y = row_map(name, x)
    if "softmax" in name:
        p = np.exp(x.astype(np.float64))
        p /= p.sum(axis=-1, keepdims=True)
        log_p, dot = np.log(p), (p * dy).sum(axis=-1, keepdims=True)
        if name == "softmax":
            want, slope = p, p * (dy - dot)
        else:
            want, slope = log_p, dy - p * dy.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(y, want, rtol=2e-6, atol=4e-7)
        np.testing.assert_allclose(row_map_grad(name, dy, y), slope, rtol=1e-5, atol=2e-6)
    else:
        assert np.array_equal(y, getattr(pyloss, name)(x))
        (want,) = pyloss.grad(lambda x: (getattr(pyloss, name)(x) * dy).sum(), argnums=(0,))(x)
        np.testing.assert_allclose(row_map_grad(name, dy, x), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_rows_of_other_types(dtype):
    x = normal(3, 5).astype(dtype)
    y = row_map("softmax", x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(np.float64).sum(axis=-1), 1, rtol=2e-3)
    assert row_map_grad("softmax", x, y) is None  # NumPy's, by the result


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (1, 2)])
def test_gradients_of_extremes(axis):
    x = np.round(normal(3, 4, 5) * 2)
    y = x.max(axis=axis)
    dy = normal(*y.shape, seed=1)
    dx = extreme_grad(dy, x, np.asarray(y), axis)
    at = x == x.max(axis=axis, keepdims=True)
    kept = dy.reshape(x.max(axis=axis, keepdims=True).shape)
    want = np.where(at, kept / at.sum(axis=axis, keepdims=True), 0)
    np.testing.assert_allclose(dx, want, rtol=1e-6)
    assert extreme_grad(dy, x, np.asarray(y), (0, 2)) is None


def test_running_sums():
    x = normal(2, 3, 5)
    np.testing.assert_allclose(cumsum(x), np.cumsum(x, axis=-1), rtol=1e-5, atol=1e-6)
    want = np.cumsum(x[..., ::-1], axis=-1)[..., ::-1]
    np.testing.assert_allclose(cumsum(x, reverse=True), want, rtol=1e-5, atol=1e-6)
    assert cumsum(x.T) is None and cumsum(np.float32(1)) is None


def test_other_arguments_are_left_to_numpy():
    x = normal(3, 4)
    assert reduced("median", x) is None
    assert reduced("sum", x.T) is None
    assert reduced("sum", x, 2) is None
    assert reduced("sum", x, (0, 0)) is None
    assert reduced("max", normal(0, 3), 0) is None
    assert expanded(x, (3, 5)) is None
    assert summed_to(x, (3, 2)) is None
    assert row_map("softmax", normal(3, 0)) is None
    assert logsumexp_grad(normal(2), x, normal(3)) is None
