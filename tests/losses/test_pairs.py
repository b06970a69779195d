"""Losses of a student's and a teacher's logits: directions, ends of beta and skew, caps and scales
of both rows, rows left out by their labels.
"""

import numpy as np
import pytest
from loss_cases import DTYPES, Loss, tolerance
from loss_formulas import IGNORE

import pyloss

NAMES = ("kl_div_loss", "js_div_loss", "skew_kl_div_loss", "tvd_loss", "cosine_loss")
LINEAR = ("linear_kl_div", "linear_js_div", "linear_skew_kl_div", "linear_tvd", "linear_cosine")


@pytest.fixture
def rng():
    return np.random.default_rng(61)


def bits(loss, gradients):
    return [np.asarray(a).tobytes() for a in (loss, *gradients)]


def pair(rng, shape=(6, 131), dtype=np.float32):
    return tuple((3 * rng.standard_normal(shape)).astype(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_same_loss_under_two_names_has_the_same_bits(rng, dtype):
    q, p = pair(rng, dtype=dtype)
    kl, js, skew = (Loss(name, logits=2) for name in NAMES[:3])
    forward, reverse = kl.gradients(q, p), kl.gradients(q, p, direction="reverse")
    loss, (dp, dq) = kl.gradients(p, q)
    assert bits(*reverse) == bits(loss, (dq, dp))
    assert bits(*js.gradients(q, p, beta=0)) == bits(*forward)
    assert bits(*js.gradients(q, p, beta=1)) == bits(*reverse)
    assert bits(*skew.gradients(q, p, skew=0)) == bits(*forward)
    assert bits(*skew.gradients(q, p, skew=0, direction="reverse")) == bits(*reverse)


def test_the_student_comes_first():
    """Teacher (1/2, 1/4, 1/4), student (1/4, 1/2, 1/4)."""
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    p_only = np.log([[0.5, 0.5, 0]], where=[True, True, False], out=np.full((1, 3), -np.inf))
    forward = 0.5 * np.log(2) - 0.25 * np.log(2)
    np.testing.assert_allclose(pyloss.kl_div_loss(q, p), [forward], rtol=1e-14)
    # The student covers what the teacher excludes: only the reverse KL is infinite.
    assert pyloss.kl_div_loss(q, p_only)[0] < np.inf
    assert pyloss.kl_div_loss(q, p_only, direction="reverse")[0] == np.inf
    # KL(P || s P + (1 - s) Q): the mixture keeps a share of the first distribution.
    np.testing.assert_allclose(
        pyloss.skew_kl_div_loss(q, p_only, skew=0.75, direction="reverse"),
        [0.25 * np.log(0.25 / 0.3125) + 0.5 * np.log(0.5 / 0.5) + 0.25 * np.log(1 / 0.75)],
        rtol=1e-14,
    )


@pytest.mark.parametrize("skew", [1e-6, 0.1, 0.5, 0.999])
def test_skewed_kl_is_at_most_minus_log_of_the_skew(rng, skew):
    q, p = pair(rng, dtype=np.float64)
    q[:3, 5:], p[:3, :5] = -np.inf, -np.inf  # nothing in common
    loss = pyloss.skew_kl_div_loss(q, p, skew=skew)
    np.testing.assert_allclose(loss[:3], -np.log(skew), atol=1e-15 / skew)
    assert (loss[3:] < -np.log(skew)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("softcap", [None, 4.0, (4.0, None), (3.0, 5.0)], ids=str)
@pytest.mark.parametrize("logit_scale", [1.0, 0.25, (1.5, 0.5)], ids=str)
def test_caps_and_scales_by_finite_differences(rng, name, softcap, logit_scale):
    q, p = pair(rng, (3, 17), np.float64)
    q[0, 4] = p[0, 4] = q[0, 7] = p[1, 2] = -np.inf
    if name == "kl_div_loss":
        q[0, 7] = p[1, 2] = 0.5
    options = {"softcap": softcap, "logit_scale": logit_scale}
    if name != "cosine_loss":
        options["temperature"] = 2.0
    loss = Loss(name, logits=2, options=options)
    weights = rng.uniform(1, 2, 3)
    _, gradients = loss.gradients(q, p, weights=weights)
    h = 1e-6
    for i, gradient in enumerate(gradients):
        for _ in range(12):
            at = rng.integers(3), rng.integers(17)
            ends = []
            for step in (h, -h):
                moved = [q.copy(), p.copy()]
                moved[i][at] += step
                ends.append(loss(*moved, weights=weights, reduction="sum"))
            np.testing.assert_allclose(gradient[at], (ends[0] - ends[1]) / (2 * h), atol=1e-8)


def test_cosine_of_zeros_and_of_parallel_rows(rng):
    """A row of zeros, or of masked classes alone, has no direction: distance 1, gradient 0."""
    loss, q = Loss("cosine_loss", logits=2), rng.standard_normal((4, 50))
    p = np.stack([np.zeros(50), np.full(50, -np.inf), 3 * q[2], -q[3]])
    got, gradients = loss.gradients(q, p)
    np.testing.assert_allclose(got, [1, 1, 0, 2], atol=1e-15)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_without_a_label_are_left_out(rng, name, dtype):
    """Even if they hold NaN; the others keep their bits."""
    q, p = pair(rng, dtype=dtype)
    loss = Loss(name, logits=2)
    want, slopes = loss.gradients(q, p)
    labels = np.array([3, IGNORE, 130, 0, IGNORE, 7])
    q[1], p[4] = np.nan, np.nan
    got, gradients = loss.gradients(q, p, labels=labels)
    kept = labels != IGNORE
    assert (got[~kept] == 0).all() and (got[kept] == want[kept]).all()
    for gradient, slope in zip(gradients, slopes):
        assert (gradient[~kept].astype(np.float32) == 0).all()
        assert gradient[kept].tobytes() == slope[kept].tobytes()
    weights = np.array([1, 5, 0, 2, 9, 1.0])
    np.testing.assert_allclose(
        loss(q, p, labels=labels, weights=weights, reduction="mean"),
        (want[0] + 2 * want[3] + want[5]) / 4,
        rtol=tolerance(dtype),
    )
    assert loss(q, p, labels=np.full(6, -1), ignore_index=-1, reduction="mean") == 0


@pytest.mark.parametrize("name", LINEAR)
def test_heads_do_not_compute_rows_without_a_label(rng, name):
    arrays = [rng.standard_normal(s).astype(np.float32) for s in [(5, 6), (40, 6), (5, 8), (40, 8)]]
    loss, labels = getattr(pyloss, name), np.array([1, IGNORE, 39, IGNORE, 0])

    def summed(*arrays, **options):
        return loss(*arrays, reduction="sum", **options)

    kept = labels != IGNORE
    some = [arrays[0][kept], arrays[1], arrays[2][kept], arrays[3]]
    want, slopes = pyloss.value_and_grad(summed, range(4))(*some)
    arrays[0][1] = arrays[2][3] = np.nan
    got, gradients = pyloss.value_and_grad(lambda *a: summed(*a, labels=labels), range(4))(*arrays)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for i in (0, 2):
        assert (gradients[i][~kept] == 0).all()
    for i, (gradient, slope) in enumerate(zip(gradients, slopes)):
        gradient = gradient[kept] if i in (0, 2) else gradient
        np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"direction": "back"}, ValueError, "direction must be one of 'forward', 'reverse', not"),
        ({"softcap": 0}, ValueError, "softcap is 0;"),
        ({"softcap": (1.0, -2)}, ValueError, "softcap is -2;"),
        ({"softcap": (1.0, 2.0, 3.0)}, TypeError, "softcap"),
        ({"logit_scale": None}, TypeError, "logit_scale is None;"),
        ({"logit_scale": (0.5, 0)}, ValueError, "logit_scale is 0;"),
        ({"labels": [0, 3, 0, 0, 0, 0]}, ValueError, r"label 3 at position 1 is outside \[0, 3\)"),
        ({"labels": [0, 1]}, ValueError, r"labels have shape \(2,\)"),
        ({"labels": [0.5] * 6}, TypeError, "labels"),
    ],
    ids=str,
)
@pytest.mark.parametrize("linear", [False, True])
def test_refused(options, error, message, linear):
    x, w = np.zeros((6, 3)), np.eye(3)
    with pytest.raises(error, match=message):
        if linear:
            pyloss.linear_kl_div(x, w, x, w, **options)
        else:
            pyloss.kl_div_loss(x, x, **options)


@pytest.mark.parametrize("skew", [-0.1, 1, 2, np.nan])
def test_skew_outside_its_range(skew):
    with pytest.raises(ValueError, match="skew is"):
        pyloss.skew_kl_div_loss(np.zeros(3), np.zeros(3), skew=skew)
