"""Operations on rows, heads and sequences against float64 central differences of their formulas."""

import itertools

import numpy as np
import pytest
from ops_checks import check, differences, mask, normal

from pyloss import nn, ops
from pyloss.autograd.differentiation import value_and_grad

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 5)])
def test_embedding(rng, shape):
    ids = rng.integers(0, 6, shape)
    check(rng, lambda w: ops.embedding(ids, w), lambda w: w[ids], normal(rng, 6, 13))


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (0, 5), (3, 17), (2, 3, 7), (13,)])
def test_rms_norm(rng, shape):
    check(
        rng,
        lambda x, w: ops.rms_norm(x, w, 1e-3),
        lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * w,
        normal(rng, *shape), normal(rng, shape[-1]), tolerance=1e-4,
    )  # fmt: skip


def rotated(x, positions, cos, sin, head_dim):
    half = cos.shape[1]
    heads = x.reshape(len(x), x.shape[1] // head_dim, head_dim)
    c, s = cos[positions][:, None], sin[positions][:, None]
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return np.concatenate([a * c - b * s, b * c + a * s, rest], axis=2).reshape(x.shape)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rest", [0, 1, 8])
@pytest.mark.parametrize(("n", "heads", "half"), [(1, 1, 1), (7, 3, 5), (5, 2, 16), (0, 2, 3)])
def test_rope(rng, n, heads, half, rest, in_place):
    head_dim = 2 * half + rest
    angles = normal(rng, 9, half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = rng.integers(0, 9, n).astype(np.int32)

    def operation(x):
        fresh = ops.add(x, np.zeros(x.shape, np.float32))
        out = ops.rope(
            fresh, positions, cos, sin, in_place=in_place, head_dim=head_dim if rest else None
        )
        if n:
            array = fresh if isinstance(fresh, np.ndarray) else fresh.data
            assert (
                np.shares_memory(array, out if isinstance(out, np.ndarray) else out.data)
                == in_place
            )
        return out

    check(
        rng,
        operation,
        lambda x: rotated(x, positions, cos.astype(float), sin.astype(float), head_dim),
        normal(rng, n, head_dim * heads),
    )


@pytest.mark.parametrize("widths", [(3, 4), (5, 0), (1, 2, 6), (16, 8, 8)])
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("in_order", [True, False])
def test_split_columns(rng, n, widths, in_order):
    ends = np.cumsum([0, *widths])
    places = np.arange(ends[-1]) if in_order else rng.permutation(ends[-1])
    parts = [places[a:b].astype(np.int32) for a, b in itertools.pairwise(ends)]
    x = normal(rng, n, sum(widths))
    for found, part in zip(ops.split_columns(x, *parts), parts, strict=True):
        np.testing.assert_array_equal(found, x[:, part])
    weights = [normal(rng, n, width).astype(np.float32) for width in widths]

    def joined(x):  # a third part has no gradient
        chosen = ops.split_columns(x, *parts)
        return np.concatenate([chosen[i] * weights[i] for i in (0, 1)], axis=1)

    def expected(x):
        return np.concatenate([x[:, parts[i]] * weights[i] for i in (0, 1)], axis=1)

    check(rng, joined, expected, x)


@pytest.mark.parametrize(("rows", "heads", "size"), [(4, 3, 5), (1, 1, 2), (0, 2, 2), (3, 4, 1)])
def test_scale_heads(rng, rows, heads, size):
    def reference(x, factors):
        return x * np.repeat(factors, size)

    check(rng, ops.scale_heads, reference, normal(rng, rows, heads * size), normal(rng, heads))


def attention_reference(q, k, v, offsets, head_dim, scale, window):
    groups = k.shape[1] // head_dim
    share = q.shape[1] // k.shape[1] if k.shape[1] else 1
    out = np.zeros(q.shape)
    for begin, end in itertools.pairwise(offsets):
        for h in range(groups * share):
            own, g = slice(h * head_dim, (h + 1) * head_dim), h // share
            other = slice(g * head_dim, (g + 1) * head_dim)
            scores = q[begin:end, own] @ k[begin:end, other].T * scale
            scores[np.triu_indices(end - begin, 1)] = -np.inf
            scores[np.tril_indices(end - begin, -window)] = -np.inf
            p = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-1e9))
            out[begin:end, own] = p / p.sum(axis=1, keepdims=True) @ v[begin:end, other]
    return out


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "head_dim"),
    [
        ([1], 1, 1, 2),
        ([5, 0, 3], 4, 2, 3),
        ([7], 3, 1, 4),
        ([], 2, 1, 4),
        ([0, 0], 2, 2, 3),
        ([2, 11], 2, 2, 5),
    ],
)
def test_attention(rng, lengths, heads, groups, head_dim, window):
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    n = int(offsets[-1])
    check(
        rng,
        lambda q, k, v: ops.attention(q, k, v, offsets, head_dim, 0.7, window=window),
        lambda q, k, v: attention_reference(q, k, v, offsets, head_dim, 0.7, window or 99),
        normal(rng, n, heads * head_dim), normal(rng, n, groups * head_dim), normal(rng, n, groups * head_dim), tolerance=1e-4,
    )  # fmt: skip


def test_attention_over_a_cache(rng):
    q, k, v = (normal(rng, 6, 4).astype(np.float32) for _ in range(3))
    offsets = np.array([0, 6], np.int32)
    whole = ops.attention(q, k, v, offsets, 2, 0.5)
    last = ops.attention(q[4:], k, v, np.array([0, 2], np.int32), 2, 0.5, offsets)
    np.testing.assert_allclose(last, whole[4:], rtol=1e-5, atol=1e-6)
    # Its gradients are those of the last queries in the whole.
    found = value_and_grad(
        lambda q, k, v: ops.attention(q, k, v, np.array([0, 2], np.int32), 2, 0.5, offsets).sum(),
        (0, 1, 2),
    )(q[4:], k, v)[1]
    want = value_and_grad(
        lambda q, k, v: ops.attention(q, k, v, offsets, 2, 0.5)[4:].sum(), (0, 1, 2)
    )(q, k, v)[1]
    for one, other in zip(found, (want[0][4:], *want[1:]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 33), (3, 2, 5)])
def test_elementwise(rng, shape):
    gate, up = normal(rng, *shape), normal(rng, *shape)
    check(rng, lambda x: ops.scale(x, -2.5), lambda x: -2.5 * x, gate)
    check(rng, ops.swiglu, lambda g, u: g / (1 + np.exp(-g)) * u, gate, up)
    check(rng, lambda x: ops.swiglu(x, x), lambda x: x / (1 + np.exp(-x)) * x, gate)
    check(rng, ops.glu, lambda g, u: u / (1 + np.exp(-g)), gate, up)
    check(
        rng,
        ops.geglu,
        lambda g, u: g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) / 2 * u,
        gate,
        up,
    )
    check(rng, ops.sigmoid, lambda x: 1 / (1 + np.exp(-x)), gate)
    check(rng, ops.add, lambda a, b: a + b, gate, up)
    check(rng, lambda x: ops.add(x, x), lambda x: x + x, gate)
    check(
        rng,
        lambda x: ops.add(ops.swiglu(x, x), ops.add(x, x)),
        lambda x: x / (1 + np.exp(-x)) * x + 2 * x,
        gate,
    )


@pytest.mark.parametrize(
    ("shape", "tail", "axis"), [((3, 4), (3, 2), 1), ((3, 4), (5, 4), 0), ((2, 3, 4), (2, 1, 4), 1)]
)
def test_lengthen(rng, shape, tail, axis):
    fixed = rng.standard_normal(tail).astype(np.float32)
    check(
        rng,
        lambda x: ops.append(x, fixed, axis),
        lambda x: np.concatenate((x, fixed), axis),
        normal(rng, *shape),
    )


@pytest.mark.parametrize(
    ("n", "d", "rows"), [(5, 7, [4, 0, 0, 2]), (3, 1, []), (1, 33, [0]), (7, 3, [6, 6, 6])]
)
def test_gather_rows(rng, n, d, rows):
    rows = np.array(rows, np.int32)
    check(rng, lambda x: ops.gather_rows(x, rows), lambda x: x[rows], normal(rng, n, d))


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(0,), (7, 33), (1,), (2, 3, 5)])
def test_dropout(rng, shape, p):
    factors = mask(shape, p, 12)
    check(rng, lambda x: ops.dropout(x, p, 12), lambda x: x * factors, normal(rng, *shape))


def test_dropout_keeps_the_share_that_it_should(rng):
    for p in (0.1, 0.5, 0.75):
        factors = mask((200, 500), p, 1)
        assert abs((factors == 0).mean() - p) < 0.006
        assert (factors != mask((200, 500), p, 2)).any()
        assert (factors == mask((200, 500), p, 1)).all()


@pytest.mark.parametrize("p", [1.0, -0.1, 2.0, float("nan")])
def test_dropout_of_everything_is_refused(p):
    with pytest.raises(ValueError, match="dropout"):
        ops.dropout(np.ones(3, np.float32), p, 0)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: ops.linear(x, np.ones((2, 2), np.float32)),
        lambda x: ops.swiglu(x, x),
        lambda x: ops.add(x, x),
    ],
)
def test_arrays_without_numbers_are_refused(operation):
    with pytest.raises(TypeError, match="real numbers"):
        operation(np.full((2, 2), 1j))


@pytest.mark.parametrize(
    ("ids", "error"),
    [([0.5], TypeError), ([4], ValueError), ([-1], ValueError), ([2**40], ValueError)],
)
def test_ids_that_are_none(ids, error):
    with pytest.raises(error):
        ops.embedding(np.array(ids), np.ones((4, 2), np.float32))


def test_a_module_trains_everything_that_is_not_frozen(rng):
    """The same operations through nn, where parameters are leaves by identity."""
    layer = nn.Linear(5, 3)
    norm = nn.RMSNorm(3)
    x, upstream = normal(rng, 4, 5), normal(rng, 4, 3)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = layer, norm

        def __call__(self, x):
            return self.norm(self.layer(x))

    model = Both()
    _, grads = nn.value_and_grad(model, lambda: (model(x) * upstream.astype(np.float32)).sum())()

    def reference(w, b, g):
        y = x @ w.T + b
        return y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) * g

    arguments = [a.astype(np.float64) for a in (layer.weight, layer.bias, norm.weight)]
    for i, name in enumerate(("layer.weight", "layer.bias", "norm.weight")):
        np.testing.assert_allclose(
            grads[name], differences(reference, arguments, i, upstream), rtol=1e-3, atol=1e-4
        )
