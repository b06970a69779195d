"""Elementwise maps, their gradients, and pairs whose axes broadcast, against float64."""

import math

import numpy as np
import pytest
from kernel_checks import on_threads

from pyloss import _core
from pyloss.arithmetic import BINARY

pytestmark = [
    pytest.mark.usefixtures("place"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 1.0, -1.0, 88.7, 89.0, -87.0, -104.0, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]  # fmt: skip


def _below(x):
    return np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)), otypes=[float])(x)


def _density(x):
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _logistic(x):
    return np.where(x < 0, np.exp(np.minimum(x, 0)) / (1 + np.exp(np.minimum(x, 0))), 1 / (1 + np.exp(-x)))  # fmt: skip


def _gelu_argument(x):
    return 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def _gelu_tanh_slope(x):
    s = _logistic(_gelu_argument(x))
    return s + x * s * (1 - s) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


#: f, f', and whether it needs positive arguments
MAPS = {
    "exp": (np.exp, np.exp, False),
    "expm1": (np.expm1, np.exp, False),
    "log": (np.log, lambda x: 1 / x, True),
    "log1p": (np.log1p, lambda x: 1 / (1 + x), True),
    "sqrt": (np.sqrt, lambda x: 0.5 / np.sqrt(x), True),
    "square": (np.square, lambda x: 2 * x, False),
    "reciprocal": (np.reciprocal, lambda x: -1 / x**2, True),
    "absolute": (np.abs, np.sign, False),
    "tanh": (np.tanh, lambda x: 1 / np.cosh(x) ** 2, False),
    "sigmoid": (_logistic, lambda x: _logistic(x) * _logistic(-x), False),
    "silu": (lambda x: x * _logistic(x), lambda x: _logistic(x) * (1 + x * _logistic(-x)), False),
    "gelu": (lambda x: x * _below(x), lambda x: _below(x) + x * _density(x), False),
    "gelu_tanh": (lambda x: x * _logistic(_gelu_argument(x)), _gelu_tanh_slope, False),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0, False),
}
PAIRS = {name: getattr(np, name) for name in BINARY if name != "above"}
PAIRS["above"] = lambda a, b: np.where(a == b, 0.5, a > b).astype(np.float32)
#: what NumPy gives of special values; the other maps have no function of their own in it
IN_NUMPY = ["exp", "expm1", "log", "log1p", "sqrt", "square", "reciprocal", "absolute", "tanh"]


def test_every_map_is_tested():
    made = {name.removeprefix("map_") for name, _ in _core.ops() if name.startswith("map_")}
    assert made == {*MAPS, *(f"{name}_grad" for name in MAPS), *PAIRS}


def arguments(name, rng, n):
    x = rng.standard_normal(n) * rng.choice([1e-3, 0.3, 3.0, 20.0], n)
    return np.abs(x) if MAPS[name][2] else x


def near(got, want, ulps, floor=1e-37):
    spacing = np.spacing(np.maximum(np.abs(want), floor).astype(np.float32)).astype(np.float64)
    excess = np.abs(got.astype(np.float64) - want) / spacing
    assert (excess <= ulps).all(), (excess.max(), got[excess.argmax()], want[excess.argmax()])


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("n", [1, 3, 8, 17, 4001])
def test_a_map_is_within_some_ulp(memory, rng, name, n):
    x = memory.put(arguments(name, rng, n))
    y = memory.new((n,))
    getattr(_core, f"map_{name}")(x, y)
    want = MAPS[name][0](x.astype(np.float64))
    # Tails of sigmoids, which are sums of 1 and a small number: relative to the argument.
    floor = 1e-37 if "elu" not in name else np.maximum(np.abs(x) / 16, 1e-37)
    # The polynomial of GELU rounds ten times, and the exponent of its tanh form twice.
    near(y, want, 8 if "gelu" in name else 3.5, floor)


@pytest.mark.parametrize("name", MAPS)
def test_a_gradient_is_the_derivative(memory, rng, name):
    x = memory.put(arguments(name, rng, 1003))
    y, dx = memory.new(x.shape), memory.new(x.shape)
    dy = memory.put(rng.standard_normal(x.shape))
    getattr(_core, f"map_{name}")(x, y)
    reads = dict(_core.ops())[f"map_{name}_grad"].split()[1][0]
    getattr(_core, f"map_{name}_grad")(dy, {"x": x, "y": y}[reads], dx)
    slope = MAPS[name][1](x.astype(np.float64))
    # 1 - y^2 and y (1 - y) round y.
    np.testing.assert_allclose(dx, dy * slope, rtol=2e-6, atol=1.5e-6)


@pytest.mark.parametrize("name", IN_NUMPY)
def test_special_values_are_numpys(memory, place, name):
    if "opencl" in place:
        pytest.skip("a device may take subnormal numbers as 0")
    x = memory.put(SPECIAL)
    y = memory.new(x.shape)
    getattr(_core, f"map_{name}")(x, y)
    want = getattr(np, name)(x)
    small = np.abs(want) < 1e-37
    np.testing.assert_allclose(y[~small], want[~small], rtol=4e-7)
    np.testing.assert_allclose(y[small], want[small], atol=3e-45)


@pytest.mark.parametrize("name", ["exp", "gelu", "relu"])
def test_maps_write_over_their_argument(memory, rng, name):
    x = memory.put(rng.standard_normal(77))
    y = memory.new(x.shape)
    getattr(_core, f"map_{name}")(x, y)
    getattr(_core, f"map_{name}")(x, x)
    assert x.tobytes() == y.tobytes()


LAYOUTS = [
    ((1, 1, 7), (1, 1, 7)), ((3, 5, 17), (3, 5, 17)), ((1, 5, 17), (1, 1, 17)), ((1, 5, 17), (1, 5, 1)),
    ((1, 5, 1), (1, 1, 17)), ((3, 1, 17), (1, 5, 1)), ((3, 5, 1), (1, 1, 9)), ((3, 5, 9), (3, 1, 9)),
    ((3, 1, 1), (1, 5, 9)), ((3, 5, 9), (3, 1, 1)), ((1, 1, 1), (3, 5, 9)), ((3, 5, 1), (3, 5, 1)),
    ((1, 300, 129), (1, 1, 129)), ((0, 2, 3), (1, 2, 3)), ((1, 1, 1), (1, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("swapped", [False, True])
def test_pairs_broadcast_and_have_numpys_bits(memory, rng, place, name, layout, swapped):
    a, b = (memory.put(rng.standard_normal(shape)) for shape in layout[:: -1 if swapped else 1])
    y = memory.new(np.broadcast_shapes(*layout))
    getattr(_core, f"map_{name}")(a, b, y)
    want = PAIRS[name](a, b)
    np.testing.assert_allclose(y, want, rtol=3e-7 if "opencl" in place else 0)


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_extremes_of_nan_are_nan(memory, name):
    a, b = memory.put([[[np.nan, 1.0, np.nan]]]), memory.put([[[1.0, np.nan, np.nan]]])
    y = memory.new(a.shape)
    getattr(_core, f"map_{name}")(a, b, y)
    assert np.isnan(y).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("third", [(1, 1, 1), None])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_selection_broadcasts(memory, rng, layout, third, turn):
    shapes = [*layout, third or np.broadcast_shapes(*layout)]
    shapes = shapes[turn:] + shapes[:turn]
    mask = memory.put(rng.integers(0, 2, shapes[0]) * rng.integers(1, 256, shapes[0]), np.uint8)
    a, b = (memory.put(rng.standard_normal(shape)) for shape in shapes[1:])
    y = memory.new(np.broadcast_shapes(*shapes))
    _core.select(mask, a, b, y)
    assert np.array_equal(y, np.where(mask, a, b))


def test_bits_do_not_depend_on_threads(rng, place):
    if "opencl" in place:
        pytest.skip("threads of the core")
    x = rng.standard_normal((300, 1001)).astype(np.float32)
    row = rng.standard_normal((1, 1001)).astype(np.float32)

    def run():
        y, z = np.empty_like(x), np.empty_like(x)
        _core.map_gelu(x, y)
        _core.map_divide(x, row, z)
        return y, z

    on_threads(run)


def test_large_results_are_stored_past_the_caches(rng, place):
    if "opencl" in place:
        pytest.skip("stores of the core")
    x = np.resize(rng.standard_normal(100_003).astype(np.float32), 7_000_003)
    y, row = _core.empty(x.shape), np.full((1, 1, 1), 2, np.float32)
    _core.map_square(x, y)
    assert np.array_equal(y, x * x)
    z = _core.empty((1, 7, 1_000_000))
    _core.map_multiply(x[:7_000_000].reshape(z.shape), row, z)
    assert np.array_equal(z.reshape(-1), 2 * x[:7_000_000])
    mask = (x[:7_000_000] > 0).view(np.uint8).reshape(z.shape)
    _core.select(mask, x[:7_000_000].reshape(z.shape), row, z)
    assert np.array_equal(z.reshape(-1), np.where(x[:7_000_000] > 0, x[:7_000_000], 2))
