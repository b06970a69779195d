"""Routing of tokens to experts and their weights, on every instruction set and thread count."""

import numpy as np
import pytest
from kernel_checks import assert_close, on_threads

from pyloss import _core

pytestmark = pytest.mark.usefixtures("place")

SHAPES = [(0, 4, 2), (1, 1, 1), (3, 5, 5), (7, 8, 2), (33, 60, 7), (9, 128, 8)]


def put_logits(memory, rng, n, experts):
    return memory.put(3 * rng.standard_normal((n, experts)))


def chosen_of(logits, k):
    return np.sort(np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :k], axis=1)


@pytest.mark.parametrize(("n", "experts", "k"), SHAPES)
def test_top_experts(memory, rng, n, experts, k):
    logits = put_logits(memory, rng, n, experts)
    logits[::2] = np.round(logits[::2])  # makes some logits equal

    def run():
        chosen = memory.new((n, k), np.int32)
        _core.top_experts(logits, chosen)
        return (chosen,)

    np.testing.assert_array_equal(on_threads(run)[0], chosen_of(logits, k))


def test_what_cannot_be_ranked_comes_last(memory):
    nan, inf = np.nan, np.inf
    logits = memory.put([[nan, 1, 2, 3], [nan, nan, -inf, nan], [inf, nan, inf, 0], [0, 0, 0, 0]])
    chosen = memory.new((4, 2), np.int32)
    _core.top_experts(logits, chosen)
    assert chosen.tolist() == [[2, 3], [0, 1], [0, 2], [0, 1]]
    more = memory.new((4, 6), np.int32)
    _core.top_experts(logits, more)
    assert (more == [0, 1, 2, 3, -1, -1]).all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("n", "experts", "k"), SHAPES)
def test_sigmoid_scores(memory, rng, n, experts, k, with_bias):
    logits, scores = put_logits(memory, rng, n, experts), memory.new((n, experts))
    bias = memory.put(rng.standard_normal(experts)) if with_bias else None
    _core.sigmoid_scores(logits, bias, scores)
    want = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert_close(scores, want + bias.astype(np.float64) if with_bias else want)


@pytest.mark.parametrize(("n", "experts", "k"), SHAPES)
def test_visits_are_sorted_by_expert_then_by_token(memory, rng, n, experts, k):
    logits, chosen = put_logits(memory, rng, n, experts), memory.new((n, k), np.int32)
    _core.top_experts(logits, chosen)
    tokens, visits = memory.new((n, k), np.int32), memory.new((n, k), np.int32)
    offsets = memory.new(experts + 1, np.int32)
    _core.sort_visits(chosen, logits, tokens, visits, offsets)
    order = np.argsort(chosen.reshape(-1), kind="stable")
    np.testing.assert_array_equal(tokens.reshape(-1), order // k)
    np.testing.assert_array_equal(visits.reshape(-1)[order], np.arange(n * k))
    counts = np.bincount(chosen.reshape(-1), minlength=experts)
    np.testing.assert_array_equal(offsets, [0, *np.cumsum(counts)])


def shares_of(logits, chosen, normalise, sigmoid):
    """Of the chosen experts and of all, and the slope of the first by their own logits' shares."""
    if sigmoid:
        own = np.take_along_axis(1 / (1 + np.exp(-logits)), chosen, 1)
        return own / (own.sum(1, keepdims=True) + 1e-6 if normalise else 1), 0 * logits, 1 - own
    powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    own = np.take_along_axis(powers, chosen, 1)
    shares = powers / powers.sum(1, keepdims=True)
    return own / (own if normalise else powers).sum(1, keepdims=True), shares * (not normalise), 1


@pytest.mark.parametrize("sigmoid", [0, 1])
@pytest.mark.parametrize("normalise", [0, 1])
@pytest.mark.parametrize(("n", "experts", "k"), SHAPES)
def test_weights_and_their_gradient(memory, rng, n, experts, k, normalise, sigmoid):
    logits, chosen = put_logits(memory, rng, n, experts), memory.new((n, k), np.int32)
    _core.top_experts(logits, chosen)
    visits = memory.put(rng.permutation(n * k).reshape(n, k), np.int32)
    tokens = memory.put(np.zeros(n * k), np.int32)
    slope = memory.put(rng.standard_normal(n * k))
    rule = normalise, sigmoid, 1.5

    def run():
        weights, dlogits = memory.new(n * k), memory.new((n, experts))
        _core.visit_weights(logits, chosen, visits, tokens, *rule, weights)
        _core.visit_weights_grad(slope, logits, chosen, visits, *rule, dlogits)
        return weights, dlogits

    weights, dlogits = on_threads(run)
    want, others, inner = shares_of(logits.astype(np.float64), chosen, normalise, sigmoid)
    assert_close(weights[visits], 1.5 * want)
    d = slope[visits].astype(np.float64)
    mean = (want * d).sum(1, keepdims=True) if normalise or not sigmoid else 0
    wanted = -1.5 * others * mean
    np.put_along_axis(wanted, chosen, 1.5 * want * (d - mean) * inner, 1)
    assert_close(dlogits, wanted, k)


def test_an_expert_that_is_not_there(memory):
    logits, visits, weights = (
        memory.put(np.zeros((1, 3))),
        memory.put([[0]], np.int32),
        memory.new(1),
    )
    tokens, rule = memory.put([0], np.int32), (1, 0, 1.0)
    with pytest.raises(ValueError, match="chosen"):
        _core.visit_weights(logits, memory.put([[3]], np.int32), visits, tokens, *rule, weights)
    with pytest.raises(ValueError, match="chosen"):
        beyond, places = memory.put([[-1]], np.int32), memory.new((1, 1), np.int32)
        _core.sort_visits(beyond, logits, tokens.reshape(1, 1), places, memory.new(4, np.int32))
    with pytest.raises(ValueError, match="visits"):
        _core.visit_weights(
            logits, memory.put([[2]], np.int32), memory.put([[1]], np.int32), tokens, *rule, weights
        )
