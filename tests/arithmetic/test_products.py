"""Batched products: axes that broadcast, transposition, sums over the batch."""

import itertools

import numpy as np
import pytest

from pyloss.arithmetic import batched_product, summed_product

BATCHES = [
    ((), ()), ((3,), (3,)), ((1,), (3,)), ((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 1, 3), (1, 4, 1)),
    ((0,), (1,)), ((5,), ()), ((), (5,)), ((1, 1), (2, 2)), ((2, 2), (1, 1)),
]  # fmt: skip


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 17, 5), (0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_products_broadcast_as_numpys(batches, size):
    m, n, k = size
    for swap_a, swap_b in itertools.product((False, True), repeat=2):
        a = normal(*batches[0], *((k, m) if swap_a else (m, k)))
        b = normal(*batches[1], *((n, k) if swap_b else (k, n)), seed=1)
        left, right = (x.swapaxes(-1, -2) if swap else x for x, swap in ((a, swap_a), (b, swap_b)))
        want = left.astype(np.float64) @ right
        got = batched_product(a, b, None, swap_a, swap_b, 0.5)
        assert got.shape == want.shape and got.dtype == np.float32
        np.testing.assert_allclose(got, 0.5 * want, atol=1e-5)
        out = np.ones(want.shape, np.float32)
        assert batched_product(a, b, out, swap_a, swap_b, 2.0, add=True) is out
        np.testing.assert_allclose(out, 1 + 2 * want, atol=2e-5)


@pytest.mark.parametrize("batches", [((4,), (4,), ()), ((4,), (4,), (1,)), ((2, 3), (2, 3), (3,)),
    ((2, 3), (2, 3), (2, 1)), ((2, 3), (3,), (3,)), ((2, 3), (2, 3), (1, 3)), ((2, 3), (2, 3), (2, 3)),
    ((0,), (0,), ())])  # fmt: skip
@pytest.mark.parametrize("swap", [(True, False), (False, True)])
def test_gradients_of_broadcast_operands_are_sums(batches, swap):
    a = normal(*batches[0], *((6, 5) if swap[0] else (5, 6)))
    b = normal(*batches[1], *((7, 6) if swap[1] else (6, 7)), seed=1)
    left, right = (x.swapaxes(-1, -2) if s else x for x, s in zip((a, b), swap, strict=True))
    whole = left.astype(np.float64) @ right
    batch = batches[2]
    padded = (1,) * (whole.ndim - 2 - len(batch)) + batch
    axes = tuple(i for i, n in enumerate(padded) if n != whole.shape[i])
    want = whole.sum(axis=axes, keepdims=True).reshape(*batch, 5, 7)
    np.testing.assert_allclose(summed_product(a, b, batch, *swap), want, atol=1e-5)


def test_other_arguments_are_left_to_numpy():
    x = normal(2, 3, 4)
    assert batched_product(x, x) is None  # depths 4 and 3
    assert batched_product(x, normal(3, 4, 2)) is None  # batches 2 and 3
    assert batched_product(x.astype(np.float64), normal(2, 4, 2)) is None
    assert batched_product(x.swapaxes(1, 2), normal(2, 3, 2)) is None  # not contiguous
    assert batched_product(x, normal(4)) is None
    with pytest.raises(ValueError, match="out"):
        batched_product(x, normal(2, 4, 2), np.zeros((2, 3, 3), np.float32))
    with pytest.raises(ValueError, match="add"):
        batched_product(x, normal(2, 4, 2), add=True)
