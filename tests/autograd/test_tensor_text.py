"""How Tensors are shown."""

import ml_dtypes
import numpy as np
import pytest

import pyloss
from pyloss.autograd.tensor import LazyTensor, Parameter, Tensor


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.float32([1, 2.5]), "Tensor([2], float32, host: [1. , 2.5])"),
        (np.array(3), "Tensor([], int64, host: 3)"),
        (np.zeros((0, 3), bool), "Tensor([0, 3], bool, host: [])"),
        (np.ones((2, 1)), "Tensor([2, 1], float64, host,\n  [[1.],\n   [1.]])"),
        (np.arange(100), "Tensor([100], int64, host: [ 0,  1,  2, ..., 97, 98, 99])"),
        (np.full(2, 0.5, ml_dtypes.bfloat16), "Tensor([2], bfloat16, host: [0.5, 0.5])"),
    ],
)
def test_shape_type_place_and_values(array, text):
    assert repr(Tensor(array)) == text
    assert f"{Tensor(array)}" == text


def test_a_large_one_is_short():
    text = repr(Tensor(np.random.default_rng(0).standard_normal((64, 500, 30))))
    assert text.startswith("Tensor([64, 500, 30], float64, host,") and len(text) < 4000


def test_html():
    page = Tensor(np.ones((1, 2)))._repr_html_()
    assert page == "<div><b>Tensor [1, 2] float64 host</b></div><pre>[[1., 1.]]</pre>"


def test_a_parameter_and_a_tensor_that_is_not_computed_yet():
    assert repr(Parameter(np.ones(1))) == "Parameter([1], float64, host: [1.])"
    lazy = LazyTensor((1,), np.dtype(float), lambda: np.ones(1))
    assert repr(lazy) == "Tensor([1], float64, host: [1.])"


def test_showing_does_not_disturb_a_gradient():
    def f(x):
        y = x * x
        assert "float32, host" in repr(y) and "<pre>" in y._repr_html_()
        return y.sum()

    _, gradient = pyloss.value_and_grad(f)(np.float32([1, 2]))
    np.testing.assert_array_equal(gradient, [2, 4])
