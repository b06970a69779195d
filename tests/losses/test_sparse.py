"""Losses of a teacher that is known at few classes, against the formulas of whole rows: the classes
without an entry become one class, the formula of that row is in loss_formulas.py.
"""

import loss_formulas
import numpy as np
import pytest
from loss_cases import DTYPES, assert_gradient, assert_loss, tolerance
from loss_formulas import IGNORE, log_softmax

import pyloss

ROWS, K = 5, 7
# kind -> the formula, its options
KINDS = {
    "forward-kl": ("kl_div_loss", {}),
    "reverse-kl": ("kl_div_loss", {"direction": "reverse"}),
    "js": ("js_div_loss", {"beta": 0.3}),
    "skew-kl": ("skew_kl_div_loss", {"skew": 0.2}),
    "skew-reverse-kl": ("skew_kl_div_loss", {"skew": 0.2, "direction": "reverse"}),
    "tvd": ("tvd_loss", {}),
    "cross-entropy": ("kl_div_loss", {}),
}
OPTIONS = {"js": {"beta": 0.3}, "skew-kl": {"skew": 0.2}, "skew-reverse-kl": {"skew": 0.2}}
LINEAR = ("linear_sparse_distillation",)


@pytest.fixture
def rng():
    return np.random.default_rng(71)


def teacher(rng, v, k=K, rows=ROWS):
    """(ids, log-probabilities) of the k likeliest classes of random rows."""
    log_p = log_softmax(2 * rng.standard_normal((rows, v)))
    ids = np.argsort(-log_p, axis=-1)[:, : min(k, v)]
    return ids.astype(np.int32), np.take_along_axis(log_p, ids, -1)


def formula(
    kind,
    x,
    ids,
    logp,
    *,
    rest="bucket",
    left=None,
    temperature=1.0,
    stored_temperature=1.0,
    **options,
):
    """(losses, gradients) [rows], [rows, V]: each row by the formula of its k + 1 classes."""
    name, fixed = KINDS[kind]
    scale, cap = options.pop("logit_scale", 1.0), options.pop("softcap", None)
    losses, gradients = np.zeros(len(x)), np.zeros(x.shape)
    for i, row in enumerate(np.asarray(x, np.float64)):
        z, slope = loss_formulas._prepared(row, cap, scale, temperature)
        entries, log_p = ids[i][ids[i] >= 0], np.asarray(logp[i], np.float64)[ids[i] >= 0]
        outside = np.ones(len(row), bool)
        outside[entries] = False
        log_left = -np.inf
        if rest == "renormalize":
            log_p = log_p * stored_temperature / temperature
            log_p = log_p - np.logaddexp.reduce(log_p)
        elif outside.any():
            remains = 1 - np.exp(log_p).sum() if left is None else left[i]
            log_left = np.log(max(remains, 0)) if remains > 0 else -np.inf
        log_q = log_softmax(z)
        log_rest = np.logaddexp.reduce(log_q[outside], initial=-np.inf)
        coarse = np.append(log_q[entries], log_rest)[None], np.append(log_p, log_left)[None]
        loss, (by, _) = getattr(loss_formulas, name)(*coarse, **fixed)
        if kind == "cross-entropy":
            p = np.exp(coarse[1][0])
            loss = loss - np.where(p == 0, 0, p * np.where(p == 0, 0, coarse[1][0])).sum()
        losses[i] = loss[0]
        # The bucket's logit is the logsumexp of its classes: each gets its share.
        inside = outside & (log_q > -np.inf)
        share = np.exp(log_q - log_rest, where=inside, out=np.zeros(len(row)))
        gradient = share * by[0, -1]
        gradient[entries] = by[0, :-1]
        gradients[i] = gradient * slope
    return losses, gradients


def computed(x, ids, logp, **options):
    """(losses, gradients) from the tape."""

    def f(x):
        loss = pyloss.sparse_distillation_loss(x, ids, logp, **options)
        return loss.sum(), loss

    (_, loss), gradient = pyloss.value_and_grad(f)(x)
    return loss, gradient


def compare(x, ids, logp, **options):
    kind, rounding = options.get("kind", "forward-kl"), options.pop("rounding", 1.0)
    want, slopes = formula(
        kind,
        x,
        ids,
        logp,
        **{k: v for k, v in options.items() if k not in ("kind", "beta", "skew")},
    )
    loss, gradient = computed(x, ids, logp, **options)
    finite = np.isfinite(want)
    assert (loss[~finite] == np.inf).all()
    assert_loss(loss[finite], want[finite], x.dtype, rounding)
    assert_gradient(gradient[finite], slopes[finite], x.dtype, rounding)
    alone = pyloss.sparse_distillation_loss(x, ids, logp, **options)
    assert alone.tobytes() == np.asarray(loss).tobytes()


@pytest.mark.parametrize("v", [8, 31, 64, 2049, 5000])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        *((kind, "bucket") for kind in KINDS),
        *((kind, "renormalize") for kind in KINDS if kind != "reverse-kl"),  # infinite: refused
    ],
)
def test_values(rng, kind, rest, dtype, v):
    x, (ids, logp) = (2 * rng.standard_normal((ROWS, v))).astype(dtype), teacher(rng, v)
    ids[1, 3:] = -1  # fewer entries, anywhere
    ids[2, ::2] = -5
    logp[1, 3:] = np.nan
    compare(x, ids, logp, kind=kind, rest=rest, **OPTIONS.get(kind, {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2.0, "stored_temperature": 2.0},
        {"logit_scale": 0.25},
        {"softcap": 3.0, "logit_scale": 1.5, "temperature": 2.0, "stored_temperature": 2.0},
    ],
    ids=str,
)
def test_temperature_caps_and_scales(rng, kind, options):
    for dtype in (np.float64, np.float32):
        x, (ids, logp) = (2 * rng.standard_normal((ROWS, 200))).astype(dtype), teacher(rng, 200)
        compare(x, ids, logp, kind=kind, **options, **OPTIONS.get(kind, {}))


def test_renormalized_entries_are_brought_to_the_temperature(rng):
    """The k likeliest classes at T are those at 1: their ratios are known at every T."""
    z, x = 2 * rng.standard_normal((2, ROWS, 300))
    ids = np.argsort(-z, axis=-1)[:, :K]
    at_1 = np.take_along_axis(log_softmax(z), ids, -1)
    at_3 = np.take_along_axis(log_softmax(z / 3), ids, -1)
    options = {"rest": "renormalize", "temperature": 3.0}
    compare(x, ids, at_1, **options)
    np.testing.assert_allclose(
        pyloss.sparse_distillation_loss(x, ids, at_1, **options),
        pyloss.sparse_distillation_loss(x, ids, at_3, stored_temperature=3.0, **options),
        rtol=1e-12,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("v", [1, 5, 300])
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=str)
def test_all_classes_are_the_whole_loss(rng, kind, v, dtype):
    """K = V in any order: the loss of two rows of logits, to rounding."""
    q, p = (2 * rng.standard_normal((2, ROWS, v))).astype(dtype)
    ids = np.argsort(rng.uniform(size=(ROWS, v)), axis=-1)
    log_p = log_softmax(p)
    name, options = KINDS[kind]
    want, (slopes, _) = getattr(loss_formulas, name)(q, p, **options)
    if kind == "cross-entropy":
        want = want - (np.exp(log_p) * log_p).sum(-1)
    loss, gradient = computed(
        q, ids, np.take_along_axis(log_p, ids, -1), kind=kind, **OPTIONS.get(kind, {})
    )
    assert_loss(loss, want, dtype, 4.0)
    assert_gradient(gradient, slopes, dtype, 4.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_is_at_most_the_whole_loss(rng, kind):
    """Joining classes loses information: no divergence grows."""
    q, p = 2 * rng.standard_normal((2, 50, 100))
    log_p = log_softmax(p)
    ids = np.argsort(-log_p, axis=-1)[:, :9]
    name, options = KINDS[kind]
    whole = getattr(loss_formulas, name)(q, p, **options)[0]
    if kind == "cross-entropy":
        return  # of the coarse distributions: not a divergence
    some = pyloss.sparse_distillation_loss(
        q, ids, np.take_along_axis(log_p, ids, -1), kind=kind, **OPTIONS.get(kind, {})
    )
    assert (some <= whole + 1e-12).all() and (some < whole).any()


def test_the_probability_that_is_left_may_be_given(rng):
    """Rounded log-probabilities do not sum to what is left."""
    x, (ids, logp) = rng.standard_normal((ROWS, 100)), teacher(rng, 100)
    left = 1 - np.exp(logp).sum(-1)
    coarse = logp.astype(np.float16).astype(np.float64)

    def forward(x):
        log_q = log_softmax(x)
        at, outside = np.take_along_axis(log_q, ids, -1), log_q.copy()
        np.put_along_axis(outside, ids, -np.inf, -1)
        rest = left * (np.log(left) - np.logaddexp.reduce(outside, -1))
        return (np.exp(coarse) * (coarse - at)).sum(-1) + rest

    loss, gradient = computed(x, ids, coarse.astype(np.float16), left=left)
    np.testing.assert_allclose(loss, forward(x), rtol=1e-13)
    for j in range(100):
        step = 1e-6 * (np.arange(100) == j)
        slope = (forward(x + step) - forward(x - step)) / 2e-6
        np.testing.assert_allclose(gradient[:, j], slope, atol=1e-8)


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "js", "tvd"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=str)
def test_a_sure_student_keeps_the_digits_of_the_rest(rng, kind, dtype):
    """The student's rest is 1e-6: 1 minus the others would have one digit."""
    x, (ids, logp) = rng.standard_normal((ROWS, 3000)).astype(dtype), teacher(rng, 3000)
    np.put_along_axis(x, ids, np.take_along_axis(x, ids, -1) + dtype(21), -1)
    compare(x, ids, logp, kind=kind, rounding=4.0, **OPTIONS.get(kind, {}))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_classes(rng, kind):
    """-inf in the student at entries that the teacher has or has not, and at all of the rest."""
    x, (ids, logp) = rng.standard_normal((4, 60)), teacher(rng, 60, rows=4)
    x[0, ids[0, 2]] = -np.inf
    logp[0, 2] = -np.inf
    outside = np.ones(60, bool)
    outside[ids[1]] = False
    x[1, outside] = -np.inf
    logp[1] -= np.logaddexp.reduce(logp[1])
    x[2, ids[2, 0]] = -np.inf  # the teacher's likeliest class
    x[3, outside] = -np.inf
    compare(x, ids, logp, kind=kind, **OPTIONS.get(kind, {}))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_that_do_not_count(rng, dtype):
    x, (ids, logp) = rng.standard_normal((ROWS, 90)).astype(dtype), teacher(rng, 90)
    want, slopes = computed(x, ids, logp)
    ids[1] = -1
    x[1], x[3] = np.nan, np.nan
    labels = np.array([1, 2, 3, IGNORE, 5])
    loss, gradient = computed(x, ids, logp, labels=labels)
    assert (loss[[1, 3]] == 0).all() and (gradient[[1, 3]].astype(np.float32) == 0).all()
    for i in (0, 2, 4):
        assert loss[i] == want[i] and gradient[i].tobytes() == slopes[i].tobytes()
    weights = np.array([1, 5, 2, 7, 0.0])
    np.testing.assert_allclose(
        pyloss.sparse_distillation_loss(
            x, ids, logp, labels=labels, weights=weights, reduction="mean"
        ),
        (want[0] + 2 * want[2]) / 3,
        rtol=tolerance(dtype),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_with_nan_is_alone(rng, kind):
    x, (ids, logp) = rng.standard_normal((ROWS, 90)), teacher(rng, 90)
    want, slopes = computed(x, ids, logp, kind=kind)
    x[1, 5], logp[3, 2] = np.nan, np.nan
    loss, gradient = computed(x, ids, logp, kind=kind)
    assert np.isnan(loss[[1, 3]]).all() and np.isnan(gradient[[1, 3]]).all()
    for i in (0, 2, 4):
        assert loss[i] == want[i] and gradient[i].tobytes() == slopes[i].tobytes()


def samples(rng, log_p, proposal, draws):
    """(ids, logprobs, shares) [rows, K] of sparse logit sampling from the proposal."""
    rows, v = log_p.shape
    ids = np.full((rows, draws), -1, np.int32)
    logp, shares = np.zeros((rows, draws)), np.zeros((rows, draws))
    for i in range(rows):
        drawn, counts = np.unique(rng.choice(v, draws, p=proposal[i]), return_counts=True)
        k = len(drawn)
        ids[i, :k], logp[i, :k] = drawn, log_p[i, drawn]
        shares[i, :k] = counts / draws * np.exp(log_p[i, drawn]) / proposal[i, drawn]
    return ids, logp, shares


@pytest.mark.parametrize("power", [1.0, 0.8])
def test_samples_have_no_bias(rng, power):
    """10,000 draws of 8: the mean loss and gradient are the whole KL's, within 5 deviations."""
    v, rows = 12, 10_000
    z, x = rng.standard_normal((2, 1, v))
    log_p = log_softmax(2 * z)
    proposal = np.exp(power * log_p)
    proposal /= proposal.sum()
    drawn = samples(rng, np.broadcast_to(log_p, (rows, v)), np.broadcast_to(proposal, (rows, v)), 8)
    ids, logp, shares = drawn
    loss, gradients = computed(np.repeat(x, rows, 0), ids, logp, shares=shares)
    want, (slope, _) = loss_formulas.kl_div_loss(x, 2 * z)
    for found, expected in ((loss[:, None], want), (gradients, slope[0])):
        deviation = found.std(0) / np.sqrt(rows)
        assert (np.abs(found.mean(0) - expected) <= 5 * deviation + 1e-12).all()
    cross = pyloss.sparse_distillation_loss(
        np.repeat(x, rows, 0), ids, logp, shares=shares, kind="cross-entropy"
    )
    entropy = -(np.exp(log_p) * log_p).sum()
    assert abs(cross.mean() - want[0] - entropy) <= 5 * cross.std() / np.sqrt(rows)


def test_samples_by_their_formula(rng):
    for dtype in (np.float64, np.float32):
        x = rng.standard_normal((ROWS, 80)).astype(dtype)
        log_p = log_softmax(2 * rng.standard_normal((ROWS, 80)))
        proposal = np.exp(log_softmax(0.8 * log_p))
        ids, logp, shares = samples(rng, log_p, proposal, 16)
        log_q = log_softmax(x)
        at = np.take_along_axis(log_q, np.maximum(ids, 0), -1)
        want = (shares * (logp - at)).sum(-1)
        slope = np.exp(log_q) * shares.sum(-1, keepdims=True)
        for i in range(ROWS):
            slope[i, ids[i][ids[i] >= 0]] -= shares[i][ids[i] >= 0]
        loss, gradient = computed(x, ids, logp, shares=shares)
        assert_loss(loss, want, dtype, 4.0)
        assert_gradient(gradient, slope, dtype, 4.0)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 2, 2)], ids=str)
def test_leading_shapes(rng, shape):
    count = int(np.prod(shape))
    x, (ids, logp) = rng.standard_normal((count, 40)), teacher(rng, 40, rows=count)
    loss = pyloss.sparse_distillation_loss(
        x.reshape(*shape, 40), ids.reshape(*shape, K), logp.reshape(*shape, K)
    )
    assert loss.shape == shape
    if count:
        np.testing.assert_allclose(
            np.reshape(loss, -1), formula("forward-kl", x, ids, logp)[0], rtol=1e-12
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filtered", [0.0, 1e-9])
def test_under_a_head(rng, kind, filtered):
    """Loss and gradients by hidden states and head, some rows left out."""
    hidden, weight = rng.standard_normal((9, 6)), rng.standard_normal((70, 6))
    ids, logp = teacher(rng, 70, rows=9)
    labels = np.array([0, 1, IGNORE, 3, 4, 5, IGNORE, 7, 8])
    ids[4] = -1
    upstream = rng.standard_normal(9)

    def f(hidden, weight):
        loss = pyloss.linear_sparse_distillation(
            hidden,
            weight,
            ids,
            logp,
            kind=kind,
            labels=labels,
            gradient_filter=filtered,
            **OPTIONS.get(kind, {}),
        )
        return (loss * upstream.astype(np.float32)).sum(), loss

    (_, loss), gradients = pyloss.value_and_grad(f, (0, 1))(
        hidden.astype(np.float32), weight.astype(np.float32)
    )
    counted = (labels != IGNORE) & (ids >= 0).any(-1)
    want, slopes = formula(kind, hidden @ weight.T, ids, logp)
    slopes = np.where(counted, upstream, 0)[:, None] * np.nan_to_num(slopes)
    np.testing.assert_allclose(loss, np.where(counted, want, 0), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(gradients[0], slopes @ weight, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(gradients[1], slopes.T @ hidden, rtol=1e-4, atol=2e-5)


def test_threads_and_layouts_keep_the_bits(rng):
    x, (ids, logp) = rng.standard_normal((64, 4001)).astype(np.float32), teacher(rng, 4001, rows=64)
    want, slopes = computed(x, ids, logp, kind="js")
    threads = pyloss.get_num_threads()
    try:
        for count in (1, 3):
            pyloss.set_num_threads(count)
            loss, gradient = computed(np.asfortranarray(x), ids, logp, kind="js")
            assert loss.tobytes() == want.tobytes() and gradient.tobytes() == slopes.tobytes()
    finally:
        pyloss.set_num_threads(threads)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kind": "kl"}, ValueError, "kind must be one of 'forward-kl', .*, not 'kl'"),
        ({"rest": "drop"}, ValueError, "rest must be one of 'bucket', 'renormalize', not 'drop'"),
        ({"beta": 2, "kind": "js"}, ValueError, "beta is 2;"),
        ({"skew": 1}, ValueError, "skew is 1;"),
        ({"temperature": 0}, ValueError, "temperature is 0;"),
        ({"stored_temperature": -1}, ValueError, "stored_temperature is -1;"),
        ({"temperature": 2.0}, ValueError, "temperature is 2 and stored_temperature 1"),
        ({"kind": "reverse-kl", "rest": "renormalize"}, ValueError, "infinite"),
        ({"shares": np.ones((2, 3)), "kind": "js"}, ValueError, "shares are for the kinds"),
        ({"shares": -np.ones((2, 3))}, ValueError, "shares must not be negative"),
        ({"shares": np.ones((2, 4))}, ValueError, r"shares has shape \(2, 4\), expected \(2, 3\)"),
        ({"left": np.ones(3)}, ValueError, r"left has shape \(3,\), expected \(2,\)"),
        ({"ids": [[0, 1, 2], [0, 5, 2]]}, ValueError, r"id 5 at position \(1, 1\) is outside"),
        ({"ids": [[0, 1, 2], [2, 1, 2]]}, ValueError, r"id 2 occurs twice .* position \(1,\)"),
        ({"ids": [0, 1, 2]}, ValueError, r"ids must be \[..., K\] for rows \(2,\), got shape"),
        ({"ids": np.zeros((2, 0), int)}, ValueError, "ids must be"),
        ({"ids": np.zeros((2, 3))}, TypeError, "ids"),
        ({"logprobs": np.zeros((2, 2))}, ValueError, r"logprobs has shape \(2, 2\)"),
        ({"logprobs": None}, TypeError, "logprobs must be an array"),
        ({"logprobs": [["a", "b", "c"]] * 2}, TypeError, "logprobs must hold real numbers"),
        ({"softcap": 0}, ValueError, "softcap is 0;"),
    ],
    ids=str,
)
@pytest.mark.parametrize("linear", [False, True])
def test_refused(changes, error, message, linear):
    given = {
        "ids": [[0, 1, 2], [3, -1, -1]],
        "logprobs": np.log(np.full((2, 3), 0.25)),
        **changes,
    }
    with pytest.raises(error, match=message):
        if linear:
            pyloss.linear_sparse_distillation(np.zeros((2, 4)), np.eye(4), **given)
        else:
            pyloss.sparse_distillation_loss(np.zeros((2, 4)), **given)
