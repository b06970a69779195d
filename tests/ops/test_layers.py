"""Gradients of every operation against float64 central differences of its documented formula."""

import itertools

import numpy as np
import pytest
from stored_weights import stored

import pyloss
from pyloss import _core, nn, ops
from pyloss.autograd.differentiation import value_and_grad
from pyloss.ops.projection import Product, Projection
from pyloss.weights.weight import FORMATS, Weight


@pytest.fixture(autouse=True)
def every_isa(isa):
    """Run all tests of this file on each instruction set."""


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def normal(rng, *shape):
    """float32 numbers as float64, so that both sides start from equal values."""
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64)


def differences(f, arguments, i, upstream, step=1e-5):
    """The gradient of sum(f(*arguments) * upstream) by argument i, by central differences."""
    x = arguments[i]
    out = np.empty_like(x)
    for place in np.ndindex(x.shape):
        moved = list(arguments)
        ends = []
        for sign in (1, -1):
            moved[i] = x.copy()
            moved[i][place] += sign * step
            ends.append((f(*moved) * upstream).sum())
        out[place] = (ends[0] - ends[1]) / (2 * step)
    return out


def check(rng, operation, reference, *arguments, tolerance=2e-5):
    """Check value and gradients, all together and alone, contiguous and strided.

    The upstream gradient is not uniform.
    """
    want = reference(*arguments)
    upstream = normal(rng, *want.shape)
    expected = [differences(reference, arguments, i, upstream) for i in range(len(arguments))]
    single = [a.astype(np.float32) for a in arguments]

    def near(got, want):
        assert got.shape == want.shape and got.dtype == np.float32
        limit = tolerance * max(1, np.abs(want).max(initial=0))
        np.testing.assert_allclose(got, want, atol=limit, rtol=tolerance)

    def f(*traced):
        out = operation(*traced)
        return (out * upstream.astype(np.float32)).sum(), out

    plain = operation(*single)
    assert type(plain) is np.ndarray
    near(plain, want)
    (_, out), grads = value_and_grad(f, range(len(single)))(*single)
    assert out.tobytes() == plain.tobytes(), "recording changes the value"
    for got, exact in zip(grads, expected, strict=True):
        near(got, exact)
    for i, exact in enumerate(expected):
        (_, out), gradient = value_and_grad(f, i)(*single)
        near(gradient, exact)
    strided = [np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a for a in single]
    _, again = value_and_grad(f, range(len(single)))(*strided)
    for got, first in zip(again, grads, strict=True):
        assert got.tobytes() == first.tobytes(), "strides change the gradient"


# (rows, in, out)
SHAPES = [(1, 1, 1), (1, 7, 3), (7, 1, 5), (5, 33, 7), (0, 4, 3), (13, 5, 0), (3, 17, 19)]


@pytest.mark.parametrize(("n", "i", "o"), SHAPES)
def test_linear(rng, n, i, o):
    x, w, b = normal(rng, n, i), normal(rng, o, i), normal(rng, o)
    check(rng, ops.linear, lambda x, w: x @ w.T, x, w)
    check(rng, ops.linear, lambda x, w, b: x @ w.T + b, x, w, b)


def test_linear_with_more_leading_axes(rng):
    check(
        rng,
        ops.linear,
        lambda x, w, b: x @ w.T + b,
        normal(rng, 2, 3, 5),
        normal(rng, 7, 5),
        normal(rng, 7),
    )
    check(rng, ops.linear, lambda x, w: x @ w.T, normal(rng, 5), normal(rng, 3, 5))


@pytest.mark.parametrize(("n", "i", "o"), [(1, 7, 3), (5, 33, 7), (0, 4, 3), (9, 3, 17)])
@pytest.mark.parametrize("rank", [1, 3])
def test_lora_linear(rng, n, i, o, rank):
    arguments = (
        normal(rng, n, i),
        normal(rng, o, i),
        normal(rng, o),
        normal(rng, i, rank),
        normal(rng, rank, o),
    )
    check(
        rng,
        lambda x, w, bias, a, b: ops.lora_linear(x, w, bias, a, b, 1.5),
        lambda x, w, bias, a, b: x @ w.T + bias + 1.5 * x @ a @ b,
        *arguments,
    )
    x, w, _, a, b = arguments
    check(
        rng,
        lambda x, w, a, b: ops.lora_linear(x, w, None, a, b, -0.5),
        lambda x, w, a, b: x @ w.T - 0.5 * x @ a @ b,
        x,
        w,
        a,
        b,
    )


def mask(shape, p, seed):
    """The factors by which dropout multiplies."""
    out = np.empty(shape, np.float32)
    _core.dropout(np.ones(shape, np.float32), seed, p, out)
    assert set(np.unique(out)) <= {0, np.float32(1 / (1 - p))}
    return out.astype(np.float64)


@pytest.mark.parametrize(("n", "i", "o"), [(5, 33, 7), (0, 4, 3), (4, 7, 3)])
def test_lora_linear_with_dropout(rng, n, i, o):
    factors = mask((n, i), 0.4, 99)
    if n == 5:
        assert (factors == 0).any() and (factors != 0).any()
    check(
        rng,
        lambda x, w, bias, a, b: ops.lora_linear(x, w, bias, a, b, 1.5, 0.4, 99),
        lambda x, w, bias, a, b: x @ w.T + bias + 1.5 * (x * factors) @ a @ b,
        normal(rng, n, i), normal(rng, o, i), normal(rng, o), normal(rng, i, 2), normal(rng, 2, o),
    )  # fmt: skip


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("head_dim", [0, 4])
def test_every_stored_format(rng, format, head_dim):
    weight = stored(rng, 12, 32, format, head_dim)
    cols = weight.shape[1]
    dense = weight.dequantize().astype(np.float64)
    x, bias = normal(rng, 6, cols), normal(rng, 12)
    a, b = normal(rng, cols, 2), normal(rng, 2, 12)
    check(
        rng,
        lambda x, bias: ops.linear(x, weight, bias),
        lambda x, bias: x @ dense.T + bias,
        x,
        bias,
    )
    check(
        rng,
        lambda x, a, b: ops.lora_linear(x, weight, None, a, b, 2.0),
        lambda x, a, b: x @ dense.T + 2.0 * x @ a @ b,
        x,
        a,
        b,
    )
    factors = mask((6, cols), 0.5, 4)
    check(
        rng,
        lambda x, a, b: ops.lora_linear(x, weight, None, a, b, 2.0, 0.5, 4),
        lambda x, a, b: x @ dense.T + 2.0 * (x * factors) @ a @ b,
        x, a, b,
    )  # fmt: skip
    ids = np.array([[11, 0], [5, 5]])
    np.testing.assert_allclose(ops.embedding(ids, weight), dense[ids], rtol=1e-6)
    # A stored matrix is never trained; without a trained input nothing is recorded.
    assert type(ops.linear(x, weight)) is np.ndarray


def test_a_value_that_goes_into_several_layers_gathers_their_gradients(rng):
    """q, k and v read one array; each path that can adds its gradient in place."""
    x, w, a, b = normal(rng, 6, 5), normal(rng, 7, 5), normal(rng, 5, 2), normal(rng, 2, 7)
    factors = mask((6, 5), 0.5, 3)

    def operation(x, w, a, b):
        y = ops.rms_norm(x, np.ones(5, np.float32))
        parts = [
            ops.linear(y, w),
            ops.lora_linear(y, w, None, a, b, 0.5),
            ops.lora_linear(y, w, None, a, b, 0.5, 0.5, 3),
            ops.linear(y, w),
        ]
        return ops.add(ops.add(parts[0], parts[1]), ops.add(parts[2], parts[3]))

    def reference(x, w, a, b):
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return 4 * y @ w.T + 0.5 * y @ a @ b + 0.5 * (y * factors) @ a @ b

    check(rng, operation, reference, x, w, a, b)


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
def test_split_columns(rng, n, widths):
    ends = np.cumsum([0, *widths])
    parts = [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(ends)]
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


def convolved(x, weight, bias, offsets):
    d, taps = len(weight), weight.shape[2]
    inner, out = x[:, :d] * x[:, 2 * d :], np.zeros((len(x), d))
    for begin, end in itertools.pairwise(offsets):
        for n in range(begin, end):
            for at in range(max(begin, n - taps + 1), n + 1):
                out[n] += weight[:, 0, taps - 1 - n + at] * inner[at]
    return (out if bias is None else out + bias) * x[:, d : 2 * d]


@pytest.mark.parametrize("lengths", [[0], [1], [2, 3], [4, 0, 1, 5]])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_short_conv(rng, lengths, taps, biased):
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    x, weight = normal(rng, int(offsets[-1]), 9), normal(rng, 3, 1, taps)
    more = [normal(rng, 3)] if biased else []

    def operation(x, weight, bias=None):
        return ops.short_conv(x, weight, bias, offsets)

    def reference(x, weight, bias=None):
        return convolved(x, weight, bias, offsets)

    check(rng, operation, reference, x, weight, *more)
    np.testing.assert_allclose(
        operation(x, weight, *more), reference(x, weight, *more), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("lengths", [[0], [4, 0, 1, 5]])
@pytest.mark.parametrize("biased", [False, True])
def test_conv_silu(rng, lengths, biased):
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    x, weight = normal(rng, int(offsets[-1]), 3), normal(rng, 3, 1, 4)
    more = [normal(rng, 3)] if biased else []

    def operation(x, weight, bias=None):
        return ops.conv_silu(x, weight, bias, offsets)

    def reference(x, weight, bias=None):
        sums = convolved(np.concatenate([x, x * 0 + 1, x * 0 + 1], 1), weight, bias, offsets)
        return sums / (1 + np.exp(-sums))

    check(rng, operation, reference, x, weight, *more)
    np.testing.assert_allclose(
        operation(x, weight, *more), reference(x, weight, *more), rtol=1e-12, atol=1e-12
    )


def delta_rule_by_steps(q, k, v, g, beta, offsets, d, scale):
    """One head of keys and values at a time, row by row."""
    out, share = np.zeros_like(v), g.shape[1] * d // k.shape[1]
    e = v.shape[1] // g.shape[1]
    for head in range(g.shape[1]):
        of_k = slice(head // share * d, (head // share + 1) * d)
        of_v = slice(head * e, (head + 1) * e)
        for begin, end in itertools.pairwise(offsets):
            state = np.zeros((d, e))
            for n in range(begin, end):
                key, query = (x[n, of_k] / np.sqrt(np.sum(x[n, of_k] ** 2) + 1e-6) for x in (k, q))
                state *= np.exp(g[n, head])
                state += np.outer(key, beta[n, head] * (v[n, of_v] - key @ state))
                out[n, of_v] = scale * query @ state
    return out


@pytest.mark.parametrize("lengths", [[0], [1], [4, 0, 1, 3]])
@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (1, 2), (2, 2)])
def test_delta_rule(rng, lengths, groups, heads):
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    n, d = int(offsets[-1]), 3
    q, k, v = normal(rng, n, groups * d), normal(rng, n, groups * d), normal(rng, n, heads * 2)
    g, beta = -np.abs(normal(rng, n, heads)), np.abs(normal(rng, n, heads))

    def operation(*arrays):
        return ops.delta_rule(*arrays, offsets, d, 0.7)

    def reference(*arrays):
        return delta_rule_by_steps(*arrays, offsets, d, 0.7)

    check(rng, operation, reference, q, k, v, g, beta)
    np.testing.assert_allclose(
        operation(q, k, v, g, beta), reference(q, k, v, g, beta), rtol=1e-12, atol=1e-12
    )


def scan_by_steps(x, dt, g, b, c, offsets, d):
    """One head at a time, row by row."""
    out, share = np.zeros_like(x), g.shape[1] * d // b.shape[1]
    e = x.shape[1] // g.shape[1]
    for head in range(g.shape[1]):
        group = slice(head // share * d, (head // share + 1) * d)
        own = slice(head * e, (head + 1) * e)
        for begin, end in itertools.pairwise(offsets):
            state = np.zeros((d, e))
            for n in range(begin, end):
                state = np.exp(g[n, head]) * state
                state += dt[n, head] * np.outer(b[n, group], x[n, own])
                out[n, own] = c[n, group] @ state
    return out


@pytest.mark.parametrize("lengths", [[0], [1], [4, 0, 1, 3]])
@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (1, 2), (2, 2)])
def test_state_scan(rng, lengths, groups, heads):
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    n, d = int(offsets[-1]), 3
    b, c, x = normal(rng, n, groups * d), normal(rng, n, groups * d), normal(rng, n, heads * 2)
    g, dt = -np.abs(normal(rng, n, heads)), np.abs(normal(rng, n, heads))

    def operation(*arrays):
        return ops.state_scan(*arrays, offsets, d)

    def reference(*arrays):
        return scan_by_steps(*arrays, offsets, d)

    check(rng, operation, reference, x, dt, g, b, c)
    np.testing.assert_allclose(
        operation(x, dt, g, b, c), reference(x, dt, g, b, c), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("which", [0, 1])
def test_delta_gates(rng, which):
    a, b, a_log, dt_bias = normal(rng, 4, 3), normal(rng, 4, 3), normal(rng, 3), normal(rng, 3)

    def operation(*arrays):
        return ops.delta_gates(*arrays)[which]

    def reference(a, b, a_log, dt_bias):
        return 1 / (1 + np.exp(-b)) if which else -np.exp(a_log) * np.logaddexp(0, a + dt_bias)

    check(rng, operation, reference, a, b, a_log, dt_bias)
    np.testing.assert_allclose(
        operation(a, b, a_log, dt_bias), reference(a, b, a_log, dt_bias), rtol=1e-12
    )


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("limits", [(0.0, np.inf), (0.3, 1.1)])
def test_scan_gates(rng, which, limits):
    x, a_log, dt_bias = normal(rng, 5, 3), normal(rng, 3), normal(rng, 3)

    def operation(*arrays):
        return ops.scan_gates(*arrays, limits)[which]

    def reference(x, a_log, dt_bias):
        dt = np.clip(np.logaddexp(0, x + dt_bias), *limits)
        return -np.exp(a_log) * dt if which else dt

    check(rng, operation, reference, x, a_log, dt_bias)
    np.testing.assert_allclose(
        operation(x, a_log, dt_bias), reference(x, a_log, dt_bias), rtol=1e-12
    )


@pytest.mark.parametrize(("rows", "heads", "size"), [(4, 3, 5), (1, 1, 2), (0, 2, 2), (3, 4, 1)])
def test_scale_heads(rng, rows, heads, size):
    def reference(x, factors):
        return x * np.repeat(factors, size)

    check(rng, ops.scale_heads, reference, normal(rng, rows, heads * size), normal(rng, heads))


@pytest.mark.parametrize("length", [64, 65])
def test_short_conv_of_longer_sequences(rng, length):
    """Gradients in float32 against those in float64, which other tests compare with differences."""
    offsets = np.array([0, length, length + 3, 2 * length], np.int32)
    arrays = normal(rng, 2 * length, 60), normal(rng, 20, 1, 3), normal(rng, 20)
    upstream = normal(rng, 2 * length, 20)

    def loss(x, weight, bias):
        return (ops.short_conv(x, weight, bias, offsets) * upstream.astype(x.dtype)).sum()

    step = value_and_grad(loss, argnums=(0, 1, 2))
    _, want = step(*arrays)
    _, got = step(*(array.astype(np.float32) for array in arrays))
    for one, other in zip(got, want, strict=True):
        assert one.dtype == np.float32 and other.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())


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


@pytest.mark.parametrize("rows", [1, 3, 5, 14, 50])
@pytest.mark.parametrize("depth", [32, 1536])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_products_thin_part_alone_has_the_bits_of_the_whole(rows, depth, dropout):
    """Checkpoints recompute only this part of a product whose result is not read."""
    rng = np.random.default_rng(rows)
    x, w, a, b = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((rows, depth), (64, depth), (depth, 8), (8, 64))
    )
    for weight in (w, Weight.quantize(w, "q4_1")):
        products = [
            Product((Projection(weight, None, a, b, 2.0, dropout, seed=3),), rows, x)
            for _ in range(2)
        ]
        products[0].forward([np.empty((rows, 64), np.float32)])
        products[1].compute_low_rank()
        first, second = (product.low_rank[0] for product in products)
        assert first.any() and first.tobytes() == second.tobytes()


X = np.zeros((2, 4), np.float32)


class Odd:
    """A foreign array-like object without an array."""

    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


@pytest.mark.parametrize("place", ["logits", "labels", "weights"])
def test_array_likes_that_raise_something_of_their_own(place):
    good = {"logits": X, "labels": [0, 1], "weights": [1.0, 1.0]}
    for error in (
        KeyError("gone"),
        RuntimeError("on another device"),
        ZeroDivisionError(),
        RecursionError("deep"),
    ):
        with pytest.raises(
            TypeError,
            match=f"{place} cannot be read as an array: Odd raises {type(error).__name__}",
        ) as caught:
            pyloss.softmax_cross_entropy(**(good | {place: Odd(error)}))
        assert caught.value.__cause__ is error
    with pytest.raises(MemoryError):
        pyloss.softmax_cross_entropy(**(good | {place: Odd(MemoryError())}))
    with pytest.raises(KeyboardInterrupt):
        pyloss.softmax_cross_entropy(**(good | {place: Odd(KeyboardInterrupt())}))


@pytest.mark.parametrize(
    ("place", "value"), [("logits", X), ("labels", [0, 1]), ("weights", [1.0, 1.0])]
)
def test_masked_arrays_are_read_only_where_nothing_is_masked(place, value):
    """NumPy ignores masks when it converts, so a masked label would count."""
    good = {"logits": X, "labels": [0, 1], "weights": [1.0, 1.0]}
    whole, masked = np.ma.array(value), np.ma.array(value)
    masked[1] = np.ma.masked
    want = pyloss.softmax_cross_entropy(**good)
    np.testing.assert_array_equal(pyloss.softmax_cross_entropy(**(good | {place: whole})), want)
    with pytest.raises(
        TypeError, match=f"masked elements cannot be read as {place}; give them values with .filled"
    ):
        pyloss.softmax_cross_entropy(**(good | {place: masked}))
