"""Every function of NumPy that carries gradients, against NumPy and float64 differences."""

import inspect
import math

import numpy as np
import pytest
from numpy_cases import BINARY, ONE_ARRAY, SHAPES, TWO_ARRAYS, UNARY, drawn
from tape_cases import Scale, numeric

from pyloss import grad, nn, value_and_grad
from pyloss.autograd.tensor import FUNCTIONS, UFUNCS, Tensor

ORDERS = ["C", "F"]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def check(f, *arrays, tolerance=1e-6):
    """Value and gradients of f against NumPy's value and differences, by each array."""
    want = np.asarray(f(*arrays))
    upstream = np.random.default_rng(1).standard_normal(want.shape)

    def loss(*xs):
        out = f(*xs)
        if isinstance(xs[0], Tensor) and isinstance(out, Tensor):
            assert out.shape == want.shape and out.dtype == want.dtype
        return np.sum(out * upstream)

    value, grads = value_and_grad(loss, tuple(range(len(arrays))))(*arrays)
    np.testing.assert_allclose(value, np.sum(want * upstream), rtol=1e-10, atol=1e-12)
    for i, (array, gradient) in enumerate(zip(arrays, grads, strict=True)):
        assert gradient.shape == array.shape and gradient.dtype == array.dtype

        def only(x, i=i):
            return loss(*arrays[:i], x, *arrays[i + 1 :])

        np.testing.assert_allclose(gradient, numeric(only, array), rtol=tolerance, atol=1e-7)
    # One Tensor beside plain arrays.
    for i in range(len(arrays) if len(arrays) > 1 else 0):
        alone = value_and_grad(loss, i)(*arrays)[1]
        np.testing.assert_array_equal(alone, grads[i])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ufunc", UNARY, ids=lambda u: u.__name__)
def test_functions_of_one_array(rng, ufunc, shape, order):
    check(ufunc, np.asarray(drawn(rng, shape, UNARY[ufunc]), order=order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 1), (1, 4)), ((2, 3, 1), (3, 4)), ((3,), ()), ((0, 4), (4,))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("ufunc", BINARY, ids=lambda u: u.__name__)
def test_functions_of_two_arrays(rng, ufunc, left, right, order):
    a, b = drawn(rng, left, BINARY[ufunc]), drawn(rng, right, BINARY[ufunc])
    check(ufunc, np.asarray(a, order=order), np.asarray(b, order=order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ONE_ARRAY)
def test_other_functions(rng, name, order):
    check(ONE_ARRAY[name], np.asarray(drawn(rng, (2, 3, 5)), order=order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", TWO_ARRAYS)
def test_joins_and_products(rng, name, order):
    function, left, right = TWO_ARRAYS[name]
    check(
        function,
        np.asarray(drawn(rng, left), order=order),
        np.asarray(drawn(rng, right), order=order),
    )


@pytest.mark.parametrize("ufunc", [*UNARY, *BINARY], ids=lambda u: u.__name__)
def test_float32_against_float64(rng, ufunc):
    """Of a size that the core computes on all threads."""
    domain = {**UNARY, **BINARY}[ufunc]
    arrays = [drawn(rng, (257, 65), domain) for _ in range(ufunc.nin)]
    if ufunc.nin == 2:
        arrays[1] = arrays[1][:, :1]
    upstream = rng.standard_normal((257, 65))

    def loss(*xs):
        return np.sum(ufunc(*xs) * upstream.astype(xs[0].dtype))

    want, slopes = value_and_grad(loss, tuple(range(ufunc.nin)))(*arrays)
    value, found = value_and_grad(loss, tuple(range(ufunc.nin)))(
        *(a.astype(np.float32) for a in arrays)
    )
    np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-2)
    for ours, theirs in zip(found, slopes, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4 * np.abs(theirs).max())


def test_every_ufunc_of_the_table_is_tested():
    carried = {
        u for u, f in UFUNCS.items() if f.__qualname__.split(".")[0] in ("_unary", "_binary")
    }
    assert carried == {*UNARY, *BINARY}


@pytest.mark.parametrize("f", [np.prod, lambda x: np.prod(x, axis=0)], ids=["all", "columns"])
@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_products_with_zeros(rng, f, zeros):
    x = drawn(rng, (3, 2))
    x[:zeros, 0] = 0
    check(f, x)


def test_equal_values_share_the_gradient_of_an_extreme():
    x = np.array([2.0, 2.0, 1.0])
    np.testing.assert_array_equal(value_and_grad(np.max)(x)[1], [0.5, 0.5, 0])
    np.testing.assert_array_equal(
        value_and_grad(lambda x: np.maximum(x, 2).sum())(x)[1], [0.5, 0.5, 0]
    )
    np.testing.assert_array_equal(value_and_grad(lambda x: np.clip(x, 1, 2).sum())(x)[1], [1, 1, 1])


# Types


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * np.float64(0.5), lambda x: np.float64(2) - x, lambda x: x * 0.5 + 1,
        lambda x: np.where(x > 0, x, np.float64(0)), lambda x: x / np.int64(3), lambda x: x**2,
        lambda x: 2.0**x, lambda x: np.maximum(x, 0), lambda x: x * np.bool_(True),
        lambda x: np.mean(x, -1), lambda x: np.var(x), lambda x: np.einsum("ij->i", x),
        lambda x: np.clip(x, np.float64(-1), 1), lambda x: np.tanh(x) % 2,
    ],
)  # fmt: skip
def test_float32_stays_float32_beside_numbers(rng, f):
    x = rng.standard_normal((3, 4)).astype(np.float32)

    def loss(x):
        y = f(x)
        assert y.dtype == np.float32
        return y.sum()

    assert value_and_grad(loss)(x)[1].dtype == np.float32


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("other", [np.float32, np.float64, np.int64, np.bool_])
def test_types_are_numpys_beside_arrays(kind, other):
    x, y = np.ones((2, 3), kind), np.ones(3, other)

    def loss(t):
        z = t * y
        assert z.dtype == (x * y).dtype
        return z.sum()

    gradient = value_and_grad(loss)(x)[1]
    assert gradient.dtype == kind
    np.testing.assert_array_equal(gradient, 1)


def test_bfloat16_carries_gradients():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    x = np.array([0.5, 1, 2], bfloat16)
    gradient = grad(lambda x: (np.exp(x) * x).sum())(x)
    assert gradient.dtype == bfloat16
    wide = x.astype(np.float64)
    np.testing.assert_allclose(gradient.astype(np.float64), np.exp(wide) * (1 + wide), rtol=0.02)


# What has no gradient is plain or raises


PLAIN = {
    "equal": lambda x: x == 1, "not equal": lambda x: x != 1, "less": lambda x: x < 1,
    "compared with a Tensor": lambda x: x >= x, "isnan": np.isnan, "isfinite": np.isfinite,
    "sign": np.sign, "floor": np.floor, "round": np.round, "argmax": lambda x: x.argmax(-1),
    "argsort": np.argsort, "any": lambda x: (x > 0).any(), "zeros_like": np.zeros_like,
    "ones_like": np.ones_like, "shape": np.shape, "array_equal": lambda x: np.array_equal(x, x),
    "nonzero": np.nonzero, "count_nonzero": np.count_nonzero, "int": lambda x: x.astype(int),
    "where of one": lambda x: np.where(x > 0), "floor division": lambda x: x // 2,
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_results_without_gradient_are_plain(rng, name):
    x = rng.standard_normal((3, 4))

    def loss(t):
        found = PLAIN[name](t)
        assert not isinstance(found, Tensor)
        for one, want in zip(np.atleast_1d(found), np.atleast_1d(PLAIN[name](x)), strict=True):
            np.testing.assert_array_equal(one, want)
        return t.sum()

    value_and_grad(loss)(x)


RAISES = {
    "asarray": lambda x: np.asarray(x) * 1, "array of a list": lambda x: np.array([x, x]),
    "float": lambda x: float(x[0, 0]), "math": lambda x: math.sqrt(x[0, 0] ** 2),
    "int": lambda x: int(x[0, 0]), "in place": lambda x: x.__iadd__(1),
    "item assignment": lambda x: x.__setitem__(0, 1),
    "out": lambda x: np.exp(x, out=np.empty((3, 4))),
    "into an array": lambda x: np.zeros((3, 4)).__iadd__(x),
    "assignment into an array": lambda x: np.zeros((3, 4)).__setitem__(0, x[0]),
    "unknown function": lambda x: np.median(x), "unknown ufunc": lambda x: np.spacing(x),
    "fft": lambda x: np.fft.fft(x), "solve": lambda x: np.linalg.solve(np.eye(3), x),
    "reduce": lambda x: np.logaddexp.reduce(x), "accumulate": lambda x: np.add.accumulate(x),
    "where=": lambda x: np.exp(x, where=np.ones((3, 4), bool)),
    "a letter twice": lambda x: np.einsum("ii->i", x[:3, :3]),
    "pad with means": lambda x: np.pad(x, 1, mode="mean"),
    "an order": lambda x: np.reshape(x, (12,), order="F"),
    "interp": lambda x: np.interp(x, [0, 1], [0, 1]),
    "random": lambda x: np.random.default_rng(0).normal(x),
    "index": lambda x: [1, 2][x[0, 0]],
}  # fmt: skip


@pytest.mark.parametrize("name", RAISES)
def test_what_cannot_carry_a_gradient_raises(rng, name):
    x = rng.standard_normal((3, 4))
    with pytest.raises(TypeError):
        value_and_grad(lambda t: (RAISES[name](t), t.sum())[1])(x)


def test_errors_say_what_to_use(rng):
    x = rng.standard_normal((3, 4))
    for f, words in (
        (np.median, "numpy.median has no gradient.*custom_function"),
        (np.asarray, "lose its gradient.*stop_gradient"),
        (lambda t: t.__iadd__(1), r"in place.*t = t \+ x"),
        (lambda t: float(t[0, 0]), r"t\.item\(\)"),
    ):
        with pytest.raises(TypeError, match=words):
            value_and_grad(f)(x)


def test_outside_of_recordings_everything_is_numpys(rng):
    kept = []
    value_and_grad(lambda t: (kept.append(t * 2), t.sum())[1])(rng.standard_normal((3, 3)))
    (t,) = kept
    assert type(np.median(t)) is np.float64 and type(np.asarray(t)) is np.ndarray
    assert type(t + 1) is np.ndarray and float(t[0, 0]) == t.data[0, 0]
    assert type(np.concatenate([t, t])) is np.ndarray and bool(t[0, 0] == t[0, 0])


def test_registered_functions_take_numpys_arguments():
    """Positional arguments go to the parameters that NumPy's have."""
    for function, ours in FUNCTIONS.items():
        if getattr(np, function.__name__, None) is not function:
            continue
        try:
            theirs = list(inspect.signature(function).parameters.values())
        except ValueError:
            continue
        if "lambda" in ours.__name__ or ours.__name__ == "computed":
            continue
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in theirs):
            continue
        want = [p.name for p in theirs if p.kind in positional]
        mine = [p.name for p in inspect.signature(ours).parameters.values() if p.kind in positional]
        assert mine == want[: len(mine)], f"numpy.{function.__name__}"


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_of_an_axis_of_a_square(rng, axis):
    """Along axis 0, broadcasting would weight axis 1."""
    check(lambda x, w: np.average(x, axis, w), drawn(rng, (3, 3)), drawn(rng, (3,), "positive"))


@pytest.mark.parametrize(
    ("shape", "axis", "error"),
    [
        ((3,), None, TypeError),
        ((2,), 0, ValueError),
        ((3, 1), 1, ValueError),
        ((0,), 0, ValueError),
    ],
)
def test_weights_that_numpy_refuses(shape, axis, error):
    for x in (np.ones((3, 3)), np.ones((3, 3))):
        with pytest.raises(error):
            np.average(x, axis, np.ones(shape))
        with pytest.raises(error):
            grad(lambda x: np.sum(np.average(x, axis, np.ones(shape))))(x)
    with pytest.raises(ZeroDivisionError):
        grad(lambda x: np.average(x, weights=x * 0))(np.ones(3))


def test_means_of_float16_do_not_overflow():
    x = np.full(70000, 3, np.float16)
    for f in (
        np.mean, np.std, np.linalg.norm, np.average, lambda x: np.average(x, weights=x),
        lambda x: np.var(x * 40.0),
    ):  # fmt: skip
        value, gradient = value_and_grad(f)(x)
        assert value.dtype == gradient.dtype == np.float16
        np.testing.assert_allclose(value, f(x.astype(np.float64)), rtol=1e-3)
    assert value_and_grad(lambda x: np.average(x, weights=np.ones(70000)))(x)[0].dtype == np.float64


@pytest.mark.parametrize(
    ("split", "shape"),
    [
        (lambda x: np.split(x, [3, 1]), (4,)), (lambda x: np.split(x, [1, 1, 9], 1), (2, 3)),
        (lambda x: np.hsplit(x, 2), (4,)), (lambda x: np.hsplit(x, [2, 1]), (4,)),
        (lambda x: np.array_split(x, 3), (4,)), (lambda x: np.dsplit(x, [2, 0]), (1, 2, 3)),
    ],
)  # fmt: skip
def test_splits_that_overlap_and_of_one_axis(rng, split, shape):
    check(
        lambda x: sum(np.sum(part * (i + 1)) for i, part in enumerate(split(x))), drawn(rng, shape)
    )


def test_values_that_fill_and_choose(rng):
    x = drawn(rng, (3,))
    check(lambda x: np.full_like(x, x.sum()) * x, x)
    check(lambda x: np.full_like(x, fill_value=x[0], shape=(2, 1)) * x, x)
    check(lambda x: np.heaviside(np.array([-1, 0, 2.0]), x), x)
    check(lambda x: np.heaviside(np.array([[0.0], [1]]), x), x)
    assert not grad(lambda x: np.sum(np.heaviside(x, 0.5) * x * 0))(x).any()


def test_a_trained_array_that_bounds(rng):
    """The arrays of a model before it is differentiated are bounds, too."""
    low = np.array([1.0, 0.0, 2.0], np.float32)
    model = Scale(low)
    x = np.array([0.5, 3.0, 1.0], np.float32)
    for f in (
        lambda: np.clip(model.weight * 0 + x, low, None),
        lambda: np.maximum(model.weight, x),
    ):
        np.testing.assert_array_equal(
            nn.value_and_grad(model, lambda f=f: np.sum(f()))()[1]["weight"], [1, 0, 1]
        )
