"""no_grad, in every order and thread."""

import copy
import threading

import numpy as np
import pytest

import pyloss
from pyloss import nn


def test_one_no_grad_is_entered_twice():
    shared = pyloss.no_grad()

    def loss(x):
        with shared:
            a = x * 2
            with shared:
                pass
            b = x * 3
        return (x * x).sum() + (a * b).sum()

    assert pyloss.grad(loss)(np.array([1.0, 2.0])).tolist() == [2, 4]


def test_one_no_grad_serves_several_threads():
    shared, x = pyloss.no_grad(), np.array([1.0, 2.0])
    entered, left, found = threading.Event(), threading.Event(), []

    def record():
        def loss(x):
            with shared:
                entered.set()
                left.wait()
            return (x * x).sum()

        found.append(pyloss.grad(loss)(x))

    thread = threading.Thread(target=record)
    thread.start()
    entered.wait()
    with shared:
        pass
    left.set()
    thread.join()
    assert found[0].tolist() == [2, 4]


def test_no_grad_decorates_functions_and_refuses_generators():
    @pyloss.no_grad()
    def double(x):
        return x * 2

    assert pyloss.grad(lambda x: (double(x) * x).sum())(np.ones(2)).tolist() == [2, 2]

    def generator(x):
        yield x * 2

    async def later(x):
        return x * 2

    for function in (generator, later):
        with pytest.raises(TypeError, match=f"{function.__name__} is a generator or async"):
            pyloss.no_grad()(function)


@pytest.mark.parametrize(
    "same",
    [
        lambda t: +t, copy.copy, copy.deepcopy, lambda t: t.clip(), lambda t: np.clip(t, None, None),
        lambda t: pyloss.checkpoint(lambda a: a, t),
        lambda t: pyloss.checkpoint(lambda a: {"a": [a]}, t)["a"][0],
        nn.Dropout(0.0), nn.Dropout(0.5).eval(), np.real, lambda t: t.astype(t.dtype),
        lambda t: t.reshape(2), lambda t: np.diff(t, 0), lambda t: np.squeeze(t),
    ],
)  # fmt: skip
def test_functions_that_change_nothing_give_constants(same):
    def loss(x):
        t = x * 2
        carried = same(t)
        assert isinstance(carried, pyloss.Tensor)
        with pyloss.no_grad():
            constant = same(t)
        assert type(constant) is np.ndarray
        return (carried * constant).sum()

    assert pyloss.grad(loss)(np.ones(2, np.float32)).tolist() == [4, 4]
