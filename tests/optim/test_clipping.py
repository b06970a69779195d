"""The norm of gradients, and its bound."""

import math

import numpy as np
import pytest
from optim_cases import SHAPES, some_grads

from pyloss import optim


def test_norm_and_clipping():
    grads = some_grads(0)
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
    assert optim.grad_norm(grads) == pytest.approx(norm, rel=1e-6)
    clipped, before = optim.clip_grad_norm(grads, 1.0)
    assert before == pytest.approx(norm, rel=1e-6)
    assert optim.grad_norm(clipped) == pytest.approx(1.0, rel=1e-4)
    kept, _ = optim.clip_grad_norm(grads, 1e9)
    for name in SHAPES:
        np.testing.assert_array_equal(kept[name], grads[name])
    assert optim.grad_norm({}) == 0
    assert math.isnan(optim.grad_norm({"a": np.array([1, np.nan], np.float32)}))
    assert math.isinf(optim.grad_norm({"a": np.array([1, np.inf], np.float32)}))
