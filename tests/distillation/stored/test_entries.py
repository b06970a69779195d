"""Entries of rows of logits: their values in float64, and draws without bias."""

import numpy as np
import pytest

from pyloss.distillation.stored.entries import drawn, likeliest


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.fixture
def logits():
    return (3 * np.random.default_rng(5).standard_normal((4, 50))).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("count", [1, 7, 50])
def test_the_likeliest_classes(logits, temperature, count):
    found = likeliest(logits, temperature, count)
    p = softmax(logits.astype(np.float64) / temperature)
    np.testing.assert_array_equal(found.ids, np.argsort(-p, axis=-1)[:, :count])
    top = np.take_along_axis(p, found.ids, -1)
    np.testing.assert_allclose(found.logprobs, np.log(top), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.left, 1 - top.sum(-1), rtol=1e-5, atol=1e-7)
    if count == 50:
        assert (found.left == 0).all()


def test_the_rest_keeps_its_digits():
    """1 less the entries would be 0 here in float32."""
    z = np.zeros((1, 1000), np.float32)
    z[0, 3] = 30
    left = 999 * np.exp(-30.0) / (1 + 999 * np.exp(-30.0))
    np.testing.assert_allclose(likeliest(z, 1.0, 1).left, left, rtol=1e-5)


def test_equal_classes_are_in_the_order_of_their_ids():
    found = likeliest(np.array([[0, 2, 1, 2, 2]], np.float32), 1.0, 4)
    assert found.ids.tolist() == [[1, 3, 4, 2]]


def test_masked_classes_have_no_probability():
    z = np.array([[0, -np.inf, 1]], np.float32)
    found = likeliest(z, 1.0, 3)
    assert found.ids.tolist() == [[2, 0, 1]] and found.logprobs[0, 2] == -np.inf
    assert 1 not in drawn(z, 1.0, 1000, np.random.default_rng(0)).ids


def test_draws_have_no_bias(logits):
    """The gradient of the cross entropy from draws, q less their shares, over 10,000 draws of 8:
    its mean is that of the whole distributions, q - p, within 5 standard errors.
    """
    rounds, draws = 10_000, 8
    row = np.repeat(logits[:1], 100, axis=0)
    random = np.random.default_rng(42)
    shares = np.zeros((rounds, logits.shape[1]))
    for begin in range(0, rounds, len(row)):
        ids = drawn(row, 1.0, draws, random).ids
        for i, drawn_ids in enumerate(ids):
            shares[begin + i] = np.bincount(drawn_ids, minlength=logits.shape[1]) / draws
    p = softmax(logits[0].astype(np.float64))
    error = np.sqrt(p * (1 - p) / (draws * rounds))  # of a mean of binomial shares
    off = np.abs(shares.mean(0) - p) / error
    assert off.max() < 5
    # Pearson's statistic over the classes with at least 5 expected draws: mean V - 1
    often = p * draws * rounds >= 5
    statistic = (((shares.mean(0) - p) ** 2 / p) * draws * rounds)[often].sum()
    freedom = often.sum() - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_draws_are_sorted_and_their_log_probabilities_those_of_their_classes(logits):
    found = drawn(logits, 2.0, 20, np.random.default_rng(1))
    log_p = np.log(softmax(logits.astype(np.float64) / 2))
    assert (np.diff(found.ids, axis=-1) >= 0).all()
    np.testing.assert_allclose(
        found.logprobs, np.take_along_axis(log_p, found.ids, -1), rtol=1e-5, atol=1e-6
    )
    for row, p, left in zip(found.ids, np.exp(log_p), found.left, strict=True):
        np.testing.assert_allclose(left, 1 - p[np.unique(row)].sum(), rtol=1e-5)
