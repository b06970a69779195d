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


@pytest.mark.parametrize("normalise", [0, 1])
@pytest.mark.parametrize(("n", "experts", "k"), SHAPES)
def test_weights_and_their_gradient(memory, rng, n, experts, k, normalise):
    logits, chosen = put_logits(memory, rng, n, experts), memory.new((n, k), np.int32)
    _core.top_experts(logits, chosen)
    visits = memory.put(rng.permutation(n * k).reshape(n, k), np.int32)
    slope = memory.put(rng.standard_normal(n * k))

    def run():
        weights, dlogits = memory.new(n * k), memory.new((n, experts))
        _core.visit_weights(logits, chosen, visits, normalise, weights)
        _core.visit_weights_grad(slope, logits, chosen, visits, normalise, dlogits)
        return weights, dlogits

    weights, dlogits = on_threads(run)
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True, initial=-np.inf))
    mine = np.take_along_axis(powers, chosen, 1)
    want = mine / (mine if normalise else powers).sum(1, keepdims=True)
    assert_close(weights[visits], want)
    d = slope[visits].astype(np.float64)
    mean = (want * d).sum(1, keepdims=True)
    share = 0 * powers if normalise else powers / powers.sum(1, keepdims=True)
    wanted = -share * mean
    np.put_along_axis(wanted, chosen, want * (d - mean), 1)
    assert_close(dlogits, wanted, k)


def test_an_expert_that_is_not_there(memory):
    logits, visits, weights = (
        memory.put(np.zeros((1, 3))),
        memory.put([[0]], np.int32),
        memory.new(1),
    )
    with pytest.raises(ValueError, match="chosen"):
        _core.visit_weights(logits, memory.put([[3]], np.int32), visits, 1, weights)
    with pytest.raises(ValueError, match="visits"):
        _core.visit_weights(
            logits, memory.put([[2]], np.int32), memory.put([[1]], np.int32), 1, weights
        )
