"""pyloss.softmax and its kind, against formulas in float64 and differences."""

import math

import numpy as np
import pytest
from tape_cases import numeric

import pyloss
from pyloss import value_and_grad


def erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x)


FORMULAS = {
    "softmax": (pyloss.softmax, lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
    "softmax axes": (
        lambda x: pyloss.softmax(x, (0, 1)),
        lambda x: np.exp(x) / np.exp(x).sum((0, 1), keepdims=True),
    ),
    "log_softmax": (pyloss.log_softmax, lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))),
    "logsumexp": (pyloss.logsumexp, lambda x: np.log(np.exp(x).sum())),
    "logsumexp axis": (lambda x: pyloss.logsumexp(x, 0), lambda x: np.log(np.exp(x).sum(0))),
    "logsumexp kept": (
        lambda x: pyloss.logsumexp(x, (0, -1), keepdims=True),
        lambda x: np.log(np.exp(x).sum((0, -1), keepdims=True)),
    ),
    "sigmoid": (pyloss.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "silu": (pyloss.silu, lambda x: x / (1 + np.exp(-x))),
    "relu": (pyloss.relu, lambda x: np.where(x > 0, x, 0)),
    "gelu": (pyloss.gelu, lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2)))),
    "gelu tanh": (
        lambda x: pyloss.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
}


@pytest.mark.parametrize("shape", [(3, 4, 2), (1, 3, 1), (64, 33, 7)], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients(name, shape):
    ours, formula = FORMULAS[name]
    rng = np.random.default_rng(2)
    x = 2 * rng.standard_normal(shape)
    want = formula(x)
    upstream = rng.standard_normal(want.shape)
    value, gradient = value_and_grad(lambda x: np.sum(ours(x) * upstream))(x)
    np.testing.assert_allclose(value, (want * upstream).sum(), rtol=1e-9, atol=1e-12)
    if x.size < 100:
        slopes = numeric(lambda x: np.sum(formula(x) * upstream), x)
        np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(ours(x), want, rtol=1e-10, atol=1e-12)  # outside of a recording
    single = x.astype(np.float32)
    value, slopes = value_and_grad(lambda x: np.sum(ours(x) * upstream.astype(np.float32)))(single)
    assert value.dtype == slopes.dtype == np.float32
    np.testing.assert_allclose(slopes, gradient, rtol=2e-4, atol=2e-5)


def test_extreme_logits():
    x = np.array([[1e4, -1e4, -np.inf], [-1e4, -1e4, -1e4]], np.float32)
    np.testing.assert_allclose(pyloss.softmax(x), [[1, 0, 0], [1 / 3] * 3], rtol=1e-6)
    np.testing.assert_allclose(pyloss.logsumexp(x, -1), [1e4, -1e4 + math.log(3)], rtol=1e-6)
    assert (value_and_grad(lambda x: np.sum(pyloss.softmax(x)[..., 0]))(x)[1] == 0)[0].all()
    for f in (pyloss.sigmoid, pyloss.silu, pyloss.gelu):
        assert np.isfinite(f(np.array([-1e4, 1e4], np.float32))).all()
    assert pyloss.logsumexp(np.full(3, -np.inf)) == -np.inf


def test_numbers_and_lists():
    assert pyloss.sigmoid(0.0) == 0.5 and pyloss.relu([-1, 2]).tolist() == [0, 2]
    assert pyloss.softmax([1, 1]).dtype == np.float32


def test_one_hot():
    np.testing.assert_array_equal(pyloss.one_hot([[0, 2]], 3), [[[1, 0, 0], [0, 0, 1]]])
    with pytest.raises(ValueError, match=r"\[0, 3\), got values from 0 to 3"):
        pyloss.one_hot([0, 3], 3)
    with pytest.raises(ValueError, match="approximate"):
        pyloss.gelu(np.ones(1), approximate="erf")


@pytest.mark.parametrize("axis", [-1, 0, (0, 1)], ids=str)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_log_probabilities_of_large_logits(kind, axis):
    """Their differences are exact, so that the result and its gradient keep all digits."""
    rng = np.random.default_rng(3)
    x = (1e6 + rng.integers(-40, 40, (5, 70)) / 4).astype(kind)
    upstream = rng.standard_normal(x.shape).astype(kind)
    below = x.astype(np.float64) - 1e6
    want = below - np.log(np.exp(below).sum(axis, keepdims=True))
    slope = upstream - np.exp(want) * upstream.sum(axis, keepdims=True, dtype=np.float64)
    close = {"rtol": 1e-6, "atol": 2e-6} if kind == np.float32 else {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(pyloss.log_softmax(x, axis), want, **close)
    _, found = value_and_grad(lambda x: np.sum(pyloss.log_softmax(x, axis) * upstream))(x)
    np.testing.assert_allclose(found, slope, **close)
