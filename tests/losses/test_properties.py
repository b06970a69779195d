"""Properties that hold for any logits, tested with hypothesis."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from loss_cases import BCE, EVERY, LOSSES, MAPS, Loss

import pyloss

PAIRS = [loss for loss in LOSSES if loss.logits == 2]
SHIFTABLE = [loss for loss in LOSSES if loss.shiftable]
KL, JS = Loss("kl_div_loss", logits=2), Loss("js_div_loss", logits=2)
EPS = np.finfo(np.float64).eps


@st.composite
def cases(draw, rows=4):
    """(generator, shape, scale): sizes around vector widths, logits from equal to far apart."""
    seed = draw(st.integers(0, 2**32 - 1))
    v = draw(st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 257, 1030]))
    return (
        np.random.default_rng(seed),
        (draw(st.integers(1, rows)), v),
        draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0, 300.0, 1e4])),
    )


def pairs(draw_case, mask=0.0):
    rng, shape, scale = draw_case
    q, p = scale * rng.standard_normal((2, *shape))
    for x in (q, p):
        masked = rng.uniform(size=shape) < mask
        masked[:, rng.integers(shape[1])] = False
        x[masked] = -np.inf
    return q, p


@settings(max_examples=60, deadline=None)
@given(cases())
def test_kl_is_not_negative_and_0_on_equal_rows(case):
    q, p = pairs(case)
    assert (KL(q, p) >= -8 * EPS * max(1, np.abs(q).max())).all()
    assert (np.abs(KL(q, q.copy())) <= 4 * EPS).all()


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(0.01, 0.99), st.sampled_from([0.0, 0.3, 0.9]))
def test_js_lies_between_0_and_ln2(case, beta, mask):
    """At most the entropy of (beta, 1 - beta), so at most ln 2; symmetric for equal weights."""
    q, p = pairs(case, mask)
    most = -(beta * np.log(beta) + (1 - beta) * np.log1p(-beta))
    loss = JS(q, p, beta=beta)
    assert (loss >= -8 * EPS).all() and (loss <= most + 8 * EPS).all()
    half, (dq, dp) = JS.gradients(q, p)
    swapped, (eq, ep) = JS.gradients(p, q)
    assert (half <= np.log(2) + 8 * EPS).all()
    np.testing.assert_allclose(swapped, half, atol=16 * EPS)
    np.testing.assert_allclose(eq, dp, atol=16 * EPS)
    np.testing.assert_allclose(ep, dq, atol=16 * EPS)
    np.testing.assert_allclose(JS(p, q, beta=1 - beta), loss, atol=16 * EPS)


@pytest.mark.parametrize("loss", SHIFTABLE, ids=str)
@settings(max_examples=25, deadline=None)
@given(cases(), st.integers(-(2**20), 2**20))
def test_a_constant_added_to_a_row_changes_nothing(loss, case, constant):
    """Logits are multiples of 2^-20 below 2^13, so that adding the constant is exact."""
    rng, shape, scale = case
    arguments = loss.arguments(rng, shape, np.float64, min(scale, 300.0))
    logits = [np.round(x * 2**20) / 2**20 for x in arguments[: loss.logits]]
    want, slopes = loss.gradients(*logits, *arguments[loss.logits :])
    shift = constant * (1 + np.arange(shape[0]))[:, None] / 2**10
    got, gradients = loss.gradients(*(x + shift for x in logits), *arguments[loss.logits :])
    size = 1 + np.abs(want)
    assert (np.abs(got - want) <= 64 * EPS * size).all()
    for gradient, slope in zip(gradients, slopes):
        assert (np.abs(gradient - slope) <= 64 * EPS * size[:, None]).all()


@pytest.mark.parametrize("loss", SHIFTABLE, ids=str)
@settings(max_examples=25, deadline=None)
@given(cases())
def test_gradients_of_softmax_losses_sum_to_0(loss, case):
    rng, shape, scale = case
    arguments = loss.arguments(rng, shape, np.float64, scale)
    upstream = rng.standard_normal(shape[0])
    want, gradients = loss.gradients(*arguments, upstream=upstream)
    for gradient in gradients:
        limit = (
            16
            * EPS
            * (1 + np.abs(want))
            * np.abs(upstream)
            / loss.options.get("temperature", 1)
            * np.sqrt(shape[1])
        )
        assert (np.abs(gradient.sum(-1)) <= limit).all()


@pytest.mark.parametrize("loss", [*LOSSES, *MAPS], ids=str)
@settings(max_examples=25, deadline=None)
@given(cases())
def test_the_order_of_the_vocabulary_does_not_matter(loss, case):
    rng, shape, scale = case
    arguments = loss.arguments(rng, shape, np.float64, scale)
    order = rng.permutation(shape[1])
    place = np.argsort(order)
    permuted = [x[:, order] for x in arguments[: loss.logits]]
    if loss.other is not None:
        labels = arguments[1]
        permuted.append(np.where(labels < 0, labels, place[np.maximum(labels, 0)]))
    want, slopes = loss.gradients(*arguments)
    got, gradients = loss.gradients(*permuted)
    got = got if loss.rows else got[:, place]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    largest = 1 + np.abs(want).max()
    for gradient, slope in zip(gradients, slopes):
        np.testing.assert_allclose(gradient[:, place], slope, rtol=1e-12, atol=1e-12 * largest)


@pytest.mark.parametrize("loss", EVERY, ids=str)
@settings(max_examples=25, deadline=None)
@given(cases(rows=9), st.sampled_from([np.float32, np.float64, np.float16]))
def test_a_row_alone_is_the_row_among_others(loss, case, dtype):
    """Values and gradients, bit for bit."""
    rng, shape, scale = case
    arguments = loss.arguments(rng, shape, dtype, min(scale, 300.0))
    want, slopes = loss.gradients(*arguments)
    for row in range(shape[0]):
        got, gradients = loss.gradients(*(a[row : row + 1] for a in arguments))
        assert got.dtype == loss.result_type(dtype) and got.tobytes() == want[row].tobytes()
        for gradient, slope in zip(gradients, slopes):
            assert gradient.tobytes() == slope[row].tobytes()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_shares_of_stablemax(case):
    """Shares lie in [0, 1], sum to 1 and grow with the logit; binary cross entropy is >= 0."""
    rng, shape, scale = case
    x = scale * rng.standard_normal(shape)
    y = pyloss.stablemax(x)
    assert (y >= 0).all() and (y <= 1).all()
    np.testing.assert_allclose(y.sum(-1), 1, rtol=1e-13)
    order = np.argsort(x, axis=-1)
    assert (np.diff(np.take_along_axis(y, order, -1), axis=-1) >= 0).all()
    assert (BCE(x, rng.uniform(size=shape)) >= 0).all()
