"""Sampling against exact probabilities."""

import math

import numpy as np
import pytest

from pyloss.generation import make_sampler, sampling

LOGITS = np.array([0.5, 2.0, -1.0, 1.5, -np.inf, 2.0], np.float32)


def exact(temperature=1.0, keep=None):
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    if keep is not None:
        p[[i for i in range(len(p)) if i not in keep]] = 0
    return p / p.sum()


def frequencies(n=20_000, **options):
    sampler = make_sampler(generator=np.random.default_rng(0), **options)
    return np.bincount([sampler(LOGITS) for _ in range(n)], minlength=len(LOGITS)) / n


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"temperature": 1.0}, exact()),
        ({"temperature": 0.5}, exact(0.5)),
        ({"temperature": 3.0}, exact(3.0)),
        ({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3}, exact(keep={1, 3, 5})),
        ({"temperature": 1.0, "top_k": 99}, exact()),
        # Probabilities in order: 0.36 (1), 0.36 (5), 0.22 (3), 0.08 (0), ...
        ({"temperature": 1.0, "top_p": 0.3}, exact(keep={1})),
        ({"temperature": 1.0, "top_p": 0.5}, exact(keep={1, 5})),
        ({"temperature": 1.0, "top_p": 0.9}, exact(keep={1, 3, 5})),
        ({"temperature": 1.0, "min_p": 1.0}, exact(keep={1, 5})),
        ({"temperature": 1.0, "min_p": 0.5}, exact(keep={1, 3, 5})),
        ({"temperature": 1.0, "min_p": 0.2}, exact(keep={0, 1, 3, 5})),
        ({"temperature": 2.0, "top_k": 4, "top_p": 0.8, "min_p": 0.1}, exact(2.0, keep={1, 3, 5})),
    ],
)
def test_draws_follow_the_exact_probabilities(options, want):
    got, want, n = frequencies(**options), np.asarray(want, np.float64), 20_000
    assert (got[want == 0] == 0).all()
    np.testing.assert_array_less(np.abs(got - want), 4.5 * np.sqrt(want * (1 - want) / n) + 1e-9)


@pytest.mark.parametrize("n", [1, 7, 64, 500, 2999, 3000, 4000])
@pytest.mark.parametrize("kinds", [50, 10**6])
def test_the_largest_are_those_of_a_stable_sort(n, kinds):
    values = np.random.default_rng(n).integers(0, kinds, 3000).astype(np.float32)
    np.testing.assert_array_equal(
        sampling._largest(values, n), np.argsort(-values, kind="stable")[:n]
    )


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.3, 0.9, 0.999, 1.0, 2.0])
@pytest.mark.parametrize("kinds", [5, 10**6])
def test_the_fewest_of_a_sum(share, kinds):
    p = np.random.default_rng(1).integers(1, 1 + kinds, 3000).astype(np.float64)
    order = np.argsort(-p, kind="stable")
    want = order[: np.searchsorted(np.cumsum(p[order]), share * p.sum()) + 1]
    np.testing.assert_array_equal(sampling._first_of(p, share * p.sum()), want)


def test_greedy_takes_the_first_largest():
    assert make_sampler()(LOGITS) == 1
    assert make_sampler(0.0, top_k=2, top_p=0.1)(np.array([-3.0, -1.0, -2.0])) == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1 << 70}, "top_k"),
        ({"temperature": 10**400}, "temperature"),
    ],
)
def test_options_outside_their_range(options, name):
    with pytest.raises(ValueError, match=f"{name} is .*; it must be"):
        make_sampler(**options)
