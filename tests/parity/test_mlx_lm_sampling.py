"""mlx_lm.sample_utils beside pyloss's: what samplers keep, and what processors change."""

import numpy as np
import pytest
from mlx_sides import compare, refused


def logprobs(shape=(2, 12), seed=0):
    x = 2 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return (x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32)


def kept(side, name, *args, values=None):
    """Where the result is finite, and its values there."""
    given = side.mx.array(logprobs() if values is None else values)
    found = np.array(getattr(side("sample_utils"), name)(given, *args), np.float32)
    return np.isfinite(found).astype(float), np.where(np.isfinite(found), found, 0)


@pytest.mark.parametrize("k", [1, 3, 11])
def test_top_k(k):
    assert compare(kept, "apply_top_k", k)[0].sum() == 2 * k


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9, 0.999, 1.0])
def test_top_p(p):
    compare(kept, "apply_top_p", p)


def test_top_p_of_known_probabilities():
    for p, count in ((0.3, 1), (0.55, 2), (0.95, 3)):
        values = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
        found = compare(lambda side, p=p, v=values: kept(side, "apply_top_p", p, values=v))
        assert found[0].sum() >= count


@pytest.mark.parametrize(("p", "least"), [(0.05, 1), (0.5, 1), (1.0, 1), (1.0, 4), (0.5, 6)])
def test_min_p(p, least):
    compare(kept, "apply_min_p", p, least)


@pytest.mark.parametrize("special", [[], [3, 5]])
@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.5])
def test_xtc_always(threshold, special):
    compare(kept, "apply_xtc", 1.0, threshold, special)


def test_xtc_never():
    compare(kept, "apply_xtc", 0.0, 0.05, [])


REFUSED = [
    ("apply_top_k", (0,)),
    ("apply_top_k", (12,)),
    ("apply_top_k", (1.5,)),
    ("apply_min_p", (1.5,)),
    ("apply_min_p", (0.5, 0)),
    ("apply_xtc", (0.5, 0.7, [])),
    ("apply_xtc", (1.5, 0.1, [])),
]


@pytest.mark.parametrize(("name", "args"), REFUSED)
def test_refused_numbers(name, args):
    case = lambda side: refused(lambda: kept(side, name, *args), ValueError)
    assert compare(case) == "ValueError"


def test_greedy():
    def case(side):
        utils, values = side("sample_utils"), side.mx.array(logprobs())
        return np.array(utils.make_sampler()(values)), np.array(utils.greedy_sampler(values))

    compare(case)


def shares(side, count=4000, **options):
    """How often each token is drawn."""
    utils, mx = side("sample_utils"), side.mx
    mx.random.seed(7)
    sampler = utils.make_sampler(**options)
    values = mx.array(np.repeat(logprobs((1, 6), seed=2), count, axis=0))
    drawn = np.array(sampler(values)).reshape(-1).astype(int)
    return np.bincount(drawn, minlength=6) / count


@pytest.mark.parametrize(
    "options",
    [
        {"temp": 1.0},
        {"temp": 0.5},
        {"temp": 1.0, "top_p": 0.7},
        {"temp": 2.0, "min_p": 0.2},
        {"temp": 1.0, "top_k": 2},
    ],
)
def test_drawn_tokens(options):
    """The generators differ; the distributions do not."""
    compare(shares, atol=0.04) if not options else compare(
        lambda side: shares(side, **options), atol=0.04
    )


TOKENS = [3, 5, 5, 1, 0, 5]


def processed(side, *processors, tokens=TOKENS):
    values = side.mx.array(logprobs())
    for process in processors:
        values = process(side.mx.array(tokens), values)
    return np.array(values, np.float32)


@pytest.mark.parametrize("context", [1, 3, 20])
@pytest.mark.parametrize("kind", ["repetition", "presence", "frequency"])
def test_penalties(kind, context):
    def case(side):
        make = getattr(side("sample_utils"), f"make_{kind}_penalty")
        return processed(side, make(1.4, context))

    compare(case)


def test_processors_together():
    def case(side):
        made = side("sample_utils").make_logits_processors(
            logit_bias={2: 4.0, 7: -3.0},
            repetition_penalty=1.3,
            presence_penalty=0.5,
            presence_context_size=2,
            frequency_penalty=0.2,
        )
        return len(made), processed(side, *made)

    assert compare(case)[0] == 4


def test_no_processors():
    def case(side):
        utils = side("sample_utils")
        return len(utils.make_logits_processors()), len(
            utils.make_logits_processors({}, 0.0, 20, 0.0)
        )

    assert compare(case) == [0, 0]


def test_a_negative_penalty():
    case = lambda side: refused(
        lambda: side("sample_utils").make_repetition_penalty(-1.0), ValueError
    )
    assert compare(case) == "ValueError"


def test_logits_that_are_given_stay():
    """pyloss alone: mlx-lm's repetition penalty changes its argument."""
    from mlx_sides import Side

    side, values = Side(True), logprobs()
    given = values.copy()
    side("sample_utils").make_repetition_penalty(2.0)(np.array(TOKENS), given)
    np.testing.assert_array_equal(given, values)
