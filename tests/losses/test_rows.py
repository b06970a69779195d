"""Difficult rows: extreme logits, masked vocabulary, equal and one-hot rows, NaN, long rows."""

import ml_dtypes
import numpy as np
import pytest
from loss_cases import (
    BCE,
    DTYPES,
    EVERY,
    LOSSES,
    MAPS,
    PLAIN,
    Loss,
    assert_gradient,
    assert_loss,
    result_type,
    tolerance,
)
from loss_formulas import IGNORE, log_softmax

import pyloss

LN2 = np.log(2)
PAIRS = [loss for loss in LOSSES if loss.logits == 2]
CLASSES = [loss for loss in LOSSES if loss.logits == 1]
KL, JS = Loss("kl_div_loss", logits=2), Loss("js_div_loss", logits=2)


@pytest.fixture
def rng():
    return np.random.default_rng(23)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request):
    return request.param


def compare(loss, *arguments, **options):
    """Compare loss and gradients with the formula; errors of log ratios grow with their size."""
    dtype = arguments[0].dtype
    want, slopes = loss.formula(*arguments, **options)
    got, gradients = loss.gradients(*arguments, **options)
    assert_loss(got, want, dtype)
    size = np.where(np.isfinite(want), np.abs(want), 1)
    for gradient, slope, x in zip(gradients, slopes, arguments):
        assert_gradient(gradient, slope, x.dtype, np.maximum(size, 1)[..., None])
    return got, gradients


@pytest.mark.parametrize("scale", [20.0, 50.0, 1e4])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_extreme_logits_of_a_large_vocabulary(rng, loss, dtype, scale):
    if dtype == np.float16 and scale > 1e3:
        scale = 1e3  # float16 ends at 65504
    _, gradients = compare(loss, *loss.arguments(rng, (2, 151_936), dtype, scale))
    assert all(np.isfinite(g.astype(np.float32)).all() for g in gradients)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_long_rows_keep_their_digits(rng, loss, dtype):
    """262,144 nearly equal logits: every one counts in the sums."""
    arguments = loss.arguments(rng, (2, 262_144), dtype, 0.5)
    want, _ = loss.formula(*arguments)
    np.testing.assert_allclose(
        loss(*arguments),
        want,
        rtol=tolerance(dtype),
        atol=0 if loss.logits == 1 else tolerance(dtype) / 4,
    )
    compare(loss, *arguments)


@pytest.mark.parametrize("v", [5, 64, 3001])
@pytest.mark.parametrize("masked", ["q", "p", "both", "apart"])
@pytest.mark.parametrize("loss", PAIRS, ids=str)
def test_masked_vocabulary_of_divergences(rng, loss, dtype, masked, v):
    """-inf (probability 0) in one argument, the other, or both; also whole blocks at either end."""
    q, p = loss.arguments(rng, (5, v), dtype)
    mask = rng.uniform(size=(5, v)) < 0.5
    mask[1], mask[2], mask[3] = (
        np.arange(v) < v // 2,
        np.arange(v) >= v // 2,
        np.arange(v) != v // 3,
    )
    mask[:, v // 3] = False
    if masked in ("q", "both"):
        q[mask] = -np.inf
    if masked in ("p", "both"):
        p[mask] = -np.inf
    if masked == "apart":
        q[mask] = p[~mask] = -np.inf
    want, (slope_q, slope_p) = loss.formula(q, p)
    got, (dq, dp) = loss.gradients(q, p)
    assert_loss(got, want, dtype)
    if loss.options.get("beta") == 1 or (
        loss.name == "kl_div_loss" and loss.options.get("direction") == "reverse"
    ):  # the reverse KL: exchange the arguments
        q, dq, slope_q, p, dp, slope_p = p, dp, slope_p, q, dq, slope_q
        masked = {"q": "p", "p": "q"}.get(masked, masked)
    bounded = loss.name != "kl_div_loss" and loss.options.get("beta") not in (0, 1)
    assert_gradient(dq, slope_q, dtype)
    assert (dq[q == -np.inf].astype(np.float32) == 0).all() or not bounded
    if not bounded and masked in ("q", "apart"):
        # The teacher allows a class that the student excludes: the loss is infinite, but the
        # student's gradient is still Q - P.
        assert np.isinf(want).any() and np.isfinite(dq.astype(np.float32)).all()
    else:
        assert_gradient(dp, slope_p, dtype, np.maximum(want, 1)[:, None])
        assert (
            np.isfinite(dp.astype(np.float32)).all()
            and (dp[p == -np.inf].astype(np.float32) == 0).all()
        )


@pytest.mark.parametrize("v", [5, 64, 3001])
@pytest.mark.parametrize("loss", CLASSES, ids=str)
def test_masked_vocabulary_of_class_losses(rng, loss, dtype, v):
    """A masked class has gradient 0. A masked label has infinite loss but no NaN gradient."""
    x = (3 * rng.standard_normal((6, v))).astype(dtype)
    labels = np.array([1, 0, v - 1, v // 3, IGNORE, 3])
    x[0, ::2] = x[1, 1:] = x[2, :-1] = x[3, : v // 3] = x[4] = x[5, 3] = -np.inf
    want, (slope,) = loss.formula(x, labels)
    got, (gradient,) = loss.gradients(x, labels)
    assert_loss(got, want, dtype)
    assert got[5] == np.inf and np.isfinite(got[:5]).all() and got[4] == 0
    assert_gradient(gradient[:5], slope[:5], dtype)
    gradient = gradient.astype(np.float32)
    assert (gradient[:5][x[:5] == -np.inf] == 0).all()
    assert not np.isnan(gradient).any()


def test_a_masked_label_still_pulls_at_the_others(dtype):
    x = np.array([[0, -np.inf, 0]], dtype)
    _, (gradient,) = Loss("softmax_cross_entropy").gradients(x, np.array([1]))
    np.testing.assert_allclose(gradient.astype(np.float64)[0, [0, 2]], [0.5, 0.5])


@pytest.mark.parametrize("v", [1, 2, 3, 31, 33, 5000])
@pytest.mark.parametrize("scale", [1.0, 50.0, 1e4])
@pytest.mark.parametrize(
    "loss", [p for p in PAIRS if not any(isinstance(o, tuple) for o in p.options.values())], ids=str
)
def test_equal_rows(rng, loss, dtype, scale, v):
    """No divergence and no gradient, within the rounding of a sum of probabilities."""
    q = (scale * rng.standard_normal((4, v))).clip(-6e4, 6e4).astype(dtype)
    q[0, 1::2] = -np.inf
    got, gradients = loss.gradients(q, q.copy())
    eps = np.finfo(result_type(dtype)).eps
    assert np.abs(got).max() <= 4 * eps
    if loss.name == "cosine_loss":  # the gradient of an angle is as large as 1 / |q|
        q = q.astype(np.float64)
        shortest = np.linalg.norm(np.where(q == -np.inf, 0, q), axis=-1).min()
        eps *= max(8, 8 / shortest)
    for gradient in gradients:
        assert np.abs(gradient.astype(np.float64)).max() <= 8 * eps / loss.options.get(
            "temperature", 1
        )


@pytest.mark.parametrize("low", [-1e4, -np.inf])
@pytest.mark.parametrize("v", [2, 33, 5000])
def test_one_hot_rows(dtype, low, v):
    """Certain and right, or certain and wrong."""
    x = np.full((2, v), low).astype(dtype)
    x[:, 1] = 1e4
    other = np.full((2, v), low).astype(dtype)
    other[0, 1] = other[1, 0] = 1e4
    apart = float(x[0, 1]) - float(x[0, 0])
    labels = np.array([1, 0])
    close = {"rtol": tolerance(dtype), "atol": tolerance(dtype)}
    for name in ("softmax_cross_entropy", "focal_loss"):
        got, (gradient,) = Loss(name).gradients(x, labels)
        np.testing.assert_allclose(got, [0, apart], **close)
        expected = np.zeros((2, v))
        expected[1, :2] = -1, 1
        np.testing.assert_allclose(gradient.astype(np.float64), expected, **close)
    got, (dq, dp) = KL.gradients(x, other)
    np.testing.assert_allclose(got, [0, apart], **close)
    np.testing.assert_allclose(dq.astype(np.float64)[:, :2], [[0, 0], [-1, 1]], **close)
    got, (dq, dp) = JS.gradients(x, other)
    np.testing.assert_allclose(got, [0, LN2], **close)
    for gradient in (dq, dp):
        np.testing.assert_allclose(gradient.astype(np.float64), 0, **close)


def test_focal_loss_of_a_certain_row_is_zero_and_flat(dtype):
    """1 - p is 0: neither (1 - p)^(gamma - 1) nor log p may give NaN."""
    x = np.array([[80, 0, 0], [0, 80, 0], [0, -np.inf, -np.inf], [1e4, -1e4, 0]], dtype)
    for gamma in (0.5, 1.0, 2.0):
        loss = Loss("focal_loss", options={"gamma": gamma})
        compare(loss, x, np.array([0, 0, 0, 1]))


def takes_infinity(loss):
    return loss is BCE or "softcap" in loss.options or "stablemax" in loss.name


@pytest.mark.parametrize("v", [1, 7, 64, 3000])
@pytest.mark.parametrize(
    ("loss", "bad"),
    [
        *((loss, np.nan) for loss in EVERY),
        *((loss, np.inf) for loss in EVERY if not takes_infinity(loss)),
    ],
    ids=str,
)
def test_a_row_that_has_no_loss_is_alone(rng, loss, bad, dtype, v):
    """NaN (and +inf, if it is no probability) makes its own row NaN; other rows keep their bits."""
    arguments = loss.arguments(rng, (7, v), dtype)
    if loss.logits == 1 and loss.other is not None and loss is not BCE:
        arguments = (arguments[0], rng.integers(0, v, 7))
    want, slopes = loss.gradients(*arguments)
    for i in range(loss.logits):
        spoiled = [a.copy() for a in arguments]
        rows, places = np.array([1, 2, 4, 5]), np.array([0, v - 1, v // 2, v // 3])
        spoiled[i][rows, places] = bad
        got, gradients = loss.gradients(*spoiled)
        for row in (0, 3, 6):
            assert got[row].tobytes() == want[row].tobytes()
            for gradient, slope in zip(gradients, slopes):
                assert gradient[row].tobytes() == slope[row].tobytes()
        if loss is BCE:
            assert np.isnan(got[rows, places]).all() and np.isnan(got).sum() == 4
            continue
        assert np.isnan(got[rows]).all()
        for gradient in gradients:
            assert np.isnan(gradient[rows].astype(np.float32)).all()


@pytest.mark.parametrize("loss", [*LOSSES, *MAPS], ids=str)
def test_a_row_without_any_vocabulary(rng, loss, dtype):
    """A fully masked row is 0/0."""
    if loss.name == "cosine_loss":
        pytest.skip("such a row has no direction: its distance is 1")
    arguments = loss.arguments(rng, (3, 20), dtype)
    if loss.logits == 1 and loss.other is not None:
        arguments = (arguments[0], np.array([1, 2, 3]))
    for i in range(loss.logits):
        spoiled = [a.copy() for a in arguments]
        spoiled[i][1] = -np.inf
        got = loss(*spoiled)
        assert np.isnan(got[1]).all() and np.isfinite(got[[0, 2]]).all()


# Stablemax


def maps_are_right(x):
    s = np.where(x >= 0, x.astype(np.float64) + 1, 1 / (1 - x.astype(np.float64)))
    shares = s / s.sum(-1, keepdims=True)
    info = ml_dtypes.finfo(x.dtype)
    close = {
        "rtol": tolerance(x.dtype) + (float(info.eps) / 2 if info.bits == 16 else 0),
        "atol": float(info.smallest_subnormal) + 1e-15,
    }
    np.testing.assert_allclose(pyloss.stablemax(x).astype(np.float64), shares, **close)
    close["atol"] += tolerance(x.dtype)  # log of a share near 1 is a difference
    np.testing.assert_allclose(pyloss.log_stablemax(x).astype(np.float64), np.log(shares), **close)


def test_stablemax_where_its_pieces_meet(dtype):
    """At exactly 1, -1 and 0, where autograd of the two branches fails or picks the wrong one."""
    x = np.array([[1, -1, 0, 1], [-0.0, 0, 0, 0], [1, 1, 1, 1], [-1, -1, 2, 1]], dtype)
    for label in range(4):
        compare(Loss("stablemax_cross_entropy"), x, np.full(4, label))
    maps_are_right(x)


def test_stablemax_needs_no_epsilon(dtype):
    """Very large and very small shares have relative accuracy; no epsilon is added."""
    maps_are_right(
        np.array([[-6e4, 6e4, 0, 1e-6, -1e-6], [-6e4, -6e4, -6e4, -5e4, -6e4]]).astype(dtype)
    )


# Elementwise


def test_binary_cross_entropy_far_out(dtype):
    """No overflow; a right answer's loss is e^-|x|, not 0."""
    x = np.array([0, 1, -1, 30, -30, 80, -80, 1e4, -1e4, -np.inf, np.inf], dtype)
    for targets in (np.zeros(11), np.ones(11), np.full(11, 0.5)):
        want, (slope, _) = BCE.formula(x, targets)
        got, (gradient,) = BCE.gradients(x, targets)
        np.testing.assert_allclose(
            got, want, rtol=tolerance(dtype), atol=np.finfo(np.float32).smallest_normal
        )
        np.testing.assert_allclose(
            gradient.astype(np.float64),
            slope,
            rtol=max(tolerance(dtype), float(ml_dtypes.finfo(dtype).eps) / 2),
            atol=1e-7,
        )


# Failures of other libraries' kernels


def test_js_gradients_at_scale_20_are_finite_and_the_same_every_time(rng):
    """Elsewhere log(1 + exp(.)) overflows here, and racing sums vary in their bits."""
    q, p = (20 * rng.standard_normal((2, 4, 151_936))).astype(np.float32)
    for loss in (JS, KL):
        first_loss, first = loss.gradients(q, p)
        assert np.isfinite(first_loss).all() and all(np.isfinite(g).all() for g in first)
    q, p = q[:, :20_011], p[:, :20_011]
    for loss in (JS, KL):
        bits = {
            b"".join(a.tobytes() for a in (got, *gradients))
            for got, gradients in (loss.gradients(q, p) for _ in range(50))
        }
        assert len(bits) == 1


@pytest.mark.parametrize(("v", "scale"), [(2000, 6.0), (262_144, 0.5)])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("loss", PLAIN, ids=str)
def test_small_gradients_are_right_relatively(rng, loss, kind, v, scale):
    """Small gradients are accurate too, as far as rounding of logit differences allows."""
    arguments = loss.arguments(rng, (2, v), kind, scale)
    want, slopes = loss.formula(*arguments)
    _, gradients = loss.gradients(*arguments)
    # A divergence's gradient is a difference that may vanish, so its error is relative to its
    # terms.
    shares = (
        sum(np.exp(log_softmax(x)) for x in arguments[:2]) * (1 + want[:, None])
        if loss.logits == 2
        else 0
    )
    if loss.name == "cosine_loss":
        wide = [x.astype(np.float64) for x in arguments]
        lengths = [np.linalg.norm(x, axis=-1, keepdims=True) for x in wide]
        shares = sum(np.abs(x) / n for x, n in zip(wide, lengths)) / min(n.min() for n in lengths)
    for gradient, slope, x in zip(gradients, slopes, arguments):
        reach = x.max(-1, keepdims=True) - x
        assert (
            np.abs(gradient - slope)
            <= np.finfo(kind).eps * (16 + 2 * reach) * (np.abs(slope) + shares) + 1e-37
        ).all()
