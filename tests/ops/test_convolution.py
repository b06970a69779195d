"""Convolutions: values and gradients against float64 central differences of their formulas."""

import itertools

import numpy as np
import pytest
from ops_checks import check, normal

from pyloss import ops
from pyloss.autograd.differentiation import value_and_grad

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def convolved(x, weight, bias, offsets):
    d, taps = len(weight), weight.shape[2]
    inner, out = x[:, :d] * x[:, 2 * d :], np.zeros((len(x), d))
    for begin, end in itertools.pairwise(offsets):
        for n in range(begin, end):
            for at in range(max(begin, n - taps + 1), n + 1):
                out[n] += weight[:, 0, taps - 1 - n + at] * inner[at]
    return (out if bias is None else out + bias) * x[:, d : 2 * d]


@pytest.mark.parametrize("lengths", [[0], [1], [2, 3], [4, 0, 1, 5]])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_short_conv(rng, lengths, taps, biased):
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    x, weight = normal(rng, int(offsets[-1]), 9), normal(rng, 3, 1, taps)
    more = [normal(rng, 3)] if biased else []

    def operation(x, weight, bias=None):
        return ops.short_conv(x, weight, bias, offsets)

    def reference(x, weight, bias=None):
        return convolved(x, weight, bias, offsets)

    check(rng, operation, reference, x, weight, *more)
    np.testing.assert_allclose(
        operation(x, weight, *more), reference(x, weight, *more), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("lengths", [[0], [4, 0, 1, 5]])
@pytest.mark.parametrize("biased", [False, True])
def test_conv_silu(rng, lengths, biased):
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    x, weight = normal(rng, int(offsets[-1]), 3), normal(rng, 3, 1, 4)
    more = [normal(rng, 3)] if biased else []

    def operation(x, weight, bias=None):
        return ops.conv_silu(x, weight, bias, offsets)

    def reference(x, weight, bias=None):
        sums = convolved(np.concatenate([x, x * 0 + 1, x * 0 + 1], 1), weight, bias, offsets)
        return sums / (1 + np.exp(-sums))

    check(rng, operation, reference, x, weight, *more)
    np.testing.assert_allclose(
        operation(x, weight, *more), reference(x, weight, *more), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("length", [64, 65])
def test_short_conv_of_longer_sequences(rng, length):
    """Gradients in float32 against those in float64, which other tests compare with differences."""
    offsets = np.array([0, length, length + 3, 2 * length], np.int32)
    arrays = normal(rng, 2 * length, 60), normal(rng, 20, 1, 3), normal(rng, 20)
    upstream = normal(rng, 2 * length, 20)

    def loss(x, weight, bias):
        return (ops.short_conv(x, weight, bias, offsets) * upstream.astype(x.dtype)).sum()

    step = value_and_grad(loss, argnums=(0, 1, 2))
    _, want = step(*arrays)
    _, got = step(*(array.astype(np.float32) for array in arrays))
    for one, other in zip(got, want, strict=True):
        assert one.dtype == np.float32 and other.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())
