"""The loss of distillation under heads, against float64 formulas: values, gradients, errors."""

import numpy as np
import pytest

from pyloss import value_and_grad
from pyloss.losses import head as heads
from pyloss.losses.distillation import KINDS, divergence, linear_distillation

OPTIONS = [
    {"kind": "forward-kl"},
    {"kind": "reverse-kl", "temperature": 2.0},
    {"kind": "js", "beta": 0.3},
    {"kind": "js", "beta": 0.0, "temperature": 0.7},
    {"kind": "js", "beta": 1.0},
    {"kind": "skew-kl", "skew": 0.1, "temperature": 1.5},
    {"kind": "skew-kl", "skew": 0.0},
    {"kind": "skew-reverse-kl", "skew": 0.3},
]
IGNORE = -100


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(log_a, log_b):
    return (np.exp(log_a) * (log_a - log_b)).sum(-1)


def exact(q, p, labels, kind, temperature=1.0, beta=0.5, skew=0.1, alpha=0.0):
    """Each row's loss in float64, with -100 rows 0."""
    shared = min(q.shape[-1], p.shape[-1])
    log_q, log_p = (log_softmax(x[..., :shared] / temperature) for x in (q, p))

    def mixed(share):  # log of share P + (1 - share) Q
        return np.log(share * np.exp(log_p) + (1 - share) * np.exp(log_q))

    d = {
        "forward-kl": lambda: kl(log_p, log_q),
        "reverse-kl": lambda: kl(log_q, log_p),
        "js": lambda: (
            beta * kl(log_p, mixed(beta)) + (1 - beta) * kl(log_q, mixed(beta))
            if 0 < beta < 1
            else kl(log_q, log_p)
            if beta
            else kl(log_p, log_q)
        ),
        "skew-kl": lambda: kl(log_p, mixed(skew)),
        "skew-reverse-kl": lambda: kl(log_q, mixed(1 - skew)),
    }[kind]()
    at = np.where(labels == IGNORE, 0, labels)
    own = -np.take_along_axis(log_softmax(q), at[..., None], -1)[..., 0]
    loss = alpha * own + (1 - alpha) * temperature**2 * d
    return np.where(labels == IGNORE, 0, loss)


def case(v=37, w=37, rows=(3, 5), seed=0):
    rng = np.random.default_rng(seed)
    hidden_q, weight_q = rng.standard_normal((*rows, 6)), rng.standard_normal((v, 6))
    hidden_p, weight_p = rng.standard_normal((*rows, 9)), rng.standard_normal((w, 9)) / 2
    labels = rng.integers(0, min(v, w), rows)
    labels[0, 1] = labels[2, 4] = IGNORE
    return [a.astype(np.float32) for a in (hidden_q, weight_q, hidden_p, weight_p)], labels


def slopes(function, at, step=1e-5):
    """Central differences of a scalar function of a float64 array."""
    found = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        kept, ends = at[i], []
        for sign in (1, -1):
            at[i] = kept + sign * step
            ends.append(function(at))
        at[i] = kept
        found[i] = (ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_values_and_gradients(options, alpha):
    arrays, labels = case()
    hq, wq, hp, wp = (a.astype(np.float64) for a in arrays)
    options = options | {"alpha": alpha}

    def total(hidden, weight):
        return exact(hidden @ weight.T, hp @ wp.T, labels, **options).sum()

    got = linear_distillation(*arrays, labels, **options)
    np.testing.assert_allclose(got, exact(hq @ wq.T, hp @ wp.T, labels, **options), atol=2e-5)
    value, (dh, dw) = value_and_grad(
        lambda h, w: linear_distillation(h, w, *arrays[2:], labels, reduction="sum", **options),
        argnums=(0, 1),
    )(*arrays[:2])
    assert value == pytest.approx(total(hq, wq), rel=1e-5)
    np.testing.assert_allclose(dh, slopes(lambda x: total(x, wq), hq), atol=2e-4)
    np.testing.assert_allclose(dw, slopes(lambda x: total(hq, x), wq), atol=2e-4)


@pytest.mark.parametrize("softcap", [1.5, (1.5, 0.7), (None, 0.7)])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_softcap_of_either_head(options, softcap):
    """Logits c tanh(x / c), for the divergence and for the labels."""
    arrays, labels = case()
    hq, wq, hp, wp = (a.astype(np.float64) for a in arrays)
    caps = softcap if isinstance(softcap, tuple) else (softcap, softcap)
    options = options | {"alpha": 0.3}

    def total(hidden):
        logits = (hidden @ wq.T, hp @ wp.T)
        q, p = (z if c is None else c * np.tanh(z / c) for z, c in zip(logits, caps, strict=True))
        return exact(q, p, labels, **options).sum()

    value, slope = value_and_grad(
        lambda h: linear_distillation(
            h, *arrays[1:], labels, softcap=softcap, reduction="sum", **options
        )
    )(arrays[0])
    assert value == pytest.approx(total(hq), rel=1e-5)
    np.testing.assert_allclose(slope, slopes(total, hq), atol=2e-4)


@pytest.mark.parametrize(("v", "w"), [(37, 40), (40, 37)])
@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "js"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_padding_of_either_head_takes_no_part(v, w, kind, alpha):
    arrays, labels = case(v, w)
    hq, wq, hp, wp = (a.astype(np.float64) for a in arrays)
    options = {"kind": kind, "alpha": alpha, "temperature": 2.0}
    value, dw = value_and_grad(
        lambda weight: linear_distillation(
            arrays[0], weight, *arrays[2:], labels, reduction="sum", **options
        )
    )(arrays[1])
    want = exact(hq @ wq.T, hp @ wp.T, labels, **options).sum()
    assert value == pytest.approx(want, rel=1e-5)
    want = slopes(lambda x: exact(hq @ x.T, hp @ wp.T, labels, **options).sum(), wq)
    np.testing.assert_allclose(dw, want, atol=2e-4)
    if v > w and not alpha:
        assert not dw[w:].any()


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_weights_and_parts(alpha, monkeypatch):
    arrays, labels = case(rows=(4, 20))
    weights = np.random.default_rng(1).uniform(size=labels.shape).astype(np.float32)
    weights[1, 2] = 0
    options = {"alpha": alpha, "kind": "js", "weights": weights, "reduction": "mean"}

    def both():
        return value_and_grad(lambda h: linear_distillation(h, *arrays[1:], labels, **options))(
            arrays[0]
        )

    whole = both()
    monkeypatch.setattr(heads, "LOGITS_BYTES", 1)
    monkeypatch.setattr(heads, "MAX_BYTES", 1)
    parts = both()
    counted = weights * (labels != IGNORE)
    hq, wq, hp, wp = (a.astype(np.float64) for a in arrays)
    rows = exact(hq @ wq.T, hp @ wp.T, labels, "js", alpha=alpha)
    assert whole[0] == pytest.approx((rows * counted).sum() / counted.sum(), rel=1e-5)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    np.testing.assert_allclose(parts[1], whole[1], atol=1e-6)
    assert not whole[1][counted == 0].any()


def test_a_share_for_each_row(monkeypatch):
    arrays, labels = case(rows=(4, 20))
    alpha = np.random.default_rng(2).choice([0, 0.25, 1], labels.shape).astype(np.float32)
    monkeypatch.setattr(heads, "LOGITS_BYTES", 1)
    monkeypatch.setattr(heads, "MAX_BYTES", 1)
    hq, wq, hp, wp = (a.astype(np.float64) for a in arrays)
    rows = {
        share: exact(hq @ wq.T, hp @ wp.T, labels, "js", temperature=2.0, alpha=share)
        for share in (0, 0.25, 1)
    }
    want = np.select([alpha == share for share in rows], list(rows.values()))
    options = {"kind": "js", "temperature": 2.0}
    value, dw = value_and_grad(
        lambda w: linear_distillation(
            arrays[0], w, *arrays[2:], labels, alpha=alpha, reduction="sum", **options
        )
    )(arrays[1])
    assert value == pytest.approx(want.sum(), rel=1e-5)
    parts = [
        value_and_grad(
            lambda w, share=share: linear_distillation(
                arrays[0], w, *arrays[2:], labels, alpha=share, weights=alpha == share,
                reduction="sum", **options,
            )
        )(arrays[1])[1]
        for share in rows
    ]  # fmt: skip
    np.testing.assert_allclose(dw, sum(parts), atol=2e-5)
    with pytest.raises(ValueError, match="one for each row"):
        linear_distillation(*arrays, labels, alpha=alpha[:2])


def test_the_teacher_gets_no_gradient():
    arrays, labels = case()
    _, grads = value_and_grad(
        lambda h, w: linear_distillation(*arrays[:2], h, w, labels, reduction="sum"),
        argnums=(0, 1),
    )(*arrays[2:])
    assert not grads[0].any() and not grads[1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, "kind is 'kl'; it must be forward-kl, reverse-kl, js, skew"),
        ({"temperature": 0}, "temperature"),
        ({"alpha": 1.5}, "alpha"),
        ({"kind": "js", "beta": -1}, "beta"),
        ({"kind": "skew-kl", "skew": 1.0}, "skew"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    arrays, labels = case()
    with pytest.raises(ValueError, match=message):
        linear_distillation(*arrays, labels, **options)


def test_shapes_must_agree():
    arrays, labels = case()
    with pytest.raises(ValueError, match="the same leading shape"):
        linear_distillation(*arrays[:2], arrays[2][:2], arrays[3], labels)


def test_each_kind_has_a_divergence():
    assert {divergence(kind).name for kind in KINDS} == {"kl_div", "js_div", "skew_kl_div"}
