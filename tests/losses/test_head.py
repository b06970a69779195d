"""Losses of hidden states under an output head, against the unfused formulas in float64."""

import ml_dtypes
import numpy as np
import pytest
from head_cases import FORMULAS, assert_close, case, computed, expected, single
from loss_cases import DTYPES, REDUCTIONS
from stored_weights import stored

import pyloss
from pyloss import _core
from pyloss.autograd.differentiation import value_and_grad
from pyloss.autograd.tensor import Tensor
from pyloss.losses import head as linear_losses
from pyloss.weights.weight import FORMATS, Weight

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
        assert calls.get("linear_weight_grad", (0,))[0] == sum(i % 2 for i in wanted)


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
    assert "linear_input_grad" not in calls and "linear_weight_grad" not in calls
    np.testing.assert_array_equal(loss, getattr(pyloss, name)(*arrays, *others))
    assert total == pytest.approx(loss.sum(), rel=1e-6)
    for gradient, exact in zip(found, want, strict=True):
        np.testing.assert_array_equal(gradient, exact)


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
    # Each thread packs panels of its own beside the part.
    assert _core.buffer_stats()["peak"] - before < 1.2 * linear_losses.LOGITS_BYTES


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
