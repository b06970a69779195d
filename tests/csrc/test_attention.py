"""Attention against float64 formulas; its gradient also against central differences."""

import numpy as np
import pytest
from kernel_checks import on_threads

from pyloss import _core

pytestmark = pytest.mark.usefixtures("place")

LENGTHS = [0, 1, 7, 33, 65, 129, 257]
HEADS = [(1, 1), (3, 1), (9, 3), (4, 4)]
WIDTHS = [1, 7, 33, 64, 128]
# Sequences of different lengths, some empty.
PACKED = [[0], [1], [5, 0, 1], [0, 33, 2, 0, 70], [129, 64, 0]]


def offsets(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def pairs(q_offsets, k_offsets, heads, kv_heads):
    """Yield each sequence's slices of queries and keys, and each head with the head of its keys."""
    for s in range(len(q_offsets) - 1):
        for h in range(heads):
            yield (
                slice(q_offsets[s], q_offsets[s + 1]),
                slice(k_offsets[s], k_offsets[s + 1]),
                h,
                h // (heads // kv_heads),
            )


def probabilities(q, k, scale, window=0, further=0, softcap=0.0):
    """Probabilities and log-sum-exp of one head; 0 and -inf where a query sees no key."""
    scores = scale * q @ k.T
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    ahead = np.arange(len(k)) - (np.arange(len(q))[:, None] + len(k) - len(q))
    seen = (ahead <= further) & ((ahead > -window) if window else True)
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=1, keepdims=True, initial=-1e30)
    e = np.exp(scores - top)
    total = e.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        return e / np.where(total == 0, 1, total), (np.log(total) + np.where(total == 0, 0, top))[
            :, 0
        ]


def reference(q, k, v, q_offsets, k_offsets, scale, window=0, ahead=0, softcap=0.0):
    o, lse = np.zeros(q.shape), np.zeros(q.shape[:2])
    for i, j, h, g in pairs(q_offsets, k_offsets, q.shape[1], k.shape[1]):
        p, lse[i, h] = probabilities(q[i, h], k[j, g], scale, window, ahead, softcap)
        o[i, h] = p @ v[j, g]
    return o, lse


def reference_grad(do, q, k, v, at, scale, window=0, ahead=0, k_at=None, softcap=0.0):
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for i, j, h, g in pairs(at, at if k_at is None else k_at, q.shape[1], k.shape[1]):
        p, _ = probabilities(q[i, h], k[j, g], scale, window, ahead, softcap)
        dv[j, g] += p.T @ do[i, h]
        dp = do[i, h] @ v[j, g].T
        ds = scale * p * (dp - (p * dp).sum(axis=1, keepdims=True))
        if softcap:
            ds /= np.cosh(scale * q[i, h] @ k[j, g].T / softcap) ** 2
        dq[i, h] = ds @ k[j, g]
        dk[j, g] += ds.T @ q[i, h]
    return dq, dk, dv


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64)


def forward(memory, q, k, v, q_offsets, k_offsets, scale, window=0, ahead=0, softcap=0.0):
    o, lse = memory.new(q.shape), memory.new(q.shape[:2])
    inputs = [memory.put(a) for a in (q, k, v)] + [
        memory.put(a, np.int32) for a in (q_offsets, k_offsets)
    ]
    _core.attention_forward(*inputs, scale, softcap, window, ahead, o, lse)
    return o, lse


def grad(memory, do, q, k, v, at, scale, window=0, ahead=0, k_at=None, softcap=0.0):
    k_at = at if k_at is None else k_at
    o, lse = forward(memory, q, k, v, at, k_at, scale, window, ahead, softcap)
    out = [memory.new(a.shape) for a in (q, k, v)]
    _core.attention_grad(
        *(memory.put(a) for a in (do, q, k, v)),
        o,
        lse,
        memory.put(at, np.int32),
        memory.put(k_at, np.int32),
        scale,
        softcap,
        window,
        ahead,
        *out,
    )
    return tuple(out)


def assert_near(got, want, limit):
    """Compare within `limit` of the largest value (or of 1): small elements are canceling sums."""
    assert got.shape == want.shape
    if got.size:
        assert np.isfinite(got).all()
        assert np.abs(got - want).max() <= limit * max(1, np.abs(want).max())


def check(memory, rng, lengths, heads, kv_heads, d, window=0):
    at, scale = offsets(lengths), 1 / np.sqrt(d)
    n = int(at[-1])
    q, k, v, do = (normal(rng, n, h, d) for h in (heads, kv_heads, kv_heads, heads))
    o, lse = forward(memory, q, k, v, at, at, scale, window)
    want_o, want_lse = reference(q, k, v, at, at, scale, window)
    assert_near(o, want_o, 3e-6)
    assert_near(lse, want_lse, 3e-6)
    got_grads, want_grads = (
        grad(memory, do, q, k, v, at, scale, window),
        reference_grad(do, q, k, v, at, scale, window),
    )
    for got, want in zip(got_grads, want_grads, strict=True):
        assert_near(got, want, 1e-5)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("d", WIDTHS)
def test_one_sequence(memory, rng, n, heads, kv_heads, d):
    check(memory, rng, [n], heads, kv_heads, d)


@pytest.mark.parametrize("lengths", PACKED)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(1, 1, 7), (9, 3, 64), (4, 1, 33)])
def test_packed_sequences(memory, rng, lengths, heads, kv_heads, d):
    check(memory, rng, lengths, heads, kv_heads, d)


def test_no_heads_and_no_width(memory, rng):
    check(memory, rng, [5], 0, 0, 8)
    q = np.zeros((5, 2, 0))
    at = offsets([5])
    _, lse = forward(memory, q, q, q, at, at, 1.0)
    assert_near(lse, np.repeat(np.log(np.arange(1.0, 6.0))[:, None], 2, axis=1), 1e-6)
    grad(memory, q, q, q, q, at, 1.0)


# With a window

WINDOWS = [1, 2, 17, 64, 100, 256, 1000]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (4, 1, 33)])
def test_windows(memory, rng, window, heads, kv_heads, d):
    check(memory, rng, [1, 300, 0, 63, 129], heads, kv_heads, d, window)


EVERYTHING = np.iinfo(np.int32).max


@pytest.mark.parametrize(
    ("ahead", "window"), [(EVERYTHING, 0), (3, 0), (70, 0), (1, 2), (40, 41), (EVERYTHING, 5)]
)
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [
        ((5, 130, 1), (5, 130, 1)), ((200,), (200,)), ((81, 81), (81, 81)), ((70, 3), (9, 140)),
        ((1, 2), (200, 65)), ((3, 0, 64), (2, 5, 1)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(6, 2, 16), (1, 1, 7)])
def test_keys_after_a_querys_place(
    memory, rng, q_lengths, k_lengths, heads, kv_heads, d, ahead, window
):
    at, k_at = (np.concatenate([[0], np.cumsum(n)]) for n in (q_lengths, k_lengths))
    q, do = normal(rng, at[-1], heads, d), normal(rng, at[-1], heads, d)
    k, v = normal(rng, k_at[-1], kv_heads, d), normal(rng, k_at[-1], kv_heads, d)
    o, lse = forward(memory, q, k, v, at, k_at, 0.3, window, ahead)
    want, want_lse = reference(q, k, v, at, k_at, 0.3, window, ahead)
    assert_near(o, want, 1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)
    found = grad(memory, do, q, k, v, at, 0.3, window, ahead, k_at)
    for got, slope in zip(
        found, reference_grad(do, q, k, v, at, 0.3, window, ahead, k_at), strict=True
    ):
        assert_near(got, slope, 1e-5)


@pytest.mark.parametrize("softcap", [0.5, 4.0, 50.0])
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"), [((1, 2, 70), (200, 65, 130)), ((129,), (129,))]
)
@pytest.mark.parametrize(("window", "ahead"), [(0, 0), (40, 0), (0, EVERYTHING)])
def test_softcap(memory, rng, softcap, q_lengths, k_lengths, window, ahead):
    """Scores reach the cap, and are near 0."""
    at, k_at = offsets(q_lengths), offsets(k_lengths)
    q, do = 3 * normal(rng, at[-1], 4, 24), normal(rng, at[-1], 4, 24)
    k, v = normal(rng, k_at[-1], 2, 24), normal(rng, k_at[-1], 2, 24)
    more = {"window": window, "ahead": ahead, "softcap": softcap}
    o, lse = forward(memory, q, k, v, at, k_at, 0.3, **more)
    want, want_lse = reference(q, k, v, at, k_at, 0.3, **more)
    assert_near(o, want, 1e-5)
    assert_near(lse, want_lse, 1e-5)
    slopes = reference_grad(do, q, k, v, at, 0.3, k_at=k_at, **more)
    for got, slope in zip(
        grad(memory, do, q, k, v, at, 0.3, k_at=k_at, **more), slopes, strict=True
    ):
        assert_near(got, slope, 2e-5)


def test_wide_heads_with_a_window(memory, rng):
    """Heads as wide as Gemma's."""
    check(memory, rng, [70, 5], 4, 1, 256, 33)


def test_a_window_of_the_whole_sequence_changes_no_bit(memory, rng):
    at = offsets([200, 33])
    q, k, v, do = (normal(rng, at[-1], h, 16) for h in (4, 2, 2, 4))
    plain, plain_grads = forward(memory, q, k, v, at, at, 0.25), grad(memory, do, q, k, v, at, 0.25)
    for window in (0, -1, 200, 2**40):
        for got, want in zip(forward(memory, q, k, v, at, at, 0.25, window), plain, strict=True):
            assert (got == want).all()
    for got, want in zip(grad(memory, do, q, k, v, at, 0.25, 200), plain_grads, strict=True):
        assert_near(got, want.astype(np.float64), 1e-6)


def test_what_lies_before_the_window_is_never_read(memory, rng):
    """Keys and values before the window are NaN, so any use of them would show."""
    at, window = offsets([700]), 100
    q, k, v, do = (normal(rng, 700, h, 24) for h in (4, 2, 2, 4))
    clean, clean_grads = (
        forward(memory, q, k, v, at, at, 0.2, window),
        grad(memory, do, q, k, v, at, 0.2, window),
    )
    k[:64], v[:64] = np.nan, np.nan
    for got, want in zip(forward(memory, q, k, v, at, at, 0.2, window), clean, strict=True):
        assert (got[400:] == want[400:]).all()
    for got, want in zip(grad(memory, do, q, k, v, at, 0.2, window), clean_grads, strict=True):
        assert (got[500:] == want[500:]).all()
    one, behind = offsets([1]), slice(100, 700)
    whole, _ = forward(memory, q[:1], k, v, one, at, 0.2, window)
    without, _ = forward(memory, q[:1], k[behind], v[behind], one, offsets([600]), 0.2, window)
    assert (whole == without).all()


# With a cache: fewer queries than keys, or more (the first ones see no key)

CACHED = [
    ([1], [1]),
    ([1], [300]),
    ([1], [1024]),
    ([2, 1, 0, 1], [70, 257, 9, 0]),
    ([40, 1], [300, 65]),
    ([130], [517]),
    ([5], [3]),
    ([90], [70]),
    ([3], [0]),
]


@pytest.mark.parametrize(("n", "m"), CACHED)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "window"),
    [(1, 1, 33, 0), (9, 3, 64, 0), (9, 3, 64, 50), (8, 8, 5, 1), (8, 8, 5, 0), (16, 1, 128, 300)],
)
def test_queries_after_a_cache(memory, rng, n, m, heads, kv_heads, d, window):
    q_offsets, k_offsets, scale = offsets(n), offsets(m), 1 / np.sqrt(d)
    q = normal(rng, q_offsets[-1], heads, d)
    k, v = (normal(rng, k_offsets[-1], kv_heads, d) for _ in range(2))
    o, lse = forward(memory, q, k, v, q_offsets, k_offsets, scale, window)
    want_o, want_lse = reference(q, k, v, q_offsets, k_offsets, scale, window)
    assert_near(o, want_o, 3e-6)
    blind = np.isneginf(want_lse)
    assert (np.isneginf(lse) == blind).all()
    assert_near(lse[~blind], want_lse[~blind], 3e-6)
    assert (o[blind] == 0).all()


@pytest.mark.parametrize("window", [0, 40])
def test_generation_gives_what_one_pass_gives(memory, rng, window):
    """Queries in chunks of any size see the same keys."""
    q, k, v = (normal(rng, 200, h, 32) for h in (6, 2, 2))
    whole, _ = forward(memory, q, k, v, offsets([200]), offsets([200]), 0.2, window)
    begin = 0
    for n in (90, 1, 1, 37, 2, 1, 68):
        end = begin + n
        part, _ = forward(
            memory, q[begin:end], k[:end], v[:end], offsets([n]), offsets([end]), 0.2, window
        )
        assert_near(part, whole[begin:end].astype(np.float64), 2e-6)
        begin = end


# Large and extreme numbers


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "d"), [([4], 1, 1, 3), ([3, 0, 2], 2, 1, 5)]
)
def test_gradient_against_central_differences(memory, rng, lengths, heads, kv_heads, d):
    at, scale, step = offsets(lengths), 0.7, 1e-5
    arrays = [normal(rng, at[-1], h, d) for h in (heads, kv_heads, kv_heads)]
    do = normal(rng, at[-1], heads, d)
    got = grad(memory, do, *arrays, at, scale)
    for which, array in enumerate(arrays):
        want = np.empty(array.shape)
        for i in np.ndindex(array.shape):
            values = []
            for sign in (1, -1):
                moved = [a.copy() for a in arrays]
                moved[which][i] += sign * step
                values.append((reference(*moved, at, at, scale)[0] * do).sum())
            want[i] = (values[0] - values[1]) / (2 * step)
        assert_near(got[which], want, 2e-6)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_scores(memory, rng, size):
    """Scores reach +-size; q and k are integers, so float32 and float64 have the same scores."""
    at = offsets([150])
    q, k = (rng.integers(-8, 9, (150, h, 16)).astype(np.float64) for h in (4, 2))
    v, do = normal(rng, 150, 2, 16), normal(rng, 150, 4, 16)
    largest = max(np.abs(q[:, h] @ k[:, h // 2].T).max() for h in range(4))
    scale = 2.0 ** np.round(np.log2(size / largest))
    o, lse = forward(memory, q, k, v, at, at, scale)
    want_o, want_lse = reference(q, k, v, at, at, scale)
    assert_near(o, want_o, 3e-6)
    assert_near(lse, want_lse, 3e-7)
    # Probabilities come from the log-sum-exp, which float32 holds to half a unit in the last place.
    error = 1e-5 + 2 * np.spacing(np.float32(size))
    for got, want in zip(
        grad(memory, do, q, k, v, at, scale), reference_grad(do, q, k, v, at, scale), strict=True
    ):
        assert_near(got, want, error)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("m", [33, 100])
def test_nan_stays_in_its_sequence(memory, rng, which, m):
    q_offsets, k_offsets = offsets([20, 33, 1, 2, 40]), offsets([20, 33, 1, m, 40])
    arrays = [
        normal(rng, at[-1], h, 17) for at, h in ((q_offsets, 4), (k_offsets, 2), (k_offsets, 2))
    ]
    clean, clean_lse = forward(memory, *arrays, q_offsets, k_offsets, 0.25)
    for s in (1, 3):
        dirty = [a.copy() for a in arrays]
        dirty[which][(k_offsets if which else q_offsets)[s]] = np.nan
        o, lse = forward(memory, *dirty, q_offsets, k_offsets, 0.25)
        own = np.arange(q_offsets[-1])
        own = (own >= q_offsets[s]) & (own < q_offsets[s + 1])
        assert (o[~own] == clean[~own]).all()
        assert (lse[~own] == clean_lse[~own]).all()
        assert np.isnan(o[q_offsets[s]]).all()


def test_nan_gradient_stays_in_its_sequence(memory, rng):
    at = offsets([20, 33, 5, 70])
    arrays = [normal(rng, at[-1], h, 17) for h in (4, 4, 2, 2)]
    clean = grad(memory, *arrays, at, 0.25)
    own = (np.arange(at[-1]) >= at[1]) & (np.arange(at[-1]) < at[2])
    for which in range(4):
        dirty = [a.copy() for a in arrays]
        dirty[which][at[1]] = np.nan
        for got, want in zip(grad(memory, *dirty, at, 0.25), clean, strict=True):
            assert (got[~own] == want[~own]).all()


@pytest.mark.parametrize("lengths", [[300], [3, 140, 0, 65], [1] * 20])
def test_any_number_of_threads_gives_the_same_bits(memory, rng, lengths):
    at = offsets(lengths)
    q, k, v, do = (normal(rng, at[-1], h, 40) for h in (6, 2, 2, 6))
    on_threads(lambda: forward(memory, q, k, v, at, at, 0.2))
    on_threads(lambda: grad(memory, do, q, k, v, at, 0.2))
    on_threads(lambda: grad(memory, do, q, k, v, at, 0.2, 30))
    keys = offsets([700] * len(lengths))
    k, v = (normal(rng, keys[-1], 2, 40) for _ in range(2))
    on_threads(lambda: forward(memory, q, k, v, at, keys, 0.2))
    on_threads(lambda: forward(memory, q, k, v, at, keys, 0.2, 300))


def test_long_sequence(memory, rng):
    """Longer than any block; a few rows are compared with the formula."""
    n, scale = 5000, 0.125
    q, k, v = (normal(rng, n, 1, 64) for _ in range(3))
    o, lse = forward(memory, q, k, v, offsets([n]), offsets([n]), scale)
    for i in (0, 63, 64, 1000, 4096, 4999):
        p, want_lse = probabilities(q[i : i + 1, 0], k[: i + 1, 0], scale)
        assert_near(o[i, 0], (p @ v[: i + 1, 0])[0], 3e-6)
        assert_near(lse[i], want_lse, 3e-6)
