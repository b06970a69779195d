"""Class weights, and what cross entropies return beside the loss, against float64 formulas."""

import numpy as np
import pytest
from loss_cases import DTYPES, REDUCTIONS, Loss, assert_gradient, some_labels

import pyloss
from pyloss import nn

V = 11
OPTIONS = [
    {},
    {"label_smoothing": 0.2},
    {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 3.0},
]


def formula(x, labels, w, *, label_smoothing=0.0, z_loss=0.0, softcap=None):
    """(losses, lse, z-losses) of each row, 0 where the label is ignored."""
    x = np.asarray(x, np.float64)
    x = x if softcap is None else np.where(x == -np.inf, x, softcap * np.tanh(x / softcap))
    top = x.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]
    cost, counted = lse[..., None] - x, labels != -100
    own = np.where(counted, labels, 0)[..., None]
    label = np.take_along_axis(w * cost, own, -1)[..., 0]
    seen = x > -np.inf
    mean = (w * np.where(seen, cost, 0)).sum(-1) / seen.sum(-1)
    z = z_loss * lse**2
    loss = (1 - label_smoothing) * label + label_smoothing * mean + z
    return tuple(np.where(counted, a, 0) for a in (loss, lse, z))


def slope(function, x, step=1e-6):
    """Central differences of a number by x."""
    found = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        found[i] = (function(up) - function(down)) / (2 * step)
    return found


@pytest.fixture
def weights(rng):
    w = rng.uniform(0.2, 2, V)
    w[3] = 0
    return w


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_class_weights(rng, weights, options, dtype, isa):
    x = rng.standard_normal((3, 5, V)).astype(DTYPES[dtype])
    x[:, :, 7] = -np.inf
    labels = np.where(some_labels(rng, x.shape) == 7, 3, some_labels(rng, x.shape))
    labels[labels == 7] = 1
    loss, *_ = formula(x, labels, weights, **options)
    upstream = rng.standard_normal(loss.shape)
    given = {"class_weight": weights, **options}
    ours, (gradient,) = Loss("softmax_cross_entropy").gradients(
        x, labels, upstream=upstream, **given
    )
    exact = dtype == "f64"
    np.testing.assert_allclose(
        ours, loss, rtol=1e-12 if exact else 3e-6, atol=1e-14 if exact else 2e-6
    )
    want = slope(
        lambda x: (formula(x, labels, weights, **options)[0] * upstream).sum(), x.astype(float)
    )
    want[:, :, 7] = 0
    if exact:
        np.testing.assert_allclose(gradient, want, atol=1e-8)
    else:
        assert_gradient(gradient, want, DTYPES[dtype], 4 * np.abs(upstream).max())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_mean_divides_by_the_labels_weights(rng, weights, reduction):
    x, labels = rng.standard_normal((7, V)), some_labels(rng, (7, V))
    rows, row_weights = formula(x, labels, weights)[0], rng.uniform(0.5, 2, 7)
    counted = labels >= 0
    total = (row_weights * weights[np.maximum(labels, 0)])[counted].sum()
    want = {
        "none": rows * row_weights,
        "sum": (rows * row_weights).sum(),
        "mean": (rows * row_weights).sum() / total,
    }[reduction]
    got = pyloss.softmax_cross_entropy(
        x, labels, class_weight=weights, weights=row_weights, reduction=reduction
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_the_weight_zero_of_a_masked_label_leaves_it_out(weights):
    x = np.array([[0.0, 1.0, 2.0, -np.inf, *[0.5] * 7]])
    got = pyloss.softmax_cross_entropy(x, [3], class_weight=weights)
    np.testing.assert_array_equal(got, [0.0])


ALL = {"return_lse": True, "return_z_loss": True, "return_token_accuracy": True}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_what_is_returned(rng, options, reduction, recorded):
    x, labels = rng.standard_normal((3, 5, V)), some_labels(rng, (3, 5, V))
    row_weights = rng.uniform(0.5, 2, labels.shape)
    given = {"weights": row_weights, "reduction": reduction, **options, **ALL}
    loss, lse, z = formula(x, labels, np.ones(V), **options)
    counted = labels >= 0
    right = (x.argmax(-1) == labels) & counted

    def reduced(rows):
        if reduction == "none":
            return rows * row_weights
        total = (rows * row_weights).sum()
        return total if reduction == "sum" else total / row_weights[counted].sum()

    def f(x):
        found = pyloss.softmax_cross_entropy(x, labels, **given)
        return found.loss.sum(), found

    found = pyloss.value_and_grad(f)(x)[0][1] if recorded else f(x)[1]
    assert found._fields == ("loss", "lse", "z_loss", "token_accuracy")
    np.testing.assert_allclose(found.loss, reduced(loss), rtol=1e-12)
    np.testing.assert_allclose(found.lse, lse, rtol=1e-12)
    np.testing.assert_allclose(found.z_loss, reduced(z), rtol=1e-12, atol=1e-15)
    accuracy = right if reduction == "none" else right.sum() / counted.sum()
    np.testing.assert_allclose(found.token_accuracy, accuracy, rtol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_all_that_is_returned(rng, options):
    x, labels = rng.standard_normal((2, 3, V)), some_labels(rng, (2, 3, V))
    a, b, c = rng.standard_normal((3, *labels.shape))
    w = np.ones(V)
    given = {**options, **ALL}

    def f(x):
        loss, lse, z, _ = pyloss.softmax_cross_entropy(x, labels, **given)
        return (loss * a).sum() + (lse * lse * b).sum() + (z * c).sum()

    def want(x):
        loss, lse, z = formula(x, labels, w, **options)
        return (loss * a + lse * lse * b + z * c).sum()

    value, gradient = pyloss.value_and_grad(f)(x)
    np.testing.assert_allclose(value, want(x), rtol=1e-12)
    np.testing.assert_allclose(gradient, slope(want, x), atol=1e-7)

    def only_lse(x):
        return pyloss.softmax_cross_entropy(x, labels, return_lse=True, **options).lse.sum()

    _, gradient = pyloss.value_and_grad(only_lse)(x)
    np.testing.assert_allclose(
        gradient, slope(lambda x: formula(x, labels, w, **options)[1].sum(), x), atol=1e-7
    )


def test_out_takes_the_loss(rng):
    x, labels = rng.standard_normal((4, V)), rng.integers(0, V, 4)
    out = np.empty(4)
    found = pyloss.softmax_cross_entropy(x, labels, return_lse=True, out=out)
    assert found.loss is out
    np.testing.assert_array_equal(out, pyloss.softmax_cross_entropy(x, labels))


# Under a head


@pytest.mark.parametrize("logits_bytes", [None, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_under_a_head(rng, weights, options, logits_bytes):
    hidden, head = (rng.standard_normal(s).astype(np.float32) for s in ((4, 9, 6), (V, 6)))
    bias = rng.standard_normal(V).astype(np.float32)
    labels = some_labels(rng, (4, 9, V))
    a, b = rng.standard_normal((2, 4, 9))
    given = {"class_weight": weights, **options, **ALL}

    def fused(hidden, head, bias):
        found = pyloss.linear_cross_entropy(
            hidden, head, labels, bias=bias, logits_bytes=logits_bytes, **given
        )
        return (found.loss * a).sum() + (found.lse * found.lse * b).sum(), found

    def plain(hidden, head, bias):
        found = pyloss.softmax_cross_entropy(hidden @ head.T + bias, labels, **given)
        return (found.loss * a).sum() + (found.lse * found.lse * b).sum(), found

    wide = [x.astype(np.float64) for x in (hidden, head, bias)]
    (_, want), exact = pyloss.value_and_grad(plain, (0, 1, 2))(*wide)
    (_, got), found = pyloss.value_and_grad(fused, (0, 1, 2))(hidden, head, bias)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shift", [1, 3, True])
def test_shift(rng, shift, reduction):
    hidden, head = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 7, 6), (V, 6)))
    labels, row_weights = some_labels(rng, (2, 3, 7, V)), rng.uniform(0.5, 2, (2, 3, 7))
    options = {"reduction": reduction, **ALL}

    def whole(hidden, head):
        found = pyloss.linear_cross_entropy(
            hidden, head, labels, shift=shift, weights=row_weights, **options
        )
        return found.loss.sum() + found.lse.sum(), found

    def sliced(hidden, head):
        found = pyloss.linear_cross_entropy(
            np.ascontiguousarray(hidden[..., :-shift, :])
            if isinstance(hidden, np.ndarray)
            else hidden[..., :-shift, :],
            head,
            labels[..., shift:],
            weights=row_weights[..., shift:],
            **options,
        )
        return found.loss.sum() + found.lse.sum(), found

    (_, got), found = pyloss.value_and_grad(whole, (0, 1))(hidden, head)
    (_, want), exact = pyloss.value_and_grad(sliced, (0, 1))(hidden, head)
    assert got.lse.shape == (2, 3, 7 - shift)
    for one, other in zip([*got, *found], [*want, *exact], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    untraced = whole(hidden, head)[1]
    np.testing.assert_allclose(untraced.loss, got.loss, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_weight": np.ones(3)}, ValueError, r"class_weight has shape \(3,\), expected"),
        ({"class_weight": -np.ones(V)}, ValueError, "class_weight must be finite and not neg"),
        ({"class_weight": np.full(V, np.inf)}, ValueError, "class_weight must be finite"),
        ({"class_weight": ["a"] * V}, TypeError, "class_weight must hold real numbers, not <U1"),
        ({"bias": np.ones(3)}, ValueError, r"bias has shape \(3,\), expected one per class: \(11,"),
        ({"shift": -1}, ValueError, "shift"),
        ({"shift": 4}, ValueError, "shift is 4; it must be below the 4 positions of a row"),
        ({"shift": 1.5}, TypeError, "shift"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        pyloss.linear_cross_entropy(np.ones((4, 6)), np.ones((V, 6)), np.zeros(4, int), **options)


def test_a_layer_brings_its_own_bias():
    with pytest.raises(ValueError, match="bias goes with an array or a Weight; a Linear brings"):
        pyloss.linear_cross_entropy(
            np.ones((4, 6)), nn.Linear(6, V), np.zeros(4, int), bias=np.ones(V)
        )


# Reductions of two rows


@pytest.mark.parametrize("name", ["kl_div_loss", "js_div_loss", "tvd_loss", "skew_kl_div_loss"])
def test_batchmean(rng, name):
    """The first dimension, or the rows that count."""
    loss = getattr(pyloss, name)
    q, p = rng.standard_normal((2, 3, 5, V))
    total = loss(q, p, reduction="sum")
    np.testing.assert_allclose(loss(q, p, reduction="batchmean"), total / 3, rtol=1e-12)
    labels, weights = some_labels(rng, q.shape), rng.uniform(0.5, 2, (3, 5))
    for options in ({"labels": labels}, {"weights": weights}):
        np.testing.assert_allclose(
            loss(q, p, reduction="batchmean", **options), loss(q, p, reduction="mean", **options)
        )
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'sum', 'mean', not"):
        loss(q[0, 0], p[0, 0], reduction="batchmean")


def test_batchmean_under_heads_and_of_a_sparse_teacher(rng):
    hidden, head = rng.standard_normal((2, 3, 6)), rng.standard_normal((V, 6))
    other = rng.standard_normal((2, 3, 6))
    both = [
        pyloss.linear_kl_div(hidden, head, other, head, reduction=reduction)
        for reduction in ("batchmean", "sum")
    ]
    np.testing.assert_allclose(both[0], both[1] / 2, rtol=1e-6)
    ids = np.tile(np.arange(4), (2, 3, 1))
    logprobs = np.full(ids.shape, np.log(0.2))
    both = [
        pyloss.sparse_distillation_loss(hidden @ head.T, ids, logprobs, reduction=reduction)
        for reduction in ("batchmean", "sum")
    ]
    np.testing.assert_allclose(both[0], both[1] / 2, rtol=1e-6)


def test_a_loss_of_labels_has_no_batchmean():
    with pytest.raises(ValueError, match="'mean', not 'batchmean'"):
        pyloss.softmax_cross_entropy(np.ones((2, 3)), [0, 1], reduction="batchmean")
