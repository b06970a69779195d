"""Attention of every kind against its formula in float64."""

import numpy as np
import pytest

import pyloss
from pyloss import ops
from pyloss.ops import dot_product_attention


def formula(q, k, v, causal=False, window=0, mask=None, bias=None, softcap=0.0, scale=None):
    """softmax(scores) v with the whole T x S matrix; heads of q share those of k."""
    b, t, heads, d = q.shape
    s, groups = k.shape[1:3]
    k, v = (np.repeat(x, heads // groups, 2) for x in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) * (d**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    ago = np.arange(t)[:, None] + s - t - np.arange(s)
    seen = (ago >= 0) if causal else np.ones((t, s), bool)
    if window:
        seen = seen & (np.abs(ago) < window)
    seen = np.broadcast_to(seen if mask is None else seen & mask, (b, heads, t, s))
    # A query without keys has the output 0.
    some = seen.any(-1, keepdims=True)
    scores = np.where(seen | ~some, scores, -np.inf)
    p = np.exp(scores - np.max(pyloss.stop_gradient(scores), -1, keepdims=True))
    p = np.where(some, p / np.sum(p, -1, keepdims=True), 0)
    return np.einsum("bhts,bshd->bthd", p, v)


def drawn(b, t, s, heads, groups, d, e, dtype=np.float64):
    rng = np.random.default_rng(b * t + s)
    shapes = (b, t, heads, d), (b, s, groups, d), (b, s, groups, e)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


SHAPES = {
    "self": (2, 5, 5, 4, 4, 8, 8), "grouped": (2, 7, 7, 6, 2, 8, 8), "cross": (2, 3, 9, 4, 1, 8, 8),
    "values wider": (1, 4, 6, 2, 2, 3, 5), "one": (1, 1, 1, 1, 1, 1, 1), "Sudoku": (3, 81, 81, 4, 4, 16, 16),
    "more queries": (1, 9, 4, 2, 2, 4, 4),
}  # fmt: skip
OPTIONS = {
    "none": {}, "causal": {"causal": True}, "window": {"window": 3},
    "causal window": {"causal": True, "window": 2}, "cap": {"softcap": 1.5}, "scale": {"scale": 0.3},
}  # fmt: skip


def compare(arrays, options, tolerance):
    single = arrays[0].dtype == np.float32
    bias = options.get("bias")
    wide = [x.astype(np.float64) for x in arrays]
    wide_options = options if bias is None else {**options, "bias": bias.astype(np.float64)}
    rng = np.random.default_rng(5)

    def loss(function, options, upstream):
        def computed(q, k, v, *bias):
            more = {"bias": bias[0]} if bias else {}
            return (function(q, k, v, **{**options, **more}) * upstream).sum()

        return computed

    more = [] if bias is None else [bias]
    upstream = rng.standard_normal((*arrays[0].shape[:3], arrays[2].shape[3]))
    places = tuple(range(3 + len(more)))
    want, slopes = pyloss.value_and_grad(loss(formula, wide_options, upstream), places)(
        *wide, *(x.astype(np.float64) for x in more)
    )
    small = upstream.astype(arrays[0].dtype)
    value, found = pyloss.value_and_grad(loss(pyloss.attention, options, small), places)(
        *arrays, *more
    )
    np.testing.assert_allclose(value, want, rtol=tolerance, atol=tolerance * 30)
    for one, other in zip(found, slopes, strict=True):
        assert one.shape == other.shape and (one.dtype == np.float32) == single
        np.testing.assert_allclose(
            one, other, rtol=tolerance, atol=tolerance * (1 + np.abs(other).max())
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, option, dtype):
    arrays = drawn(*SHAPES[shape], dtype=dtype)
    compare(arrays, OPTIONS[option], 1e-4 if dtype == np.float32 else 1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["mask", "bias"])
@pytest.mark.parametrize(
    "axes", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 6, 1, 1), (1, 1, 7, 1), (2, 6, 7, 1), (2, 1, 7, 7), (2, 6, 7, 7)],
    ids=str,
)  # fmt: skip
def test_masks_and_biases_of_any_shape(axes, kind, dtype):
    shape = axes[:3] + (7,)
    rng = np.random.default_rng(sum(shape))
    arrays = drawn(2, 7, 7, 6, 2, 8, 8, dtype=dtype)
    option = (
        rng.uniform(size=shape) > 0.3
        if kind == "mask"
        else rng.standard_normal(shape).astype(dtype)
    )
    for more in ({}, {"causal": True, "softcap": 2.0}):
        compare(arrays, {kind: option, **more}, 1e-4 if dtype == np.float32 else 1e-9)


@pytest.mark.parametrize("block", [1, 16, 40, 100, 1000])
def test_blocks_of_any_size(monkeypatch, block):
    monkeypatch.setattr(dot_product_attention, "BLOCK", block)
    rng = np.random.default_rng(0)
    bias = rng.standard_normal((2, 6, 7, 5))
    mask = rng.uniform(size=(2, 1, 1, 5)) > 0.4
    compare(drawn(2, 7, 5, 6, 3, 4, 4), {"bias": bias, "mask": mask, "softcap": 3.0}, 1e-9)
    compare(drawn(2, 37, 5, 6, 3, 4, 4), {"window": 4}, 1e-9)


def test_a_query_without_keys_gives_zero():
    q, k, v = drawn(1, 3, 4, 2, 2, 4, 4, np.float32)
    mask = np.ones((1, 1, 3, 4), bool)
    mask[..., 1, :] = False
    y, dq = (
        pyloss.attention(q, k, v, mask=mask),
        pyloss.grad(lambda q: pyloss.attention(q, k, v, mask=mask).sum())(q),
    )
    assert (y[:, 1] == 0).all() and (dq[:, 1] == 0).all() and np.isfinite(y).all()


def test_packed_sequences_are_the_single_ones():
    rng = np.random.default_rng(1)
    ends = np.array([0, 3, 3, 10])
    q, k, v = (rng.standard_normal((10, n, 4)) for n in (4, 2, 2))
    for options in OPTIONS.values():
        y = pyloss.attention(q, k, v, offsets=ends, **options)
        for first, last in ((0, 3), (3, 10)):
            part = slice(first, last)
            want = formula(q[None, part], k[None, part], v[None, part], **options)[0]
            np.testing.assert_allclose(y[part], want, atol=1e-12)
    cross = pyloss.attention(q, k[:6], v[:6], offsets=ends, k_offsets=[0, 2, 3, 6])
    np.testing.assert_allclose(cross[:3], formula(q[None, :3], k[None, :2], v[None, :2])[0])


def test_the_kernel_of_language_models_agrees():
    q, k, v = drawn(2, 9, 9, 4, 2, 8, 8, np.float32)
    kernel = ops.attention(
        q.reshape(18, -1),
        k.reshape(18, -1),
        v.reshape(18, -1),
        np.array([0, 9, 18], np.int32),
        8,
        0.5,
    )
    y = pyloss.attention(q, k, v, causal=True, scale=0.5)
    np.testing.assert_allclose(y.reshape(18, -1), kernel, atol=1e-5)


def test_the_names_of_torch_and_mlx():
    q, k, v = (np.swapaxes(x, 1, 2) for x in drawn(2, 5, 5, 4, 2, 8, 8))
    want = np.swapaxes(formula(*(np.swapaxes(x, 1, 2) for x in (q, k, v)), causal=True), 1, 2)
    sdpa = pyloss.scaled_dot_product_attention
    for y in (sdpa(q, k, v, is_causal=True), sdpa(q, k, v, mask="causal")):
        np.testing.assert_allclose(y, want, atol=1e-12)
    keep = np.tril(np.ones((5, 5), bool))
    for mask in (keep, np.where(keep, 0, -np.inf)):
        np.testing.assert_allclose(sdpa(q, k, v, mask), want, atol=1e-12)
        np.testing.assert_allclose(sdpa(q, k, v, mask=mask), want, atol=1e-12)
    with pytest.raises(ValueError, match="enable_gqa"):
        sdpa(q, k, v, enable_gqa=False)
    with pytest.raises(ValueError, match="two names"):
        sdpa(q, k, v, keep, mask=keep)


def test_dropout_repeats_with_a_seed_and_keeps_the_mean():
    q, k, v = drawn(4, 30, 30, 4, 4, 8, 8, np.float32)
    v = np.ones_like(v)
    pyloss.random.seed(3)
    y = pyloss.attention(q, k, v, dropout=0.4)
    pyloss.random.seed(3)
    np.testing.assert_array_equal(y, pyloss.attention(q, k, v, dropout=0.4))
    assert y.std() > 0.05 and abs(y.mean() - 1) < 0.02
    assert pyloss.gradcheck(
        lambda q, v: (pyloss.random.seed(3), pyloss.attention(q, q, v, dropout=0.4))[1],
        q[:1, :4], v[:1, :4],
    ).ok  # fmt: skip


BAD = [
    ({"mask": np.ones((5, 5))}, TypeError, "mask must hold bool"),
    ({"mask": np.ones((3, 5), bool)}, ValueError, r"shape \(3, 5\).*\(2, 4, 5, 5\)"),
    ({"bias": np.ones((2, 5, 5, 5))}, ValueError, "bias has shape"),
    ({"window": -1}, ValueError, "window"), ({"dropout": 1}, ValueError, "dropout"),
    ({"softcap": -1}, ValueError, "softcap"), ({"k_offsets": [0, 1]}, ValueError, "needs offsets"),
    ({"offsets": [0, 1], "mask": np.ones(1, bool)}, ValueError, "no mask"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        pyloss.attention(*drawn(2, 5, 5, 4, 2, 8, 8), **options)


def test_shapes_that_do_not_fit():
    q, k, v = drawn(2, 5, 5, 4, 2, 8, 8)
    for arrays, message in (
        ((q[0], k, v), r"\[batch, tokens, heads, size\]"), ((q, k[:1], v), "do not fit"),
        ((q[:, :, :3], k, v), "no multiple"), ((q, k, v[:, :4]), "do not fit"),
        ((q, k[..., :4], v), "do not fit"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pyloss.attention(*arrays)
    with pytest.raises(ValueError, match="ascend from 0 to the 5 rows"):
        pyloss.attention(q[0], k[0], v[0], offsets=[0, 4])
    with pytest.raises(TypeError, match="real numbers"):
        pyloss.attention(q.astype(complex), k, v)
