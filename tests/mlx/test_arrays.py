"""mx.array: types, values that change in place, NumPy and pyloss beside it, lost gradients."""

from __future__ import annotations

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest

import pyloss
import pyloss.mlx.core as mx
from pyloss.mlx import nn


def test_ndarrays_and_tensors_are_instances():
    assert isinstance(mx.array(1), mx.array) and isinstance(np.ones(2), mx.array)
    assert isinstance(mx.array([1.0]), pyloss.Tensor)
    assert not isinstance(1.0, mx.array) and not isinstance([1.0], mx.array)
    seen = []
    pyloss.grad(lambda t: (seen.append(isinstance(t, mx.array)), t.sum())[1])(np.ones(2, "f4"))
    assert seen == [True]


@pytest.mark.parametrize(
    "given, kind",
    [(1, "int32"), (1.5, "float32"), (True, "bool"), (2**40, "int64"), ([1, 2.5], "float32"),
     (np.float64(2), "float32"), (np.arange(2), "int64"), (np.ones(2), "float32"),
     (np.ones(2, np.float16), "float16"), ([], "float32")],
)  # fmt: skip
def test_types_of_values(given, kind):
    assert mx.array(given).dtype == np.dtype(kind)


def test_an_element_is_an_array():
    x = mx.array([[1.0, 2.0], [3.0, 4.0]])
    assert isinstance(x[0, 1], mx.array) and x[0, 1].square().item() == 4
    assert [row.sum().item() for row in x] == [3, 7]
    assert f"{x[1, 1]:.2f}" == "4.00" and int(mx.array(3)) == 3 and [5, 6][mx.array(1)] == 6
    assert x.tolist() == [[1, 2], [3, 4]] and len(x) == 2
    assert repr(mx.array([1.5, 2])) == "array([1.5, 2], dtype=float32)"
    with pytest.raises(TypeError, match="one element"):
        f"{x:.2f}"


def test_what_changes_in_place_changes_no_other_array():
    x = mx.arange(4.0)
    alias, view, row = x, x.reshape(2, 2), x[1:]
    x += 1
    x[0] = 9
    assert alias.tolist() == [9, 2, 3, 4] and alias is x
    assert view.tolist() == [[0, 1], [2, 3]] and row.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="in place"):
        x += mx.ones((3, 4))
    given = np.zeros(2, np.float32)
    y = mx.array(given)
    given[0] = 1
    assert y.tolist() == [0, 0]
    read = np.asarray(y)
    read[0] = 5
    assert y.tolist() == [0, 0]


def test_copies():
    x = mx.array([1.0, 2.0])
    for other in (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x)), mx.array(x)):
        assert type(other) is mx.array and other.tolist() == [1, 2]
        other[0] = 7
    assert x.tolist() == [1, 2]


def test_bfloat16():
    x = mx.array([1.5, 2.5], dtype=mx.bfloat16)
    assert x.dtype == ml_dtypes.bfloat16 and (x * 2 + 1).dtype == mx.bfloat16
    assert (x.sum().item(), mx.softmax(x).dtype) == (4.0, mx.bfloat16)
    assert mx.finfo(mx.bfloat16).max > 1e38 and mx.issubdtype(x.dtype, mx.floating)


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize(
    "function",
    [lambda x: x * 2.5, lambda x: 1 / x, lambda x: x**0.5, lambda x: 2.5 - x, lambda x: x @ x,
     lambda x: mx.where(x > 0, x, 0.0), lambda x: mx.where(x > 2, 1.0, x),
     lambda x: mx.maximum(x, 0.5), lambda x: mx.clip(x, 0.1, None), lambda x: x.mean(),
     lambda x: x.var(), lambda x: mx.std(x), nn.silu, nn.leaky_relu,
     lambda x: mx.tensordot(x, x, 1), lambda x: mx.einsum("i,i->", x, x)],
)  # fmt: skip
def test_a_type_is_kept_beside_numbers(function, kind):
    x = mx.array([1.5, 2.5], dtype=kind)
    value, gradient = mx.value_and_grad(lambda x: function(x).sum())(x)
    assert function(x).dtype == value.dtype == gradient.dtype == kind
    want = function(x.astype(mx.float32)).sum().item()
    assert value.item() == pytest.approx(want, rel=0.01)
    x += 0.5
    assert x.dtype == kind and x.tolist() == [2, 3]


def test_numpy_takes_arrays():
    x = mx.array([1.0, 4.0])
    assert np.sqrt(x).tolist() == [1, 2] and np.sum(x) == 5
    assert (np.ones(2, np.float32) + x).tolist() == [2, 5]
    assert type(np.float32(2) * x) is mx.array and (x == np.array([1, 0])).tolist() == [True, False]


def test_pyloss_takes_arrays_and_gives_gradients():
    logits, labels = mx.array([[1.0, 2.0, 0.5]]), np.array([1])

    def loss(x):
        return pyloss.softmax_cross_entropy(x * 2, labels)

    value, grad = mx.value_and_grad(loss)(logits)
    own, by_own = pyloss.value_and_grad(loss)(np.array([[1.0, 2.0, 0.5]], np.float32))
    np.testing.assert_allclose(value.item(), own, rtol=1e-6)
    np.testing.assert_allclose(grad.tolist(), by_own, rtol=1e-5)


def test_pyloss_differentiates_through_functions_of_mx():
    x = np.array([0.5, -1.0, 2.0], np.float32)

    def loss(t):
        y = mx.square(t) + 1
        y /= 2
        y[0] = y[1] * y[2]
        return mx.logsumexp(y)

    value, grad = pyloss.value_and_grad(loss)(x)
    wide = x.astype(np.float64)

    def of(v):
        y = (v**2 + 1) / 2
        return np.log(np.exp(np.array([y[1] * y[2], y[1], y[2]])).sum())

    steps = [(of(wide + d) - of(wide - d)) / 2e-6 for d in 1e-6 * np.eye(3)]
    np.testing.assert_allclose(value, of(wide), rtol=1e-6)
    np.testing.assert_allclose(grad, steps, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_full_is_the_sum_over_the_copies():
    weights = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    grad = mx.grad(lambda a: (mx.full((2, 3), a) * mx.array(weights)).sum())(mx.ones((3,)))
    np.testing.assert_allclose(grad.tolist(), weights.sum(0), rtol=1e-6)


@pytest.mark.parametrize("name", ["cumprod", "cummax", "cummin", "logcumsumexp", "median"])
def test_functions_without_a_gradient_raise(name):
    function = getattr(mx, name)
    assert function(mx.array([1.0, 2.0])).size in (1, 2)
    with pytest.raises(TypeError, match=f"mx.{name} has no gradient"):
        mx.grad(lambda x: function(x).sum())(mx.array([1.0, 2.0]))


def test_gradients_of_at_multiply_need_places_that_occur_once():
    x, v = mx.array([1.0, 2.0]), mx.array([3.0, 4.0])
    assert x.at[mx.array([0, 0])].multiply(v).tolist() == [12, 2]
    with pytest.raises(TypeError, match="occur once"):
        mx.grad(lambda x: x.at[mx.array([0, 0])].multiply(v).sum())(x)
    with pytest.raises(ValueError, match="needs an index"):
        x.at.add(1)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: mx.value_and_grad(lambda x: x)(mx.ones(2)), ValueError, "must return a scalar"),
        (lambda: mx.grad(lambda x: x, argnums=1)(mx.ones(2)), ValueError, "argnums is 1"),
        (lambda: mx.grad(lambda x: x, argnames="y")(mx.ones(2)), ValueError, "'y'"),
        (lambda: mx.concatenate([]), ValueError, "at least one"),
        (lambda: mx.arange(0, 2**40), ValueError, "2\\^31"),
        (lambda: mx.arange(0, 3, 0), ValueError, "step"),
        (lambda: mx.arange(float("inf")), ValueError, "finite"),
        (lambda: mx.topk(mx.ones(3), 4), ValueError, "k is 4"),
        (lambda: mx.quantize(mx.ones((2, 33))), ValueError, "multiple of group_size 64"),
        (lambda: mx.quantize(mx.ones((2, 64)), bits=7), ValueError, "bits is 7"),
        (lambda: mx.quantize(mx.ones((2, 64)), mode="mxfp4"), ValueError, "'affine' mode"),
        (lambda: mx.load("x.gguf"), ValueError, "pyloss.load reads"),
        (lambda: mx.load("x.bin"), ValueError, "safetensors, npz and npy"),
        (lambda: mx.save("x", mx.ones(2, mx.bfloat16)), TypeError, "bfloat16"),
        (lambda: mx.array({"a": 1}), TypeError, "numbers, lists"),
        (lambda: mx.fast.rope(mx.ones((1, 2, 4)), 4, traditional=False, base=None, scale=1.0,
                              offset=0), ValueError, "exactly one"),
        (lambda: mx.vmap, AttributeError, "mlx.core.vmap is not here"),
        (lambda: mx.nothing, AttributeError, "coming_from_mlx"),
        (lambda: mx.softmx, AttributeError, "mlx.core has no 'softmx' here, but 'softmax'"),
        (lambda: nn.Linaer, AttributeError, "mlx.nn has no 'Linaer' here, but 'Linear'"),
        (lambda: mx.linalg.nrm, AttributeError, "mlx.core.linalg has no 'nrm' here, but 'norm'"),
        (lambda: nn.losses.x, AttributeError, "mlx.nn.losses has no 'x' here: "),
        (lambda: mx.fast.metal_kernel, AttributeError, "custom_function"),
    ],
)  # fmt: skip
def test_errors_say_what_is_allowed(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_constants_and_facades():
    assert mx.default_device() == mx.cpu and not mx.metal.is_available()
    assert mx.get_peak_memory() > 1e6 and mx.device_info()["memory_size"] > 1e8
    with mx.stream(mx.gpu):
        x = mx.add(mx.array(1), 2, stream=mx.cpu)
    mx.eval(x, {"a": [x]})
    assert mx.set_wired_limit(10) > 10 and x.item() == 3
    group = mx.distributed.init()
    assert group.size() == 1 and mx.distributed.all_sum(x).item() == 3
    with pytest.raises(RuntimeError, match="mpirun"):
        mx.distributed.init(strict=True)

    @mx.compile
    def plain(x):
        return x + 1

    assert plain(x).item() == 4 and mx.compile(inputs=[x])(plain)(x).item() == 4
