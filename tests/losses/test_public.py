"""The public losses: values, reductions, weights, ignored rows, gradients, types, errors."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from pyloss import softmax_cross_entropy
from pyloss.autograd.differentiation import grad, value_and_grad

REDUCTIONS = ["none", "sum", "mean"]
IGNORE = -100


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def reference(logits, labels, weights, ignore, reduction):
    """The loss in float64, straight from its definition."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    flat, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    counted = wanted != ignore
    top = flat.max(-1, keepdims=True)
    log_p = flat - top - np.log(np.exp(flat - top).sum(-1, keepdims=True))
    loss = np.where(counted, -log_p[np.arange(len(flat)), np.where(counted, wanted, 0)], 0)
    w = counted * (1.0 if weights is None else np.asarray(weights, np.float64).reshape(-1))
    loss = loss * w
    if reduction == "none":
        return loss.reshape(labels.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / w.sum() if w.sum() else np.float64(0)


def differences(f, x, upstream, step=1e-5):
    out = np.empty_like(x)
    for i in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[i] += sign * step
            ends.append((f(moved) * upstream).sum())
        out[i] = (ends[0] - ends[1]) / (2 * step)
    return out


CASES = list(
    itertools.product(
        [(5, 7), (1, 1), (2, 3, 33), (9,), (0, 4), (2, 0, 4)],
        ["all", "some ignored"],
        [False, True],
    )
)


def case(rng, shape, ignored, weighted):
    logits = 3 * rng.standard_normal(shape)
    labels = np.asarray(rng.integers(0, shape[-1], shape[:-1]))
    if ignored != "all" and labels.size > 1:
        labels.flat[:: 2 if labels.size > 2 else 1][:1] = IGNORE
        labels.flat[-1] = IGNORE
    weights = rng.uniform(0, 2, shape[:-1]) if weighted else None
    if weighted and weights.size > 2:
        weights.flat[1] = 0
    return logits, labels, weights


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("shape", "ignored", "weighted"), CASES)
def test_softmax_cross_entropy(rng, shape, ignored, weighted, reduction):
    logits, labels, weights = case(rng, shape, ignored, weighted)
    options = {"weights": weights, "reduction": reduction}
    want = reference(logits, labels, weights, IGNORE, reduction)
    upstream = rng.standard_normal(np.shape(want))
    exact = differences(
        lambda x: reference(x, labels, weights, IGNORE, reduction), logits, upstream
    )
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-6)):
        x = logits.astype(dtype)
        got = softmax_cross_entropy(x, labels, **options)
        assert np.shape(got) == np.shape(want) and np.asarray(got).dtype == dtype
        np.testing.assert_allclose(
            got, want, rtol=5 * tolerance, atol=5 * tolerance * (1 + np.abs(want).max(initial=0))
        )
        gradient = grad(
            lambda x, d=dtype: (
                softmax_cross_entropy(x, labels, **options) * upstream.astype(d)
            ).sum()
        )(x)
        assert gradient.dtype == dtype and gradient.shape == shape
        np.testing.assert_allclose(gradient, exact, atol=max(1e-8, 10 * tolerance), rtol=1e-5)
        traced, _ = value_and_grad(
            lambda x: (lambda y: (y.sum(), y))(softmax_cross_entropy(x, labels, **options))
        )(x)
        np.testing.assert_allclose(traced[1], got, rtol=2 * tolerance)


# Types and layouts


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.int32, np.uint8, ">f4", ">f8", "<f8"]
)
def test_types_of_logits(rng, dtype):
    logits = (3 * rng.standard_normal((5, 7))).clip(0).astype(dtype)
    labels = rng.integers(0, 7, 5)
    got = softmax_cross_entropy(logits, labels)
    double = np.dtype(dtype).itemsize == 8
    assert got.dtype == (np.float64 if double else np.float32)
    np.testing.assert_allclose(
        got,
        reference(logits.astype(np.float64), labels, None, IGNORE, "none"),
        rtol=1e-14 if double else 1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "kind",
    [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64, ">i4", list, "range"],
)
def test_types_of_labels(rng, kind):
    logits = rng.standard_normal((4, 7))
    labels = (
        range(4) if kind == "range" else [0, 1, 2, 3] if kind is list else np.arange(4).astype(kind)
    )
    np.testing.assert_allclose(
        softmax_cross_entropy(logits, labels), reference(logits, np.arange(4), None, IGNORE, "none")
    )


def test_strides_do_not_matter(rng):
    logits, labels = rng.standard_normal((6, 14)), rng.integers(0, 7, 12)
    want = softmax_cross_entropy(logits[::2, ::2].copy(), labels[::4].copy())
    np.testing.assert_array_equal(softmax_cross_entropy(logits[::2, ::2], labels[::4]), want)
    np.testing.assert_array_equal(
        softmax_cross_entropy(np.asfortranarray(logits[::2, ::2]), labels[::4]), want
    )
    before = logits.copy()
    before.flags.writeable = False
    softmax_cross_entropy(before, rng.integers(0, 14, 6))
    np.testing.assert_array_equal(before, logits)


# Edges


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [None, np.ones(3)])
def test_all_rows_ignored(weights, reduction):
    options = {"weights": weights, "reduction": reduction}

    def f(x):
        labels = np.full(3, IGNORE)
        out = softmax_cross_entropy(x, labels, **options)
        return out.sum(), out

    (total, out), gradient = value_and_grad(f)(np.full((3, 4), np.nan, np.float32))
    assert (
        total == 0
        and not np.any(out)
        and not gradient.any()
        and np.shape(out) == ((3,) if reduction == "none" else ())
    )


@pytest.mark.parametrize("ignore", [-100, -1, 0, 2, 99])
def test_any_number_may_be_ignored(rng, ignore):
    logits, labels = rng.standard_normal((6, 3)), np.array([0, 1, 2, ignore, 1, ignore])
    got = softmax_cross_entropy(logits, labels, ignore_index=ignore, reduction="mean")
    assert got == pytest.approx(reference(logits, labels, None, ignore, "mean"), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masked_vocabulary_and_large_logits(dtype):
    logits = np.array(
        [[-np.inf, 0, 0], [1e4, -1e4, 0], [-1e4, 1e4, 1e4], [0, -np.inf, -np.inf]], dtype
    )
    labels = np.array([1, 1, 2, 0])
    loss, gradient = (
        softmax_cross_entropy(logits, labels),
        grad(lambda x: softmax_cross_entropy(x, labels, reduction="sum"))(logits),
    )
    np.testing.assert_allclose(loss, [np.log(2), 2e4, np.log(2), 0], rtol=1e-6)
    np.testing.assert_allclose(
        gradient, [[0, -0.5, 0.5], [1, -1, 0], [0, 0.5, -0.5], [0, 0, 0]], atol=1e-6
    )


def test_nan_stays_in_its_row(rng):
    logits = rng.standard_normal((3, 5))
    logits[1, 3] = np.nan
    loss, gradient = (
        softmax_cross_entropy(logits, [0, 1, 2]),
        grad(lambda x: softmax_cross_entropy(x, [0, 1, 2], reduction="sum"))(logits),
    )
    assert np.isnan(loss).tolist() == [False, True, False]
    assert (
        np.isnan(gradient).all(axis=1).tolist() == [False, True, False]
        and np.isfinite(gradient[[0, 2]]).all()
    )


@pytest.mark.parametrize("bad", [np.inf, np.nan, -np.inf])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_row_of_weight_zero_stays_out_whatever_it_holds(rng, bad, reduction):
    logits = rng.standard_normal((3, 5))
    logits[1, 3] = bad
    options = {"weights": [1.0, 0.0, 2.0], "reduction": reduction}
    (_, got), gradient = value_and_grad(
        lambda x: (lambda y: (y.sum(), y))(softmax_cross_entropy(x, [0, 3, 2], **options))
    )(logits)
    logits[1] = 0
    np.testing.assert_allclose(got, reference(logits, [0, 3, 2], [1, 0, 2], IGNORE, reduction))
    assert np.isfinite(gradient).all() and not gradient[1].any() and gradient[0].any()


def test_a_large_vocabulary_keeps_its_digits(rng):
    logits = (rng.standard_normal((2, 262_144)) * 4).astype(np.float32)
    got = softmax_cross_entropy(logits, [5, 262_143])
    np.testing.assert_allclose(
        got, reference(logits, np.array([5, 262_143]), None, IGNORE, "none"), rtol=5e-7
    )


# Errors


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [[0, 1], [7, 2]],
            r"label 7 at position \(1, 0\) is outside \[0, 7\) and not ignore_index -100",
        ),
        ([[0, -1], [9, 2]], r"label -1 at position \(0, 1\)"),
        ([[0, 2**40], [9, 2]], r"label 1099511627776 at position \(0, 1\)"),
        ([0, 1], r"labels have shape \(2,\), expected one per row of logits: \(2, 2\)"),
        ([[[0]]], r"labels have shape \(1, 1, 1\)"),
    ],
)
def test_wrong_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        softmax_cross_entropy(np.zeros((2, 2, 7)), labels)


def test_a_position_in_one_dimension_is_a_number():
    with pytest.raises(ValueError, match="label 3 at position 1 is"):
        softmax_cross_entropy(np.zeros((2, 3)), [0, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: softmax_cross_entropy(np.zeros((2, 3)), [0.0, 1.0]), TypeError, "labels must be integers, not float64"),
        (lambda: softmax_cross_entropy(np.zeros((2, 3)), ["a", "b"]), TypeError, "labels must be integers"),
        (lambda: softmax_cross_entropy(np.zeros((2, 3)), [True, False]), TypeError, "labels must be integers, not bool"),
        (lambda: softmax_cross_entropy(np.zeros((2, 3), complex), [0, 1]), TypeError, "logits must hold real numbers, not complex128"),
        (lambda: softmax_cross_entropy(np.array([["a"]]), [0]), TypeError, "logits must hold real numbers"),
        (lambda: softmax_cross_entropy(np.float32(1), 0), ValueError, r"logits must be \[..., V\]"),
        (lambda: softmax_cross_entropy(np.zeros((2, 0)), [0, 1]), ValueError, "V at least 1"),
        (lambda: softmax_cross_entropy(np.zeros((2, 3)), [0, 1], weights=[1.0]), ValueError, r"weights have shape \(1,\).*\(2,\)"),
        (lambda: softmax_cross_entropy(np.zeros((2, 3)), [0, 1], reduction="avg"), ValueError, "'none', 'sum', 'mean', not 'avg'"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
