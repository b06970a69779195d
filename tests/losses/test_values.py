"""Every loss against its float64 formula: types, layouts, reductions, pairs of options, gradients.

Gradients are also compared with central differences.
"""

import itertools

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
    REDUCTIONS,
    Loss,
    assert_gradient,
    assert_loss,
    assert_value,
    layouts,
    some_labels,
)
from loss_formulas import IGNORE

import pyloss

SHAPES = [(6, 7), (1, 1), (4, 1), (5, 2), (4, 3), (3, 31), (3, 33), (9,), (2, 3, 100), (2, 1061)]


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request):
    return request.param


def compare(loss, arguments, upstream, reduction=None, **options):
    """Compare loss and gradients of one call with the formula."""
    if reduction is not None:
        options["reduction"] = reduction
    want, slopes = loss.formula(*arguments, upstream=upstream, **options)
    dtype = arguments[0].dtype
    alone = loss(*arguments, **options)
    got, gradients = loss.gradients(*arguments, upstream=upstream, **options)
    assert_value(
        loss,
        alone,
        want,
        dtype,
        1 + np.abs(want).max(initial=0) if reduction in ("sum", "mean") else 1,
    )
    assert np.asarray(got).tobytes() == np.asarray(alone).tobytes()
    scale = np.abs(upstream).max(initial=0) / ({**loss.options, **options}.get("temperature", 1))
    if reduction == "mean":
        scale /= max(np.size(arguments[0]) / arguments[0].shape[-1], 1)
    if loss.logits == 2:  # log probability differences are about as large as the loss
        scale *= 1 + np.abs(loss.formula(*arguments, **options)[0]).max(initial=0)
    if loss.name == "cosine_loss":  # the gradient of an angle is a difference of terms 1 / |x|
        shortest = min(np.linalg.norm(x.astype(np.float64), axis=-1).min() for x in arguments)
        scale = scale * max(1, 1 / shortest)
    for gradient, slope, x in zip(gradients, slopes, arguments):
        assert_gradient(gradient, slope, x.dtype, scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_values_and_gradients(rng, loss, dtype, shape):
    arguments = loss.arguments(rng, shape, dtype)
    compare(loss, arguments, rng.standard_normal(loss.out_shape(shape)).astype(np.float32))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("loss", [*LOSSES, BCE], ids=str)
def test_reductions_and_weights(rng, loss, dtype, weighted, reduction):
    arguments = loss.arguments(rng, (2, 8, 13), dtype)
    options = {"weights": loss.weights(rng, (2, 8, 13)).astype(np.float32)} if weighted else {}
    compare(
        loss,
        arguments,
        rng.standard_normal(loss.out_shape((2, 8, 13)) if reduction == "none" else ()).astype(
            np.float32
        ),
        reduction,
        **options,
    )


def differences(loss, arguments, i, upstream, options, step):
    """Central differences of `(upstream * loss).sum()` by argument i."""
    slope = np.empty(arguments[i].shape)
    for place in np.ndindex(slope.shape):
        ends = []
        for sign in (1, -1):
            moved = [np.array(a) for a in arguments]
            moved[i][place] += sign * step
            ends.append((upstream * loss(*moved, **options)).sum())
        slope[place] = (ends[0] - ends[1]) / (2 * step)
    return slope


@pytest.mark.parametrize("reduction", [None, *REDUCTIONS])
@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_gradients_are_the_slopes_of_the_loss(rng, loss, reduction):
    """Every logits argument, in float64, with upstream gradients that differ by row."""
    if loss in MAPS and reduction is not None:
        return
    arguments = loss.arguments(rng, (5, 4), np.float64, 2.0)
    options = (
        {} if reduction is None else {"reduction": reduction, "weights": loss.weights(rng, (5, 4))}
    )
    upstream = rng.standard_normal(np.shape(loss(*arguments, **options)))
    _, gradients = loss.gradients(*arguments, upstream=upstream, **options)
    for i, gradient in enumerate(gradients):
        np.testing.assert_allclose(
            gradient, differences(loss, arguments, i, upstream, options, 1e-5), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("loss", [loss for loss in EVERY if loss.logits == 2], ids=str)
@pytest.mark.parametrize("only", [0, 1])
def test_one_gradient_without_the_other(rng, loss, only):
    """Gradients of the student alone and of the teacher alone equal those of both."""
    arguments = loss.arguments(rng, (4, 19))
    upstream = rng.standard_normal(4)
    _, both = loss.gradients(*arguments, upstream=upstream)
    alone = pyloss.grad(lambda q, p: (loss(q, p) * upstream).sum(), only)(*arguments)
    np.testing.assert_allclose(alone, both[only], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "types",
    list(itertools.permutations(DTYPES.values(), 2)),
    ids=lambda t: "-".join(np.dtype(d).name for d in t),
)
@pytest.mark.parametrize("name", ["kl_div_loss", "js_div_loss"])
def test_student_and_teacher_of_different_types(rng, name, types):
    """Each gradient has its argument's type; the computation is float64 if either argument is."""
    loss = Loss(name, logits=2)
    q, p = (a.astype(t) for a, t in zip(loss.arguments(rng, (3, 40)), types))
    upstream = rng.standard_normal(3).astype(np.float32)
    want, slopes = loss.formula(q, p, upstream=upstream)
    got, gradients = loss.gradients(q, p, upstream=upstream)
    assert_loss(got, want, np.float64 if np.float64 in types else np.float32)
    for gradient, slope, kind in zip(gradients, slopes, types):
        assert_gradient(gradient, slope, kind, np.abs(upstream).max())


# Layouts


@pytest.mark.parametrize("shape", [(6, 33), (2, 3, 130)], ids=str)
@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_layouts_do_not_matter(rng, loss, dtype, shape):
    """Strides, byte order and alignment do not change bits, and the arguments stay unaltered."""
    arguments = loss.arguments(rng, shape, dtype)
    logits, other = arguments[: loss.logits], arguments[loss.logits :]
    upstream = rng.standard_normal(loss.out_shape(shape)).astype(np.float32)
    want, slopes = loss.gradients(*arguments, upstream=upstream)
    for i, x in enumerate(logits):
        for name, variant in layouts(x).items():
            mixed = [variant if j == i else y for j, y in enumerate(logits)]
            got, gradients = loss.gradients(*mixed, *other, upstream=upstream)
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes(), name
            for a, b in zip(gradients, slopes):
                assert a.tobytes() == b.tobytes() and a.dtype == b.dtype, name
            np.testing.assert_array_equal(variant, x, err_msg=name)


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_broadcast_logits(rng, loss, dtype):
    arguments = loss.arguments(rng, (4, 21), dtype)
    logits = [np.broadcast_to(x[0], x.shape) for x in arguments[: loss.logits]]
    upstream = rng.standard_normal(loss.out_shape((4, 21))).astype(np.float32)
    got, gradients = loss.gradients(*logits, *arguments[loss.logits :], upstream=upstream)
    want, slopes = loss.gradients(
        *(x.copy() for x in logits), *arguments[loss.logits :], upstream=upstream
    )
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    for a, b in zip(gradients, slopes):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_no_rows(rng, loss, dtype, shape):
    arguments = loss.arguments(rng, shape, dtype)
    got, gradients = loss.gradients(*arguments)
    assert np.shape(got) == loss.out_shape(shape) and all(
        g.shape == shape and g.dtype == dtype for g in gradients
    )
    for reduction in ["sum", "mean"] if loss not in MAPS else []:
        total, gradients = loss.gradients(*arguments, reduction=reduction)
        assert np.shape(total) == () and total == 0 and all(g.shape == shape for g in gradients)


@pytest.mark.parametrize("kind", [list, np.int32, np.uint8])
@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_whatever_asarray_takes(rng, loss, kind):
    arguments = loss.arguments(rng, (3, 5))
    whole = [np.abs(x).round() for x in arguments[: loss.logits]]
    given = [x.tolist() for x in whole] if kind is list else [x.astype(kind) for x in whole]
    got = loss(*given, *arguments[loss.logits :])
    want, _ = loss.formula(*(np.asarray(x) for x in given), *arguments[loss.logits :])
    assert_value(loss, got, want, np.float64 if kind is list else np.float32)


# Options


def options_in_pairs():
    """Yield each pair of these options, with a third one sometimes on."""
    choices = {
        "label_smoothing": 0.2,
        "ignore_index": 3,
        "weights": np.array([0.5, 0.0, 2.0, 1.0, 0.25, 1.5, 3.0]),
        "z_loss": 0.1,
        "softcap": 2.5,
        "reduction": "mean",
    }
    for pair in itertools.combinations(choices, 2):
        yield {name: choices[name] for name in pair}
    yield choices


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("options", list(options_in_pairs()), ids="-".join)
def test_cross_entropy_options_in_pairs(rng, dtype, options, masked):
    loss = Loss("softmax_cross_entropy")
    logits = (3 * rng.standard_normal((7, 6))).astype(dtype)
    labels = np.array([0, 3, 5, 3, 1, 2, 4])
    if masked:
        logits[np.arange(7), (labels + 1) % 6] = -np.inf
        logits[4, 2:] = -np.inf
    upstream = rng.standard_normal(() if "reduction" in options else 7).astype(np.float32)
    compare(loss, (logits, labels), upstream, **options)


@pytest.mark.parametrize(
    "options",
    [{"gamma": g, "alpha": a} for g in (0.0, 0.5, 1.0, 2.0, 5.0) for a in (None, 0.25)],
    ids=str,
)
@pytest.mark.parametrize(
    "extra",
    [{}, {"weights": np.array([1.0, 0.0, 2.0, 0.5])}, {"reduction": "mean"}],
    ids=["", "weights", "mean"],
)
def test_focal_loss_options(rng, dtype, options, extra):
    logits = (3 * rng.standard_normal((4, 9))).astype(dtype)
    upstream = rng.standard_normal(() if extra.get("reduction") else 4).astype(np.float32)
    compare(Loss("focal_loss"), (logits, np.array([8, 0, IGNORE, 4])), upstream, **options, **extra)


@pytest.mark.parametrize(
    ("name", "beta"), [("kl_div_loss", None), *(("js_div_loss", beta) for beta in (0.01, 0.5, 0.9))]
)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_divergence_options(rng, dtype, name, temperature, beta, weighted):
    options = {"temperature": temperature, **({} if beta is None else {"beta": beta})}
    if weighted:
        options["weights"] = np.array([0.5, 0.0, 2.0, 1.0])
    loss = Loss(name, logits=2)
    compare(
        loss,
        loss.arguments(rng, (4, 50), dtype),
        rng.standard_normal(4).astype(np.float32),
        **options,
    )


def test_defaults_say_what_they_mean(rng):
    """An option at its default changes nothing; focal loss with gamma 0 is cross entropy."""
    logits, labels = rng.standard_normal((6, 11)), some_labels(rng, (6, 11))
    plain = pyloss.softmax_cross_entropy(logits, labels)
    same = pyloss.softmax_cross_entropy(
        logits,
        labels,
        label_smoothing=0,
        z_loss=0,
        softcap=None,
        weights=np.ones(6),
        ignore_index=IGNORE,
    )
    np.testing.assert_array_equal(plain, same)
    np.testing.assert_allclose(pyloss.focal_loss(logits, labels, gamma=0), plain, rtol=1e-13)
    q, p = rng.standard_normal((2, 6, 11))
    np.testing.assert_array_equal(
        pyloss.js_div_loss(q, p), pyloss.js_div_loss(q, p, beta=0.5, temperature=1)
    )


@pytest.mark.parametrize("loss", [loss for loss in PLAIN if loss.logits == 1], ids=str)
@pytest.mark.parametrize("ignore", [-1, 0, 2, 99])
def test_any_number_may_be_ignored(rng, loss, dtype, ignore):
    logits = rng.standard_normal((6, 3)).astype(dtype)
    compare(
        loss,
        (logits, np.array([0, 1, 2, ignore, 1, ignore])),
        np.float32(2),
        "mean",
        ignore_index=ignore,
    )


@pytest.mark.parametrize("loss", [loss for loss in PLAIN if loss.logits == 1], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_labels_ignored(loss, dtype, reduction):
    logits = np.full((3, 40), np.nan, dtype)
    got, (gradient,) = loss.gradients(logits, np.full(3, IGNORE), reduction=reduction)
    assert not np.any(got) and not np.isnan(got).any() and (gradient.astype(np.float32) == 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("loss", [*PLAIN, BCE], ids=str)
def test_a_row_of_weight_zero_stays_out_whatever_it_holds(rng, loss, dtype, reduction):
    arguments = loss.arguments(rng, (3, 20), dtype)
    arguments[0][1, 4], weights = np.nan, np.ones(loss.out_shape((3, 20)))
    weights[1] = 0
    got, gradients = loss.gradients(*arguments, weights=weights, reduction=reduction)
    assert np.isfinite(got).all()
    for gradient in gradients:
        gradient = gradient.astype(np.float32)
        assert np.isfinite(gradient).all() and (gradient[1] == 0).all() and gradient[0].any()


def test_bfloat16_is_not_rounded_on_the_way(rng):
    """Half-precision logits are exact float32 inputs: both types give the same loss."""
    for dtype in (np.float16, ml_dtypes.bfloat16):
        for loss in EVERY:
            arguments = loss.arguments(rng, (3, 200), dtype)
            wide = [x.astype(np.float32) for x in arguments[: loss.logits]]
            want = loss(*wide, *arguments[loss.logits :])
            np.testing.assert_array_equal(
                loss(*arguments), want.astype(dtype) if loss.own_type else want, err_msg=str(loss)
            )


def test_targets_have_a_gradient_too(rng, dtype):
    """Gradients by the logits and the targets of the elementwise loss, each of its own type."""
    x, t = (
        (3 * rng.standard_normal((4, 9))).astype(dtype),
        rng.uniform(size=(4, 9)).astype(np.float32),
    )
    upstream = rng.standard_normal((4, 9)).astype(np.float32)
    dx, dt = pyloss.grad(lambda x, t: (BCE(x, t) * upstream).sum(), (0, 1))(x, t)
    _, (slope, by_target) = BCE.formula(x, t, upstream=upstream)
    assert_gradient(dx, slope, dtype)
    assert_gradient(dt, by_target, np.float32)


def test_focal_loss_with_a_weight_for_every_class(rng, dtype):
    """alpha[label] multiplies the loss; the mean does not divide by it."""
    logits, labels, alpha = (
        (3 * rng.standard_normal((6, 5))).astype(dtype),
        np.array([0, 4, IGNORE, 2, 1, 4]),
        np.array([0.1, 2, 1, 0, 0.5]),
    )
    compare(Loss("focal_loss"), (logits, labels), np.float32(0.7), "mean", alpha=alpha)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 5, 7), (5, 7)], ids=str)
def test_accuracy(rng, dtype, shape):
    """Compares logits without a softmax; the first of equal logits wins; NaN without labels."""
    logits, labels = rng.integers(-3, 3, shape).astype(dtype), some_labels(rng, shape)
    labels[..., :2] = np.argmax(logits[..., :2, :], axis=-1)
    labels.reshape(-1, shape[-2])[-1] = IGNORE
    if len(shape) > 2:
        labels.reshape(-1, shape[-2])[0] = np.argmax(logits.reshape(-1, *shape[-2:])[0], axis=-1)
    tokens, sequences = pyloss.compute_accuracy(logits, labels)
    counted, right = labels != IGNORE, np.argmax(logits, axis=-1) == labels
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(tokens, (counted & right).sum(-1) / counted.sum(-1))
    want = np.where(counted.any(-1), (right | ~counted).all(-1), np.nan)
    np.testing.assert_array_equal(sequences, want)
    assert np.isnan(tokens.reshape(-1)[-1]) and (len(shape) == 2 or sequences.reshape(-1)[0] == 1)
