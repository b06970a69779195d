"""The tape: every operator of Tensor, nesting, threads and memory."""

import gc
import threading
import weakref
from collections import namedtuple

import numpy as np
import pytest
from tape_cases import Scale, buffers, numeric

import pyloss
from pyloss import nn, ops
from pyloss.autograd.differentiation import grad, value_and_grad
from pyloss.autograd.scope import current_tape, no_grad
from pyloss.autograd.tape import Tape, keep, record
from pyloss.autograd.tensor import Tensor

Pair = namedtuple("Pair", "a b")


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture(autouse=True)
def no_tape_is_left():
    yield
    assert current_tape() is None


# Operators


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 4), (3, 4)),
        ((3, 4), (4,)),
        ((3, 1), (1, 4)),
        ((2, 3, 1), (3, 4)),
        ((3,), ()),
        ((0, 4), (4,)),
        ((1, 1), ()),
    ],
)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_operators_against_differences(rng, name, left, right):
    f = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
    }[name]
    a, b = rng.standard_normal(left), rng.uniform(0.5, 2, right)
    upstream = rng.standard_normal(np.broadcast_shapes(left, right))
    value, (da, db) = value_and_grad(lambda a, b: (f(a, b) * upstream).sum(), (0, 1))(a, b)
    np.testing.assert_allclose(value, (f(a, b) * upstream).sum())
    np.testing.assert_allclose(
        da, numeric(lambda a: (f(a, b) * upstream).sum(), a), atol=1e-8, rtol=1e-6
    )
    np.testing.assert_allclose(
        db, numeric(lambda b: (f(a, b) * upstream).sum(), b), atol=1e-8, rtol=1e-6
    )
    # One operand is traced, the other is an array. NumPy must leave `ndarray + Tensor` to Tensor.
    np.testing.assert_array_equal(grad(lambda t: (f(t, b) * upstream).sum())(a), da)
    np.testing.assert_array_equal(grad(lambda t: (upstream * f(a, t)).sum())(b), db)


SCALARS = {
    "x + 2": lambda x: x + 2, "2 + x": lambda x: 2 + x, "x - 2": lambda x: x - 2, "2 - x": lambda x: 2 - x,
    "x * 3": lambda x: x * 3, "3 * x": lambda x: 3 * x, "x / 3": lambda x: x / 3, "3 / x": lambda x: 3 / x,
    "-x": lambda x: -x, "x**3": lambda x: x**3, "x**-1.5": lambda x: x**-1.5, "x**0": lambda x: x**0,
    "x**array": lambda x: x ** np.array([[0.0, 1.0, 2.0, 3.5]]),
    "x + x": lambda x: x + x, "x * x": lambda x: x * x, "x - x": lambda x: x - x, "x / x": lambda x: x / x,
    "x * x * x + x": lambda x: x * x * x + x,
    "float32 number": lambda x: x * np.float32(0.5),
    "shared": lambda x: (lambda y: y * y + y)(x + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SCALARS))
def test_numbers_and_values_used_twice(rng, name):
    f, x = SCALARS[name], rng.uniform(0.5, 2, (3, 4))
    upstream = rng.standard_normal((3, 4))
    value, gradient = value_and_grad(lambda x: (f(x) * upstream).sum())(x)
    np.testing.assert_allclose(value, (f(x) * upstream).sum())
    np.testing.assert_allclose(
        gradient, numeric(lambda x: (f(x) * upstream).sum(), x), atol=1e-7, rtol=1e-6
    )
    single = grad(lambda x: (f(x) * upstream.astype(np.float32)).sum())(x.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, gradient, rtol=1e-4, atol=1e-4)


def test_powers_at_zero():
    np.testing.assert_array_equal(grad(lambda x: (x**2 + x**1 + x**0).sum())(np.zeros(2)), [1, 1])


def test_an_exponent_gets_its_gradient():
    x = np.array([0.5, 1.0, 3.0])
    np.testing.assert_allclose(grad(lambda x: (x**x).sum())(x), x**x * (np.log(x) + 1))
    np.testing.assert_allclose(grad(lambda x: (2**x).sum())(x), 2**x * np.log(2))


@pytest.mark.parametrize("method", ["sum", "mean"])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), (-1, -2), (0, 1, 2)])
def test_reductions(rng, method, axis, keepdims):
    x = rng.standard_normal((2, 3, 5))
    want = getattr(x, method)(axis=axis, keepdims=keepdims)
    upstream = rng.standard_normal(want.shape)
    value, gradient = value_and_grad(
        lambda t: (getattr(t, method)(axis, keepdims=keepdims) * upstream).sum()
    )(x)
    np.testing.assert_allclose(value, (want * upstream).sum())
    np.testing.assert_allclose(
        gradient,
        numeric(lambda x: (getattr(x, method)(axis=axis, keepdims=keepdims) * upstream).sum(), x),
        atol=1e-8,
    )


def test_the_gradient_of_a_sum_is_an_array_of_its_own():
    """A broadcast view would be read-only, so adding to it would fail."""
    np.testing.assert_array_equal(
        grad(lambda x: x.sum() + x.sum() + (x * x).sum())(np.ones((1, 3))), [[4, 4, 4]]
    )
    np.testing.assert_array_equal(
        grad(lambda x: x.sum() + x.sum() + x.sum())(np.ones(1, np.float32)), [3]
    )


def test_reshape_and_the_small_things(rng):
    x, upstream = rng.standard_normal((2, 6)), rng.standard_normal((4, 3))
    gradient = grad(lambda t: (t.reshape(4, 3) * upstream + t.reshape((4, -1))).sum())(x)
    np.testing.assert_allclose(gradient, upstream.reshape(2, 6) + 1)

    def f(t):
        assert (t.shape, t.ndim, t.size, t.dtype, len(t)) == ((2, 6), 2, 12, np.float64, 2)
        assert t.sum().item() == pytest.approx(x.sum())
        assert repr(t).startswith("Tensor([2, 6], float64, host,\n  [[")
        return t.sum()

    value_and_grad(f)(x)


def test_outside_of_a_tape_values_are_plain():
    assert type(Tensor(np.ones(2)) + 1) is np.ndarray
    assert type(ops.add(np.ones(2, np.float32), np.ones(2, np.float32))) is np.ndarray


# Nesting and threads


def test_a_value_of_an_outer_recording_is_refused_in_an_inner_one(rng):
    x, y = rng.standard_normal(3), rng.standard_normal(3)

    def f(a, constant):
        value, gradient = value_and_grad(lambda b: (b * constant(a) * b).sum())(y)
        assert type(gradient) is np.ndarray
        return (a * a).sum() * value

    with pytest.raises(TypeError, match="gradients of gradients"):
        value_and_grad(f)(x, lambda a: a)
    _, gradient = value_and_grad(f)(x, pyloss.stop_gradient)
    np.testing.assert_allclose(gradient, 2 * x * (x * y * y).sum())
    with pytest.raises(TypeError, match="inner gradient.*gradients of gradients are not computed"):
        value_and_grad(lambda a: value_and_grad(lambda b: (b * b).sum())(a)[0])(x)


def test_a_trained_array_of_an_outer_recording_is_refused_in_an_inner_one():
    model = Scale(np.ones(3, np.float32))

    def inner():
        return value_and_grad(lambda b: (b * model.weight).sum())(np.ones(3, np.float32))[0]

    with pytest.raises(TypeError, match="gradients of gradients"):
        nn.value_and_grad(model, inner)()
    with pyloss.no_grad():
        assert inner() == 3


def test_a_tensor_of_a_finished_tape_is_refused():
    """As a constant it would lose its gradient from the second step on."""
    leaked = []
    grad(lambda x: (leaked.append(x * 3), x.sum())[1])(np.ones(2))
    with pytest.raises(TypeError, match="earlier recording"):
        grad(lambda x: (x * leaked[0]).sum())(np.ones(2))
    gradient = grad(lambda x: (x * leaked[0].data).sum())(np.ones(2))
    np.testing.assert_array_equal(gradient, [3, 3])


def test_two_threads_at_once(rng):
    arrays = [rng.standard_normal((64, 64)).astype(np.float32) for _ in range(2)]
    shared = rng.standard_normal((64, 64)).astype(np.float32)
    model = Scale(shared)
    start, results = threading.Barrier(2), [None, None]

    def work(i):
        start.wait()
        for _ in range(30):
            plain = value_and_grad(lambda a: (ops.linear(a, shared) * arrays[i]).sum())(arrays[i])
            trained = nn.value_and_grad(
                model, lambda: (ops.linear(arrays[i], model.weight) * arrays[i]).sum()
            )()
            results[i] = plain[1], trained[1]["weight"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, (dx, dw) in enumerate(results):
        a = arrays[i].astype(np.float64)
        np.testing.assert_allclose(dx, a @ shared, atol=1e-3)
        np.testing.assert_allclose(dw, a.T @ a, atol=1e-3)


# Memory and errors


def test_cheap_values_are_computed_again_and_not_kept(rng):
    x, norm, w = (
        rng.standard_normal((64, 256)).astype(np.float32),
        np.ones(256, np.float32),
        rng.standard_normal((8, 256)).astype(np.float32),
    )
    with Tape() as tape:
        leaf = tape.watch(norm)
        y = ops.rms_norm(x, norm)
        output = weakref.ref(y.data)
        value, kept = y.data.copy(), keep(y)
        z = ops.linear(y, w)
        del y
        gc.collect()
        assert output() is None, "the output of a norm is kept for backward"
        assert kept().tobytes() == value.tobytes() and kept() is kept()
        tape.backward(z, np.ones_like(z.data))
    want = grad(lambda n: (ops.linear(Tensor.__mul__(n, 1) * (value / norm), w)).sum())(norm)
    np.testing.assert_allclose(leaf.grad, want, rtol=1e-4, atol=1e-3)


def test_a_chain_of_cheap_values_is_computed_again(rng):
    """The product's trained weight reads swiglu of two norms; the tape recomputes the chain."""
    x, w = rng.standard_normal((32, 96)), rng.standard_normal((4, 96))

    def norm(x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    n = norm(x)
    want = np.ones((32, 4)).T @ (n / (1 + np.exp(-n)) * n)
    x, w, ones = (a.astype(np.float32) for a in (x, w, np.ones(96)))

    def f(x, w):
        return ops.linear(ops.swiglu(ops.rms_norm(x, ones), ops.rms_norm(x, ones)), w).sum()

    np.testing.assert_allclose(grad(f, 1)(x, w), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad(f, (0, 1))(x, w)[1], want, rtol=1e-4, atol=1e-4)


def test_backward_frees_what_was_saved(rng):
    x, w = (
        rng.standard_normal((5, 7)).astype(np.float32),
        rng.standard_normal((11, 7)).astype(np.float32),
    )
    saved = []

    def f(x):
        y = ops.linear(ops.add(x, x), w)
        saved.append(weakref.ref(y.data))
        return (y * y).sum()

    gc.disable()  # reference counts must suffice
    try:
        value_and_grad(f)(x)
        assert saved[0]() is None
    finally:
        gc.enable()


def test_backward_frees_as_it_goes_and_what_outlives_it_keeps_nothing(rng):
    x, w = (
        rng.standard_normal((64, 64)).astype(np.float32),
        rng.standard_normal((64, 64)).astype(np.float32),
    )
    saved, outliving, alive_at_the_first_layer = [], [], []

    def f(x, w):
        y = _look(x, lambda: alive_at_the_first_layer.append(sum(r() is not None for r in saved)))
        for _ in range(5):
            y = ops.add(y, y)
            saved.append(weakref.ref(y.data))
            y = ops.linear(y, w)
        outliving.append(y)
        return y.sum()

    value_and_grad(f, (0, 1))(x, w)
    assert alive_at_the_first_layer == [0]
    assert [r() for r in saved] == [None] * 5 and len(outliving) == 1


def _look(x, look):
    """The identity; calls `look` when its gradient is computed."""

    def vjp(dy, grads):
        look()
        grads.put(0, dy, own=False)

    return record(x.data, (x,), vjp)


def test_what_is_computed_without_gradients_is_a_constant(rng):
    x, w = (
        rng.standard_normal((5, 7)).astype(np.float32),
        rng.standard_normal((3, 7)).astype(np.float32),
    )

    def f(a, b):
        with no_grad():
            constant = ops.linear(a, b)
            assert type(constant) is np.ndarray and current_tape() is None
        return (ops.linear(a, b) * constant).sum()

    constant = ops.linear(x, w)
    for gradient, wanted in zip(grad(f, (0, 1))(x, w), (constant @ w, constant.T @ x)):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="within"), no_grad():
        raise RuntimeError("within")


def test_an_error_leaves_no_tape_and_no_memory(rng):
    x, w = (
        rng.standard_normal((5, 7)).astype(np.float32),
        rng.standard_normal((3, 7)).astype(np.float32),
    )
    before = buffers()

    def broken(a):
        ops.linear(ops.add(a, a), w)
        raise RuntimeError("within")

    for f in (broken, lambda a: pyloss.checkpoint(broken, a), lambda a: grad(broken)(a.data)):
        with pytest.raises(RuntimeError, match="within"):
            value_and_grad(f)(x)
        assert current_tape() is None
    assert buffers() == before
    np.testing.assert_array_equal(grad(lambda a: (a * a).sum())(x), 2 * x)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (0, 1, 2), ()])
def test_an_operation_with_several_outputs(rng, used):
    """Outputs that take no part get no gradient; `project_all` is one operation on the tape."""
    x, *weights = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((5, 7), (3, 7), (4, 7), (2, 7))
    )

    def total(outputs):
        return sum((outputs[i] * outputs[i]).sum() for i in used) + 0.0

    def together(x, weights):
        return total(ops.project_all(x, [ops.Projection(w) for w in weights])) + (x * 0.0).sum()

    def apart(x, weights):
        return total([ops.linear(x, w) for w in weights]) + (x * 0.0).sum()

    value, gradients = value_and_grad(together, (0, 1))(x, weights)
    wanted, expected = value_and_grad(apart, (0, 1))(x, weights)
    assert value == wanted
    for found, correct in zip((gradients[0], *gradients[1]), (expected[0], *expected[1])):
        assert found.tobytes() == correct.tobytes()
    for i, w in enumerate(weights):
        by_w = 2 * (x @ w.T).T @ x if i in used else np.zeros_like(w)
        np.testing.assert_allclose(gradients[1][i], by_w, rtol=1e-4, atol=1e-4)
