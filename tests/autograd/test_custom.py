"""Functions with a gradient that is written by hand, and constants."""

import collections
import dataclasses

import numpy as np
import pytest
from tape_cases import Trained, single

import pyloss
from pyloss import nn


def test_custom_functions():
    @pyloss.custom_function
    def scaled(x, factor):
        """Doc."""
        assert type(x) is np.ndarray
        return x * factor

    assert scaled.__name__ == "scaled" and scaled(np.ones(2), 3.0).tolist() == [3, 3]
    with pytest.raises(TypeError, match=r"scaled has no gradient.*@scaled\.vjp"):
        pyloss.grad(lambda x: scaled(x, 2.0).sum())(np.ones(2))

    @scaled.vjp
    def scaled_vjp(primals, cotangent, output):
        x, factor = primals
        np.testing.assert_array_equal(output, x * factor)
        return cotangent * factor, np.sum(cotangent * x)

    x, factor = np.array([1.0, 2.0]), np.array(3.0)
    dx, dfactor = pyloss.grad(lambda x, f: (scaled(x, f) ** 2).sum(), (0, 1))(x, factor)
    np.testing.assert_allclose(dx, 2 * factor**2 * x)
    np.testing.assert_allclose(dfactor, 2 * factor * (x**2).sum())

    @pyloss.custom_function
    def polar(x, y):
        return np.hypot(x, y), np.arctan2(y, x)

    polar.defvjp(
        lambda x, y: ((np.hypot(x, y), np.arctan2(y, x)), (x, y)),
        lambda kept, dys: (
            (dys[0] * kept[0] * np.hypot(*kept) - dys[1] * kept[1]) / np.hypot(*kept) ** 2,
            (dys[0] * kept[1] * np.hypot(*kept) + dys[1] * kept[0]) / np.hypot(*kept) ** 2,
        ),
    )
    report = pyloss.gradcheck(
        lambda x, y: sum(a * b for a, b in zip(polar(x, y), (2, 3), strict=True)), x, x + 1
    )
    assert report.ok

    @pyloss.custom_function
    def wrong(x):
        return x * 1

    wrong.vjp(lambda x, dy, y: dy[:1])
    with pytest.raises(ValueError, match=r"shape \(1,\), and the argument \(2,\)"):
        pyloss.grad(lambda x: wrong(x).sum())(x)
    with pytest.raises(TypeError, match="by keyword"):
        pyloss.grad(lambda f: scaled(x, factor=f).sum())(factor)


@pytest.mark.parametrize("use", ["value", "parameter", "keyword"])
def test_custom_functions_take_what_they_differentiate_as_arguments(use):
    model = Trained(g=single(4))

    def loss(t):
        @pyloss.custom_function
        def scaled(x, factor=1.0):
            return x * {"value": t, "parameter": model.g, "keyword": factor}[use]

        scaled.vjp(lambda x, dy, y: dy)
        return np.sum(scaled(t) if use != "keyword" else scaled(t, factor=t))

    with pytest.raises(TypeError, match="by position"):
        nn.value_and_grad(model, lambda: loss(model.g * 2.0))()


@pyloss.custom_function
def codes(x):
    """Rounded values, and their numbers."""
    return np.round(x), np.round(x).astype(np.int64)


codes.vjp(lambda x, cotangents, outputs: cotangents[0])


def test_whole_numbers_beside_other_outputs_are_constants():
    def loss(x):
        rounded, numbers = codes(x)
        assert type(numbers) is np.ndarray and numbers.dtype == np.int64
        return (rounded * numbers).sum()

    assert pyloss.grad(loss)(np.array([1.2, 1.9])).tolist() == [1, 2]


@pytest.mark.parametrize("kind", [np.int64, np.bool_, np.complex128, dict, list])
def test_outputs_that_carry_no_gradient_are_refused(kind):
    @pyloss.custom_function
    def f(x):
        return {"y": x} if kind is dict else [x] if kind is list else np.round(x).astype(kind)

    f.vjp(lambda x, cotangent, output: cotangent)
    with pytest.raises(TypeError, match=r"f, a custom_function, returned .*float32 or float64"):
        pyloss.grad(lambda x: (x * f(x)).sum())(np.ones(2))


def test_custom_functions_write_to_nothing_that_they_are_given():
    x = np.array([-1.0, 2.0])

    @pyloss.custom_function
    def relu(x):
        x[x < 0] = 0
        return x

    relu.vjp(lambda x, cotangent, output: cotangent)
    for run in (relu, pyloss.grad(lambda x: relu(x).sum())):
        with pytest.raises(ValueError, match="read-only"):
            run(x)
    assert x.tolist() == [-1, 2]

    for part in ("primals", "cotangent", "output"):

        @pyloss.custom_function
        def same(x):
            return x

        @same.vjp
        def same_vjp(primals, cotangent, output, part=part):
            array = {"primals": primals, "cotangent": cotangent, "output": output}[part]
            array *= 100
            return array

        with pytest.raises(ValueError, match="read-only"):
            pyloss.grad(lambda a, b, f=same: (f(a) + b).sum(), (0, 1))(x, x)


def test_an_output_that_is_an_argument_is_an_array_of_its_own():
    @pyloss.custom_function
    def same(x):
        return x

    same.vjp(lambda x, cotangent, output: cotangent)
    x = np.array([1.0, 2.0])
    assert not np.shares_memory(same(x), x)
    y = same(x)
    y += 1
    assert x.tolist() == [1, 2]
    assert pyloss.grad(lambda x: (same(x) * x).sum())(x).tolist() == [2, 4]


def test_a_constant_of_a_custom_function_may_change_later():
    @pyloss.custom_function
    def scaled(x, factor):
        return x * factor

    scaled.vjp(lambda primals, cotangent, output: (cotangent * primals[1], None))

    def loss(x):
        factor = np.array([2.0, 3.0])
        y = scaled(x, factor)
        factor[:] = 100
        return y.sum()

    assert pyloss.grad(loss)(np.ones(2)).tolist() == [2, 3]


def test_values_within_an_argument_by_keyword_are_refused():
    @pyloss.custom_function
    def scaled(x, extra=None):
        return x * extra["by"][0]

    scaled.vjp(lambda x, cotangent, output: cotangent)
    model = Trained(g=single(1))
    before = model.g
    with pytest.raises(TypeError, match="by keyword"):
        pyloss.grad(lambda s: scaled(np.ones(2), extra={"by": [s]}).sum())(np.array(2.0))
    with pytest.raises(TypeError, match="by keyword"):
        nn.value_and_grad(model, lambda: scaled(model.g, extra={"by": [before]}).sum())()
    assert scaled(np.ones(2), extra={"by": [2.0]}).tolist() == [2, 2]


def test_a_complex_gradient_is_refused():
    @pyloss.custom_function
    def f(x):
        return x * 2

    f.vjp(lambda x, cotangent, output: cotangent * 1j)
    with pytest.raises(TypeError, match="complex"):
        pyloss.grad(lambda x: f(x).sum())(np.ones(2))


@dataclasses.dataclass
class Pair:
    """Holds Tensors where nothing looks for them."""

    a: object
    b: object = None


def test_stop_gradient_refuses_what_may_hold_tensors():
    def loss(x):
        t = x * 2
        for hidden in (Pair(t), collections.deque([t]), (v for v in t), [Pair(t)]):
            with pytest.raises(TypeError, match="stop_gradient of a .*lists, tuples and dicts"):
                pyloss.stop_gradient(hidden)
        tree = {"a": [t, None, "text", 3, True, 2.5, 1j], "b": (np.float32(1), {1}, range(2))}
        constant = pyloss.stop_gradient(tree)
        assert type(constant["a"][0]) is np.ndarray and constant["a"][1:] == tree["a"][1:]
        return t.sum()

    pyloss.grad(loss)(np.ones(2))


def test_a_custom_function_is_a_method():
    class Scaled:
        factor = 3.0

        @pyloss.custom_function
        def apply(self, x):
            return x * self.factor

        @apply.vjp
        def apply_vjp(primals, cotangent, output):
            return None, cotangent * primals[0].factor

    scaled, x = Scaled(), np.ones(2)
    assert scaled.apply(x).tolist() == [3, 3]
    assert pyloss.grad(lambda x: scaled.apply(x).sum())(x).tolist() == [3, 3]
    assert isinstance(Scaled.apply, pyloss.custom_function)
