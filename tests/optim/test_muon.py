"""Muon against its formula in float64."""

import math

import numpy as np
import pytest

from pyloss import optim
from pyloss.optim.muon import orthogonalized

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = {"square": (16, 16), "wide": (5, 24), "tall": (33, 7), "row": (1, 9), "column": (9, 1)}


def newton_schulz(g, coefficients, steps, eps):
    a, b, c = coefficients
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / max(np.linalg.norm(x), eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def muon_float64(p, g, s, lr, momentum=0.95, weight_decay=0.1, nesterov=True, adjust="original"):
    s["m"] = momentum * s.get("m", 0) + (1 - momentum) * g
    u = momentum * s["m"] + (1 - momentum) * g if nesterov else s["m"]
    rows, columns = p.shape
    ratio = (
        math.sqrt(max(1, rows / columns))
        if adjust == "original"
        else 0.2 * math.sqrt(max(rows, columns))
    )
    return p * (1 - lr * weight_decay) - lr * ratio * newton_schulz(u, COEFFICIENTS, 5, 1e-7)


def some(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("given", "formula"),
    [
        ({}, {}),
        ({"nesterov": False, "momentum": 0.5, "weight_decay": 0.0}, {}),
        ({"adjust_lr_fn": "match_rms_adamw"}, {"adjust": "match_rms_adamw"}),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_thirty_updates_follow_the_formula(given, formula, scale):
    arrays, states = some(0), {name: {} for name in SHAPES}
    expected = {name: array.astype(np.float64) for name, array in arrays.items()}
    optimizer = optim.Muon(0.02, **given)
    shared = {key: value for key, value in given.items() if key != "adjust_lr_fn"} | formula
    for t in range(30):
        grads = some(100 + t)
        optimizer.update(arrays, grads, grad_scale=scale)
        for name, grad in grads.items():
            g = grad.astype(np.float64) * scale
            expected[name] = muon_float64(expected[name], g, states[name], 0.02, **shared)
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)


def test_singular_values_come_near_1():
    for matrix in some(3).values():
        values = np.linalg.svd(orthogonalized(matrix, COEFFICIENTS, 10), compute_uv=False)
        assert (0.6 < values).all() and (values < 1.3).all()


def test_a_gradient_of_zeros_changes_nothing_but_the_decay():
    array = np.ones((3, 4), np.float32)
    optim.Muon(0.1, weight_decay=0.5).update({"w": array}, {"w": np.zeros((3, 4), np.float32)})
    np.testing.assert_allclose(array, 0.95, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_other_parameters_than_matrices_are_refused_with_what_to_use(shape):
    arrays = {"norm.weight": np.ones(shape, np.float32)}
    optimizer = optim.Muon()
    for act in (lambda: optimizer.update(arrays, arrays), lambda: optimizer.check(arrays)):
        with pytest.raises(ValueError, match=r"matrices, and 'norm\.weight' has .*MultiOptimizer"):
            act()
    assert optimizer.step == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"adjust_lr_fn": "adamw"}, "adjust_lr_fn is 'adamw'; allowed: original, match_rms_adamw"),
        ({"ns_steps": 100}, "ns_steps is 100; .* from 1 to 99"),
        ({"ns_coefficients": (1, 2)}, r"ns_coefficients is \(1, 2\); it must be three numbers"),
        ({"momentum": 2}, "momentum is 2"),
        ({"eps": 0}, "eps is 0"),
    ],
)
def test_bad_settings_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        optim.Muon(**options)
