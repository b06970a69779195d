"""Calls of the core from several threads and after fork, and its number of threads."""

import os
import threading

import numpy as np
import pytest
from kernel_checks import f32

from pyloss import _core


def work(seed):
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, 200, 577), dtype=np.float32)
    w = rng.standard_normal(577, dtype=np.float32)
    y, dx, rstd, dw = np.zeros_like(x), np.zeros_like(x), f32(200), f32(577)
    _core.rms_norm_forward(x, w, 1e-5, y, rstd)
    _core.rms_norm_grad(dy, x, w, rstd, dx, dw)
    product = f32(200, 200)
    _core.matmul_nt(x, dy, 1.0, 0, product)
    return y.tobytes() + dx.tobytes() + dw.tobytes() + product.tobytes()


@pytest.fixture
def threads():
    before = _core.num_threads()
    yield _core.set_num_threads
    _core.set_num_threads(before)


def test_number_of_threads(threads):
    threads(3)
    assert _core.num_threads() == 3
    for bad in (0, -1, 1 << 31, 1 << 70):
        with pytest.raises(
            ValueError,
            match=f"the number of threads is {bad}; it must be a whole number from 1 to 2147483647",
        ):
            threads(bad)
    with pytest.raises(
        TypeError, match="the number of threads must be a whole number .*, not float"
    ):
        threads(2.0)
    threads(100_000)
    assert 1 <= _core.num_threads() <= 100_000
    threads(2)


def test_calls_from_several_threads(threads):
    threads(2)
    want = [work(seed) for seed in range(4)]
    wrong = []

    def call(seed):
        for _ in range(20):
            if work(seed) != want[seed]:
                wrong.append(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for n in (1, 3, 2, 4) * 5:  # changes while others call
        threads(n)
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kernels_in_a_forked_child_and_its_parent(threads):
    threads(2)
    want = work(1)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            right = work(1) == want and work(1) == want and _core.empty((1000,)).size == 1000
            os._exit(0 if right else 1)
        assert work(1) == want
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert work(1) == want


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_while_another_thread_is_in_a_kernel(threads):
    threads(2)
    want = work(1)
    stop = threading.Event()

    def call():
        while not stop.is_set():
            work(2)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                os._exit(0 if work(1) == want else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        caller.join()
