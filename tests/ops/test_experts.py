"""Routing, rows of visits and products of experts: values and gradients against float64."""

import numpy as np
import pytest

import pyloss
from pyloss import ops
from pyloss.autograd.tape import data
from pyloss.ops.projection import Projection
from pyloss.weights.stack import WeightStack

N, K, E = 9, 3, 6


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def weights_of(logits, k, normalise):
    """(chosen [N, k] ascending, weights [N, k]) in float64."""
    chosen = np.sort(np.argsort(-logits, axis=1)[:, :k], axis=1)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    w = np.take_along_axis(p, chosen, 1)
    return chosen, w / w.sum(1, keepdims=True) if normalise else w


def slopes(f, x, step=1e-6):
    """Central differences of a scalar function of a float64 array."""
    found = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[i] += sign * step
            ends.append(f(moved))
        found[i] = (ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("k", [1, K, E])
def test_route(rng, k, normalise):
    logits, dw = normal(rng, N, E), rng.standard_normal((N, k))
    routing, weights = ops.route(logits, k, normalise)
    chosen, want = weights_of(logits.astype(np.float64), k, normalise)
    np.testing.assert_allclose(weights[routing.visits], want, rtol=1e-6)
    np.testing.assert_array_equal(
        routing.tokens[routing.visits], np.repeat(np.arange(N)[:, None], k, 1)
    )
    experts = np.repeat(np.arange(E), np.diff(routing.offsets))
    np.testing.assert_array_equal(experts[routing.visits], chosen)
    for e in range(E):  # the visits of an expert keep the order of their tokens
        assert (np.diff(routing.tokens[routing.offsets[e] : routing.offsets[e + 1]]) > 0).all()

    def loss(logits):
        routing, weights = ops.route(logits, k, normalise)
        by_visit = np.empty(N * k)
        by_visit[routing.visits] = dw
        return (weights * by_visit).sum()

    _, grad = pyloss.value_and_grad(loss)(logits)

    def formula(logits):
        share = np.take_along_axis(weights_of(logits, E, False)[1], chosen, 1)
        return ((share / share.sum(1, keepdims=True) if normalise else share) * dw).sum()

    wanted = slopes(formula, logits.astype(np.float64))
    np.testing.assert_allclose(grad, wanted, atol=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("k", [1, K, E])
@pytest.mark.parametrize("biased", [True, False])
def test_route_by_sigmoids(rng, k, normalise, biased):
    """The bias chooses experts and is not in the weights, which have gradients as in float64."""
    logits, dw = normal(rng, N, E), rng.standard_normal((N, k))
    bias = rng.standard_normal(E).astype(np.float32) if biased else None
    shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
    chosen = np.sort(np.argsort(-(shares + (0 if bias is None else bias)), axis=1)[:, :k], axis=1)

    def formula(logits):
        share = np.take_along_axis(1 / (1 + np.exp(-logits)), chosen, 1)
        return 1.5 * (share / (share.sum(1, keepdims=True) + 1e-6) if normalise else share)

    routing, weights = ops.route_sigmoid(logits, k, normalise, bias, 1.5)
    experts = np.repeat(np.arange(E), np.diff(routing.offsets))
    np.testing.assert_array_equal(experts[routing.visits], chosen)
    np.testing.assert_allclose(weights[routing.visits], formula(logits.astype(float)), rtol=1e-6)

    def loss(logits):
        routing, weights = ops.route_sigmoid(logits, k, normalise, bias, 1.5)
        by_visit = np.empty(N * k, logits.dtype)
        by_visit[routing.visits] = dw
        return (weights * by_visit).sum()

    wanted = slopes(lambda x: (formula(x) * dw).sum(), logits.astype(np.float64))
    for dtype in (np.float32, np.float64):
        _, grad = pyloss.value_and_grad(loss)(logits.astype(dtype))
        assert grad.dtype == dtype
        np.testing.assert_allclose(grad, wanted, atol=1e-6)


@pytest.mark.parametrize("k", [0, E + 1])
def test_more_experts_than_there_are(rng, k):
    with pytest.raises(ValueError, match=f"from 1 to {E}, not {k}"):
        ops.route(normal(rng, N, E), k, True)
    with pytest.raises(ValueError, match=f"from 1 to {E}, not {k}"):
        ops.route_sigmoid(normal(rng, N, E), k, True)


def test_no_tokens():
    routing, weights = ops.route(np.zeros((0, E), np.float32), K, True)
    assert not routing.offsets.any() and len(routing.offsets) == E + 1
    x = ops.dispatch(np.zeros((0, 5), np.float32), routing)
    assert x.shape == (0, 5) and ops.combine(x, routing).shape == (0, 5) and weights.shape == (0,)


def test_what_is_not_finite_stays_with_its_token(rng):
    logits = normal(rng, N, E)
    logits[2, 1], logits[3, 0] = np.nan, np.inf
    routing, weights = ops.route(logits, K, True)
    spoiled = ~np.isfinite(weights[routing.visits]).all(1)
    assert set(np.flatnonzero(spoiled)) == {2, 3}


def test_rows_of_visits(rng):
    routing, _ = ops.route(normal(rng, N, E), K, True)
    x, factor = normal(rng, N, 5), normal(rng, N * K)

    def f(x, factor):
        rows = ops.dispatch(x, routing)
        return ops.combine(ops.scale_rows(rows * rows, factor), routing)

    totals = factor[routing.visits].sum(1, keepdims=True)
    np.testing.assert_allclose(f(x, factor), x**2 * totals, rtol=1e-4, atol=1e-5)
    dy = normal(rng, N, 5)
    _, (dx, dfactor) = pyloss.value_and_grad(
        lambda x, factor: (f(x, factor) * dy).sum(), argnums=(0, 1)
    )(x, factor)
    np.testing.assert_allclose(dx, 2 * x * totals * dy, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        dfactor[routing.visits], np.repeat((x**2 * dy).sum(1)[:, None], K, 1), rtol=1e-4, atol=1e-5
    )


def dense_forward(x, offsets, w, bias, a, b, scale):
    counts = np.diff(offsets)
    parts = np.split(x.astype(np.float64), offsets[1:-1])
    merged = w.astype(np.float64) + scale * b.astype(np.float64) @ a
    return np.concatenate([p @ m.T for p, m in zip(parts, merged, strict=True)]) + np.repeat(
        bias.astype(np.float64), counts, 0
    )


@pytest.mark.parametrize("stored", [None, "f32", "q8_0"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_products_of_experts(rng, stored, dropout):
    offsets, (o, i, r), scale = np.array([0, 4, 4, 5, 25], np.int32), (7, 32, 3), 1.5
    e = len(offsets) - 1
    x, w, bias, a, b, dy = (
        normal(rng, *s) for s in ((25, i), (e, o, i), (e, o), (e, r, i), (e, o, r), (25, o))
    )
    weight = WeightStack.quantize(w, stored) if stored else w
    w = weight.dequantize() if stored else w
    mask = pyloss.ops.dropout(np.ones_like(x), dropout, 5)

    def f(x, weight, bias, a, b):
        return ops.expert_project(x, offsets, Projection(weight, bias, a, b, scale, dropout, 5))

    branch = dense_forward(x * mask, offsets, np.zeros_like(w), np.zeros_like(bias), a, b, scale)
    plain = dense_forward(x, offsets, w, bias, a, np.zeros_like(b), scale)
    np.testing.assert_allclose(f(x, weight, bias, a, b), plain + branch, atol=2e-4)
    np.testing.assert_allclose(
        ops.expert_project(x, offsets, Projection(weight, bias)), plain, atol=1e-4
    )

    expert = np.repeat(np.arange(e), np.diff(offsets))
    onehot = (expert[:, None] == np.arange(e)).astype(np.float64)
    wide = {"x": x, "w": w, "a": a, "b": b, "dy": dy}
    x6, w6, a6, b6, dy6 = (v.astype(np.float64) for v in wide.values())
    dh = scale * np.einsum("no,nor->nr", dy6, b6[expert])
    wanted = {
        "x": np.einsum("no,noi->ni", dy6, w6[expert])
        + mask * np.einsum("nr,nri->ni", dh, a6[expert]),
        "w": np.einsum("ne,no,ni->eoi", onehot, dy6, x6),
        "bias": onehot.T @ dy6,
        "a": np.einsum("ne,nr,ni->eri", onehot, dh, x6 * mask),
        "b": scale
        * np.einsum("ne,no,nr->eor", onehot, dy6, np.einsum("ni,nri->nr", x6 * mask, a6[expert])),
    }
    names = ["x", "bias", "a", "b"] + ([] if stored else ["w"])
    arguments = {"x": x, "bias": bias, "a": a, "b": b, "w": weight}

    def loss(*values):
        given = arguments | dict(zip(names, values, strict=True))
        return (f(given["x"], given["w"], given["bias"], given["a"], given["b"]) * dy).sum()

    _, grads = pyloss.value_and_grad(loss, argnums=range(len(names)))(
        *(arguments[name] for name in names)
    )
    for name, grad in zip(names, grads, strict=True):
        np.testing.assert_allclose(grad, wanted[name], atol=3e-4, err_msg=name)

    def plain_loss(x, w, bias):
        return (
            ops.expert_project(x, offsets, Projection(weight if stored else w, bias)) * dy
        ).sum()

    _, (dx, dw, dbias) = pyloss.value_and_grad(plain_loss, argnums=(0, 1, 2))(x, w, bias)
    np.testing.assert_allclose(dx, np.einsum("no,noi->ni", dy6, w6[expert]), atol=1e-4)
    np.testing.assert_allclose(dw, np.zeros_like(w) if stored else wanted["w"], atol=1e-4)
    np.testing.assert_allclose(dbias, wanted["bias"], atol=1e-4)


def test_gradients_of_the_adapter_alone(rng):
    """Nothing before the layer is trained."""
    offsets = np.array([0, 3, 3, 8], np.int32)
    x, w, a, b = (normal(rng, *s) for s in ((8, 12), (3, 5, 12), (3, 2, 12), (3, 5, 2)))

    def loss(*inputs):
        rows = x if len(inputs) == 2 else inputs[2]
        return (ops.expert_project(rows, offsets, Projection(w, None, *inputs[:2], 0.5)) ** 2).sum()

    _, (da, db) = pyloss.value_and_grad(loss, argnums=(0, 1))(a, b)
    _, (da_too, db_too, _) = pyloss.value_and_grad(loss, argnums=(0, 1, 2))(a, b, x)
    np.testing.assert_allclose(da, da_too, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(data(db), db_too)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_magnitudes(rng, dropout):
    """DoRA multiplies each row of an expert's weight by m / norm; m may be 0 or tiny.

    Then the gradient of m cannot be computed from y.
    """
    offsets, (o, i, r), scale = np.array([0, 4, 4, 5, 25], np.int32), (7, 32, 3), 1.5
    e = len(offsets) - 1
    shapes = ((25, i), (e, o, i), (e, o), (e, r, i), (e, o, r), (e, o), (25, o))
    x, w, bias, a, b, m, dy = (normal(rng, *s) for s in shapes)
    norm = np.linalg.norm(w + scale * b @ a, axis=2)
    m[3, :2] = 0, 1e-6
    mask = pyloss.ops.dropout(np.ones_like(x), dropout, 5)

    def f(x, w, bias, a, b, m):
        return ops.expert_project(x, offsets, Projection(w, bias, a, b, scale, dropout, 5, m, norm))

    expert = np.repeat(np.arange(e), np.diff(offsets))
    onehot = (expert[:, None] == np.arange(e)).astype(np.float64)
    x6, w6, a6, b6, dy6 = (v.astype(np.float64) for v in (x, w, a, b, dy))
    h = np.einsum("ni,nri->nr", x6 * mask, a6[expert])
    sums = np.einsum("ni,noi->no", x6, w6[expert]) + scale * np.einsum("nr,nor->no", h, b6[expert])
    factor = (m / norm)[expert].astype(np.float64)
    np.testing.assert_allclose(f(x, w, bias, a, b, m), factor * sums + bias[expert], atol=1e-4)
    scaled = dy6 * factor
    dh = scale * np.einsum("no,nor->nr", scaled, b6[expert])
    wanted = {
        "x": np.einsum("no,noi->ni", scaled, w6[expert])
        + mask * np.einsum("nr,nri->ni", dh, a6[expert]),
        "w": np.einsum("ne,no,ni->eoi", onehot, scaled, x6),
        "bias": onehot.T @ dy6,
        "a": np.einsum("ne,nr,ni->eri", onehot, dh, x6 * mask),
        "b": scale * np.einsum("ne,no,nr->eor", onehot, scaled, h),
        "m": onehot.T @ (dy6 * sums) / norm,
    }
    loss = lambda *arguments: (f(*arguments) * dy).sum()
    _, grads = pyloss.value_and_grad(loss, argnums=range(6))(x, w, bias, a, b, m)
    for (name, want), grad in zip(wanted.items(), grads, strict=True):
        np.testing.assert_allclose(grad, want, atol=3e-4, err_msg=name)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_float64_is_computed_in_float64(rng, normalize, dropout):
    """A mixture of experts, with everything that a projection may have."""
    n, d, o, e, r = 5, 4, 3, 3, 2
    arrays = [
        normal(rng, *shape)
        for shape in ((n, e), (n, d), (e, o, d), (e, o), (e, r, d), (e, o, r), (e, o))
    ]
    norm = np.abs(normal(rng, e, o)) + 1
    norm[0, 0] = 0

    def mixed(logits, x, weight, bias, a, b, m):
        routing, shares = ops.route(logits, 2, normalize)
        projection = Projection(weight, bias, a, b, 1.5, dropout, 3, m, norm)
        rows = ops.expert_project(ops.dispatch(x, routing), routing.offsets, projection)
        return ops.combine(ops.scale_rows(rows, shares), routing)

    wide = mixed(*(array.astype(np.float64) for array in arrays))
    assert wide.dtype == np.float64
    np.testing.assert_allclose(mixed(*arrays), wide, rtol=1e-5, atol=1e-5)
    assert pyloss.gradcheck(mixed, *arrays).error < 1e-7
