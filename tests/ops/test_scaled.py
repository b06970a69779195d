"""Products with matrices whose scales are trained: values and gradients."""

import numpy as np
import pytest
from ops_checks import check, normal

from pyloss import ops
from pyloss.autograd.differentiation import value_and_grad
from pyloss.ops import scaled
from pyloss.ops.scaled import scaled_linear, scaled_matrix, scaled_rows, scaled_stack
from pyloss.weights.scales import Scales
from pyloss.weights.weight import Weight


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def scales_of(rng, rows=5, columns=64, bits=3):
    """Scales in float32, so that changes are not rounded, and the parts of the values in float64.

    w = (scale (1 + t0)) (code - middle) + middle's value + scale t1
    """
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    scales = Scales(Weight.quantize(values, f"affine{bits}", group_size=32))
    base, size = scales.weight.dequantize().astype(np.float64), (rows, -1, 32)
    zero, up, along = scales.zeros(), scales.zeros(), scales.zeros()
    up[0], along[1] = 1, 1
    by_scale = scales.weight_of(up).dequantize().astype(np.float64) - base
    by_offset = scales.weight_of(along).dequantize().astype(np.float64) - base
    assert np.array_equal(scales.weight_of(zero).dequantize(), base)

    def matrix(change):
        parts = (base, by_scale, by_offset)
        whole, first, second = (part.reshape(size) for part in parts)
        return (whole + change[0][..., None] * first + change[1][..., None] * second).reshape(
            rows, columns
        )

    return scales, matrix


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_linear_and_its_gradients(rng, bias, few, monkeypatch):
    if few:  # the matrix's gradient exists one row at a time
        monkeypatch.setattr(scaled, "_AT_ONCE", 64)
        monkeypatch.setattr("pyloss.weights.scales._AT_ONCE", 128)
    scales, matrix = scales_of(rng)
    b = normal(rng, 5) if bias else None
    x, change = normal(rng, 3, 64), 0.1 * normal(rng, *scales.shape)
    check(
        rng,
        lambda x, t: scaled_linear(x, scales, t, None if b is None else b.astype(np.float32)),
        lambda x, t: x @ matrix(t).T + (0 if b is None else b),
        x,
        change,
    )


def test_it_is_the_product_with_the_stored_matrix(rng):
    scales, _ = scales_of(rng, bits=4)
    x, change = normal(rng, 7, 64).astype(np.float32), np.float32(0.01) * np.ones(scales.shape, "f")
    weight = scales.weight_of(change)
    assert np.array_equal(scaled_linear(x, scales, change), ops.linear(x, weight))
    ids = np.array([4, 0, 4])
    assert np.array_equal(scaled_rows(ids, scales, change), ops.embedding(ids, weight))
    whole = ops.embedding(np.arange(5), weight)
    assert np.array_equal(scaled_matrix(scales, change), whole)


def test_rows_and_the_whole_matrix(rng):
    scales, matrix = scales_of(rng)
    change = 0.1 * normal(rng, *scales.shape)
    ids = np.array([[4, 0], [4, 2]])
    check(rng, lambda t: scaled_rows(ids, scales, t), lambda t: matrix(t)[ids], change)
    check(rng, lambda t: scaled_matrix(scales, t), matrix, change)


def test_experts(rng):
    several = [scales_of(rng) for _ in range(3)]
    change = 0.1 * normal(rng, 3, *several[0][0].shape)
    check(
        rng,
        lambda t: scaled_stack([scales for scales, _ in several], t),
        lambda t: np.stack([matrix(part) for (_, matrix), part in zip(several, t, strict=True)]),
        change,
    )


def test_a_constant_change_gets_no_gradient(rng):
    scales, matrix = scales_of(rng)
    x = normal(rng, 2, 64).astype(np.float32)
    _, dx = value_and_grad(lambda x: scaled_linear(x, scales, scales.zeros()).sum())(x)
    np.testing.assert_allclose(dx, np.tile(matrix(scales.zeros()).sum(0), (2, 1)), atol=1e-4)
