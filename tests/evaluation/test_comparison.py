"""Differences of two models and their intervals."""

import itertools

import numpy as np
import pytest

from pyloss.evaluation import Evaluation, Result, compare


def evaluation(scores, metric="exact-match", reference="x"):
    return Evaluation(
        (metric,), [Result(reference=reference, answer="", scores={metric: s}) for s in scores]
    )


def losses(pairs, metric="loss"):
    return Evaluation((metric,), [Result(loss_sum=a, targets=b) for a, b in pairs])


def test_equal_models_do_not_differ():
    found = compare(evaluation([0, 1, 1]), evaluation([0, 1, 1]))["exact-match"]
    assert (found.score, found.base, found.difference) == (2 / 3, 2 / 3, 0)
    assert (found.low, found.high) == (0, 0)


def test_bounds_are_percentiles_of_all_resamples():
    """Of three records there are 27 resamples, equally likely."""
    ours, base = [0.9, 0.2, 0.5], [0.1, 0.4, 0.3]
    every = [
        np.mean([ours[i] - base[i] for i in drawn])
        for drawn in itertools.product(range(3), repeat=3)
    ]
    found = compare(evaluation(ours, "f1"), evaluation(base, "f1"), resamples=200_000)["f1"]
    # One of 27 is 3.7 %, so 2.5 % lies within the first value, and 97.5 % within the last.
    assert found.low == pytest.approx(min(every)) and found.high == pytest.approx(max(every))
    assert found.difference == pytest.approx(np.mean(ours) - np.mean(base))


def test_bounds_of_many_records_are_those_of_the_normal_distribution():
    rng = np.random.default_rng(0)
    a, b = rng.random(2000), rng.random(2000)
    found = compare(evaluation(a, "f1"), evaluation(b, "f1"))["f1"]
    spread = 1.96 * (a - b).std() / 2000**0.5
    assert found.low == pytest.approx((a - b).mean() - spread, abs=0.05 * spread)
    assert found.high == pytest.approx((a - b).mean() + spread, abs=0.05 * spread)


def test_pairing_narrows_the_interval():
    """Both models fail on the same records, so their difference is certain."""
    right = np.arange(200) % 2
    found = compare(evaluation(right * 0.9 + 0.1, "f1"), evaluation(right * 0.9, "f1"))["f1"]
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)


def test_losses_are_means_over_tokens():
    ours, base = losses([(2.0, 1), (9.0, 9)]), losses([(3.0, 1), (9.0, 9)])
    found = compare(ours, base, resamples=5000)["loss"]
    assert (found.score, found.base) == pytest.approx((1.1, 1.2))
    # Resamples: the first record twice, both, the second twice.
    assert (found.low, found.high) == pytest.approx((-1.0, 0.0))
    pairs = [(2.0, 1), (9.0, 9)], [(3.0, 1), (9.0, 9)]
    found = compare(*(losses(p, "perplexity") for p in pairs), resamples=5000)["perplexity"]
    assert found.difference == pytest.approx(np.exp(1.1) - np.exp(1.2))
    assert found.low == pytest.approx(np.exp(2.0) - np.exp(3.0)) and found.high == pytest.approx(0)


def test_records_without_targets_have_no_share_in_the_loss():
    found = compare(losses([(2.0, 1), (0.0, 0)]), losses([(1.0, 1), (0.0, 0)]))["loss"]
    assert (found.difference, found.low, found.high) == (1, 1, 1)


def test_the_seed_fixes_the_bounds():
    rng = np.random.default_rng(1)
    pair = evaluation(rng.random(50), "f1"), evaluation(rng.random(50), "f1")
    assert compare(*pair) == compare(*pair)
    assert compare(*pair, seed=1) != compare(*pair)


@pytest.mark.parametrize(
    "base, message",
    [
        (evaluation([1.0]), "2 records of exact-match, and 1 of exact-match"),
        (evaluation([1.0, 0.0], "f1"), "and 2 of f1"),
        (evaluation([1.0, 0.0], reference="y"), "reference answers differ"),
    ],
)
def test_other_records_are_refused(base, message):
    with pytest.raises(ValueError, match=message):
        compare(evaluation([1.0, 0.0]), base)
