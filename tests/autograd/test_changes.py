"""What changes while a function is differentiated: dicts, lists, indices, arrays, modules."""

import copy
import pickle

import numpy as np
import pytest
from tape_cases import Trained, single

import pyloss
from pyloss import nn


def test_an_array_that_changes_after_an_operation_was_read_before():
    def loss(x):
        buffer, index, total = np.zeros(3), np.zeros(1, int), 0
        for i in (1, 2):
            buffer[:], index[:] = i, i
            total = total + (x * buffer).sum() + x[index].sum() + (buffer @ x)
        return total

    np.testing.assert_array_equal(pyloss.grad(loss)(np.arange(3.0)), [6, 7, 7])


def test_constants_of_values_cannot_be_written_to():
    def loss(x):
        h = np.exp(x)
        for constant in (pyloss.stop_gradient(h), pyloss.stop_gradient([h])[0], h.detach()):
            with pytest.raises(ValueError, match="read-only"):
                constant += 1
        carry = pyloss.stop_gradient(h).copy()
        carry[:1] = 0
        return (h * h).sum() + (carry * x).sum()

    x = np.array([0.5, 1.0])
    want = 2 * np.exp(2 * x) + np.where(np.arange(2) == 0, 0, np.exp(x))
    np.testing.assert_allclose(pyloss.grad(loss)(x), want)


def changed(p):
    p["w"] = p["w"] * 2
    return p["w"].sum()


def popped(p):
    w = p.pop("w")
    return (w * w).sum()


def in_place(p):
    for i in range(len(p["l"])):
        p["l"][i] = np.tanh(p["l"][i])
    p["l"].append(1.0)
    return p["l"][0].sum() + p["l"][1].sum() + (p["w"] * 0).sum()


@pytest.mark.parametrize("f", [changed, popped, in_place])
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: lambda p: pyloss.checkpoint(f, p)])
def test_a_function_may_change_the_dicts_and_lists_that_it_gets(f, wrap):
    x = np.array([0.5, 1.0])
    given = {"w": x, "l": [x, 2 * x]}
    grads = pyloss.grad(wrap(f))(given)
    slope = 1 - np.tanh([x, 2 * x]) ** 2
    want = {changed: (2 + 0 * x, 0 * slope), popped: (2 * x, 0 * slope), in_place: (0 * x, slope)}[
        f
    ]
    np.testing.assert_allclose(grads["w"], want[0])
    np.testing.assert_allclose(grads["l"], want[1])
    assert given["w"] is x and len(given["l"]) == 2


ARGUMENTS = {
    "list": (lambda x, i: x[i], [0, 1], [2, 0]),
    "list in a tuple": (lambda x, i: x[(i,)], [0, 1], [2, 0]),
    "array": (lambda x, i: x[i], np.array([0, 1]), [2, 0]),
    "take_along_axis": (lambda x, i: np.take_along_axis(x, i, 0), np.array([0, 1]), [2, 0]),
    "take": (lambda x, i: np.take(x, i), np.array([0, 1]), [2, 0]),
    "take, clipped": (lambda x, i: np.take(x, i, mode="clip"), np.array([0, 1]), [2, 0]),
    "compress": (lambda x, i: np.compress(i, x), np.array([1, 1, 0], bool), [0, 1, 1]),
    "compress by a list": (lambda x, i: np.compress(i, x), [True, True, False], [0, 1, 1]),
    "delete": (lambda x, i: np.delete(x, i), np.array([0, 0]), [2, 2]),
    "repeat": (lambda x, i: np.repeat(x, i), np.array([2, 1, 0]), [0, 1, 2]),
    "pad": (lambda x, i: np.pad(x, i, "edge"), np.array([2, 0]), [0, 2]),
    "tile": (lambda x, i: np.tile(x[:, None], i), [2, 1], [1, 2]),
    "split": (lambda x, i: np.concatenate(np.split(x, i)[:2]), [0, 2], [1, 3]),
    "flip": (lambda x, i: np.flip(x[None] * np.ones((3, 1)), i) * x, np.array([0, 1]), [0, 0]),
    "roll": (lambda x, i: np.roll(x, i, [0]) * x, np.array([1]), [2]),
    "moveaxis": (lambda x, i: np.moveaxis(x[:, None] * x, i, [1, 0]) * x, [0, 1], [1, 0]),
    "transpose": (lambda x, i: np.transpose(x[:, None] * x, i) * x, [1, 0], [0, 1]),
    "where": (lambda x, i: np.where(i, x, 0), np.array([True, False, True]), [0, 1, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_changes_later_was_read_before(name):
    f, given, other = ARGUMENTS[name]

    def loss(x, change):
        argument = copy.deepcopy(given)
        y = f(x, argument)
        if change:
            argument[:] = other
        return (y * y).sum() + (y * np.arange(1.0, y.size + 1).reshape(y.shape)).sum()

    x = np.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(pyloss.grad(loss)(x, True), pyloss.grad(loss)(x, False))


def test_a_constant_beside_a_value_that_is_not_computed_yet_may_change():
    logits, labels = single(3, 4), np.array([0, 1, 2])

    def loss(logits, change):
        factor = np.ones(3, np.float32)
        y = pyloss.softmax_cross_entropy(logits, labels) * factor
        if change:
            factor[:] = 100
        return y.sum()

    want, found = (pyloss.value_and_grad(loss)(logits, change) for change in (False, True))
    assert found[0] == want[0]
    np.testing.assert_array_equal(found[1], want[1])


# Modules


def test_changes_beside_a_trained_array_in_a_container_stay():
    model = Trained(
        st={"w": single(2), "n": 0, "deep": [(single(2), "a"), []]}, pair=(single(2), 1)
    )
    st, deep, first, array = model.st, model.st["deep"], model.st["deep"][0], model.st["w"]

    def loss():
        model.st["n"] += 1
        model.st["new"] = "x"
        model.st["deep"][1].append(1)
        model.st["deep"].append(2)
        assert model.st is st and isinstance(model.pair[0], pyloss.Tensor)
        return (np.exp(model.st["w"]) + model.st["deep"][0][0] + model.pair[0]).sum()

    for _ in range(2):
        _, grads = nn.value_and_grad(model, loss)()
    assert list(grads) == ["st.w", "st.deep.0.0", "pair.0"]
    np.testing.assert_allclose(grads["st.w"], np.exp(array), rtol=1e-6)
    assert model.st is st and st["n"] == 2 and st["new"] == "x" and st["w"] is array
    assert st["deep"] is deep and deep[1:] == [[1, 1], 2, 2] and deep[0][0] is first[0]
    assert type(model.pair[0]) is np.ndarray


def test_trained_arrays_in_containers_are_found_once():
    """A walk over all modules takes milliseconds."""
    model = Trained(l=[single(2), (single(2), {"a": single(2)})], pair=(single(2), [1]))
    step = nn.value_and_grad(model, lambda: sum(np.sum(p) for p in model.parameters().values()))
    step()
    found = model._trained_places()
    step()
    assert model._trained_places() is found
    model.l.append(single(2))
    assert len(model.trainable_parameters()) == 5


def test_a_tensor_does_not_take_the_place_of_an_array_in_a_container():
    model = Trained(st={"w": single(2)}, l=[[single(2)]])
    w, first = model.st["w"], model.l[0][0]

    def loss():
        model.st["w"] = model.st["w"] * 2
        model.l[0][0] = model.l[0][0] * 2
        return model.st["w"].sum()

    with pytest.raises(TypeError, match=r"st\.w is an array of the module"):
        nn.value_and_grad(model, loss)()
    assert model.st["w"] is w and model.l[0][0] is first


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_deep_copy_of_a_model_that_is_differentiated_has_arrays(copied):
    shared = single(2)
    model = Trained(a=Trained(g=shared), b=Trained(g=shared), st={"w": [single(3)]})
    made = []

    def loss():
        made.append(copied(model))
        assert isinstance(copy.copy(model.a).g, pyloss.Tensor)
        return (model.a.g * made[0].a.g).sum() + model.st["w"][0].sum()

    _, grads = nn.value_and_grad(model, loss)()
    np.testing.assert_array_equal(grads["a.g"], shared)
    other = made[0]
    assert sorted(other.trainable_parameters()) == ["a.g", "st.w.0"]
    assert all(type(p) is np.ndarray for p in other.parameters().values())
    assert other.a.g is other.b.g and other.a.g is not shared
