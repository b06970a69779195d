"""Arguments and results of value_and_grad and grad."""

from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
from tape_cases import Scale, numeric

from pyloss import nn, ops
from pyloss.autograd.differentiation import grad, value_and_grad, vjp
from pyloss.autograd.scope import current_tape

Pair = namedtuple("Pair", "a b")


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture(autouse=True)
def no_tape_is_left():
    yield
    assert current_tape() is None


@pytest.mark.parametrize(
    ("argnums", "expected"),
    [(0, 0), (1, 1), (-1, 2), (-3, 0), ((1,), (1,)), ((2, 0), (2, 0)), ([0, -1], (0, 2)), ((), ())],
)
def test_argnums(argnums, expected):
    arguments = np.array([2.0, 3.0]), np.array([5.0, 7.0]), np.array([11.0, 13.0])
    wanted = [arguments[1] * arguments[2], arguments[0] * arguments[2], arguments[0] * arguments[1]]
    value, grads = value_and_grad(
        lambda a, b, c: (a * b * c).sum() if argnums != () else np.float64(383), argnums
    )(*arguments)
    assert value == 2 * 5 * 11 + 3 * 7 * 13 or argnums == ()
    if isinstance(argnums, int):
        np.testing.assert_allclose(grads, wanted[expected])
    else:
        assert isinstance(grads, tuple) and len(grads) == len(expected)
        for g, i in zip(grads, expected, strict=True):
            np.testing.assert_allclose(g, wanted[i])


@pytest.mark.parametrize("argnums", [2, -3, (0, 2)])
def test_argnums_outside_the_call(argnums):
    with pytest.raises(ValueError, match="called with 2 arguments"):
        value_and_grad(lambda a, b: a.sum(), argnums)(np.ones(2), np.ones(2))


def test_trees_of_arguments(rng):
    x, y, z = rng.standard_normal((3, 4))
    tree = {"x": x, "inner": [y, (z, Pair(x, y))]}

    def f(t):
        y, (z, pair) = t["inner"]
        return (t["x"] * y * z + pair.a * pair.a).sum()

    value, grads = value_and_grad(f)(tree)
    np.testing.assert_allclose(value, (x * y * z + x * x).sum())
    np.testing.assert_allclose(grads["x"], y * z)
    np.testing.assert_allclose(grads["inner"][0], x * z)
    np.testing.assert_allclose(grads["inner"][1][0], x * y)
    assert isinstance(grads["inner"][1][1], Pair)
    np.testing.assert_allclose(grads["inner"][1][1].a, 2 * x)
    assert (grads["inner"][1][1].b == 0).all()


def test_a_tuple_comes_back_as_plain_values():
    def f(x):
        return (x * x).sum(), {"twice": x * 2, "n": 3, "list": [x.sum()]}, "text"

    (loss, extra, text), gradient = value_and_grad(f)(np.array([1.0, 2.0]))
    assert loss == 5 and text == "text" and extra["n"] == 3 and extra["list"][0] == 3
    assert type(extra["twice"]) is np.ndarray and (extra["twice"] == [2, 4]).all()
    assert (gradient == [2, 4]).all()


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(np.float32, np.float32), (np.float64, np.float64), (np.int64, np.float32), (np.uint8, np.float32), (bool, np.float32),
     (np.float16, np.float16), (ml_dtypes.bfloat16, ml_dtypes.bfloat16), (">f4", np.float32), (">f8", np.float64)],
)  # fmt: skip
def test_types(dtype, kept):
    value, gradient = value_and_grad(lambda x: (x * x).sum())(np.array([1, 0, 1]).astype(dtype))
    assert value == 2 and value.dtype == gradient.dtype == kept
    np.testing.assert_array_equal(gradient, [2, 0, 2])


def test_float64_stays_float64_through_a_float32_operation():
    gradient = grad(lambda x: ops.swiglu(x, x).sum() + (x * x).sum())(np.array([0.5, 1.0]))
    assert gradient.dtype == np.float64
    np.testing.assert_allclose(
        gradient, numeric(lambda x: (x * x / (1 + np.exp(-x)) + x * x).sum(), [0.5, 1.0]), rtol=1e-5
    )


@pytest.mark.parametrize("wrong", [np.ones(2, complex), np.array(["a"]), np.array([None]), "text"])
def test_wrong_types(wrong):
    with pytest.raises(TypeError, match="cannot differentiate"):
        value_and_grad(lambda x: x)(wrong)


@pytest.mark.parametrize("f", [lambda x: x * 2, lambda x: (x * 2, 1), lambda x: np.zeros(3)])
def test_the_result_must_be_a_scalar(f):
    with pytest.raises(ValueError, match=r"scalar.*\(3,\)"):
        value_and_grad(f)(np.ones(3))


def test_numbers_without_dimensions():
    value, gradient = value_and_grad(lambda x: x * x + x.sum() + x.mean() / 2)(3.0)
    assert value == 13.5 and gradient.shape == () and gradient == 7.5
    gradient = grad(lambda x: (x * np.ones(4, np.float32)).sum() + x)(np.float32(2))
    assert gradient.shape == () and gradient == 5 and gradient.dtype == np.float32


def test_unused_arguments_have_zero_gradients():
    a, b = np.ones((2, 3)), np.ones((0, 4), np.float32)
    value, (da, db) = value_and_grad(lambda a, b: np.float32(4), (0, 1))(a, b)
    assert (
        value == 4
        and da.shape == a.shape
        and db.shape == b.shape
        and not da.any()
        and da.dtype == a.dtype
    )


def test_arguments_are_not_touched_and_gradients_are_the_callers_alone(rng):
    a, b = (rng.standard_normal(5).astype(np.float32) for _ in range(2))
    before = a.copy()
    da, db = grad(lambda a, b: ops.add(a, b).sum(), (0, 1))(a, b)
    da *= 7
    assert (db == 1).all() and (a == before).all()
    model = Scale(a)
    (_, first), second = nn.value_and_grad(model, lambda: ops.add(model.weight, b).sum())(), a
    first["weight"] *= 0
    assert (second == before).all()


def test_vjp_is_mlxs():
    x, w = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    outputs, grads = vjp(lambda x, w: (x * w, np.exp(x)), [x, w], [np.ones(2), np.zeros(2)])
    np.testing.assert_array_equal(outputs[0], x * w)
    np.testing.assert_array_equal(grads[0], w)
    np.testing.assert_array_equal(grads[1], x)
    with pytest.raises(ValueError, match="2 outputs need as many cotangents, got 1"):
        vjp(lambda x: (x, x), [x], [x])
    with pytest.raises(ValueError, match=r"shape \(1,\), its output \(2,\)"):
        vjp(lambda x: x * 2, [x], x[:1])


def test_auxiliary_results():
    f = value_and_grad(lambda x: (x.sum(), {"mean": x.mean()}), has_aux=True)
    (value, aux), gradient = f(np.ones(2))
    assert value == 2 and aux == {"mean": 1} and gradient.tolist() == [1, 1]
    gradient, aux = grad(lambda x: (x.sum(), 5), has_aux=True)(np.ones(2))
    assert aux == 5 and gradient.tolist() == [1, 1]
    with pytest.raises(TypeError, match=r"\(value, aux\)"):
        value_and_grad(lambda x: x.sum(), has_aux=True)(np.ones(2))


def test_vjp_of_trees():
    x = np.array([1.0, 2.0])
    outputs, (dx,) = vjp(
        lambda a: {"y": a * a, "z": (a * 1, [a * 2, 3])}, [x], {"y": x, "z": (x, [10 * x, 0])}
    )
    np.testing.assert_array_equal(outputs["z"][1][0], 2 * x)
    np.testing.assert_array_equal(dx, 2 * x * x + x + 20 * x)
    dx = vjp(lambda a: [[a * 1, a * 2], a], [x], [[x, x], x])[1][0]
    np.testing.assert_array_equal(dx, 4 * x)


@pytest.mark.parametrize(
    ("f", "cotangent", "error", "message"),
    [
        (lambda a: a * 1, np.ones(2, complex), TypeError, "a cotangent is a ndarray of .*complex"),
        (lambda a: (a, None), [np.ones(2), None], TypeError, "an output is a NoneType"),
        (lambda a: (a, "x"), [np.ones(2), "x"], TypeError, "an output is a str"),
        (lambda a: {"y": a}, np.ones(2), ValueError, r"a dict with the keys \['y'\]"),
        (lambda a: {"y": a}, {"x": np.ones(2)}, ValueError, r"a dict with the keys \['y'\]"),
        (lambda a: (a, (a, a)), [np.ones(2), [np.ones(2)]], ValueError, "2 outputs need as many"),
    ],
)
def test_cotangents_that_do_not_fit(f, cotangent, error, message):
    with pytest.raises(error, match=message):
        vjp(f, [np.ones(2)], cotangent)
