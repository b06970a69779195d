"""Adafactor against its formula in float64."""

import numpy as np
import pytest

from pyloss import optim

SHAPES = {"vector": (17,), "matrix": (9, 6), "stack": (2, 5, 3), "one": (1,), "empty": (0, 4)}
EPS = np.finfo(np.float32).eps


def rms(x):
    return np.sqrt((x * x).mean()) if x.size else 0.0


def adafactor_float64(p, g, s, t, lr, options):
    decay = options.get("weight_decay", 0.0)
    eps1, eps2 = options.get("eps", (None, 1e-3))
    eps1 = EPS if eps1 is None else eps1
    share = t ** options.get("beta2_decay", -0.8)
    rho = min(lr, t**-0.5) if options.get("relative_step", True) else lr
    alpha = max(eps2, rms(p)) * rho if options.get("scale_parameter", True) else rho

    def moved(key, value):
        s[key] = s.get(key, 0) + share * (value - s.get(key, 0))
        return s[key]

    if p.ndim > 1:
        row = moved("row", (g * g).mean(-1, keepdims=True))
        col = moved("col", (g * g).mean(-2, keepdims=True))
        v = row * col / np.maximum(row.mean(-2, keepdims=True), eps1)
    else:
        v = moved("v", g * g)
    u = g / np.sqrt(np.maximum(v, eps1**2))
    u = u / max(1, rms(u) / options.get("d", 1.0))
    return p * (1 - lr * decay) - alpha * u


def some(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.2, "beta2_decay": -0.5, "d": 2.0},
        {"eps": (1e-4, 0.1)},
        {"scale_parameter": False, "relative_step": False},
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_thirty_updates_follow_the_formula(options, scale):
    arrays, states = some(0), {name: {} for name in SHAPES}
    expected = {name: array.astype(np.float64) for name, array in arrays.items()}
    optimizer = optim.Adafactor(0.05, **options)
    for t in range(1, 31):
        grads = some(100 + t)
        optimizer.update(arrays, grads, grad_scale=scale)
        for name, grad in grads.items():
            if grad.size:
                g = grad.astype(np.float64) * scale
                expected[name] = adafactor_float64(
                    expected[name], g, states[name], t, 0.05, options
                )
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name], rtol=2e-5, atol=2e-6)


def test_the_state_is_small_and_resumes_to_the_same_bits():
    whole, split = some(0), some(0)
    one, two = optim.Adafactor(0.05), optim.Adafactor(0.05)
    for t in range(6):
        one.update(whole, some(t))
        if t == 3:
            state = {key: np.copy(value) for key, value in two.state_dict().items()}
            two = optim.Adafactor(0.05)
            two.load_state_dict(dict(reversed(state.items())) | {"step": int(state["step"])})
        two.update(split, some(t))
    for name in SHAPES:
        np.testing.assert_array_equal(whole[name], split[name])
    kept = one.state_dict()
    assert kept["row.matrix"].size == 9 and kept["col.matrix"].size == 6
    assert kept["row.stack"].size == 10 and kept["col.stack"].size == 6
    assert kept["variance.vector"].size == 17
    del kept["col.matrix"]
    with pytest.raises(ValueError, match="'matrix' lacks col"):
        optim.Adafactor(0.05).load_state_dict(kept)
    with pytest.raises(ValueError, match="Adafactor keeps row, col, variance"):
        optim.Adafactor(0.05).load_state_dict({"step": 1, "m.matrix": np.ones(54)})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"eps": 1e-3}, "eps is 0.001; it must be two numbers, or None and a number"),
        ({"eps": (1e-30, -1)}, r"eps\[1\] is -1"),
        ({"d": 0.5}, "d is 0.5; .* at least 1"),
        ({"beta2_decay": 0.8}, "beta2_decay is 0.8; .* at most 0"),
    ],
)
def test_bad_settings_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        optim.Adafactor(**options)
