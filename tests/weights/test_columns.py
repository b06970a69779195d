"""Weights that store their columns in another order: NumPy's view of them, and who refuses them."""

import numpy as np
import pytest

import pyloss
from pyloss.nn import Embedding, Linear
from pyloss.tuner.adapters.initial import _products
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

FORMATS = ["affine3", "affine4", "affine8", "q8_0", "f32", "f16"]


def both(format, rows=48, cols=64, seed=0):
    """A matrix whose columns are stored in another order, and its values."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(cols).astype(np.int32)
    values = rng.standard_normal((rows, cols)).astype(np.float32)
    w = Weight.quantize(values[:, order], format, group_size=32)
    dense = np.empty_like(values)
    dense[:, order] = w.dequantize()
    return Weight(w.raw, format, w.shape, 0, w.groups, order), dense


@pytest.mark.parametrize("format", FORMATS)
def test_columns_are_given_in_order(format):
    w, dense = both(format)
    np.testing.assert_array_equal(w.dequantize(), dense)
    np.testing.assert_array_equal(w.rows([[5, 1], [47, 5]]), dense[[[5, 1], [47, 5]]])
    np.testing.assert_array_equal(w.slice_rows(3, 9).dequantize(), dense[3:9])
    assert "columns in another order" in repr(w)


@pytest.mark.parametrize("format", FORMATS[:3])
def test_requantizing_keeps_the_order(format):
    w, dense = both(format)
    again = w.requantize(dense)
    assert again.columns is w.columns and again.raw.tobytes() == w.raw.tobytes()
    moved = w.requantize(dense * 3)
    step = 3 * np.ptp(dense) / (2 ** (8 if format == "affine8" else int(format[-1])) - 1)
    assert np.abs(moved.dequantize() - 3 * dense).max() < step
    like = w.quantize_alike(dense[:5])
    assert like.columns is w.columns and like.shape == (5, 64)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_are_those_of_the_values(format, rows):
    w, dense = both(format)
    plain, _ = both(format, seed=1)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((rows, 64)).astype(np.float32)
    np.testing.assert_allclose(pyloss.ops.linear(x, w), x @ dense.T, atol=1e-4)
    # Matrices of one order, of another, and of none, in one operation
    share = Weight(w.raw, format, w.shape, 0, w.groups, w.columns)
    none = Weight(w.raw, format, w.shape, 0, w.groups)
    bases = [w, none, plain, share]
    found = pyloss.ops.project_all(x, [pyloss.ops.Projection(base) for base in bases])
    for y, base in zip(found, bases, strict=True):
        np.testing.assert_allclose(y, x @ base.dequantize().T, atol=1e-4)
    forward, backward = _products(w)
    dy = rng.standard_normal((rows, 48)).astype(np.float32)
    np.testing.assert_allclose(forward(x), x @ dense.T, atol=1e-4)
    np.testing.assert_allclose(backward(dy), dy @ dense, atol=1e-4)


def test_gradients_of_several_projections():
    bases = [both("affine4", seed=seed) for seed in (0, 1)]
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 5, 64)).astype(np.float32)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((64, 4), (4, 48)))

    def total(weights):
        def f(x, a, b):
            some = [pyloss.ops.Projection(w, None, a, b, 0.5) for w in weights]
            one, other = pyloss.ops.project_all(x, [*some, pyloss.ops.Projection(weights[0])])[:2]
            return (one * one * other).sum()

        return pyloss.value_and_grad(f, argnums=(0, 1, 2))(x, a, b)

    value, grads = total([w for w, _ in bases])
    wanted, others = total([dense for _, dense in bases])
    assert value == pytest.approx(float(wanted), rel=1e-5)
    for one, other in zip(grads, others, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_who_refuses_them():
    w, _ = both("affine4")
    with pytest.raises(ValueError, match="stack must have their columns in order"):
        WeightStack([w, w])
    with pytest.raises(ValueError, match="table of rows must have its columns in order"):
        Embedding.from_weight(w)(np.array([1, 2]))
    hidden, labels = np.ones((3, 64), np.float32), np.array([1, 2, 3])
    for head in (w, Linear.from_weight(w)):
        with pytest.raises(ValueError, match="weight must have its columns in order"):
            pyloss.linear_cross_entropy(hidden, head, labels)
    for columns in ([0, 1], [0] * 64, range(1, 65)):
        with pytest.raises(ValueError, match="columns must be all numbers below 64, each once"):
            Weight(w.raw, "affine4", w.shape, 0, w.groups, np.array(columns, np.int32))
