"""Losses of rows of logits against float64 formulas and central differences; edge cases."""

import numpy as np
import pytest
from kernel_checks import assert_close, on_threads, row_gradient, tolerance

from pyloss import _core

pytestmark = pytest.mark.usefixtures("isa")


PLAIN = (0.0, 0.0, 0.0)  # label_smoothing, z_loss, softcap
NONE = (None, None, None)  # class_weight, dloss, dlse
PAIR = None, 0.5, 0.0, 0.5, 0.0  # labels, then scale and softcap of both rows
CAPPED = None, 0.5, 3.0, 1.5, 0.0
SHAPES = [
    (0, 5),
    (1, 1),
    (4, 1),
    (3, 2),
    (5, 7),
    (3, 8),
    (4, 15),
    (4, 16),
    (4, 17),
    (3, 31),
    (3, 33),
    (2, 127),
    (2, 1023),
]
SHAPES += [(2, 1024), (2, 1025), (2, 2053)]


@pytest.fixture(params=[np.float32, np.float64], ids=["f32", "f64"])
def dtype(request):
    return request.param


def cross_entropy(x, labels):
    highest = x.max(axis=1, keepdims=True)
    total = np.exp(x - highest).sum(axis=1)
    at_label = x[np.arange(len(x)), np.maximum(labels, 0)]
    return np.where(labels < 0, 0.0, np.log(total) + (highest[:, 0] - at_label))


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def run(memory, x, labels, dtype, dloss=None, gradient=True):
    loss = memory.new(len(x), dtype)
    dx = memory.new(x.shape, dtype) if gradient else None
    given = None if dloss is None else memory.put(dloss, dtype)
    _core.softmax_cross_entropy(
        memory.put(x, dtype),
        memory.put(labels, np.int32),
        *PLAIN,
        None,
        given,
        None,
        loss,
        None,
        dx,
    )
    return loss, dx


@pytest.mark.parametrize(("n", "v"), SHAPES)
def test_loss_and_gradient(memory, rng, dtype, n, v):
    x = (4 * rng.standard_normal((n, v))).astype(np.float32).astype(np.float64)
    labels = rng.integers(-1, v, n)
    dloss = rng.standard_normal(n).astype(np.float32).astype(np.float64)
    loss, dx = run(memory, x, labels, dtype, dloss)
    want = cross_entropy(x, labels)
    assert (np.abs(loss - want) <= tolerance(v, dtype) * (1 + np.abs(want))).all()
    slope = row_gradient(lambda x: cross_entropy(x, labels), x, dloss)
    assert (np.abs(dx - slope) <= tolerance(v, dtype) * np.abs(dloss)[:, None] + 1e-9).all()
    exact = (
        dloss[:, None]
        * np.where(labels < 0, 0, 1)[:, None]
        * (softmax(x) - np.eye(v)[np.maximum(labels, 0)])
    )
    assert_close(dx, exact, v, dtype)
    # dloss defaults to 1. Without dlogits the loss is the same. The gradient may overwrite the
    # logits.
    again, plain = run(memory, x, labels, dtype)
    alone, _ = run(memory, x, labels, dtype, gradient=False)
    _, ones = run(memory, x, labels, dtype, np.ones(n))
    assert (again == loss).all() and (alone == loss).all() and (plain == ones).all()
    place, again = memory.put(x, dtype), memory.new(n, dtype)
    _core.softmax_cross_entropy(
        *(place, memory.put(labels, np.int32), *PLAIN),
        *(None, memory.put(dloss, dtype), None, again, None, place),
    )
    assert (place == dx).all() and (again == loss).all()


def test_leading_dimensions(memory, rng, dtype):
    x, labels = rng.standard_normal((2, 3, 5)).astype(dtype), np.zeros((2, 3), np.int32)
    loss = memory.new(6, dtype)
    _core.softmax_cross_entropy(x, labels, *PLAIN, *NONE, loss, None, memory.new(x.shape, dtype))
    assert_close(loss, cross_entropy(x.reshape(6, 5).astype(np.float64), labels.ravel()), 5, dtype)


def test_a_single_class_costs_nothing(memory, dtype):
    loss, dx = run(memory, np.array([[1e4], [-3.0]]), np.array([0, 0]), dtype)
    assert (loss == 0).all() and (dx == 0).all()


@pytest.mark.parametrize("v", [5, 33, 1500, 4099])
def test_large_logits(memory, rng, dtype, v):
    x = (1e4 * rng.choice([-1.0, 1.0], (6, v))).astype(np.float64)
    labels = rng.integers(0, v, 6)
    loss, dx = run(memory, x, labels, dtype)
    want = cross_entropy(x, labels)
    assert (np.abs(loss - want) <= tolerance(v, dtype) * (1 + want)).all()
    assert_close(dx, softmax(x) - np.eye(v)[labels], v, dtype)


@pytest.mark.parametrize("reach", [1.0, 50.0, 2000.0])
def test_a_maximum_that_moves_from_block_to_block(memory, dtype, reach):
    rising = np.linspace(-reach, reach, 9001).astype(np.float32).astype(np.float64)
    x = np.stack([rising, rising[::-1], np.roll(rising, 4000)])
    labels = np.array([8999, 8999, 3999])
    loss, dx = run(memory, x, labels, dtype)
    want = cross_entropy(x, labels)
    assert (np.abs(loss - want) <= tolerance(9001, dtype) * (1 + want)).all()
    exact = softmax(x) - np.eye(9001)[labels]
    others = np.arange(9001) != labels[:, None]
    # The difference of two logits is rounded to its own size. The exponential turns that into a
    # relative error.
    limit = (
        np.finfo(dtype).eps * (16 + 2 * reach) * np.abs(exact) + 4 * np.finfo(dtype).smallest_normal
    )
    assert (np.abs(dx - exact) <= limit)[others].all()
    assert_close(dx, exact, 9001, dtype)


@pytest.mark.parametrize("v", [7, 64, 3000])
def test_masked_vocabulary(memory, rng, dtype, v):
    x = rng.standard_normal((5, v)).astype(np.float32).astype(np.float64)
    # Row 2 has only its last logit: whole blocks before it are masked.
    x[0, ::2], x[1, 1:], x[2, :-1], x[3, : v // 2] = (-np.inf,) * 4
    labels = np.array([1, 0, v - 1, 0, 3])
    loss, dx = run(memory, x, labels, dtype)
    finite = np.array([0, 1, 2, 4])
    want = cross_entropy(x[finite], labels[finite])
    assert (np.abs(loss[finite] - want) <= tolerance(v, dtype) * (1 + want)).all()
    assert loss[3] == np.inf  # its label is masked
    assert_close(dx, softmax(x) - np.eye(v)[labels], v, dtype)
    others = np.isinf(x) & (np.arange(v) != labels[:, None])
    assert (dx[others] == 0).all()


@pytest.mark.parametrize("v", [1, 7, 64, 3000])
def test_rows_do_not_touch_each_other(memory, rng, dtype, v):
    clean = rng.standard_normal((7, v))
    labels = rng.integers(0, v, 7)
    want, want_dx = run(memory, clean, labels, dtype)
    x = clean.copy()
    x[1, 0], x[2, v - 1], x[3, v // 2] = np.nan, np.nan, np.nan
    x[4] = -np.inf
    x[5, v // 3] = np.inf
    loss, dx = run(memory, x, labels, dtype)
    for i in (0, 6):
        assert loss[i] == want[i] and (dx[i] == want_dx[i]).all()
    for i in (1, 2, 3, 4, 5):
        assert np.isnan(loss[i])
    assert np.isnan(dx[1:5]).all()


def test_nan_in_each_place(memory, rng, dtype):
    v = 2100
    places = np.r_[0:70, 1020:1030, 2040:2100]
    x = np.where(np.arange(v) % 3, rng.standard_normal((len(places), v)), -np.inf)
    x[np.arange(len(places)), places] = np.nan
    loss, dx = run(memory, x, np.ones(len(places), np.int32), dtype)
    assert np.isnan(loss).all() and np.isnan(dx).all()


def test_ignored_rows_are_zero_whatever_they_hold(memory, dtype):
    x = np.full((3, 20), np.nan)
    x[1] = -np.inf
    loss, dx = run(memory, x, np.full(3, -1), dtype, np.full(3, np.nan))
    assert (loss == 0).all() and (dx == 0).all()


@pytest.mark.parametrize("spread", [0.0, 1e-3, 8.0])
@pytest.mark.parametrize("v", [262_144, 300_007])
def test_long_rows_keep_their_digits(memory, rng, v, spread):
    x = (spread * rng.standard_normal((2, v))).astype(np.float32)
    labels = np.array([5, v - 1])
    loss, dx = run(memory, x, labels, np.float32)
    want = cross_entropy(x.astype(np.float64), labels)
    assert np.abs(loss / want - 1).max() < 4e-7
    assert np.abs(dx.astype(np.float64).sum(axis=1)).max() < 2e-6
    assert np.abs(dx / softmax(x.astype(np.float64)) - 1)[0, 6:].max() < 1e-5


def test_small_probabilities_are_right_to_the_last_digits(memory, dtype):
    """With two classes the second gradient is e^x / (1 + e^x), over the whole range of exp."""
    x = np.linspace(np.log(np.finfo(dtype).smallest_normal) + 1e-3, 0, 20_011).astype(dtype)
    loss, dx = run(memory, np.stack([np.zeros_like(x), x], axis=1), np.zeros(len(x)), dtype)
    e = np.exp(x.astype(np.longdouble))
    assert np.abs(dx[:, 1] / (e / (1 + e)) - 1).max() < 3 * np.finfo(dtype).eps
    assert np.abs(loss - np.log1p(e)).max() < 2 * np.finfo(dtype).eps


def test_vanishing_probabilities_are_zero_or_subnormal(memory, dtype):
    x = np.linspace(
        4 * np.log(np.finfo(dtype).smallest_normal), np.log(np.finfo(dtype).smallest_normal), 1001
    ).astype(dtype)
    _, dx = run(memory, np.stack([np.zeros_like(x), x], axis=1), np.zeros(len(x)), dtype)
    assert (
        np.abs(dx[:, 1] - np.exp(x.astype(np.longdouble))).max()
        <= 2 * np.finfo(dtype).smallest_subnormal
    )


def test_threads_do_not_change_a_bit(rng, dtype):
    x, labels = (
        rng.standard_normal((37, 5003)).astype(dtype),
        rng.integers(-1, 5003, 37).astype(np.int32),
    )

    def both():
        loss, dx = np.zeros(37, dtype), np.zeros_like(x)
        _core.softmax_cross_entropy(x, labels, *PLAIN, *NONE, loss, None, dx)
        return loss, dx

    on_threads(both)


def test_gradients_in_the_place_of_the_logits(rng, dtype):
    """Gradients may overwrite the logits, also in rows without a label or upstream gradient."""
    q, p = (rng.standard_normal((6, 1500)).astype(dtype) for _ in range(2))
    labels, dloss = (
        np.array([3, -1, 1400, 0, 7, -1], np.int32),
        np.array([1, 2, 0, -1, 0, 0], dtype),
    )

    count_of_rows = {"softmax_cross_entropy": 1, "kl_div": 2, "js_div": 2}

    def called(kernel, arguments, where):
        loss, gradients = np.empty(6, dtype), [np.empty_like(q) if w is None else w for w in where]
        if count_of_rows[kernel] == 1:
            getattr(_core, kernel)(*arguments, None, dloss, None, loss, None, *gradients)
        else:
            getattr(_core, kernel)(*arguments, dloss, loss, *gradients)
        return [loss, *gradients]

    def both(kernel, arguments, count):
        want = called(kernel, arguments, [None] * count)
        copies = [
            a.copy() if isinstance(a, np.ndarray) and a.dtype == dtype else a for a in arguments
        ]
        for got, apart in zip(called(kernel, copies, copies[:count]), want, strict=True):
            np.testing.assert_array_equal(got, apart)

    both("softmax_cross_entropy", (q, labels, *PLAIN), 1)
    both("softmax_cross_entropy", (q, labels, 0.1, 0.01, 3.0), 1)
    both("kl_div", (q, p, *PAIR), 2)
    both("js_div", (q, p, *PAIR, 0.3), 2)
    both("js_div", (q, p, *CAPPED, 0.3), 2)
    # Each gradient may also overwrite the other logits.
    for given in (PAIR, CAPPED):
        loss, *apart = called("js_div", (q, p, *given, 0.3), [None, None])
        first, second = q.copy(), p.copy()
        again, *swapped = called("js_div", (first, second, *given, 0.3), [second, first])
        for got, want in zip([again, *swapped], [loss, *apart], strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sparse_losses_of_more_entries_than_classes(rng, dtype):
    """Callers give each class once; the core stays inside its memory if they do not."""
    x = rng.standard_normal((5, 4)).astype(dtype)
    ids = rng.integers(-1, 4, (5, 30)).astype(np.int32)
    logp = np.full((5, 30), -4, dtype)
    loss, gradient = np.empty(5, dtype), np.empty_like(x)
    for flags in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        _core.sparse_kl_div(
            x, ids, logp, None, None, None, 1.0, 0.0, 1.0, *flags, None, loss, gradient
        )
        assert not np.isnan(gradient).all()
