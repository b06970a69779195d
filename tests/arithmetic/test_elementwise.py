"""Functions of one array and of two that broadcast, as NumPy has them."""

import numpy as np
import pytest

import pyloss
from pyloss.arithmetic import (
    BINARY,
    GRADIENT_READS,
    UNARY,
    binary,
    scaled,
    unary,
    unary_grad,
    where,
)

SHAPES = [
    ((), ()), ((5,), (5,)), ((3, 4), (4,)), ((3, 4), (3, 1)), ((3, 1), (1, 4)), ((2, 3, 4), (2, 1, 4)),
    ((2, 1, 4), (1, 3, 1)), ((2, 3, 4, 5), (3, 4, 5)), ((2, 3, 4, 5), (2, 3, 1, 1)), ((4, 5), (2, 3, 4, 5)),
    ((2, 3, 1, 5), (1, 1, 4, 1)), ((1,), (7,)), ((0, 3), (1, 3)), ((3, 0), (3, 1)),
    ((33, 17), (17,)), ((6, 1, 1), (6, 300, 40)), ((2, 1, 1, 3), (3,)),
]  # fmt: skip


def normal(*shape, seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


IN_NUMPY = [name for name in BINARY if name != "above"]


def test_above_shares_what_is_equal():
    a, b = np.array([1, 2, 3, np.nan], np.float32), np.array([2, 2, 2, 2], np.float32)
    assert binary("above", a, b).tolist() == [0, 0.5, 1, 0]
    assert binary("above", b, a).tolist() == [1, 0.5, 0, 0]


@pytest.mark.parametrize("name", IN_NUMPY)
@pytest.mark.parametrize("shapes", SHAPES)
def test_pairs_are_numpys(name, shapes):
    a, b = normal(*shapes[0]), normal(*shapes[1], seed=1)
    for left, right in ((a, b), (b, a)):
        got, want = binary(name, left, right), getattr(np, name)(left, right)
        assert got.shape == want.shape and got.tobytes() == want.tobytes()


@pytest.mark.parametrize("name", IN_NUMPY)
@pytest.mark.parametrize("number", [2, -1.5, np.float64(3), np.int64(4), np.float32(0.1), True])
def test_numbers_become_float32(name, number):
    a, f = normal(3, 5), getattr(np, name)
    assert np.array_equal(binary(name, a, number), f(a, np.float32(number)))
    assert np.array_equal(binary(name, number, a), f(np.float32(number), a))


def test_arrays_with_more_axes_than_the_core_reads_are_left_to_numpy():
    x = normal(*(2,) * 9)
    assert unary("absolute", x) is None and binary("add", x, x) is None
    value, grad = pyloss.value_and_grad(lambda t: np.sum(np.abs(t) * t))(x)
    np.testing.assert_allclose(value, np.sum(np.abs(x) * x), rtol=1e-5)
    np.testing.assert_allclose(grad, 2 * np.abs(x), rtol=1e-6)


def test_other_arguments_are_left_to_numpy():
    x = normal(2, 2, 2, 2)
    assert binary("add", x, normal(2, 1, 2, 1)) is None
    assert binary("add", x, normal(3)) is None
    assert binary("add", x, x.astype(np.float64)) is None
    assert binary("add", x, x.T) is None
    assert binary("add", x, 1j) is None
    assert binary("add", 1.0, 2.0) is None
    assert binary("hypot", x, x) is None
    assert unary("cbrt", x) is None
    assert unary("exp", x[..., 0]) is None
    assert unary("exp", x.astype(np.float64)) is None
    assert unary_grad("exp", x, x[0]) is None
    assert scaled(x.T, 2.0) is None


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 0), (2, 3, 5)])
def test_functions_and_gradients_keep_the_shape(name, shape):
    x = np.abs(normal(*shape)) + np.float32(0.1)
    x = np.asarray(x)
    y = unary(name, x)
    dx = unary_grad(name, np.ones_like(x), {"x": x, "y": y}[GRADIENT_READS[name]])
    assert y.shape == dx.shape == shape and y.dtype == dx.dtype == np.float32
    if hasattr(np, name):
        np.testing.assert_allclose(y, getattr(np, name)(x), rtol=1e-6)
    above, below = (unary(name, np.asarray(x + np.float32(d))) for d in (1e-2, -1e-2))
    np.testing.assert_allclose(dx, (above - below) / np.float32(2e-2), rtol=0.05, atol=2e-3)


def test_scaled():
    x = normal(3, 5)
    assert np.array_equal(scaled(x, -1.0), -x)


@pytest.mark.parametrize("shapes", [
    ((5,), (5,), (5,)), ((3, 4), (3, 4), (4,)), ((3, 1), (3, 4), (3, 4)), ((3, 4), (), (3, 4)),
    ((2, 3, 4), (2, 1, 1), (1, 1, 4)), ((1,), (7,), (7,)), ((4,), (3, 1), (1,)), ((2, 3, 1, 1), (2, 3, 4, 5), ()),
    ((0,), (1,), ()), ((), (), ()),
])  # fmt: skip
def test_where_is_numpys(shapes):
    mask = np.asarray(normal(*shapes[0]) > 0)
    a, b = normal(*shapes[1], seed=1), normal(*shapes[2], seed=2)
    one, two = np.float32(1), np.float32(2)
    for got, want in (
        (where(mask, a, b), np.where(mask, a, b)),
        (where(mask, a, 2), np.where(mask, a, two)),
        (where(mask, 1.0, b), np.where(mask, one, b)),
        (where(mask, True, 2), np.where(mask, one, two)),
    ):
        assert got.shape == want.shape and got.tobytes() == want.tobytes()


def test_where_leaves_the_rest_to_numpy():
    x = normal(2, 3)
    assert where(x, x, x) is None  # not bools
    assert where(x > 0, x.astype(np.float64), x) is None
    assert where(x > 0, x, normal(4)) is None
    assert where((x > 0).T, 1.0, 0.0) is None
