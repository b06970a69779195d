"""The check of gradients against finite differences."""

import numpy as np
import pytest
from tape_cases import Trained, single

import pyloss
from pyloss import nn


def test_gradcheck_finds_a_wrong_gradient():
    @pyloss.custom_function
    def cube(x):
        return x**3

    cube.vjp(lambda x, dy, y: np.where(x > 1, 2.5, 3) * x**2 * dy)
    x = np.array([[0.5, 0.7], [2.0, 0.1]], np.float32)
    with pytest.raises(AssertionError, match=r"argument 0 at \(1, 0\)"):
        pyloss.gradcheck(cube, x)
    report = pyloss.gradcheck(cube, x, raise_error=False)
    assert not report.ok and report.entry == (1, 0) and "argument 0" in repr(report)
    assert pyloss.gradcheck(cube, x[:1]).ok


def test_gradcheck_refuses_a_model_without_parameters_where_nothing_else_is_checked():
    without = Trained(_hidden=single(2))
    with pytest.raises(TypeError, match="no trainable parameters"):
        pyloss.gradcheck(lambda: np.sum(single(2)), model=without)
    assert pyloss.gradcheck(lambda x: x * 2.0, single(2), model=without).ok


def test_gradcheck_of_a_model():
    model = Trained(layer=nn.Linear(3, 4), norm=nn.RMSNorm(4), g=single(4))
    x, labels = single(5, 3), np.array([0, 1, 2, 3, 0])
    before = model.layer.weight

    def loss(x):
        hidden = pyloss.ops.swiglu(model.layer(x), model.norm(model.layer(x)) * model.g)
        return pyloss.softmax_cross_entropy(hidden, labels).mean()

    report = pyloss.gradcheck(loss, x, model=model)
    assert report.ok and report.error < 1e-6
    assert model.layer.weight is before


def test_arrays_in_containers_are_checked():
    @pyloss.custom_function
    def square(x):
        return x * x

    square.vjp(lambda x, cotangent, output: cotangent * x)  # half of the gradient

    def f(p, x, scale):
        return square(p["layers"][1]) * x * p["rate"] * scale[0]

    params = {"layers": [single(3, seed=1), single(3)], "rate": 0.5, "name": None}
    report = pyloss.gradcheck(f, params, single(3), [2.0], raise_error=False)
    assert not report.ok and report.name == "argument 0['layers'][1]"
    assert report.entries == 3 + 3 + 3 + 1  # a list of numbers is an array
    assert (
        pyloss.gradcheck(lambda p: p["a"] * p["b"], {"a": single(2), "b": single(2)}).entries == 4
    )


@pytest.mark.parametrize("args", [(np.ones(0),), ({"w": np.ones((0, 3))},), ({"w": 1.0},), ()])
def test_nothing_to_check_is_refused(args):
    with pytest.raises(TypeError, match="nothing to check"):
        pyloss.gradcheck(lambda *unused: np.float64(1), *args)
