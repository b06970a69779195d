"""Losses of hidden states under an output head, against the unfused formulas in float64."""

import ml_dtypes
import numpy as np
import pytest
from loss_cases import DTYPES, REDUCTIONS
from loss_formulas import IGNORE, reduced
from stored_weights import stored

import pyloss
from pyloss import _core
from pyloss.autograd.differentiation import value_and_grad
from pyloss.autograd.tensor import Tensor
from pyloss.losses import head as linear_losses
from pyloss.weights.weight import FORMATS, Weight

FORMULAS = {
    "linear_cross_entropy": "softmax_cross_entropy",
    "linear_kl_div": "kl_div_loss",
    "linear_js_div": "js_div_loss",
    "linear_skew_kl_div": "skew_kl_div_loss",
    "linear_tvd": "tvd_loss",
    "linear_cosine": "cosine_loss",
}
PAIRS = ["linear_kl_div", "linear_js_div", "linear_skew_kl_div", "linear_tvd", "linear_cosine"]
OPTIONS = [
    ("linear_cross_entropy", {}),
    ("linear_cross_entropy", {"label_smoothing": 0.2}),
    ("linear_cross_entropy", {"z_loss": 1e-2}),
    ("linear_cross_entropy", {"softcap": 3.0}),
    (
        "linear_cross_entropy",
        {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "ignore_index": 3},
    ),
    ("linear_kl_div", {}),
    ("linear_kl_div", {"temperature": 2.5}),
    ("linear_js_div", {}),
    ("linear_js_div", {"beta": 0.2, "temperature": 0.5}),
    ("linear_js_div", {"beta": 0.0}),
    ("linear_js_div", {"beta": 1.0, "temperature": 2.0}),
    ("linear_kl_div", {"direction": "reverse", "softcap": (3.0, None)}),
    ("linear_js_div", {"softcap": 4.0, "logit_scale": (0.5, 2.0)}),
    ("linear_skew_kl_div", {"skew": 0.3, "direction": "reverse"}),
    ("linear_tvd", {"temperature": 2.0}),
    ("linear_cosine", {"softcap": (4.0, None)}),
]


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture
def many_parts(monkeypatch):
    """Compute at most 16 rows at a time."""
    monkeypatch.setattr(linear_losses, "LOGITS_BYTES", 1)
    monkeypatch.setattr(linear_losses, "MAX_BYTES", 1)


def case(rng, name, shape=(2, 3), v=7, d=5, e=6):
    """(arguments with gradients, the others) of a loss of hidden states [*shape, d].

    The teacher's hidden states are [*shape, e].
    """
    hidden, weight = rng.standard_normal((*shape, d)), rng.standard_normal((v, d))
    if name == "linear_cross_entropy":
        labels = np.where(rng.uniform(size=shape) < 0.25, IGNORE, rng.integers(0, v, shape))
        return (hidden, weight), (labels,)
    return (hidden, weight, 2 * rng.standard_normal((*shape, e)), rng.standard_normal((v, e))), ()


def single(arrays):
    return tuple(a.astype(np.float32) for a in arrays)


def f64(array):
    """The argument's values in float64."""
    return (array.dequantize() if isinstance(array, Weight) else np.asarray(array)).astype(
        np.float64
    )


def expected(name, arrays, others, options, reduction="none", upstream=1.0):
    """(result, gradients of `(upstream * result).sum()` for hidden states and weights)"""
    exact = [f64(a) for a in arrays]
    heads = list(zip(exact[::2], exact[1::2], strict=True))
    logits = [hidden @ weight.T for hidden, weight in heads]
    result, by_logits = reduced(FORMULAS[name], (*logits, *others), options, reduction, upstream)
    found = []
    for (hidden, weight), by in zip(heads, by_logits, strict=True):
        by = np.asarray(by)
        found += [by @ weight, by.reshape(-1, len(weight)).T @ hidden.reshape(-1, hidden.shape[-1])]
    return result, found


def computed(name, arrays, others, options, wanted, upstream=1.0):
    """(result, gradients of the arguments at `wanted`)"""

    def f(*arrays):
        result = getattr(pyloss, name)(*arrays, *others, **options)
        return (result * np.asarray(upstream, np.float32)).sum(), result

    (_, result), found = value_and_grad(f, wanted)(*arrays)
    return result, found


def assert_close(got, want, tolerance=1e-5):
    got = np.asarray(got, np.float64)
    assert got.shape == np.shape(want)
    np.testing.assert_allclose(
        got, want, rtol=tolerance, atol=tolerance * (1 + np.abs(want).max(initial=0))
    )


# Values and gradients


SHAPES = [(), (1,), (5,), (2, 3), (3, 1, 2), (19,), (37,), (0,), (2, 0)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients(rng, name, shape, reduction):
    arrays, others = case(rng, name, shape)
    arrays = single(arrays)
    upstream = rng.standard_normal(shape if reduction == "none" else ()).astype(np.float32)
    options = {"reduction": reduction}
    want, gradients = expected(name, arrays, others, {}, reduction, upstream)
    got = getattr(pyloss, name)(*arrays, *others, **options)
    assert np.asarray(got).dtype == np.float32
    assert_close(got, want)
    traced, found = computed(name, arrays, others, options, range(len(arrays)), upstream)
    assert_close(traced, want)
    for argument, gradient, exact in zip(arrays, found, gradients, strict=True):
        assert gradient.dtype == np.float32 and gradient.shape == argument.shape
        assert_close(gradient, exact)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_options(rng, name, options, weighted):
    arrays, others = case(rng, name)
    weights = {"weights": np.array([[1, 0.5, 0], [2, 1.5, 1]])} if weighted else {}
    upstream = rng.standard_normal((2, 3)).astype(np.float32)
    if "ignore_index" in options:
        others = (np.array([[0, 3, 1], [6, 6, 3]]),)
    want, gradients = expected(
        name, single(arrays), others, {**options, **weights}, "none", upstream
    )
    got, found = computed(
        name, single(arrays), others, {**options, **weights}, range(len(arrays)), upstream
    )
    assert_close(got, want)
    for gradient, exact in zip(found, gradients, strict=True):
        assert_close(gradient, exact)


@pytest.mark.parametrize("name", FORMULAS)
def test_only_the_gradients_asked_for(rng, name):
    """Each subset has the values of the full set, and only its own products are computed."""
    arrays, others = case(rng, name, (9,))
    arrays = single(arrays)
    _, every = computed(name, arrays, others, {}, range(len(arrays)))
    for subset in range(1, 2 ** len(arrays)):
        wanted = [i for i in range(len(arrays)) if subset >> i & 1]
        _core.profile(True)
        _, found = computed(name, arrays, others, {}, wanted)
        calls = _core.profile(False)
        for i, gradient in zip(wanted, found, strict=True):
            assert_close(gradient, every[i], 1e-6)
        assert calls.get("linear_input_grad", (0,))[0] == sum(i % 2 == 0 for i in wanted)
        assert calls.get("matmul_tn", (0,))[0] == sum(i % 2 for i in wanted)


def test_gradients_meet_where_student_and_teacher_are_one(rng):
    """As in self-distillation: the same hidden states under two heads."""
    (hidden, weight, _, other), _ = case(rng, "linear_kl_div", (4,), d=5, e=5)
    hidden, weight, other = single((hidden, weight, other))
    _, (dq, _, dp, _) = expected("linear_kl_div", (hidden, weight, hidden, other), (), {})
    _, found = value_and_grad(lambda h: pyloss.linear_kl_div(h, weight, h, other).sum())(hidden)
    assert_close(found, dq + dp)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("which", ["hidden", "weight", "both"])
@pytest.mark.parametrize("name", FORMULAS)
def test_types(rng, name, kind, which):
    """Inputs of any type are computed in float32; a gradient has its argument's type."""
    dtype = DTYPES[kind]
    (student, weight, *teacher), others = case(rng, name, (6,), d=32)
    arrays = (
        student.astype(dtype if which != "weight" else np.float32),
        weight.astype(dtype if which != "hidden" else np.float32),
    )
    arrays = (*arrays, *single(teacher))
    want, gradients = expected(name, arrays, others, {}, "mean")
    got, found = computed(name, arrays, others, {"reduction": "mean"}, (0, 1))
    assert np.asarray(got).dtype == np.float32
    assert_close(got, want)
    for argument, gradient, exact in zip(arrays, found, gradients, strict=False):
        assert gradient.dtype == argument.dtype
        assert_close(gradient, exact, max(1e-5, float(ml_dtypes.finfo(argument.dtype).eps)))


@pytest.mark.parametrize(
    "change",
    [
        np.asfortranarray,
        lambda a: np.repeat(a, 2, -1)[..., ::2],
        lambda a: a.astype(a.dtype.newbyteorder()),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", FORMULAS)
def test_layouts(rng, name, dtype, change):
    arrays, others = case(rng, name, (4,))
    arrays = [a.astype(dtype) for a in arrays]
    want = getattr(pyloss, name)(*arrays, *others)
    changed = [change(a) for a in arrays]
    for a in changed:
        a.flags.writeable = False
    np.testing.assert_array_equal(getattr(pyloss, name)(*changed, *others), want)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("filtered", [0.0, 2.0**-40])
@pytest.mark.parametrize("name", FORMULAS)
def test_stored_matrices(rng, name, format, filtered):
    """A stored matrix has no gradient; hidden states and the other head still do."""
    width = max(32, FORMATS[format].elements)
    arrays, others = case(rng, name, (6,), v=11, d=width, e=2 * width)
    arrays = tuple(
        stored(rng, *a.shape, format) if i % 2 else (a / 4).astype(np.float32)
        for i, a in enumerate(arrays)
    )
    want, gradients = expected(name, arrays, others, {}, "sum")
    hidden = range(0, len(arrays), 2)
    got, found = computed(
        name, arrays, others, {"reduction": "sum", "gradient_filter": filtered}, hidden
    )
    assert_close(got, want)
    for i, gradient in zip(hidden, found, strict=True):
        assert_close(gradient, gradients[i])
    if name != "linear_cross_entropy":
        mixed = (*arrays[:3], arrays[3].dequantize())
        _, (dw,) = computed(name, mixed, others, {"reduction": "sum"}, (3,))
        assert_close(dw, gradients[3])


@pytest.mark.parametrize("name", FORMULAS)
def test_every_instruction_set(rng, isa, name):
    arrays, others = case(rng, name, (33,), v=67, d=19, e=35)
    want, gradients = expected(name, single(arrays), others, {}, "mean")
    for filtered in (0.0, 1e-12):
        options = {"reduction": "mean", "gradient_filter": filtered}
        got, found = computed(name, single(arrays), others, options, range(len(arrays)))
        assert_close(got, want)
        for gradient, exact in zip(found, gradients, strict=True):
            assert_close(gradient, exact)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_read_before_its_gradient(rng, name):
    """A value read in the traced function is computed alone; the gradient stays the same."""
    arrays, others = case(rng, name, (5,))
    arrays = single(arrays)
    everything = range(len(arrays))
    _, want = computed(name, arrays, others, {}, everything)
    calls = {}

    def f(*traced):
        loss = getattr(pyloss, name)(*traced, *others)
        assert isinstance(loss, Tensor)
        _core.profile(True)
        assert np.isfinite(loss.data).all()
        calls.update(_core.profile(False))
        return loss.sum(), loss

    (total, loss), found = value_and_grad(f, everything)(*arrays)
    assert calls["linear_forward"][0] == len(arrays) // 2
    assert "linear_input_grad" not in calls and "matmul_tn" not in calls
    np.testing.assert_array_equal(loss, getattr(pyloss, name)(*arrays, *others))
    assert total == pytest.approx(loss.sum(), rel=1e-6)
    for gradient, exact in zip(found, want, strict=True):
        np.testing.assert_array_equal(gradient, exact)


# In parts


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("rows", [25, 32, 168, 250])
def test_parts_do_not_change_a_bit(rng, monkeypatch, name, rows):
    """Values and hidden gradients keep their bits; the weight's gradient is a sum over parts.

    All parts have more than 32 rows, as real ones, or all have fewer, which have another order.
    """
    arrays, others = case(rng, name, (rows,), v=29, d=33)
    arrays = single(arrays)
    whole, wanted = computed(name, arrays, others, {}, range(len(arrays)))
    monkeypatch.setattr(linear_losses, "LOGITS_BYTES", 1)
    monkeypatch.setattr(linear_losses, "MAX_BYTES", 1)
    if rows > 32:
        monkeypatch.setattr(linear_losses, "rows_at_once", lambda *_: 2 * linear_losses.TILE_ROWS)
    _core.profile(True)
    parts, found = computed(name, arrays, others, {}, range(len(arrays)))
    assert _core.profile(False)["linear_forward"][0] >= 2
    assert whole.tobytes() == parts.tobytes()
    for i, (gradient, exact) in enumerate(zip(found, wanted, strict=True)):
        if i % 2:
            assert_close(gradient, exact, 1e-6)
        else:
            assert gradient.tobytes() == exact.tobytes()


@pytest.mark.parametrize("total", [*range(80), 127, 128, 211, 500, 2048, 4097])
@pytest.mark.parametrize("most", [16, 17, 41, 42, 60, 200, 210, 5000])
def test_parts_are_even_and_bounded(monkeypatch, total, most):
    monkeypatch.setattr(linear_losses, "LOGITS_BYTES", most * 8)
    monkeypatch.setattr(linear_losses, "MIN_ROWS", 1)
    parts = linear_losses._parts(total, 8)
    sizes = [p.stop - p.start for p in parts]
    assert sum(sizes) == total and [p.start for p in parts] == list(np.cumsum([0, *sizes]))[:-1]
    assert len(parts) == -(-total // most) and max(sizes, default=0) <= most
    few = 4 if most < 126 else 32
    assert len(parts) < 2 or min(sizes) > few, "few rows are multiplied in another order"


def test_rows_of_a_large_vocabulary_are_not_few():
    """Limits of the logits' memory, and of the cost of packing the head."""
    assert linear_losses.rows_at_once(4 * 49152) * 4 * 49152 < 42e6
    for row_bytes in (4 * 151936, 8 * 151936, 8 * 262144):
        assert linear_losses.rows_at_once(row_bytes) >= 64
        assert linear_losses.rows_at_once(row_bytes) * row_bytes < 170e6


def test_the_same_bits_for_any_number_of_threads(rng, many_parts):
    arrays, others = case(rng, "linear_cross_entropy", (50,), v=700, d=64)
    arrays, before = single(arrays), pyloss.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            pyloss.set_num_threads(threads)
            loss, gradients = computed(
                "linear_cross_entropy", arrays, others, {"gradient_filter": 1e-3}, (0, 1)
            )
            results.append((loss.tobytes(), *(g.tobytes() for g in gradients)))
    finally:
        pyloss.set_num_threads(before)
    assert results[0] == results[1] == results[2]


# Rows that need no computation


def rows_computed(monkeypatch, function):
    """The number of the head's rows that `function` computes."""
    counts = []

    def counting(x, *rest):
        counts.append(len(x))
        return forward(x, *rest)

    forward = _core.linear_forward
    monkeypatch.setattr(_core, "linear_forward", counting)
    result = function()
    monkeypatch.undo()
    return sum(counts), result


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_row_of_weight_zero_is_not_computed_whatever_it_holds(
    rng, monkeypatch, name, bad, reduction
):
    arrays, _ = case(rng, name, (6,))
    arrays, others = single(arrays), (np.arange(6),) if name == "linear_cross_entropy" else ()
    weights = np.array([1, 0, 2, 0.5, 0, 1])
    upstream = rng.standard_normal(6 if reduction == "none" else ()).astype(np.float32)
    want, gradients = expected(name, arrays, others, {"weights": weights}, reduction, upstream)
    for hidden in arrays[::2]:
        hidden[[1, 4]] = bad
    options = {"weights": weights, "reduction": reduction}
    n, (got, found) = rows_computed(
        monkeypatch, lambda: computed(name, arrays, others, options, range(len(arrays)), upstream)
    )
    assert n == 4 * len(arrays) // 2
    assert_close(got, want)
    for gradient, exact in zip(found, gradients, strict=True):
        assert_close(gradient, exact)


@pytest.mark.parametrize("ignore", [IGNORE, -1, 0, 99])
def test_a_row_without_a_label_is_not_computed(rng, monkeypatch, many_parts, ignore):
    arrays, _ = case(rng, "linear_cross_entropy", (60,))
    arrays, labels = (
        single(arrays),
        np.where(np.arange(60) % 3 == 0, rng.integers(1, 7, 60), ignore),
    )
    options = {"ignore_index": ignore, "reduction": "mean"}
    want, gradients = expected(
        "linear_cross_entropy", arrays, (labels,), {"ignore_index": ignore}, "mean"
    )
    arrays[0][labels == ignore] = np.nan
    n, (got, found) = rows_computed(
        monkeypatch, lambda: computed("linear_cross_entropy", arrays, (labels,), options, (0, 1))
    )
    assert n == 20
    assert_close(got, want)
    for gradient, exact in zip(found, gradients, strict=True):
        assert_close(gradient, exact)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("filtered", [0.0, 1e-3])
def test_nothing_to_compute(rng, monkeypatch, name, reduction, filtered):
    """All rows are ignored or have weight 0."""
    arrays, others = case(rng, name, (3,))
    arrays = [
        np.full(a.shape, np.nan, np.float32) if i % 2 == 0 else a.astype(np.float32)
        for i, a in enumerate(arrays)
    ]
    options = {"reduction": reduction, "gradient_filter": filtered}
    if name == "linear_cross_entropy":
        others = (np.full(3, IGNORE),)
    else:
        options["weights"] = np.zeros(3)
    n, (got, found) = rows_computed(
        monkeypatch, lambda: computed(name, arrays, others, options, range(len(arrays)))
    )
    assert n == 0 and not np.any(got) and np.shape(got) == ((3,) if reduction == "none" else ())
    for argument, gradient in zip(arrays, found, strict=True):
        assert gradient.shape == argument.shape and not gradient.any()


def test_a_row_that_is_not_finite_stays_alone(rng):
    (hidden, weight), _ = case(rng, "linear_cross_entropy", (5,))
    hidden, weight = single((hidden, weight))
    labels = np.arange(5)
    want = pyloss.linear_cross_entropy(hidden, weight, labels)
    hidden[2, 1] = np.nan
    for filtered in (0.0, 0.1):
        got, (gradient,) = computed(
            "linear_cross_entropy", (hidden, weight), (labels,), {"gradient_filter": filtered}, (0,)
        )
        assert np.isnan(got).tolist() == [False, False, True, False, False]
        np.testing.assert_array_equal(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]])
        assert np.isnan(gradient[2]).all() and np.isfinite(gradient[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_a_row_without_upstream_gradient_still_has_its_loss(rng, name):
    arrays, others = case(rng, name, (6,))
    upstream = np.array([0, 1, 0, 2, 0, 1], np.float32)
    want, gradients = expected(name, single(arrays), others, {}, "none", upstream)
    got, found = computed(name, single(arrays), others, {}, range(len(arrays)), upstream)
    assert_close(got, want)
    for gradient, exact in zip(found, gradients, strict=True):
        assert_close(gradient, exact)


# Filtered gradients


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("filtered", [2.0**-12, 0.03])
def test_filtered_gradients(rng, monkeypatch, many_parts, name, reduction, filtered):
    """A class counts if a row of the part is above the filter, before reduction and weights."""
    monkeypatch.setattr(linear_losses, "FILTERED_COLUMNS", 5)
    arrays, others = case(rng, name, (20,), v=150, d=9, e=10)
    arrays = single([4 * a if i % 2 == 0 else a for i, a in enumerate(arrays)])
    options = {"weights": rng.uniform(0.1, 3, 20)}
    _, by_logits = expected_slopes(name, arrays, others)
    scale = scales(others, options["weights"], reduction)
    got, found = computed(
        name,
        arrays,
        others,
        {**options, "reduction": reduction, "gradient_filter": filtered},
        range(len(arrays)),
    )
    counted = np.flatnonzero(others[0] != IGNORE) if others else np.arange(20)
    want, _ = expected(name, arrays, others, options, reduction)
    assert_close(got, want)
    for i, slopes in enumerate(map(np.asarray, by_logits)):
        kept = np.zeros(slopes.shape)
        for part in linear_losses._parts(len(counted), 4):
            rows = counted[part]
            above = (np.abs(slopes[rows]) > filtered).any(axis=0)
            if 2 * above.sum() >= len(above):
                above[:] = True
            kept[rows] = slopes[rows] * above * scale[rows, None]
        hidden, weight = f64(arrays[2 * i]), f64(arrays[2 * i + 1])
        assert_close(found[2 * i], kept @ weight)
        assert_close(found[2 * i + 1], kept.T @ hidden)


def expected_slopes(name, arrays, others):
    """(losses, gradients of each row's own loss by its logits)"""
    logits = [f64(h) @ f64(w).T for h, w in zip(arrays[::2], arrays[1::2], strict=True)]
    return reduced(FORMULAS[name], (*logits, *others), {})


def scales(others, weights, reduction):
    counted = others[0] != IGNORE if others else np.full(len(weights), True)
    return weights * counted / ((weights * counted).sum() if reduction == "mean" else 1)


def test_everything_below_the_filter(rng):
    arrays, _ = case(rng, "linear_kl_div", (4,))
    _, found = computed("linear_kl_div", single(arrays), (), {"gradient_filter": 0.999}, range(4))
    assert not any(gradient.any() for gradient in found)


def test_a_row_without_upstream_gradient_passes_no_filter(rng):
    (hidden, weight), _ = case(rng, "linear_cross_entropy", (2,), v=40)
    arrays, labels = single((9 * hidden, weight)), (np.array([3, 5]),)
    options, upstream = {"gradient_filter": 0.01}, np.array([0, 1], np.float32)
    _, (alone,) = computed(
        "linear_cross_entropy", (arrays[0][1:], arrays[1]), (labels[0][1:],), options, (0,)
    )
    losses, (both,) = computed("linear_cross_entropy", arrays, labels, options, (0,), upstream)
    assert_close(losses, expected("linear_cross_entropy", arrays, labels, {})[0])
    assert not both[0].any()
    assert_close(both[1:], alone, 1e-6)


# Memory


def test_no_more_than_a_part_is_held(rng):
    """Peak of the core's buffers, without the results."""
    hidden, weight = (
        rng.standard_normal((1500, 8)).astype(np.float32),
        rng.standard_normal((20_000, 8)).astype(np.float32),
    )
    labels = rng.integers(0, 20_000, 1500)
    _core.trim()
    before = _core.buffer_stats()["in_use"]
    value_and_grad(lambda h: pyloss.linear_cross_entropy(h, weight, labels, reduction="mean"))(
        hidden
    )
    assert _core.buffer_stats()["peak"] - before < 1.15 * linear_losses.LOGITS_BYTES


# Errors


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("bad", [-0.1, 1.0, np.nan, np.inf])
def test_the_filter_is_a_share(rng, name, bad):
    arrays, others = case(rng, name)
    with pytest.raises(
        ValueError,
        match="gradient_filter is .*; it must be a finite number of at least 0 and below 1",
    ):
        getattr(pyloss, name)(*arrays, *others, gradient_filter=bad)
    with pytest.raises(TypeError, match="gradient_filter is .a.; it must be a finite number"):
        getattr(pyloss, name)(*arrays, *others, gradient_filter="a")


X, W = np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32)
Q4 = Weight.quantize(np.zeros((4, 32)), "q4_0")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pyloss.linear_cross_entropy(X, np.zeros((4, 5)), [0, 1]), ValueError, r"hidden has shape \(2, 3\).*weight's 5"),
        (lambda: pyloss.linear_cross_entropy(np.float32(1), W, 0), ValueError, r"hidden has shape \(\)"),
        (lambda: pyloss.linear_cross_entropy(X, Q4, [0, 1]), ValueError, r"hidden has shape \(2, 3\).*weight's 32"),
        (lambda: pyloss.linear_cross_entropy(X, np.zeros(3), [0, 1]), ValueError, r"weight must be \[V, D\].*\(3,\)"),
        (lambda: pyloss.linear_cross_entropy(X, np.zeros((0, 3)), [0, 1]), ValueError, r"weight must be \[V, D\].*\(0, 3\)"),
        (lambda: pyloss.linear_cross_entropy(X.astype(complex), W, [0, 1]), TypeError, "hidden must hold real numbers, not complex128"),
        (lambda: pyloss.linear_cross_entropy(X, W.astype(object), [0, 1]), TypeError, "weight must hold real numbers, not object"),
        (lambda: pyloss.linear_cross_entropy(X, W, [0, 4]), ValueError, r"label 4 at position 1 is outside \[0, 4\)"),
        (lambda: pyloss.linear_cross_entropy(X, W, [0]), ValueError, r"labels have shape \(1,\), expected one per row.*\(2,\)"),
        (lambda: pyloss.linear_cross_entropy(X, W, [0.0, 1.0]), TypeError, "labels must be integers, not float64"),
        (lambda: pyloss.linear_cross_entropy(X, W, [0, 1], weights=[1.0]), ValueError, r"weights have shape \(1,\)"),
        (lambda: pyloss.linear_cross_entropy(X, W, [0, 1], reduction="avg"), ValueError, "reduction must be one of"),
        (lambda: pyloss.linear_cross_entropy(X, W, [0, 1], label_smoothing=1.5), ValueError, "label_smoothing is 1.5;"),
        (lambda: pyloss.linear_cross_entropy(X, W, [0, 1], z_loss=-1), ValueError, "z_loss is -1;"),
        (lambda: pyloss.linear_cross_entropy(X, W, [0, 1], softcap=0), ValueError, "softcap is 0;"),
        (lambda: pyloss.linear_cross_entropy(X, W, [0, 1], out=np.zeros(3, np.float32)), ValueError, r"out has shape \(3,\), expected \(2,\)"),
        (lambda: pyloss.linear_cross_entropy(X, W, [0, 1], out=np.zeros(2)), ValueError, "out has dtype float64"),
        (lambda: pyloss.linear_kl_div(X, W, X, np.zeros((5, 3))), ValueError, "weight_q and weight_p.*4 and 5"),
        (lambda: pyloss.linear_kl_div(X, W, np.zeros((3, 3)), W), ValueError, r"hidden_q and hidden_p.*\(2, 3\) and \(3, 3\)"),
        (lambda: pyloss.linear_js_div(X, W, X, np.zeros((4, 2))), ValueError, r"hidden_p has shape \(2, 3\).*weight_p's 2"),
        (lambda: pyloss.linear_js_div(X, W, X, np.zeros(4)), ValueError, r"weight_p must be \[V, D\]"),
        (lambda: pyloss.linear_js_div(X, W, X, W.astype("U1")), TypeError, "weight_p must hold real numbers"),
        (lambda: pyloss.linear_js_div(X, W, X, W, beta=1.5), ValueError, "beta is 1.5;"),
        (lambda: pyloss.linear_kl_div(X, W, X, W, temperature=0), ValueError, "temperature is 0;"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", FORMULAS)
def test_out(rng, name):
    arrays, others = case(rng, name, (40,))
    want = getattr(pyloss, name)(*arrays, *others)
    for out in (np.empty(40, np.float32), np.empty(80, np.float32)[::2]):
        assert getattr(pyloss, name)(*arrays, *others, out=out) is out
        np.testing.assert_array_equal(out, want)
    total = np.empty((), np.float32)
    assert getattr(pyloss, name)(*arrays, *others, reduction="sum", out=total) is total
    assert total == pytest.approx(want.sum(), rel=1e-5)
