"""Short convolutions against float64 formulas and their central differences."""

import itertools

import numpy as np
import pytest
from kernel_checks import on_threads, tolerance

from pyloss import _core

pytestmark = pytest.mark.usefixtures("place")

LENGTHS = [[0], [1], [2], [3], [64], [65], [0, 1, 0, 2, 3, 0], [5, 1, 1, 64, 2], [400, 1, 33]]
COLUMNS = [1, 7, 16, 33, 257]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64)


def convolved(x, w, bias, offsets):
    """c (bias + sum over t of w[t] (b v)[n - K + 1 + t]), row by row."""
    b, c, v = (x[:, i] for i in range(3))
    y = np.tile(0.0 if bias is None else bias, (len(x), 1)) * np.ones_like(b)
    taps = w.shape[2]
    for begin, end in itertools.pairwise(offsets):
        for n in range(begin, end):
            for t in range(taps):
                at = n - taps + 1 + t
                if at >= begin:
                    y[n] += w[:, 0, t] * b[at] * v[at]
    return c * y


def slopes(x, w, bias, offsets, dy):
    """Gradients of sum(convolved dy): by x, from each part's own factor, by w and by bias."""
    b, c, v = (x[:, i] for i in range(3))
    dx, dw, taps = np.zeros_like(x), np.zeros_like(w), w.shape[2]
    dx[:, 1] = dy * convolved(np.stack([b, np.ones_like(c), v], 1), w, bias, offsets)
    for begin, end in itertools.pairwise(offsets):
        for n in range(begin, end):
            for t in range(taps):
                at = n - taps + 1 + t
                if at >= begin:
                    dx[at, 0] += w[:, 0, t] * dy[n] * c[n] * v[at]
                    dx[at, 2] += w[:, 0, t] * dy[n] * c[n] * b[at]
                    dw[:, 0, t] += dy[n] * c[n] * b[at] * v[at]
    return dx, dw, (dy * c).sum(0)


def assert_near(got, want, size, n):
    """Within a tolerance of sums of n terms whose sizes add up to `size`."""
    assert got.shape == want.shape
    excess = np.abs(got - want) - tolerance(n) * size
    assert (excess <= 0).all(), f"off by {np.abs(got - want).max()}, {excess.max()} too much"


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_short_conv(memory, rng, lengths, columns, taps, biased):
    offsets = np.cumsum([0, *lengths])
    n = int(offsets[-1])
    x, w, dy = (
        normal(rng, n, 3, columns),
        normal(rng, columns, 1, taps),
        normal(rng, n, columns),
    )
    bias = normal(rng, columns) if biased else None
    given = (
        memory.put(x),
        memory.put(w),
        memory.put(bias) if biased else None,
        memory.put(offsets, np.int32),
    )

    def run():
        y, dx = memory.new((n, columns)), memory.new((n, 3, columns))
        dw, dbias = memory.new((columns, 1, taps)), memory.new(columns)
        _core.short_conv_forward(*given, y)
        _core.short_conv_grad(memory.put(dy), *given, dx, dw, dbias)
        return y, dx, dw, dbias

    y, dx, dw, dbias = on_threads(run)
    # A sum may cancel: its error is relative to the sum of the sizes of its terms.
    sizes = [None if a is None else np.abs(a) for a in (x, w, bias)]
    assert_near(y, convolved(x, w, bias, offsets), convolved(*sizes, offsets), taps)
    want, size = slopes(x, w, bias, offsets, dy), slopes(*sizes, offsets, np.abs(dy))
    assert_near(dx, want[0], size[0], taps)
    for got, sums in ((dw, want[1]), (dbias, want[2])):
        np.testing.assert_allclose(got, sums, rtol=0, atol=4 * tolerance(n) * np.sqrt(n + 1))
    alone = memory.new(dx.shape)
    _core.short_conv_grad(memory.put(dy), *given, alone, None, None)
    np.testing.assert_array_equal(alone, dx)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_conv_silu(memory, rng, lengths, columns, taps, biased):
    """The convolution of x is the one whose parts are x, 1 and 1."""
    offsets = np.cumsum([0, *lengths])
    n = int(offsets[-1])
    x, w, dy = normal(rng, n, columns), normal(rng, columns, 1, taps), normal(rng, n, columns)
    bias = normal(rng, columns) if biased else None
    given = (
        memory.put(x),
        memory.put(w),
        memory.put(bias) if biased else None,
        memory.put(offsets, np.int32),
    )

    def run():
        y, dx = memory.new((n, columns)), memory.new((n, columns))
        dw, dbias = memory.new((columns, 1, taps)), memory.new(columns)
        _core.conv_silu_forward(*given, y)
        _core.conv_silu_grad(memory.put(dy), *given, dx, dw, dbias)
        return y, dx, dw, dbias

    y, dx, dw, dbias = on_threads(run)
    parts = np.stack([x, np.ones_like(x), np.ones_like(x)], 1)
    sums = convolved(parts, w, bias, offsets)
    share = 1 / (1 + np.exp(-sums))
    sizes = [None if a is None else np.abs(a) for a in (parts, w, bias)]
    size = convolved(*sizes, offsets)
    assert_near(y, sums * share, 2 * size + 1e-3, taps)
    upstream = dy * share * (1 + sums * (1 - share))
    want = slopes(parts, w, bias, offsets, upstream)
    size = slopes(*sizes, offsets, np.abs(dy) * (2 + size))
    assert_near(dx, want[0][:, 0], size[0][:, 0], taps)
    for got, total, of in ((dw, want[1], size[1]), (dbias, want[2], size[2])):
        assert_near(got, total, of + 1e-3, n)
    alone = memory.new(dx.shape)
    _core.conv_silu_grad(memory.put(dy), *given, alone, None, None)
    np.testing.assert_array_equal(alone, dx)


def test_the_formulas_of_this_file(rng):
    """Its gradients are those of its convolution."""
    offsets = np.cumsum([0, 2, 4])
    x, w, bias, dy = normal(rng, 6, 3, 2), normal(rng, 2, 1, 3), normal(rng, 2), normal(rng, 6, 2)
    for array, slope in zip((x, w, bias), slopes(x, w, bias, offsets, dy), strict=True):
        for place in np.ndindex(array.shape):
            ends = []
            for step in (1e-5, -1e-5):
                array[place] += step
                ends.append((convolved(x, w, bias, offsets) * dy).sum())
                array[place] -= step
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope[place], abs=1e-8)


@pytest.mark.parametrize("columns", [1, 16, 33])
@pytest.mark.parametrize("taps", [1, 3, 5])
@pytest.mark.parametrize("name", ["short_conv", "conv_silu"])
def test_sequences_that_grow_have_the_bits_of_whole_ones(memory, rng, columns, taps, name):
    """Steps of any length, of some sequences among others in one store, with rows between them."""
    lengths, room = [70, 9, 1, 40], 75
    offsets = np.cumsum([0, *lengths])
    parts = (3,) if name == "short_conv" else ()
    x = memory.put(normal(rng, int(offsets[-1]), *parts, columns))
    w, bias = memory.put(normal(rng, columns, 1, taps)), memory.put(normal(rng, columns))
    whole = memory.new((len(x), columns))
    getattr(_core, f"{name}_forward")(x, w, bias, memory.put(offsets, np.int32), whole)
    store, held = memory.new((len(lengths) * room, columns)), np.zeros(len(lengths), int)
    got = np.full((len(x), columns), np.nan, np.float32)
    while (held < lengths).any():
        n = np.minimum(rng.integers(0, 9, len(lengths)), np.array(lengths) - held)
        q = np.zeros(2 * len(lengths), np.int32)
        q[1::2] = np.cumsum(n)
        q[2::2] = q[1:-1:2]
        k, begin = np.zeros_like(q), np.arange(len(lengths)) * room
        k[::2], k[1::2] = begin, begin + held + n
        rows = [begin[i] + held[i] + j for i in range(len(lengths)) for j in range(n[i])]
        new = [offsets[i] + held[i] + j for i in range(len(lengths)) for j in range(n[i])]
        y = memory.new((len(new), columns))
        getattr(_core, f"{name}_step")(
            memory.put(x[new]),
            w,
            bias,
            memory.put(q, np.int32),
            memory.put(k, np.int32),
            memory.put(rows, np.int32),
            store,
            y,
        )
        got[new] = y
        held += n
    np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-5)


def test_arguments_that_do_not_fit(memory):
    def call(x=(4, 3, 5), w=(5, 1, 3), offsets=(0, 4)):
        arrays = np.zeros(x, np.float32), np.zeros(w, np.float32), None
        y = memory.new((x[0], w[0]))
        _core.short_conv_forward(*arrays, np.array(offsets, np.int32), y)

    call()
    for wrong in (
        {"x": (4, 2, 5)},
        {"w": (5, 2, 3)},
        {"w": (4, 1, 3)},
        {"offsets": (0, 3)},
        {"offsets": (1, 4)},
        {"offsets": ()},
    ):
        with pytest.raises(ValueError, match="short_conv_forward: "):
            call(**wrong)
