"""`hidden_state_loss` against its formulas in float64, and its gradient against differences."""

import numpy as np
import pytest

import pyloss
from pyloss.losses.hidden import KINDS, hidden_state_loss


def formula(kind, q, p):
    q, p = q.astype(np.float64), p.astype(np.float64)
    if kind == "mse":
        return ((q - p) ** 2).mean(-1)
    return 1 - (q * p).sum(-1) / np.sqrt((q * q).sum(-1) * (p * p).sum(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 4, 33)])
def test_values_and_gradients(kind, shape):
    rng = np.random.default_rng(0)
    q, p = (rng.normal(0, 3, shape).astype(np.float64) for _ in range(2))
    weights = rng.integers(0, 3, shape[:-1]).astype(np.float64)
    np.testing.assert_allclose(hidden_state_loss(q, p, kind=kind), formula(kind, q, p), rtol=1e-12)
    small = (a.astype(np.float32) for a in (q, p))
    np.testing.assert_allclose(
        hidden_state_loss(*small, kind=kind), formula(kind, q, p), rtol=2e-6, atol=1e-6
    )

    def total(x):
        return hidden_state_loss(x, p, kind=kind, weights=weights, reduction="sum")

    value, grad = pyloss.value_and_grad(total)(q)
    assert value == pytest.approx((formula(kind, q, p) * weights).sum(), rel=1e-12)
    step = rng.normal(0, 1e-5, shape)
    change = ((formula(kind, q + step, p) - formula(kind, q - step, p)) * weights).sum() / 2
    assert (grad * step).sum() == pytest.approx(change, rel=1e-6, abs=1e-13)
    assert (grad[weights == 0] == 0).all()


def test_the_teacher_is_a_constant():
    q, p = np.ones((2, 3), np.float32), np.full((2, 3), 2, np.float32)
    for kind in KINDS:
        _, grads = pyloss.value_and_grad(
            lambda a, b, kind=kind: hidden_state_loss(a, b, kind=kind, reduction="mean"), (0, 1)
        )(q, p)
        assert (grads[1] == 0).all()
    value = hidden_state_loss(q, p, kind="mse", weights=[3.0, 0.0], reduction="mean")
    assert value == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="kind is 'mae'; it must be cosine, mse"):
        hidden_state_loss(np.ones((2, 3)), np.ones((2, 3)), kind="mae")
    for kind, name in (("mse", "hidden_q and hidden_p"), ("cosine", "logits_q and logits_p")):
        with pytest.raises(ValueError, match=f"{name} must have the same shape"):
            hidden_state_loss(np.ones((2, 3)), np.ones((2, 4)), kind=kind)
