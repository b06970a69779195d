"""The losses against PyTorch and its autograd, mlx-lm's tuner, and HRM's stablemax."""

import ml_dtypes
import numpy as np
import pytest
from loss_cases import BCE, LOSSES, Loss, assert_gradient, some_labels
from loss_formulas import IGNORE

import pyloss

SHAPE = (4, 3, 257)
HARD = [1.0, 20.0, 1e3]  # scales of logits


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="compares with torch (parity extra)")


@pytest.fixture
def mlx():
    mx = pytest.importorskip("mlx.core", reason="compares with mlx-lm (parity extra)")
    pytest.importorskip("mlx_lm", reason="compares with mlx-lm (parity extra)")
    with mx.stream(mx.cpu):
        yield mx


@pytest.fixture
def rng():
    return np.random.default_rng(31)


def in_torch(torch, loss, *arguments, weights=None):
    """The loss as usually written with torch.nn.functional, without reduction."""
    F, options = torch.nn.functional, loss.options
    if loss.logits == 2:
        return pair_in_torch(torch, loss, *arguments)
    x, other = arguments
    if loss is BCE:
        return F.binary_cross_entropy_with_logits(x, other.to(x.dtype), reduction="none")
    v, shape = x.shape[-1], other.shape
    if "softcap" in options:
        x = options["softcap"] * torch.tanh(x / options["softcap"])
    if loss.name == "stablemax_cross_entropy":
        return in_hrm(torch, x, other)
    cross = F.cross_entropy(
        x.reshape(-1, v),
        other.reshape(-1),
        reduction="none",
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    cross = cross.reshape(shape)
    if loss.name == "focal_loss":
        p = torch.exp(-cross)
        alpha = options.get("alpha")
        return (1 if alpha is None else alpha) * (1 - p) ** options.get("gamma", 2.0) * cross
    assert loss.name == "softmax_cross_entropy", f"how torch computes {loss.name} is not known here"
    return cross + options.get("z_loss", 0.0) * torch.where(
        other == IGNORE, 0, torch.logsumexp(x, -1) ** 2
    )


def pair_in_torch(torch, loss, q, p):
    """A loss of a student's q and a teacher's p."""
    F, options = torch.nn.functional, loss.options
    caps, scales = (
        value if isinstance(value, tuple) else (value, value)
        for value in (options.get("softcap"), options.get("logit_scale", 1.0))
    )

    def log_softmax(x, cap, scale):
        x = x * scale if cap is None else cap * torch.tanh(x * scale / cap)
        return F.log_softmax(x / options.get("temperature", 1.0), -1)

    if loss.name == "cosine_loss":  # as in Liger's cosine loss
        q, p = (
            x if cap is None else cap * torch.tanh(x * scale / cap)
            for x, cap, scale in zip((q, p), caps, scales)
        )
        return 1 - F.cosine_similarity(q, p, -1)
    log_q, log_p = (log_softmax(*given) for given in zip((q, p), caps, scales))
    beta, reverse = options.get("beta", 0.5), options.get("direction") == "reverse"

    def kl(a, b):
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    if loss.name == "tvd_loss":  # as in Liger's tvd
        return (log_q.exp() - log_p.exp()).abs().sum(-1) / 2
    first, second = (log_q, log_p) if reverse else (log_p, log_q)
    if loss.name == "kl_div_loss":
        return kl(first, second)
    if loss.name == "skew_kl_div_loss":  # as in DistiLLM: its lam is the skew
        skew = options.get("skew", 0.1)
        return kl(first, torch.logaddexp(first + np.log(skew), second + np.log(1 - skew)))
    assert loss.name == "js_div_loss", f"how torch computes {loss.name} is not known here"
    # As in generalized_jsd_loss of TRL's GKDTrainer and Liger's JSD, whose first argument is the
    # student: beta 0 is the forward KL, 1 the reverse.
    if beta in (0, 1):
        return kl(log_q, log_p) if beta else kl(log_p, log_q)
    log_m = torch.logsumexp(torch.stack([log_q + np.log1p(-beta), log_p + np.log(beta)]), 0)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def in_hrm(torch, x, labels):
    """-log(s / sum s) of the label, with s and epsilon as in HRM's losses.py."""
    s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    log_s = torch.log(s / s.sum(-1, keepdim=True))
    return torch.where(
        labels == IGNORE, 0, -torch.gather(log_s, -1, labels.clamp(min=0)[..., None])[..., 0]
    )


def theirs_and_ours(torch, loss, arguments, upstream):
    """((torch's loss, gradients), (our loss, gradients)) as ndarrays, in the arguments' type."""
    tensors = [torch.from_numpy(np.asarray(a)) for a in arguments]
    logits = [x.requires_grad_() for x in tensors[: loss.logits]]
    out = in_torch(torch, loss, *logits, *tensors[loss.logits :])
    gradients = torch.autograd.grad((out * torch.from_numpy(upstream)).sum(), logits)
    return (out.detach().numpy(), [g.numpy() for g in gradients]), loss.gradients(
        *arguments, upstream=upstream
    )


@pytest.mark.parametrize("scale", HARD)
@pytest.mark.parametrize("loss", [*LOSSES, BCE], ids=str)
def test_float64_equals_torch(torch, rng, loss, scale):
    """Within 1e-12 of each loss and of the largest gradient of each row."""
    if loss.name == "focal_loss" and scale > 1:
        scale = 5.0  # at larger scales torch's powers of 1 - exp(-loss) lose digits
    arguments = loss.arguments(rng, SHAPE, np.float64, scale)
    upstream = rng.standard_normal(loss.out_shape(SHAPE))
    (theirs, slopes), (ours, gradients) = theirs_and_ours(torch, loss, arguments, upstream)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    # A divergence's gradient is a difference of ratios, which are as large as the logits.
    size = scale * np.abs(upstream).max() if loss.logits == 2 else 0
    for gradient, slope in zip(gradients, slopes):
        np.testing.assert_allclose(
            gradient, slope, rtol=1e-12, atol=1e-12 * np.abs(slope).max() + 1e-14 * size
        )


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("loss", [*LOSSES, BCE], ids=str)
def test_half_precision_equals_torch_in_float32(torch, rng, loss, dtype):
    """Equal to torch on the same logits in float32, with gradients rounded once."""
    arguments = loss.arguments(rng, SHAPE, dtype)
    upstream = rng.standard_normal(loss.out_shape(SHAPE)).astype(np.float32)
    wide = (*(x.astype(np.float64) for x in arguments[: loss.logits]), *arguments[loss.logits :])
    (theirs, slopes), _ = theirs_and_ours(torch, loss, wide, upstream.astype(np.float64))
    ours, gradients = loss.gradients(*arguments, upstream=upstream)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)
    for gradient, slope in zip(gradients, slopes):
        assert_gradient(gradient, slope, dtype, np.abs(upstream).max())


def test_bfloat16_is_at_least_as_exact_as_torch(torch, rng):
    """Errors of cross entropy against float64; torch also takes bfloat16 logits directly."""
    x, labels = (
        rng.standard_normal((64, 5000)).astype(ml_dtypes.bfloat16),
        rng.integers(0, 5000, 64),
    )
    exact, (slope,) = Loss("softmax_cross_entropy").formula(x, labels)
    ours, (gradient,) = Loss("softmax_cross_entropy").gradients(x, labels)
    tensor = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).requires_grad_()
    theirs = torch.nn.functional.cross_entropy(tensor, torch.from_numpy(labels), reduction="none")
    (their_slope,) = torch.autograd.grad(theirs.sum(), tensor)
    assert np.abs(ours - exact).max() <= np.abs(theirs.detach().double().numpy() - exact).max()
    assert (
        np.abs(gradient.astype(np.float64) - slope).max()
        <= np.abs(their_slope.double().numpy() - slope).max()
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_reductions_equal_torch(torch, rng, reduction, smoothing):
    x, labels = rng.standard_normal((7, 11)), some_labels(rng, (7, 11))
    options = {"reduction": reduction, "label_smoothing": smoothing}
    theirs = torch.nn.functional.cross_entropy(
        torch.from_numpy(x), torch.from_numpy(labels), **options
    )
    np.testing.assert_allclose(
        pyloss.softmax_cross_entropy(x, labels, **options), theirs.numpy(), rtol=1e-12
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_class_weights_equal_torch(torch, rng, reduction, smoothing):
    """Loss and gradient, also of a class of weight 0."""
    x, labels = rng.standard_normal((7, 11)), some_labels(rng, (7, 11))
    weight = rng.uniform(0, 2, 11)
    weight[labels[labels >= 0][0]] = 0
    options = {"reduction": reduction, "label_smoothing": smoothing}
    logits = torch.from_numpy(x).requires_grad_()
    theirs = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(labels), torch.from_numpy(weight), **options
    )
    theirs.sum().backward()

    def f(x):
        loss = pyloss.softmax_cross_entropy(x, labels, class_weight=weight, **options)
        return loss.sum(), loss

    (_, ours), gradient = pyloss.value_and_grad(f)(x)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(gradient, logits.grad.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_shift_equals_cut_cross_entropy(torch, rng, reduction, softcap):
    pytest.importorskip("cut_cross_entropy")
    from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy

    hidden, head = (rng.standard_normal(s).astype(np.float32) for s in ((2, 9, 6), (11, 6)))
    labels = some_labels(rng, (2, 9, 11))
    with torch.compiler.set_stance("force_eager"):
        theirs = torch_compile_linear_cross_entropy(
            *map(torch.from_numpy, (hidden, head, labels)),
            softcap=softcap,
            reduction=reduction,
            shift=True,
        )
    ours = pyloss.linear_cross_entropy(
        hidden, head, labels, softcap=softcap, reduction=reduction, shift=True
    )
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_batchmean_equals_torch(torch, rng):
    q, p = rng.standard_normal((2, *SHAPE))
    log_q, log_p = (torch.log_softmax(torch.from_numpy(x), -1) for x in (q, p))
    theirs = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    np.testing.assert_allclose(
        pyloss.kl_div_loss(q, p, reduction="batchmean"), theirs.numpy(), rtol=1e-12
    )


def test_masked_vocabulary_as_torch(torch, rng):
    x, labels = rng.standard_normal((5, 9)), np.array([0, 1, 2, 3, 4])
    x[:, 6:] = -np.inf
    loss = Loss("softmax_cross_entropy", other=some_labels)
    (theirs, (slope,)), (ours, (gradient,)) = theirs_and_ours(torch, loss, (x, labels), np.ones(5))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=1e-12, atol=1e-15)


# Distillation


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
def test_generalized_jsd_equals_trl(torch, rng, beta):
    """In TRL's default reduction."""
    q, p = rng.standard_normal((2, *SHAPE))
    labels = some_labels(rng, SHAPE)
    loss = Loss("js_div_loss", logits=2, options={"beta": beta, "temperature": 0.9})
    rows = in_torch(torch, loss, *map(torch.from_numpy, (q, p)))
    mask = torch.from_numpy(labels != IGNORE)
    np.testing.assert_allclose(
        loss(q, p, labels=labels, reduction="batchmean"),
        (rows[mask].sum() / mask.sum()).numpy(),
        1e-12,
    )


@pytest.mark.parametrize("rest", ["bucket", "renormalize"])
@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "js"])
def test_sparse_teacher_equals_torch(torch, rng, kind, rest):
    """Loss and gradient by autograd of the K + 1 classes."""
    if (kind, rest) == ("reverse-kl", "renormalize"):
        pytest.skip("infinite: refused")
    z, x = rng.standard_normal((2, 6, 200))
    log_p = torch.log_softmax(torch.from_numpy(z), -1)
    top, ids = torch.topk(log_p, 16)
    logits = torch.from_numpy(x).requires_grad_()
    log_q = torch.log_softmax(logits, -1)
    outside = torch.ones(x.shape, dtype=torch.bool).scatter(-1, ids, False)
    log_rest = torch.logsumexp(log_q.masked_fill(~outside, -torch.inf), -1, keepdim=True)
    q = torch.cat([log_q.gather(-1, ids), log_rest], -1).exp()
    p = torch.cat([top.exp(), 1 - top.exp().sum(-1, keepdim=True)], -1)
    if rest == "renormalize":
        p = torch.cat([top.softmax(-1), torch.zeros(6, 1, dtype=p.dtype)], -1)
    kl = torch.special.xlogy
    if kind == "forward-kl":
        losses = (kl(p, p) - kl(p, q)).sum(-1)
    elif kind == "reverse-kl":
        losses = (kl(q, q) - kl(q, p)).sum(-1)
    else:
        m = (p + q) / 2
        losses = (kl(p, p) - kl(p, m) + kl(q, q) - kl(q, m)).sum(-1) / 2
    (slope,) = torch.autograd.grad(losses.sum(), logits)
    value, gradient = pyloss.value_and_grad(
        lambda x: pyloss.sparse_distillation_loss(
            x, ids.numpy(), top.numpy(), kind=kind, rest=rest
        ).sum()
    )(x)
    np.testing.assert_allclose(value, losses.detach().sum().numpy(), rtol=1e-12)
    np.testing.assert_allclose(gradient, slope.numpy(), rtol=1e-10, atol=1e-14)


# HRM


@pytest.mark.parametrize("scale", HARD)
def test_stablemax_equals_hrm_in_float64(torch, rng, scale):
    """HRM computes in float64 for logits of every type."""
    x, labels = scale * rng.standard_normal(SHAPE), some_labels(rng, SHAPE)
    loss = Loss("stablemax_cross_entropy", other=some_labels)
    upstream = rng.standard_normal(SHAPE[:-1])
    (theirs, (slope,)), (ours, (gradient,)) = theirs_and_ours(torch, loss, (x, labels), upstream)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=1e-12, atol=1e-12 * np.abs(slope).max())
    s = np.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    shares = s / s.sum(-1, keepdims=True)
    np.testing.assert_allclose(pyloss.stablemax(x), shares, rtol=1e-12)
    np.testing.assert_allclose(pyloss.log_stablemax(x), np.log(shares), rtol=1e-12)


def test_stablemax_has_a_gradient_where_hrms_has_none(torch):
    """At 1 the other branch, 1 / (1 - x), is infinite in float32, and 0 times infinity is NaN."""
    x, labels = np.array([[1, 0.5, -1, 0]], np.float32), np.array([1])
    loss = Loss("stablemax_cross_entropy", other=some_labels)
    (theirs, (slope,)), (ours, (gradient,)) = theirs_and_ours(
        torch, loss, (x, labels), np.ones(1, np.float32)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert np.isnan(slope[0, 0])
    np.testing.assert_allclose(gradient, loss.formula(x, labels)[1][0], rtol=1e-6)


# mlx-lm


@pytest.mark.parametrize("name", ["kl_div_loss", "js_div_loss"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_divergences_equal_mlx_lm(mlx, rng, name, scale):
    """Loss and the student's gradient, by the same call with another import."""
    from mlx_lm.tuner import losses

    q, p = (scale * rng.standard_normal((2, *SHAPE))).astype(np.float32)
    function, upstream = getattr(losses, name), rng.standard_normal(SHAPE[:-1]).astype(np.float32)
    theirs = np.array(function(mlx.array(q), mlx.array(p)))
    slope = np.array(
        mlx.grad(lambda x: (function(x, mlx.array(p)) * mlx.array(upstream)).sum())(mlx.array(q))
    )
    ours, (gradient, _) = Loss(name, logits=2).gradients(q, p, upstream=upstream)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=1e-5)


def test_js_where_mlx_lm_overflows(mlx, rng):
    """At scale 20 its float32 log(1 + exp(.)) is infinite."""
    from mlx_lm.tuner import losses

    q, p = (20 * rng.standard_normal((2, 4, 5000))).astype(np.float32)
    p[:, 0] -= 200
    q[:, 0] += 200  # e^89 is the first ratio that overflows
    theirs = np.array(losses.js_div_loss(mlx.array(q), mlx.array(p)))
    assert not np.isfinite(theirs).all()
    loss = Loss("js_div_loss", logits=2)
    np.testing.assert_allclose(loss(q, p), loss.formula(q, p)[0], rtol=1e-5, atol=1e-6)
