"""How losses run: one core call for loss and gradient, threads, instruction sets, huge arrays."""

import threading

import numpy as np
import pytest
from kernel_checks import on_threads
from loss_cases import BCE, DTYPES, EVERY, LOSSES, PLAIN, Loss, assert_gradient, assert_value
from loss_formulas import IGNORE

import pyloss
from pyloss import _core


@pytest.fixture
def rng():
    return np.random.default_rng(59)


@pytest.fixture
def calls():
    """A function that returns the core's calls since its last call."""

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
        lambda loss, *a: (
            loss(*a, reduction="mean", weights=np.full(loss.out_shape((4, 9)), 0.5)) * 3
        ),
        lambda loss, *a: (loss(*a) * np.arange(loss.out_shape((4, 9))[-1])).sum() / 7,
    ],
    ids=["sum()", "mean()", "sum", "mean", "weighted mean", "weighted sum()"],
)
@pytest.mark.parametrize("loss", [*LOSSES, BCE], ids=str)
def test_loss_and_gradient_are_one_call(rng, loss, calls, f):
    """Loss and gradient take one call if the upstream gradient is known; the value is unchanged."""
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
    """With more and with fewer rows than threads."""
    for shape in ((37, 1503), (1, 40_001)):
        arguments = loss.arguments(rng, shape, DTYPES[kind])
        upstream = rng.standard_normal(loss.out_shape(shape)).astype(np.float32)

        def both(arguments=arguments, upstream=upstream):
            value, gradients = loss.gradients(*arguments, upstream=upstream)
            totals = (
                []
                if loss.own_type
                else [np.asarray(loss(*arguments, reduction=r)) for r in ("sum", "mean")]
            )
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
            upstream[1, shape[1] // 2 :] = 0  # else log 0 times the upstream gradient
        want, slopes = loss.formula(*arguments, upstream=upstream)
        got, gradients = loss.gradients(*arguments, upstream=upstream)
        assert_value(loss, got, want, DTYPES[kind])
        for gradient, slope in zip(gradients, slopes):
            assert_gradient(gradient, slope, DTYPES[kind], np.abs(upstream).max())


def test_several_python_threads_at_once(rng):
    """The core runs without the GIL; calls share nothing."""
    work = [(loss, loss.arguments(rng, (16, 3001), np.float32)) for loss in PLAIN]
    wanted = [loss.gradients(*arguments) for loss, arguments in work]
    wrong = []

    def check(first):
        for i in range(3 * len(work)):
            loss, arguments = work[(first + i) % len(work)]
            got, gradients = loss.gradients(*arguments)
            want, slopes = wanted[(first + i) % len(work)]
            same = got.tobytes() == want.tobytes() and all(
                a.tobytes() == b.tobytes() for a, b in zip(gradients, slopes)
            )
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
    """Bytes available without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(
                int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")
            )
    except OSError:
        return 0


ROWS, V = 32_800, 65_536  # ROWS V > 2^31


def two_rows_seen_many_times(rng):
    """Logits [ROWS, V] that all alias two rows.

    Only the first and last few rows have labels, so the others cost no time.
    """
    rows = rng.standard_normal((2, V)).astype(np.float16)
    logits = np.lib.stride_tricks.as_strided(rows, (2, ROWS // 2, V), (rows.strides[0], 0, 2))
    labels = np.full((2, ROWS // 2), IGNORE)
    labels[0, :3], labels[1, -3:] = [5, 0, V - 1], [7, V - 1, 1]
    assert logits.size > 2**31
    return rows, logits, labels


def test_more_than_2_31_elements_without_their_memory(rng):
    rows, logits, labels = two_rows_seen_many_times(rng)
    got = pyloss.softmax_cross_entropy(logits, labels)
    for i, part in enumerate((np.s_[0, :3], np.s_[1, -3:])):
        np.testing.assert_array_equal(
            got[part], pyloss.softmax_cross_entropy(rows[[i] * 3], labels[part])
        )
    assert np.count_nonzero(got) == 6
    assert _core.buffer_stats()["peak"] < 4 << 30


@pytest.fixture
def returned():
    """What the test frees goes back to the system: other processes need it."""
    yield
    _core.trim()


@pytest.mark.slow
@pytest.mark.usefixtures("returned")
@pytest.mark.skipif(free_memory() < 6 << 30, reason="needs 6 GB of free memory: gradients take 4.3")
def test_more_than_2_31_elements_of_a_gradient(rng):
    rows, logits, labels = two_rows_seen_many_times(rng)
    loss = Loss("softmax_cross_entropy")
    _, (gradient,) = loss.gradients(logits, labels)
    for i, part in enumerate((np.s_[0, :3], np.s_[1, -3:])):
        np.testing.assert_array_equal(
            gradient[part], loss.gradients(rows[[i] * 3], labels[part])[1][0]
        )
    assert (
        not gradient[0, 3:].view(np.uint16)[:: ROWS // 64].any()
        and not gradient[1, :-3].view(np.uint16)[:: ROWS // 64].any()
    )


@pytest.mark.slow
@pytest.mark.usefixtures("returned")
@pytest.mark.skipif(
    free_memory() < 12 << 30,
    reason="needs 12 GB of free memory: 4.3 of logits and 4.3 of gradients",
)
def test_more_than_2_31_classes(rng):
    """One row of zeros, but its first and last logits hold half of the probability each."""
    v = 2**31 + 64
    logits = np.zeros((1, v), np.float16)
    logits[0, [0, -1]] = 30  # e^30 is 5,000 v
    _core.trim()
    for label in (0, v - 65):
        loss, (gradient,) = Loss("softmax_cross_entropy").gradients(logits, np.array([label]))
        total = np.log(2 + (v - 2) * np.exp(-30.0))
        np.testing.assert_allclose(loss, total + (0 if label == 0 else 30), rtol=1e-6)
        expected = np.exp(-total) * np.array([1, 1]) - [label == 0, 0]
        np.testing.assert_allclose(gradient[0, [0, -1]].astype(np.float64), expected, rtol=1e-3)
        assert label == 0 or gradient[0, label] == -1
        del gradient  # the next one takes its memory
