"""How the losses run: one call of the core for loss and gradient, the same bits on any threads, every instruction set, huge arrays."""

import threading

import numpy as np
import pytest
from kernel_checks import on_threads
from loss_cases import BCE, DTYPES, EVERY, LOSSES, PLAIN, Loss, assert_gradient, assert_value

import pyloss
from pyloss import _core


@pytest.fixture
def rng():
    return np.random.default_rng(59)


@pytest.fixture
def calls():
    """What the core was called for since the last time this was asked."""

    def since():
        return {name: count for name, (count, _, _) in _core.profile(True).items() if count}

    since()
    yield since
    _core.profile(False)


# Calls


@pytest.mark.parametrize(
    "f",
    [
        lambda loss, *a: loss(*a).sum(),
        lambda loss, *a: loss(*a).mean(),
        lambda loss, *a: loss(*a, reduction="sum"),
        lambda loss, *a: loss(*a, reduction="mean"),
        lambda loss, *a: loss(*a, reduction="mean", weights=np.full(loss.out_shape((4, 9)), 0.5)) * 3,
        lambda loss, *a: (loss(*a) * np.arange(loss.out_shape((4, 9))[-1])).sum() / 7,
    ],
    ids=["sum()", "mean()", "sum", "mean", "weighted mean", "weighted sum()"],
)
@pytest.mark.parametrize("loss", [*LOSSES, BCE], ids=str)
def test_loss_and_gradient_are_one_call(rng, loss, calls, f):
    """When the gradient of the result is known beforehand; and the value is the one that a call alone gives."""
    arguments = loss.arguments(rng, (4, 9))
    logits, other = arguments[: loss.logits], arguments[loss.logits :]
    calls()
    value, _ = pyloss.value_and_grad(lambda *x: f(loss, *x, *other), range(loss.logits))(*logits)
    assert list(calls().values()) == [1]
    assert value == f(loss, *arguments)


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_a_loss_alone_is_one_call(rng, loss, calls):
    arguments = loss.arguments(rng, (4, 9))
    calls()
    loss(*arguments)
    assert list(calls().values()) == [1]


def test_a_gradient_that_depends_on_the_loss_is_a_second_call(rng, calls):
    loss = Loss("kl_div_loss", logits=2)
    q, p = loss.arguments(rng, (4, 9))
    calls()
    value, gradient = pyloss.value_and_grad(lambda q: (loss(q, p) ** 2).sum())(q)
    assert list(calls().values()) == [2]
    want, (slope, _) = loss.formula(q, p)
    assert_gradient(gradient, 2 * want[:, None] * slope, np.float64)
    np.testing.assert_allclose(value, (want**2).sum())


# Threads and instruction sets


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_threads_do_not_change_a_bit(rng, loss, kind):
    """More and fewer rows than threads."""
    for shape in ((37, 1503), (1, 40_001)):
        arguments = loss.arguments(rng, shape, DTYPES[kind])
        upstream = rng.standard_normal(loss.out_shape(shape)).astype(np.float32)

        def both(arguments=arguments, upstream=upstream):
            value, gradients = loss.gradients(*arguments, upstream=upstream)
            totals = [] if loss.own_type else [np.asarray(loss(*arguments, reduction=r)) for r in ("sum", "mean")]
            return (np.asarray(value), *gradients, *totals)

        on_threads(both)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_every_instruction_set(isa, rng, loss, kind):
    for shape in ((3, 1061), (9, 3), (2, 64)):
        arguments = loss.arguments(rng, shape, DTYPES[kind])
        if loss is not BCE:
            for x in arguments[: loss.logits]:
                x[1, shape[1] // 2 :] = -np.inf
        upstream = rng.standard_normal(loss.out_shape(shape)).astype(np.float32)
        if loss.own_type:
            upstream[1, shape[1] // 2 :] = 0  # log 0 times what comes from above
        want, slopes = loss.formula(*arguments, upstream=upstream)
        got, gradients = loss.gradients(*arguments, upstream=upstream)
        assert_value(loss, got, want, DTYPES[kind])
        for gradient, slope in zip(gradients, slopes):
            assert_gradient(gradient, slope, DTYPES[kind], np.abs(upstream).max())


def test_several_python_threads_at_once(rng):
    """The core is called without the GIL: nothing is shared between calls."""
    work = [(loss, loss.arguments(rng, (16, 3001), np.float32)) for loss in PLAIN]
    wanted = [loss.gradients(*arguments) for loss, arguments in work]
    wrong = []

    def check(first):
        for i in range(3 * len(work)):
            loss, arguments = work[(first + i) % len(work)]
            got, gradients = loss.gradients(*arguments)
            want, slopes = wanted[(first + i) % len(work)]
            same = got.tobytes() == want.tobytes() and all(a.tobytes() == b.tobytes() for a, b in zip(gradients, slopes))
            if not same:
                wrong.append(loss)

    threads = [threading.Thread(target=check, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Size


def free_memory():
    """Bytes that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return 0


ROWS, V = 32_800, 65_536  # rows V > 2^31


def test_more_than_2_31_elements_without_their_memory(rng):
    """One row of logits, seen 32,800 times: every row's loss is the first one's, and no copy is made."""
    row = rng.standard_normal(V).astype(np.float16)
    logits = np.broadcast_to(row, (ROWS, V))
    assert logits.size > 2**31
    labels = rng.integers(0, V, ROWS)
    before = _core.buffer_stats()
    got = pyloss.softmax_cross_entropy(logits, labels)
    want = pyloss.softmax_cross_entropy(row, np.int64(0)) + float(row[0]) - row.astype(np.float64)[labels]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert sum(_core.buffer_stats().values()) - sum(before.values()) < 1 << 30


@pytest.mark.skipif(free_memory() < 10 << 30, reason="needs 10 GB of memory: 4.3 GB of logits and as much of gradients")
def test_more_than_2_31_elements_and_their_gradient(rng):
    """The last rows are as right as the first."""
    logits = np.zeros((ROWS, V), np.float16)
    logits[[0, -1]] = rng.standard_normal((2, V)).astype(np.float16)
    labels = rng.integers(0, V, ROWS)
    loss = Loss("softmax_cross_entropy")
    got, (gradient,) = loss.gradients(logits, labels)
    want, (slope,) = loss.formula(logits[[0, 1, -1]], labels[[0, 1, -1]])
    np.testing.assert_allclose(got[[0, 1, -1]], want, rtol=1e-6)
    assert_gradient(gradient[[0, 1, -1]], slope, np.float16)
