"""The losses with their head: formulas of the whole logits, gradients of hidden states and weights, stored weights, memory."""

import loss_formulas
import ml_dtypes
import numpy as np
import pytest
from loss_cases import REDUCTIONS
from loss_formulas import IGNORE

import pyloss
from pyloss import _core, linear_losses
from pyloss.weights import FORMATS, Weight

FORMULAS = {"linear_cross_entropy": "softmax_cross_entropy", "linear_kl_div": "kl_div_loss", "linear_js_div": "js_div_loss"}
CASES = [
    ("linear_cross_entropy", {}),
    ("linear_cross_entropy", {"label_smoothing": 0.1, "z_loss": 0.01}),
    ("linear_cross_entropy", {"softcap": 3.0}),
    ("linear_kl_div", {}),
    ("linear_kl_div", {"temperature": 2.0}),
    ("linear_js_div", {}),
    ("linear_js_div", {"beta": 0.2, "temperature": 0.5}),
]


@pytest.fixture
def rng():
    return np.random.default_rng(67)


def arguments(rng, name, shape=(7,), d=6, v=19):
    """(the arrays that have gradients: hidden states and weights in turn, the other arguments), float32"""
    heads = 1 if name == "linear_cross_entropy" else 2
    arrays = []
    for width in (d, d + 3)[:heads]:  # the teacher's hidden states may be wider
        arrays += [rng.standard_normal((*shape, width)), rng.standard_normal((v, width))]
    labels = rng.integers(0, v, shape)
    labels[rng.uniform(size=shape) < 0.25] = IGNORE
    return [a.astype(np.float32) for a in arrays], () if heads == 2 else (labels,)


def expected(name, arrays, other, options, reduction="none", upstream=1.0):
    """(loss, gradients of all arrays) through the whole logits, in float64."""
    wide = [np.asarray(a).astype(np.float64) for a in arrays]
    logits = [h @ w.T for h, w in zip(wide[::2], wide[1::2])]
    loss, slopes = loss_formulas.reduced(FORMULAS[name], (*logits, *other), options, reduction, upstream)
    gradients = []
    for slope, h, w in zip(slopes, wide[::2], wide[1::2]):
        gradients += [slope @ w, slope.reshape(-1, len(w)).T @ h.reshape(-1, w.shape[1])]
    return loss, gradients


def results(name, arrays, other, options, reduction="none", upstream=1.0):
    def f(*arrays):
        loss = getattr(pyloss, name)(*arrays, *other, **options, reduction=reduction)
        return (loss * np.float32(upstream)).sum(), loss

    (_, loss), gradients = pyloss.value_and_grad(f, range(len(arrays)))(*arrays)
    return loss, gradients


def assert_near(got, want, types=None):
    loss, gradients = got
    assert np.asarray(loss).dtype == np.float32 and np.shape(loss) == np.shape(want[0])
    np.testing.assert_allclose(loss, want[0], rtol=2e-5, atol=2e-6)
    for i, (gradient, slope) in enumerate(zip(gradients, want[1])):
        kind = np.float32 if types is None else types[i]
        assert gradient.dtype == kind
        rtol = 2e-5 if np.dtype(kind) == np.float32 else float(ml_dtypes.finfo(kind).eps)
        np.testing.assert_allclose(
            gradient.astype(np.float64), slope, rtol=rtol, atol=max(rtol, 4e-5) / 4 * np.abs(slope).max(initial=1e-3)
        )


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_values_and_every_gradient(rng, name, options, reduction, weighted):
    for shape in ((7,), (2, 3, 4)):
        arrays, other = arguments(rng, name, shape)
        given = {**options, "weights": rng.uniform(0, 2, shape) * (rng.uniform(size=shape) < 0.8)} if weighted else options
        upstream = rng.standard_normal(shape if reduction == "none" else ())
        want = expected(name, arrays, other, given, reduction, upstream)
        assert_near(results(name, arrays, other, given, reduction, upstream), want)
        alone = getattr(pyloss, name)(*arrays, *other, **given, reduction=reduction)
        np.testing.assert_allclose(alone, want[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_only_what_is_asked_for(rng, name):
    """The gradient of each argument alone is that of all of them."""
    arrays, other = arguments(rng, name)
    upstream = rng.standard_normal(7).astype(np.float32)
    _, gradients = results(name, arrays, other, {}, upstream=upstream)
    for i, gradient in enumerate(gradients):
        alone = pyloss.grad(lambda *a: (getattr(pyloss, name)(*a, *other) * upstream).sum(), i)(*arrays)
        np.testing.assert_allclose(alone, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kinds", [("f16", "f16"), ("bf16", "bf16"), ("f32", "bf16"), ("bf16", "f32"), ("f64", "f32")], ids="-".join
)
@pytest.mark.parametrize("name", FORMULAS)
def test_types_of_hidden_states_and_weights(rng, name, kinds):
    """Computed in float32 from what is stored; gradients have the types of their arguments."""
    types = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    arrays, other = arguments(rng, name)
    given = [a.astype(types[kinds[i % 2]]) for i, a in enumerate(arrays)]
    got = results(name, given, other, {})
    assert_near(got, expected(name, given, other, {}), [a.dtype for a in given])


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("name", FORMULAS)
def test_stored_weights(rng, name, format):
    """Each format as it is stored; the gradient of the hidden states alone."""
    arrays, other = arguments(rng, name, (5,), 32, 64)
    arrays = [
        a[..., :32] if i % 2 == 0 else Weight.quantize(np.ascontiguousarray(a[:, :32]), format) for i, a in enumerate(arrays)
    ]
    plain = [a.dequantize() if isinstance(a, Weight) else a for a in arrays]
    loss, slopes = expected(name, plain, other, {}, "mean")
    positions = list(range(0, len(arrays), 2))
    value, gradients = pyloss.value_and_grad(lambda *a: getattr(pyloss, name)(*a, *other, reduction="mean"), positions)(*arrays)
    assert_near((value, gradients), (loss, slopes[::2]))


@pytest.mark.parametrize("name", FORMULAS)
def test_in_many_parts(rng, name, monkeypatch):
    arrays, other = arguments(rng, name, (100,), 8, 33)
    upstream = rng.standard_normal(100)
    monkeypatch.setattr(linear_losses, "LOGITS_BYTES", 1)
    assert_near(results(name, arrays, other, {}, upstream=upstream), expected(name, arrays, other, {}, upstream=upstream))


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradients_go_through_the_logits_once(rng, name):
    """With a mean, whose gradient is known beforehand: one product for each head, one call of the loss."""
    arrays, other = arguments(rng, name)
    hidden = range(0, len(arrays), 2)
    _core.profile(True)
    try:
        pyloss.value_and_grad(lambda *a: getattr(pyloss, name)(*a, *other, reduction="mean"), hidden)(*arrays)
        calls = {kernel: count for kernel, (count, _, _) in _core.profile(True).items()}
    finally:
        _core.profile(False)
    kernel = FORMULAS[name].removesuffix("_loss")
    assert calls[kernel] == 1 and calls["linear_forward"] == calls["linear_input_grad"] == len(hidden)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_count(rng, name, reduction):
    """None there, all ignored, all of weight 0: zero, and no gradient."""
    arrays, other = arguments(rng, name)
    arrays[0][:] = np.nan
    options = {"weights": np.zeros(7)}
    for given in ([arrays, other, options], [arrays, (np.full(7, IGNORE),), {}]) if other else ([arrays, other, options],):
        loss, gradients = results(name, *given, reduction)
        assert not np.any(loss) and not any(g.any() for g in gradients)
    arrays, other = arguments(rng, name, (0,))
    loss, gradients = results(name, arrays, other, {}, reduction)
    assert np.shape(loss) == ((0,) if reduction == "none" else ()) and not np.any(loss)
    assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, arrays))


@pytest.mark.parametrize("name", FORMULAS)
def test_out(rng, name):
    arrays, other = arguments(rng, name)
    want = getattr(pyloss, name)(*arrays, *other)
    out = np.full((7, 2), 5, np.float32)
    assert np.shares_memory(getattr(pyloss, name)(*arrays, *other, out=out[:, 0]), out)
    np.testing.assert_array_equal(out, np.stack([want, np.full(7, 5)], axis=1))
    with pytest.raises(ValueError, match="out has dtype float64, expected float32"):
        getattr(pyloss, name)(*arrays, *other, out=np.zeros(7))


@pytest.mark.parametrize("name", FORMULAS)
def test_extra_memory(rng, name):
    """512 tokens of 151,936 classes: logits would be 311 MB for every head, and so would their gradients."""
    arrays, other = arguments(rng, name, (512,), 8, 151_936)
    hidden = range(0, len(arrays), 2)
    _core.trim()
    before = _core.buffer_stats()
    pyloss.value_and_grad(lambda *a: getattr(pyloss, name)(*a, *other, reduction="mean"), hidden)(*arrays)
    after = _core.buffer_stats()
    assert after["in_use"] + after["cached"] - before["in_use"] < 150e6
