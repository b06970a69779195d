"""Matrix products against float64: operations, weight formats, shapes, instruction sets."""

import itertools

import numpy as np
import pytest
from kernel_checks import on_threads
from stored_weights import K_HALVES, QUANTISED, stored

from pyloss import _core
from pyloss.weights.weight import FORMATS, Weight

pytestmark = pytest.mark.usefixtures("place")

SIZES = [0, 1, 2, 3, 4, 5, 7, 13, 14, 15, 31, 33, 96, 97, 385]
RANKS = [1, 8, 33]


def shapes(size):
    """Shapes (m, n, k) that have `size` in each place, with random sizes in the other places.

    "long" has more than one block of A, and rows one page apart: these are packed, others are read
    in place.
    """
    if size == "long":
        return [
            (1100, 33, 31),
            (7, 40, 1601),
            (3, 1, 1601),
            (97, 385, 385),
            (31, 1024, 40),
            (29, 40, 1024),
            (33, 97, 2401),
        ]
    rng = np.random.default_rng(size)
    found = []
    for place in (0, 0, 0, 1, 1, 2, 2):
        shape = [int(v) for v in rng.choice(SIZES, 3)]
        shape[place] = size
        found.append(tuple(shape))
    return found


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def wide(x):
    return x.astype(np.float64)


def near(got, want, terms):
    """Compare sums of `terms` products of standard normals, relative to the size of the sum."""
    assert got.shape == want.shape
    size = np.sqrt(terms + 1) + np.abs(want)
    assert (np.abs(got - want) <= 4e-7 * size * (4 + np.sqrt(np.sqrt(terms)))).all(), np.abs(
        (got - want) / size
    ).max()


@pytest.mark.parametrize("size", [*SIZES, "long"])
def test_plain_products(memory, rng, size):
    for m, n, k in shapes(size):
        check_products(memory, rng, m, n, k)


def check_products(memory, rng, m, n, k):
    a, b, c0 = normal(rng, m, k), normal(rng, k, n), normal(rng, m, n)
    product = wide(a) @ wide(b)
    arguments = {
        "matmul_nn": (a, b),
        "matmul_nt": (a, b.T),
        "matmul_tn": (a.T, b),
    }
    for name, (left, right) in arguments.items():
        left, right = memory.put(left), memory.put(right)
        c = memory.new((m, n))
        getattr(_core, name)(left, right, 1.0, 0, c)
        near(c, product, k)
        c = memory.put(c0)
        getattr(_core, name)(left, right, -0.75, 1, c)
        near(c, c0 - 0.75 * product, k + 1)


@pytest.mark.parametrize("size", [*SIZES, "long"])
def test_linear_and_adapter_over_a_float_matrix(memory, rng, size):
    for (m, n, k), r in zip(shapes(size), itertools.cycle(RANKS)):
        x, w, bias = (
            memory.put(normal(rng, m, k)),
            memory.put(normal(rng, n, k)),
            memory.put(normal(rng, n)),
        )
        a, b = memory.put(normal(rng, k, r)), memory.put(normal(rng, r, n))
        check_linear(memory, x, w, w, bias, a, b, 0.5)
        check_gradient(memory, normal(rng, m, n), w, w, a, b, 0.5, normal(rng, m, k))


def check_linear(memory, x, weight, dense, bias, a, b, scale):
    """Check the forward operations with every combination of optional arguments."""
    (m, k), n, r = x.shape, len(dense), len(b)
    plain = wide(x) @ wide(dense).T
    hidden = wide(x) @ wide(a)
    y = memory.new((m, n))
    _core.linear_forward(x, weight, None, None, None, 0.0, None, y)
    near(y, plain, k)
    y = memory.new((m, n))
    _core.linear_forward(x, weight, bias, None, None, 0.0, None, y)
    near(y, plain + bias, k)
    given = memory.put(hidden / np.sqrt(k + 1))
    y = memory.new((m, n))
    _core.linear_forward(x, weight, bias, given, b, scale, None, y)
    near(y, plain + bias + scale * wide(given) @ wide(b), k + r)
    for offset in (None, bias):
        y, h = memory.new((m, n)), memory.new((m, r))
        _core.lora_forward(x, weight, offset, a, b, scale, None, h, y)
        if n:  # h is not computed without outputs
            near(h, hidden, k)
        near(y, plain + (0 if offset is None else bias) + scale * hidden @ wide(b), k + r * k)
    # `factor` scales the rows of the weight, not the adapter.
    factor, y, h = memory.put(factors(n)), memory.new((m, n)), memory.new((m, r))
    _core.linear_forward(x, weight, bias, None, None, 0.0, factor, y)
    near(y, plain * factor + bias, k)
    _core.lora_forward(x, weight, None, a, b, scale, factor, h, y)
    near(y, plain * factor + scale * hidden @ wide(b), k + r * k)


def factors(n):
    """Factors far apart, so that a mix-up shows."""
    return np.linspace(-1.5, 2, n, dtype=np.float32)


def check_gradient(memory, dy, weight, dense, a, b, scale, dx0):
    (m, n), k, r = dy.shape, dense.shape[1], len(b)
    dy = memory.put(dy)
    plain, dh_want = wide(dy) @ wide(dense), scale * wide(dy) @ wide(b).T
    given = memory.put(dh_want / np.sqrt(n + 1))
    for accumulate in (0, 1):
        start = accumulate * dx0
        dx = memory.put(dx0)
        _core.linear_input_grad(dy, weight, None, None, accumulate, None, dx)
        near(dx, start + plain, n + 1)
        dx = memory.put(dx0)
        _core.linear_input_grad(dy, weight, given, a, accumulate, None, dx)
        near(dx, start + plain + wide(given) @ wide(a).T, n + r + 1)
        dx, dh = memory.put(dx0), memory.new((m, r))
        _core.lora_input_grad(dy, weight, a, b, scale, accumulate, None, dh, dx)
        if k:
            near(dh, dh_want, n)
        near(dx, start + plain + dh_want @ wide(a).T, n + r * n + 1)
        factor, dx = memory.put(factors(n)), memory.put(dx0)
        scaled = wide(dy) @ (wide(dense) * factor[:, None])
        _core.linear_input_grad(dy, weight, None, None, accumulate, factor, dx)
        near(dx, start + scaled, n + 1)
        dx, dh = memory.put(dx0), memory.new((m, r))
        _core.lora_input_grad(dy, weight, a, b, scale, accumulate, factor, dh, dx)
        near(dx, start + scaled + dh_want @ wide(a).T, n + r * n + 1)


def unaligned(weight):
    """The same matrix at 2 bytes past a multiple of 64, as in a mapped file.

    No byte after it may be read, and its scales have odd addresses.
    """
    step = 4 if weight.format == "f32" else 2

    def moved(raw, step):
        store = np.zeros(raw.size + 128, np.uint8)
        begin = -store.ctypes.data % 64 + step
        place = store[begin : begin + raw.size]
        place[...] = raw
        return place

    g = weight.groups
    if g:
        names = ("scales", "offsets", "table", "map", "nested")
        g = g._replace(
            **{name: moved(array, 1) for name in names if (array := getattr(g, name)) is not None}
        )
    place = moved(weight.raw, step)
    again = Weight(place, weight.format, weight.shape, weight.head_dim, g)
    assert again.raw is place
    return again


@pytest.mark.parametrize("head_dim", [0, 6, 32])
@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize(("n", "k"), [(96, 32), (192, 416)])
def test_every_format(memory, rng, format, head_dim, n, k):
    weight = unaligned(stored(rng, n, k, format, head_dim))
    k = weight.shape[1]
    dense = weight.dequantize()
    for m, r in [(1, 1), (4, 8), (5, 1), (5, 8), (5, 33), (14, 1), (33, 8)]:
        x, bias = memory.put(normal(rng, m, k)), memory.put(normal(rng, n))
        a, b = memory.put(normal(rng, k, r)), memory.put(normal(rng, r, n))
        check_linear(memory, x, weight.handle, dense, bias, a, b, -1.5)
        check_gradient(
            memory, normal(rng, m, n), weight.handle, dense, a, b, -1.5, normal(rng, m, k)
        )


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "nf4"])
def test_the_bits_are_those_of_the_numpy_decoder(rng, format):
    """With 16-bit scales, scale times code is exact, so every order of operations rounds once."""
    check_bits(stored(rng, 34, 96, format, head_dim=2))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [32, 64, 256])
def test_nf4_bits_are_those_of_the_numpy_decoder(rng, double, size):
    check_bits(
        Weight.quantize(normal(rng, 34, 96), "nf4", group_size=size, double=double).slice_rows(
            3, 34
        )
    )


@pytest.mark.parametrize("scale_format", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_affine_groups(rng, size, scale_format):
    for format in ("affine2", "affine3", "affine4", "affine5", "affine6", "affine8"):
        weight = Weight.quantize(
            normal(rng, 20, 256), format, group_size=size, scale_format=scale_format
        )
        check_bits(weight.slice_rows(5, 20), exact=scale_format != "f32")


def check_bits(weight, exact=True):
    """Compare every path that reads a stored matrix with `dequantize`."""
    n, k = weight.shape
    dense = weight.dequantize()
    eye, back = np.eye(k, dtype=np.float32), np.eye(n, dtype=np.float32)
    forward, few = np.empty((k, n), np.float32), np.empty((3, n), np.float32)
    embedded, gradient = np.empty((n, k), np.float32), np.empty((n, k), np.float32)
    _core.linear_forward(eye, weight.handle, None, None, None, 0.0, None, forward)
    _core.linear_forward(eye[:3], weight.handle, None, None, None, 0.0, None, few)
    _core.embedding_forward(np.arange(n, dtype=np.int32), weight.handle, embedded)
    _core.linear_input_grad(back, weight.handle, None, None, 0, None, gradient)
    for got, want in ((forward, dense.T), (few, dense.T[:3]), (embedded, dense), (gradient, dense)):
        if exact:
            np.testing.assert_array_equal(got, want)
        else:
            np.testing.assert_allclose(got, want, rtol=0, atol=3e-7 * np.abs(dense).max())


@pytest.mark.parametrize("format", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("n", "k"), [(7, 33), (34, 5), (1, 1), (97, 31)])
def test_float_formats_have_no_blocks(memory, rng, format, n, k):
    weight = unaligned(Weight.quantize(normal(rng, n, k), format))
    dense, bias = weight.dequantize(), memory.put(normal(rng, n))
    for m in (3, 15):
        a, b = memory.put(normal(rng, k, 2)), memory.put(normal(rng, 2, n))
        check_linear(memory, memory.put(normal(rng, m, k)), weight.handle, dense, bias, a, b, 2.0)
        check_gradient(
            memory, normal(rng, m, n), weight.handle, dense, a, b, 2.0, normal(rng, m, k)
        )


@pytest.mark.parametrize("format", QUANTISED)
def test_any_code_of_a_quantised_block(rng, format):
    """Random codes with finite scales: rounding seldom gives codes at the ends of the range."""
    weight = stored(rng, 34, 96, format)
    kept = {"q4_1": 4, "q5_1": 4}.get(format, 2)
    if format not in K_HALVES:
        blocks = weight.raw.reshape(-1, FORMATS[format].bytes)
        codes = blocks if weight.groups else blocks[:, kept:]
        codes[...] = rng.integers(0, 256, codes.shape)
    check_bits(weight)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 385, 97),
        (3, 200, 1000),
        (5, 33, 31),
        (70, 385, 97),
        (333, 97, 500),
        (1100, 33, 31),
        (45, 1024, 2401),
    ],
)
def test_threads_give_the_same_bits(rng, m, n, k):
    x, w, bias = normal(rng, m, k), normal(rng, n, k), normal(rng, n)
    a, b, dy = normal(rng, k, 8), normal(rng, 8, n), normal(rng, m, n)

    def run():
        h, y, dh, dx = (np.empty(s, np.float32) for s in ((m, 8), (m, n), (m, 8), (m, k)))
        _core.lora_forward(x, w, bias, a, b, 0.5, None, h, y)
        _core.lora_input_grad(dy, w, a, b, 0.5, 0, None, dh, dx)
        dw, plain, given = (
            np.empty((n, k), np.float32),
            np.empty((m, k), np.float32),
            np.empty((m, n), np.float32),
        )
        _core.matmul_tn(dy, x, 1.0, 0, dw)
        _core.matmul_nn(dy, w, 1.0, 0, plain)
        _core.linear_forward(x, w, bias, h, b, 0.5, None, given)
        return h, y, dh, dx, dw, plain, given

    on_threads(run)


@pytest.mark.parametrize(
    "format", ["f32", "f16", "q8_0", "q4_1", "q5_0", "q4_k", "affine3", "affine4", "nf4"]
)
def test_a_row_does_not_depend_on_its_neighbours(rng, format):
    """Up to 32 rows are summed in one order, more in another; in each a row's bits are its own.

    So packing sequences changes nothing.
    """
    n, r = 97, 8
    weight = stored(rng, n, 416, format)
    k = weight.shape[1]
    x, a, b, bias, dy = (
        normal(rng, 80, k),
        normal(rng, k, r),
        normal(rng, r, n),
        normal(rng, n),
        normal(rng, 80, n),
    )

    def run(rows):
        count = len(x[rows])
        h, y, dh, dx = (np.empty((count, c), np.float32) for c in (r, n, r, k))
        _core.lora_forward(x[rows].copy(), weight.handle, bias, a, b, 0.5, None, h, y)
        _core.lora_input_grad(dy[rows].copy(), weight.handle, a, b, 0.5, 0, None, dh, dx)
        return h, y, dh, dx

    whole = run(slice(None))
    for rows in (slice(0, 33), slice(3, 54), slice(9, 79), slice(47, 80)):
        for part, want in zip(run(rows), whole, strict=True):
            assert part.tobytes() == want[rows].tobytes()
    for rows in (slice(0, 5), slice(3, 17), slice(62, 80)):
        for part, want in zip(run(rows)[2:], whole[2:], strict=True):
            assert part.tobytes() == want[rows].tobytes()
    few = run(slice(0, 32))
    for rows in (slice(0, 1), slice(1, 3), slice(2, 6), slice(9, 26)):
        for part, want in zip(run(rows)[:2], few[:2], strict=True):
            assert part.tobytes() == want[rows].tobytes()


@pytest.mark.parametrize("m", [3, 5, 29])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(memory, rng, m, bad):
    n, k, row, column = 41, 67, 2, 37
    x, w, dy = normal(rng, m, k), normal(rng, n, k), normal(rng, m, n)
    x[row, 5] = dy[row, 7] = bad

    def spoiled(y):
        return set(zip(*np.nonzero(~np.isfinite(y)), strict=True))

    y, dx = memory.new((m, n)), memory.new((m, k))
    _core.linear_forward(memory.put(x), memory.put(w), None, None, None, 0.0, None, y)
    assert spoiled(y) == {(row, j) for j in range(n)}
    _core.linear_input_grad(memory.put(dy), memory.put(w), None, None, 0, None, dx)
    assert spoiled(dx) == {(row, j) for j in range(k)}
    dw = memory.new((n, k))
    _core.matmul_tn(memory.put(dy), memory.put(np.nan_to_num(x, posinf=0)), 1.0, 0, dw)
    assert spoiled(dw) == {(7, j) for j in range(k)}
    w[column, 1] = bad
    _core.linear_forward(
        memory.put(normal(rng, m, k)), memory.put(w), None, None, None, 0.0, None, y
    )
    assert spoiled(y) == {(i, column) for i in range(m)}


def test_storing_ignores_what_was_there(rng):
    """accumulate=0 over NaN gives numbers, even with depth 0."""
    for k in (0, 3):
        c = np.full((6, 5), np.nan, np.float32)
        _core.matmul_nn(normal(rng, 6, k), normal(rng, k, 5), 1.0, 0, c)
        assert np.isfinite(c).all()


@pytest.mark.parametrize("m", [2, 30])
def test_leading_axes_are_rows(rng, m):
    x, w = normal(rng, m, 3, 33), normal(rng, 7, 33)
    y, flat = np.empty((m, 3, 7), np.float32), np.empty((3 * m, 7), np.float32)
    _core.linear_forward(x, w, None, None, None, 0.0, None, y)
    _core.linear_forward(x.reshape(-1, 33), w, None, None, None, 0.0, None, flat)
    assert (y.reshape(flat.shape) == flat).all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("linear_forward", lambda f: (f(3, 4), f(5, 6), None, None, None, 0.0, None, f(3, 5))),
        ("linear_forward", lambda f: (f(3, 4), f(5, 4), f(4), None, None, 0.0, None, f(3, 5))),
        ("linear_forward", lambda f: (f(3, 4), f(5, 4), None, None, None, 0.0, None, f(4, 5))),
        (
            "lora_forward",
            lambda f: (f(3, 4), f(5, 4), None, f(4, 2), f(3, 5), 1.0, None, f(3, 2), f(3, 5)),
        ),
        (
            "lora_input_grad",
            lambda f: (f(3, 5), f(5, 4), f(4, 2), f(2, 6), 1.0, 0, None, f(3, 2), f(3, 4)),
        ),
        (
            "lora_input_grad",
            lambda f: (f(3, 5), f(5, 4), f(4, 2), f(2, 5), 1.0, 0, f(4), f(3, 2), f(3, 4)),
        ),
        ("matmul_nn", lambda f: (f(3, 4), f(5, 6), 1.0, 0, f(3, 6))),
        ("matmul_nt", lambda f: (f(3, 4), f(6, 5), 1.0, 0, f(3, 6))),
        ("matmul_tn", lambda f: (f(4, 3), f(5, 6), 1.0, 0, f(3, 6))),
    ],
)
def test_sizes_that_do_not_fit(name, arguments):
    with pytest.raises(ValueError, match=name):
        getattr(_core, name)(*arguments(lambda *shape: np.zeros(shape, np.float32)))


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize(("n", "k", "r"), [(7, 50, 3), (40, 1184, 8), (3, 2304, 0), (96, 576, 33)])
def test_a_row_has_the_same_bits_beside_up_to_31_others(memory, rng, format, n, k, r):
    """Otherwise a sequence would get other tokens in a batch than alone."""
    weight = stored(rng, n, k if format in ("f32", "bf16", "f16") else k // 32 * 32, format, 0)
    k = weight.shape[1]
    x, bias, factor = normal(rng, 32, k), normal(rng, n), factors(n)
    a, b = normal(rng, k, max(r, 1)), normal(rng, max(r, 1), n)

    def product(x):
        x, h, y = memory.put(x), memory.new((len(x), len(b))), memory.new((len(x), n))
        if r:
            _core.lora_forward(x, weight.handle, bias, a, b, -1.5, factor, h, y)
        else:
            _core.linear_forward(x, weight.handle, bias, None, None, 0.0, factor, y)
        return y.copy()

    alone = np.concatenate([product(x[i : i + 1]) for i in range(32)])
    for m in [2, 3, 4, 5, 6, 7, 9, 16, 17, 31, 32]:
        np.testing.assert_array_equal(product(x[:m]), alone[:m])
