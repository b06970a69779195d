"""What is refused says what to use, and NumPy's own defaults are accepted."""

import numpy as np
import pytest

import pyloss
from pyloss import nn

SQUARE = np.arange(1.0, 10.0).reshape(3, 3)


@pytest.mark.parametrize(
    "f",
    [
        lambda t: np.sum(t, 0, None, None), lambda t: np.sum(t, axis=0, out=None, where=True),
        lambda t: np.mean(t, 0, out=None, where=True), lambda t: np.max(t, 1, None, True),
        lambda t: np.clip(t, 2.5, 5.5, out=None), lambda t: np.clip(t, 2.5, 5.5, None),
        lambda t: np.concatenate([t, t], 1, out=None), lambda t: np.take(t, [0, 2], 1, None, "clip"),
        lambda t: np.take(t, [0, 2], out=None), lambda t: np.sort(t, kind="stable"),
        lambda t: np.std(t, 0, None, None, 1, True), lambda t: np.add(t, 1, where=True, out=None),
        lambda t: np.stack([t, t], 1, None), lambda t: np.cumsum(t, 1, None, None),
        lambda t: np.dot(t, t, out=None), lambda t: np.argsort(t, kind="stable"),
        lambda t: t.reshape(9, order="C"), lambda t: t.reshape((3, 3), order="C"),
        lambda t: t.sum(0, np.float32), lambda t: t.mean(0, np.float64, None, True),
        lambda t: t.clip(2.5, 5.5, None), lambda t: t.take([0], 1), lambda t: t.max(0, None, True),
        lambda t: np.tensordot(t, t, axes=np.int64(1)), lambda t: np.linalg.norm(t, axis=np.int64(0)),
        lambda t: np.linalg.matmul(t, t), lambda t: np.linalg.outer(t[0], t[1]),
        lambda t: np.linalg.vecdot(t, t[0], axis=-1), lambda t: np.linalg.vecdot(t, t, axis=0),
        lambda t: np.linalg.tensordot(t, t, axes=1), lambda t: np.linalg.trace(t, offset=1),
        lambda t: np.linalg.diagonal(t), lambda t: np.linalg.matrix_transpose(t),
        lambda t: np.linalg.vector_norm(t, axis=0, ord=3), lambda t: np.linalg.vector_norm(t),
        lambda t: np.linalg.vector_norm(np.stack([t, t]), axis=(0, 2), keepdims=True),
        lambda t: np.linalg.matrix_norm(t), lambda t: np.matvec(t, t[0]),
        lambda t: np.vecmat(t[0], t), lambda t: np.vecdot(t, t[1]),
        lambda t: np.kron(t, t[0]), lambda t: np.kron(t[0], t), lambda t: np.kron(t, 2.0),
    ],
)  # fmt: skip
def test_arguments_that_numpy_takes(f):
    want = f(SQUARE)

    def loss(t):
        found = f(t)
        assert found.shape == want.shape and found.dtype == want.dtype
        return np.sum(found * np.arange(1.0, want.size + 1).reshape(want.shape))

    value, _ = pyloss.value_and_grad(loss)(SQUARE)
    np.testing.assert_allclose(value, loss(SQUARE), rtol=1e-6)
    if want.dtype == np.float64:
        assert pyloss.gradcheck(loss, SQUARE).ok


def test_argnums_of_numpy():
    assert pyloss.grad(lambda a, b: (a * b).sum(), np.int64(1))(np.ones(2), np.ones(2)).shape == (
        2,
    )
    found = pyloss.grad(lambda a, b: (a * b).sum(), np.array([1, 0]))(np.ones(2), 2 * np.ones(2))
    assert found[1].tolist() == [2, 2]


BUFFER = np.zeros((3, 3))


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda t: np.exp(t, out=BUFFER), r"numpy\.exp\(\.\.\., out=\).*use the result"),
        (lambda t: np.sum(t, 0, out=BUFFER[0]), r"numpy\.sum\(\.\.\., out=\).*use the result"),
        (lambda t: np.linalg.svd(t), r"numpy\.linalg\.svd has no gradient"),
        (lambda t: np.linalg.cross(t, t), r"numpy\.linalg\.cross has no gradient"),
        (lambda t: np.sum(t, initial=1), r"numpy\.sum of a Tensor takes \(a, axis=None, "),
        (lambda t: np.sort(t, order="x"), "order"),
        (lambda t: pow(t, 2, 3), r"write t \*\* x % modulus"),
        (lambda t: len(t[0, 0]), r"without dimensions: t\.item\(\)"),
        (lambda t: pyloss.grad(lambda u: u.sum())(t), "inner gradient"),
        (lambda t: pyloss.vjp(lambda u: u * 1, [t], np.ones((3, 3))), "inner gradient"),
        (lambda t: pyloss.softmax_cross_entropy(t, [0, 1, 2], label_smoothing=t[0, 0] / 9),
         r"label_smoothing is .*it carries no gradient, and t\.item\(\)"),
        (lambda t: pyloss.kl_div_loss(t, t, temperature=t[0, 0]),
         r"temperature is .*it carries no gradient, and t\.item\(\)"),
        (lambda t: pyloss.attention(*[t[None, None]] * 3, scale=t[0, 0]),
         r"scale is .*it carries no gradient, and t\.item\(\)"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(f, message):
    with pytest.raises(TypeError, match=message):
        pyloss.grad(lambda t: (f(t), t.sum())[1])(SQUARE)


@pytest.mark.parametrize("result", [lambda t: [t.sum(), 1], lambda t: {"loss": t.sum()}])
def test_a_list_is_no_result(result):
    with pytest.raises(TypeError, match=r"a tuple that begins with one: \(loss, more\), not a"):
        pyloss.grad(result)(SQUARE)


def test_a_parameter_of_an_outer_recording_is_no_argument():
    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="inner gradient"):
        nn.value_and_grad(layer, lambda: pyloss.grad(lambda w: w.sum())(layer.weight).sum())()
    weight = layer.weight
    inner = nn.value_and_grad(layer, lambda: (layer.weight**2).sum())
    for f in (
        lambda: inner()[0],
        lambda: pyloss.value_and_grad(lambda w: (w * w).sum())(weight)[0],
    ):
        with pytest.raises(TypeError, match="inner gradient"):
            nn.value_and_grad(layer, lambda f=f: layer.weight.sum() + f())()
        _, grads = nn.value_and_grad(
            layer, lambda f=f: layer.weight.sum() + pyloss.no_grad()(f)()
        )()
        assert (grads["weight"] == 1).all()
    constant = pyloss.grad(lambda w: (w * w).sum())
    _, grads = nn.value_and_grad(
        layer, lambda: (constant(pyloss.stop_gradient(layer.weight)) * layer.weight).sum()
    )()
    np.testing.assert_allclose(grads["weight"], 2 * layer.weight)


@pytest.mark.parametrize("f", [np.linalg.norm, np.std, lambda x: np.linalg.norm(x, axis=0)])
def test_roots_of_zero_are_flat_as_in_torch(f):
    x = np.zeros((3, 2))
    assert not pyloss.grad(lambda x: np.sum(f(x)) + np.sum(f(x[:1])))(x).any()
    some = np.array([[3.0, 0.0], [4.0, 0.0]])
    found = pyloss.grad(lambda x: np.sum(np.linalg.norm(x, axis=0)))(some)
    np.testing.assert_allclose(found, [[0.6, 0], [0.8, 0]])
