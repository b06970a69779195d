"""A trained array that meets NumPy or Python carries its gradient or raises TypeError."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tape_cases import Trained, numeric, single

import pyloss
from pyloss import nn


def check(model, loss, name="g"):
    """The gradient of a parameter against differences in float32's precision."""
    _, grads = nn.value_and_grad(model, loss)()
    array = model.parameters()[name]
    assert type(array) is np.ndarray

    def moved(values):
        before = array.copy()
        array[...] = values
        value = float(loss())
        array[...] = before
        return value

    want = numeric(moved, array.astype(np.float64), step=1e-2)
    np.testing.assert_allclose(grads[name], want, rtol=2e-2, atol=2e-2)
    assert np.abs(grads[name]).max() > 0


FORMS = {
    "arithmetic": lambda m, x: (x * (1 + m.g)).sum(),
    "NumPy's function": lambda m, x: (x * np.exp(m.g)).sum(),
    "power": lambda m, x: (m.g**2).sum(),
    "slice": lambda m, x: (m.g[:2] * 3).sum(),
    "index of lists": lambda m, x: (m.g[[0, 0, 2]] * x[:3]).sum(),
    "reshape": lambda m, x: (m.g.reshape(2, 2) @ x.reshape(2, 2)).sum(),
    "astype": lambda m, x: (m.g.astype(np.float64) * x).sum(),
    "where": lambda m, x: np.where(x > 1, m.g, 0).sum() + (m.g * 0.1).sum(),
    "stack": lambda m, x: np.stack([m.g, x]).max(0).sum() + (m.g * 0.1).sum(),
    "array on the left": lambda m, x: (x - m.g).mean() + np.subtract(x, m.g).var(),
    "norm": lambda m, x: np.linalg.norm(m.g),
    "sum of Python": lambda m, x: sum(m.g) * 2,
    "a loop": lambda m, x: sum((v * w for v, w in zip(m.g, x, strict=True)), 0),
    "all parameters": lambda m, x: sum((p**2).sum() for p in m.trainable_parameters().values()),
    "einsum": lambda m, x: np.einsum("i,i->", m.g, x),
    "copy": lambda m, x: (copy.deepcopy(m.g) * copy.copy(m.g)).sum(),
    "own functions": lambda m, x: pyloss.logsumexp(m.g * x),
    "a checkpoint": lambda m, x: pyloss.checkpoint(lambda x: (x * np.exp(m.g)).sum(), x),
}


@pytest.mark.parametrize("name", FORMS)
def test_numpy_on_a_parameter(name):
    model, x = Trained(g=single(4)), single(4, seed=1)
    check(model, lambda: FORMS[name](model, x))
    assert type(model.g) is np.ndarray


@pytest.mark.parametrize(
    "lost",
    [
        lambda g: math.exp(g[0]), lambda g: float(g[0]), np.asarray, np.array, np.ascontiguousarray,
        lambda g: np.zeros(4).__setitem__(slice(None), g), lambda g: np.array([g, g]),
        np.median, lambda g: g.__imul__(2), lambda g: np.add(g, 1, out=np.zeros(4)),
        lambda g: np.random.default_rng(0).normal(g), lambda g: np.frombuffer(g, np.float32),
        lambda g: memoryview(g), lambda g: np.linalg.svd(g[None]),
    ],
)  # fmt: skip
def test_what_would_lose_the_gradient_raises(lost):
    model = Trained(g=single(4))
    with pytest.raises(TypeError):
        nn.value_and_grad(model, lambda: (lost(model.g), (model.g * 1).sum())[1])()
    assert type(model.g) is np.ndarray


def test_frozen_parameters_and_evaluation_are_plain():
    model = Trained(g=single(4), h=single(4))
    model.freeze(keys=["h"])

    def loss():
        assert type(model.h) is np.ndarray and isinstance(model.g, pyloss.Tensor)
        return (model.g * np.median(model.h)).sum()

    nn.value_and_grad(model, loss)()
    assert type(model.g) is np.ndarray


def test_attributes_come_back_after_an_error_and_own_assignments_stay():
    model = Trained(g=single(4), ws=[single(2)])
    with pytest.raises(ZeroDivisionError):
        nn.value_and_grad(model, lambda: 1 / 0)()
    assert type(model.g) is np.ndarray and type(model.ws[0]) is np.ndarray
    other = single(4, seed=5)

    def loss():
        value = model.g.sum()
        model.g = other
        return value

    nn.value_and_grad(model, loss)()
    assert model.g is other


def test_a_tied_array_is_a_tensor_everywhere():
    shared = single(3)
    model = Trained(a=Trained(g=shared), b=Trained(h=shared))
    _, grads = nn.value_and_grad(model, lambda: (np.exp(model.a.g) * model.b.h).sum())()
    np.testing.assert_allclose(grads["a.g"], np.exp(shared) * (1 + shared), rtol=1e-5)


def test_a_function_within_a_checkpoint_may_have_several_results():
    model, x = Trained(g=single(4)), single(4, seed=1)

    def two(x):
        return x * model.g, {"square": model.g**2, "constant": 3, "unused": np.exp(model.g)}

    def plain():
        a, rest = two(x)
        return (a * rest["square"]).sum() * rest["constant"]

    def checkpointed():
        a, rest = pyloss.checkpoint(two, x)
        return (a * rest["square"]).sum() * rest["constant"]

    want = nn.value_and_grad(model, plain)()
    found = nn.value_and_grad(model, checkpointed)()
    assert found[0] == want[0]
    np.testing.assert_array_equal(found[1]["g"], want[1]["g"])


def test_a_checkpoint_takes_several_arguments():
    a, b = single(3), single(3, seed=1)

    def f(a, b, power):
        return ((a * b) ** power).sum()

    want = pyloss.grad(lambda a, b: f(a, b, 2), (0, 1))(a, b)
    found = pyloss.grad(lambda a, b: pyloss.checkpoint(f, a, b, 2), (0, 1))(a, b)
    for one, other in zip(found, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_leaves_a_checkpoint_beside_its_result_is_refused():
    def loss(x):
        beside = []
        y = pyloss.checkpoint(lambda x: (beside.append((x * x).sum()), np.exp(x))[1], x)
        return y.sum() + beside[0]

    with pytest.raises(TypeError, match="left a checkpointed function"):
        pyloss.grad(loss)(np.ones(2))
    # Values of outside are the same within, also in a checkpoint of a checkpoint.
    scale, x = np.array([2.0, 3.0]), np.array([0.5, 1.0])

    def nested(x, scale):
        outer = np.exp(scale)
        return pyloss.checkpoint(
            lambda x: pyloss.checkpoint(lambda y: y * outer * x, np.sin(x)) * outer, x
        ).sum()

    assert pyloss.gradcheck(nested, x, scale).ok


MASKED = np.ma.masked_array([1.0, 1.0], mask=[1, 0])


@pytest.mark.parametrize(
    "lost",
    [
        lambda t: MASKED * t, lambda t: t * MASKED, lambda t: np.ma.log(t), lambda t: MASKED + t,
        lambda t: np.ma.getdata(t), lambda t: t * np.asmatrix([[1.0, 2.0]]),
        lambda t: np.abs(t * 1j), lambda t: t.astype(complex), lambda t: np.sum(t, dtype=complex),
        lambda t: t.astype(object), lambda t: t @ np.exp(1j * np.eye(2)),
    ],
)  # fmt: skip
def test_masks_matrices_and_complex_numbers_raise(lost):
    with pytest.raises(TypeError):
        pyloss.grad(lambda t: (lost(t), t.sum())[1])(np.ones(2))


def test_a_tensor_does_not_take_a_parameters_place():
    layer = nn.Linear(3, 2)

    def loss():
        layer.seen = layer.weight * 2  # not an array of the module
        layer.weight = layer.weight * 1.0
        return layer.weight.sum()

    with pytest.raises(TypeError, match="weight is an array of the module"):
        nn.value_and_grad(layer, loss)()
    assert type(layer.weight) is np.ndarray


def test_two_arrays_of_one_name_are_refused():
    for keys in ({0: single(1), "0": single(1)}, {"a.b": single(1), "a": {"b": single(1)}}):
        model = Trained(d=keys)
        for ask in (model.parameters, model.trainable_parameters):
            with pytest.raises(ValueError, match="two arrays of the model have the name"):
                ask()


def test_a_model_is_pickled_after_a_step():
    model = Trained(layer=nn.Linear(2, 2))
    nn.value_and_grad(model, lambda: model.layer.weight.sum())()
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.layer.weight, model.layer.weight)
    assert list(again.trainable_parameters()) == ["layer.weight", "layer.bias"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_and_pads_of_nothing(dtype):
    for f, shape in (
        (lambda a: np.dot(a, a), (0,)), (lambda a: (a @ a.T).sum(), (2, 0)),
        (lambda a: np.vdot(a, a), (0, 3)), (lambda a: np.pad(a, 1).sum(), (0, 3)),
        (lambda a: np.pad(a, {-1: (1, 2)}).sum(), (2, 3)),
    ):  # fmt: skip
        x = np.ones(shape, dtype)
        assert pyloss.grad(f)(x).shape == shape


# Comparisons


def test_comparisons_compare():
    def f(t):
        assert (t == np.array([1, 2])).tolist() == [True, False]
        assert (t != np.array([1, 2])).tolist() == [False, True]
        assert not bool(t[:1] * 0) and bool(t[0])
        with pytest.raises(ValueError, match="ambiguous"):
            bool(t)
        with pytest.raises(TypeError, match="unhashable"):
            hash(t)
        return t.sum()

    pyloss.value_and_grad(f)(np.array([1.0, 3.0]))


def test_masks_of_numpy_give_the_number_of_the_formula():
    """numpy.where over Tensors once made an object array, and 2.289 of 2.408."""
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((6, 5)), np.array([0, 1, 2, 3, 4, 0])
    mask = np.array([1, 1, 0, 1, 0, 1], bool)

    def loss(logits):
        losses = pyloss.softmax_cross_entropy(logits, labels)
        return np.where(mask, losses, 0).sum() / mask.sum()

    shifted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -shifted[np.arange(6), labels][mask].mean()
    value, gradient = pyloss.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(gradient, numeric(loss, logits), atol=1e-7)


# What is a parameter


def test_only_short_floats_are_trained():
    model = Trained(
        g=single(2), half=single(2).astype(np.float16), ids=np.arange(3), mask=np.ones(2, bool),
    )  # fmt: skip
    model.register_buffer("mean", single(2))
    assert list(model.trainable_parameters()) == list(model.parameters()) == ["g", "half"]
    assert list(model.buffers()) == ["ids", "mask", "mean"]
    assert list(nn.value_and_grad(model, lambda: model.g.sum())()[1]) == ["g", "half"]
    with pytest.raises(ValueError, match="_mean"):
        model.register_buffer("_mean", single(2))


def test_float64_is_not_trained_and_says_so():
    model = Trained(g=single(2), wide=np.ones(2))
    with pytest.warns(UserWarning, match=r"wide.*float32.*register_buffer"):
        assert list(model.trainable_parameters()) == ["g"]
    model.register_buffer("wide", np.ones(2))
    assert list(model.trainable_parameters()) == ["g"]


def test_containers_of_any_depth_hold_parameters():
    model = Trained(
        grid=[[nn.Linear(2, 3), nn.Linear(3, 2)], {"x": [nn.Linear(2, 2)]}],
        scales=[single(2), {"deep": single(2)}],
        pair=(single(2), "name", None),
    )
    names = [
        "grid.0.0.weight", "grid.0.0.bias", "grid.0.1.weight", "grid.0.1.bias",
        "grid.1.x.0.weight", "grid.1.x.0.bias",
        "scales.0", "scales.1.deep", "pair.0",
    ]  # fmt: skip
    assert sorted(model.parameters()) == sorted(names)
    check(model, lambda: np.exp(model.scales[0]).sum(), "scales.0")
    check(model, lambda: np.exp(model.scales[1]["deep"]).sum(), "scales.1.deep")
    check(model, lambda: np.exp(model.pair[0]).sum(), "pair.0")
    check(model, lambda: (model.grid[1]["x"][0](single(2, 2)) ** 2).sum(), "grid.1.x.0.weight")
    model.freeze(keys=["scales"])
    assert not any(name.startswith("scales") for name in model.trainable_parameters())
    other = nn.Linear(2, 2)
    model.set_module("grid.1.x.0", other)
    assert model.grid[1]["x"][0] is other
    model.scales.append(single(2, seed=3))
    assert (
        "scales.2" in model.parameters() and "scales.2" in model.unfreeze().trainable_parameters()
    )


def test_none_and_text_in_a_tree_of_parameters_stay():
    tree = {"w": single(2), "bias": None, "kind": "relu", "layers": [single(2), None]}
    value, grads = pyloss.value_and_grad(
        lambda p: (
            (p["w"] * p["layers"][0]).sum() if p["kind"] == "relu" and p["bias"] is None else 0
        )
    )(tree)
    assert value > 0 and grads["bias"] is None and grads["kind"] is None
    np.testing.assert_array_equal(grads["w"], tree["layers"][0])
    with pytest.raises(TypeError, match="argument 0 holds no arrays"):
        pyloss.value_and_grad(lambda p: 1.0)({"kind": "relu"})


def test_weights_are_saved_and_loaded(tmp_path):
    model = Trained(layers=[nn.Linear(3, 2)], g=single(2).T, ids=np.arange(3))
    model.save_weights(tmp_path / "w.safetensors")
    other = Trained(layers=[nn.Linear(3, 2)], g=single(2, seed=4), ids=np.zeros(3, np.int64))
    other.load_weights(tmp_path / "w.safetensors")
    for name, array in {**model.parameters(), **model.buffers()}.items():
        np.testing.assert_array_equal({**other.parameters(), **other.buffers()}[name], array)


def in_a_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.parametrize(
    "use",
    [
        lambda model, t: np.exp(t),
        lambda model, t: t * 2.0,
        lambda model, t: np.concatenate([np.ones(0, np.float32), t]),
        lambda model, t: pyloss.softmax(t),
        lambda model, t: model.g * 2.0,
        lambda model, t: nn.RMSNorm(4)(model.g),
    ],
    ids=["ufunc", "operator", "function", "loss", "parameter", "layer"],
)
def test_what_another_thread_computes_raises(use):
    model = Trained(g=single(4))

    def loss(x):
        t = x * 3.0
        return np.sum(t * in_a_thread(lambda: use(model, t)))

    with pytest.raises(TypeError, match="another thread"):
        nn.value_and_grad(model, lambda: loss(model.g))()
    aside = pyloss.no_grad()(lambda: use(model, single(4)))
    nn.value_and_grad(model, lambda: np.sum(model.g * in_a_thread(aside)))()


def test_other_threads_may_record_and_constants_may_be_used_anywhere():
    model = Trained(g=single(4))
    both = nn.value_and_grad(model, lambda: np.sum(model.g * 2.0))

    def loss():
        value, grads = in_a_thread(both)
        return np.sum(model.g * grads["g"]) + value

    _, grads = both()
    np.testing.assert_array_equal(nn.value_and_grad(model, loss)()[1]["g"], grads["g"])
    kept = []
    pyloss.value_and_grad(lambda x: kept.append(x * 2.0) or np.sum(x))(single(4))
    np.testing.assert_array_equal(in_a_thread(lambda: np.exp(kept[0])), np.exp(single(4) * 2))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: np.sum(t, where=np.ones(4, bool)), "numpy.sum of a Tensor takes"),
        (lambda t: np.diff(t, prepend=0.0), "numpy.diff of a Tensor takes"),
        (lambda t: t.cumprod(), "which arrays have: docs/experiments.md"),
        (lambda t: t.unknown, "a Tensor has no 'unknown'"),
    ],
)
def test_what_is_missing_is_named(call, message):
    with pytest.raises((TypeError, AttributeError), match=message):
        pyloss.value_and_grad(lambda x: call(x * 2.0))(single(4))


def test_parameters_are_not_updated_while_they_are_differentiated():
    model = Trained(g=single(4))
    optimizer = pyloss.optim.SGD(0.1)

    def loss():
        optimizer.update(model, {"g": single(4)})
        return np.sum(model.g)

    with pytest.raises(TypeError, match="outside of the function"):
        nn.value_and_grad(model, loss)()


@pytest.mark.parametrize("product", [np.dot, np.inner, np.tensordot])
def test_products_refuse_sizes_that_numpy_refuses(product):
    a, b = np.ones((2, 3, 1), np.float32), np.ones((3, 4), np.float32)
    axes = () if product is not np.tensordot else (((2,), (0,)),)
    with pytest.raises(ValueError):
        product(a, b, *axes)
    with pytest.raises(ValueError, match="differ in size"):
        pyloss.value_and_grad(lambda x: np.sum(product(x, b, *axes)))(a)
