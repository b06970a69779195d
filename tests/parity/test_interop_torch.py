"""pyloss.interop.torch: gradcheck, autograd's own losses, no copies, and refused arguments."""

import inspect

import loss_cases
import numpy as np
import pytest
from loss_cases import BCE, EVERY, LOSSES, MAPS, Loss

torch = pytest.importorskip("torch", reason="compares with torch (parity extra)")

import pyloss
from pyloss.interop import torch as interop

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
F = torch.nn.functional


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def run(loss, *arguments, **options):
    return getattr(interop, loss.name)(*arguments, **{**loss.options, **options})


def tensors(loss, rng, shape, kind=torch.float64, scale=2.0):
    """Logits that require gradients, and the other arguments."""
    made = [torch.from_numpy(np.asarray(a)) for a in loss.arguments(rng, shape, np.float64, scale)]
    return [a.to(kind).requires_grad_() if i < loss.logits else a for i, a in enumerate(made)]


@pytest.mark.parametrize("reduction", [None, *loss_cases.REDUCTIONS])
@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_gradcheck(rng, loss, reduction):
    if loss in MAPS and reduction is not None:
        return
    options = (
        {}
        if reduction is None
        else {"reduction": reduction, "weights": torch.from_numpy(loss.weights(rng, (4, 5)))}
    )
    given = tensors(loss, rng, (4, 5))
    assert torch.autograd.gradcheck(
        lambda *logits: run(loss, *logits, *given[loss.logits :], **options), given[: loss.logits]
    )


def test_gradcheck_of_one_argument_of_two(rng):
    for loss in [loss for loss in LOSSES if loss.logits == 2]:
        q, p = tensors(loss, rng, (3, 4))
        assert torch.autograd.gradcheck(lambda p, q=q, loss=loss: run(loss, q.detach(), p), p)
        assert torch.autograd.gradcheck(
            lambda q, p=p, loss=loss: run(loss, q, p.detach(), reduction="sum"), q
        )


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_the_bits_are_those_of_pyloss(rng, loss, kind):
    given = tensors(loss, rng, (3, 33), kind)
    arrays = [interop._array("x", a) for a in given]
    result = run(loss, *given)
    result.sum().backward()
    want, slopes = loss.gradients(*arrays)
    got = interop._array("loss", result)
    assert (
        got.dtype == loss.result_type(arrays[0].dtype)
        and got.tobytes() == np.asarray(want).tobytes()
    )
    for tensor, slope in zip(given, slopes):
        assert (
            tensor.grad.dtype == kind
            and interop._array("g", tensor.grad).tobytes() == slope.tobytes()
        )


def test_in_the_place_of_torchs_losses(rng):
    """The change of import that the module's documentation names."""
    q, p = (torch.from_numpy(rng.standard_normal((6, 11))).requires_grad_() for _ in range(2))
    labels = torch.tensor([0, 10, -100, 3, 3, 7])
    targets = torch.from_numpy(rng.uniform(size=(6, 11)))

    def same(theirs, ours):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        for a, b in zip(
            torch.autograd.grad(theirs, [q, p], allow_unused=True),
            torch.autograd.grad(ours, [q, p], allow_unused=True),
        ):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)

    same(F.cross_entropy(q, labels), interop.softmax_cross_entropy(q, labels, reduction="mean"))
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    same(F.cross_entropy(q, labels, **options), interop.softmax_cross_entropy(q, labels, **options))
    want = F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
    same(want, interop.kl_div_loss(q, p, reduction="mean"))
    same(
        F.binary_cross_entropy_with_logits(q, targets),
        interop.binary_cross_entropy_with_logits(q, targets, reduction="mean"),
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_copies(rng, kind, monkeypatch):
    """pyloss reads the tensors' own memory, views included; torch gets its gradient uncopied."""
    base = torch.randn(4, 40).to(kind)
    q, p = base[:, 1:-3].requires_grad_(), torch.randn(4, 36).to(kind)
    seen, found = [], []
    both = interop.value_and_grad

    def spy(function, argnums):
        def run(*arrays):
            seen.extend(a.__array_interface__["data"][0] for a in arrays)
            value, gradients = both(function, argnums)(*arrays)
            found.extend(g.__array_interface__["data"][0] for g in gradients)
            return value, gradients

        return run

    monkeypatch.setattr(interop, "value_and_grad", spy)
    (slope,) = torch.autograd.grad(interop.kl_div_loss(q, p, reduction="sum"), q)
    assert seen == [q.data_ptr(), p.data_ptr()]
    assert found == [slope.data_ptr()]
    assert q.data_ptr() == base.data_ptr() + base.element_size()


def test_what_comes_from_above_scales_the_gradient(rng):
    """Also for two passes over one graph, and without writing into saved tensors."""
    loss = Loss("js_div_loss", logits=2)
    q, p = tensors(loss, rng, (4, 9))
    once = torch.autograd.grad(interop.js_div_loss(q, p, reduction="mean"), [q, p])
    for value in (interop.js_div_loss(q, p, reduction="mean"), interop.js_div_loss(q, p).mean()):
        for factor in (-3.0, 1.0, 0.5):
            scaled = torch.autograd.grad(value * factor, [q, p], retain_graph=True)
            for a, b in zip(scaled, once):
                torch.testing.assert_close(a, b * factor)


def test_where_no_gradient_is_wanted(rng):
    q, p = (torch.from_numpy(a) for a in rng.standard_normal((2, 3, 5)))
    assert not interop.kl_div_loss(q, p).requires_grad
    with torch.no_grad():
        assert not interop.kl_div_loss(q.requires_grad_(), p).requires_grad
    assert interop.kl_div_loss(q, p).requires_grad


def test_changing_the_logits_before_backward_is_noticed(rng):
    q, p = tensors(Loss("kl_div_loss", logits=2), rng, (3, 5))
    loss = interop.kl_div_loss(q * 1, other := p * 1)
    other += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_linear_losses(rng):
    hidden = torch.from_numpy(rng.standard_normal((5, 6)).astype(np.float32)).requires_grad_()
    weight = torch.from_numpy(rng.standard_normal((9, 6)).astype(np.float32)).requires_grad_()
    labels = torch.tensor([0, 8, -100, 3, 3])
    ours = torch.autograd.grad(
        interop.linear_cross_entropy(hidden, weight, labels, reduction="mean"), [hidden, weight]
    )
    theirs = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels), [hidden, weight])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_bias_and_class_weights(rng):
    """As torch computes them, with the gradient of the bias."""
    hidden, weight, bias = (
        torch.from_numpy(rng.standard_normal(s).astype(np.float32)).requires_grad_()
        for s in ((6, 5), (7, 5), (7,))
    )
    labels, classes = torch.from_numpy(rng.integers(0, 7, 6)), torch.arange(7.0)
    theirs = torch.nn.functional.cross_entropy(
        hidden @ weight.T + bias, labels, classes, label_smoothing=0.1
    )
    wanted = torch.autograd.grad(theirs, (hidden, weight, bias))
    options = {"class_weight": classes, "label_smoothing": 0.1, "reduction": "mean"}
    ours = interop.linear_cross_entropy(hidden, weight, labels, bias=bias, **options)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(torch.autograd.grad(ours, (hidden, weight, bias)), wanted):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_second_derivatives_are_refused(rng):
    """A gradient penalty would otherwise silently use 0."""
    for reduction in ("none", "sum"):
        q, p = tensors(Loss("kl_div_loss", logits=2), rng, (3, 5))
        loss = interop.kl_div_loss(q, p, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="no second derivative.*create_graph"):
            torch.autograd.grad(loss, q, create_graph=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, y: interop.softmax_cross_entropy(x.to("meta"), y),
            "logits must be a dense tensor on the CPU, not one on meta",
        ),
        (
            lambda x, y: interop.softmax_cross_entropy(x, y.to("meta")),
            "labels must be a dense tensor on the CPU",
        ),
        (
            lambda x, y: interop.kl_div_loss(x, x.to_sparse()),
            "logits_p must be a dense tensor on the CPU, not one of layout torch.sparse_coo",
        ),
        (
            lambda x, y: interop.softmax_cross_entropy(
                x, y, weights=torch.ones(3).requires_grad_()
            ),
            "weights gets no gradient",
        ),
        (lambda x, y: interop.softmax_cross_entropy(x, y, out=torch.empty(3)), "out"),
    ],
    ids=["meta", "meta labels", "sparse", "weights", "out"],
)
def test_what_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))


def test_every_loss_has_its_name_here_and_its_signature():
    names = {loss.name for loss in EVERY} | {
        "linear_cross_entropy",
        "linear_kl_div",
        "linear_js_div",
        "linear_skew_kl_div",
        "linear_tvd",
        "linear_cosine",
        "linear_sparse_distillation",
        "sparse_distillation_loss",
    }
    assert set(interop.__all__) == names
    for name in names:
        ours = {
            option: each
            for option, each in inspect.signature(getattr(pyloss, name)).parameters.items()
            if option != "out" and not option.startswith("return_")  # the result is one tensor
        }
        assert dict(inspect.signature(getattr(interop, name)).parameters) == ours
        assert getattr(interop, name).__doc__ == getattr(pyloss, name).__doc__
    assert BCE.name in interop.__all__


INTEGERS = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]


@pytest.mark.parametrize(
    "dtype", [getattr(torch, name) for name in INTEGERS if hasattr(torch, name)], ids=str
)
def test_labels_of_every_integer_type(rng, dtype):
    """`ignore_index` may be a class; torch's result for int64 is the reference."""
    x, labels = (
        torch.from_numpy(rng.standard_normal((4, 5))).requires_grad_(),
        torch.tensor([1, 0, 4, 0]),
    )
    want = F.cross_entropy(x, labels, ignore_index=0)
    (slope,) = torch.autograd.grad(want, x)
    got = interop.softmax_cross_entropy(x, labels.to(dtype), ignore_index=0, reduction="mean")
    (gradient,) = torch.autograd.grad(got, x)
    np.testing.assert_allclose(got.item(), want.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope.numpy(), rtol=1e-12, atol=1e-15)
    with pytest.raises(TypeError, match="labels must be integers, not bool"):
        interop.softmax_cross_entropy(x, labels > 0)
