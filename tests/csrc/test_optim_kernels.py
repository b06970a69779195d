"""The optimizers' kernels against torch's update rules in float64."""

import numpy as np
import pytest
from kernel_checks import on_threads

from pyloss import _core

pytestmark = pytest.mark.usefixtures("place")

LENGTHS = [0, 1, 3, 4, 5, 7, 8, 15, 16, 17, 33, 127, 1031, 8192, 8193]
STEPS = 4


def close(got, want):
    """Allow a few roundings of operands near 1, however much of them cancels."""
    assert got.shape == want.shape
    assert (np.abs(got - want) <= 8 * np.finfo(np.float32).eps * (1 + np.abs(want))).all()


def normal(rng, n):
    return rng.standard_normal(n).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(
    ("decay", "scale", "corrected"), [(0.0, 1.0, True), (0.1, 0.25, True), (0.1, 1.0, False)]
)
def test_adamw(memory, rng, n, decay, scale, corrected):
    lr, beta1, beta2, eps = 0.01, 0.9, 0.99, 1e-8
    p = normal(rng, n)
    m, v = np.zeros(n), np.zeros(n)
    kp, km, kv = memory.put(p), memory.put(m), memory.put(v)
    for step in range(1, STEPS + 1):
        grad = normal(rng, n)
        bias1, bias2 = (1 - beta1**step, 1 - beta2**step) if corrected else (1.0, 1.0)
        _core.adamw(memory.put(grad), lr, beta1, beta2, eps, decay, bias1, bias2, scale, kp, km, kv)
        g = grad * scale
        p = p - lr * decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p = p - lr * (m / bias1) / (np.sqrt(v / bias2) + eps)
    close(kp, p)
    close(km, m)
    close(kv, v)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("decay", "scale", "scale_v"), [(0.0, 1.0, 1.0), (1e-3, 0.25, 0.09)])
def test_adam_atan2(memory, rng, n, decay, scale, scale_v):
    step, beta1, beta2 = 0.5, 0.9, 0.99
    p = normal(rng, n)
    m, v = np.zeros(n), np.zeros(n)
    kp, km, kv = memory.put(p), memory.put(m), memory.put(v)
    for _ in range(STEPS):
        grad = normal(rng, n)
        _core.adam_atan2(memory.put(grad), beta1, beta2, decay, step, scale_v, scale, kp, km, kv)
        g = grad * scale
        p = p - decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p = p - step * np.arctan2(m, np.sqrt(scale_v * v))
    close(kp, p)
    close(km, m)
    close(kv, v)


def test_adam_atan2_at_every_angle(memory):
    """Angles up to those of m = 0 and of v = 0, with both signs, and large ratios."""
    m = np.concatenate([[0.0], np.logspace(-18, 18, 1500), [1.0]]).astype(np.float32)
    v = np.concatenate([[0.0], np.logspace(-30, 30, 1500)[::-1], [0.0]]).astype(np.float32)
    zero = np.zeros(m.size, np.float32)
    for sign in (1, -1):
        p = memory.put(zero)
        _core.adam_atan2(zero, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, p, memory.put(sign * m), memory.put(v))
        want = -np.arctan2(sign * m.astype(np.float64), np.sqrt(v.astype(np.float64)))
        np.testing.assert_allclose(p, want, rtol=6e-7, atol=1e-18)
        assert p[0] == 0


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov", "decay"),
    [(0.0, 0.0, 0, 0.1), (0.9, 0.0, 0, 0.0), (0.9, 0.3, 0, 0.1), (0.9, 0.0, 1, 0.1)],
)
def test_sgd(memory, rng, n, momentum, dampening, nesterov, decay):
    lr, scale = 0.1, 0.5
    p, buf = normal(rng, n), np.zeros(n)
    kp, kbuf = memory.put(p), memory.put(buf) if momentum else None
    for step in range(STEPS):
        grad = normal(rng, n)
        damp = dampening if step else 0.0  # in torch, the first buffer is the gradient itself
        _core.sgd(memory.put(grad), lr, momentum, damp, decay, nesterov, scale, kp, kbuf)
        g = grad * scale + decay * p
        if momentum:
            buf = momentum * buf + (1 - damp) * g
            g = g + momentum * buf if nesterov else buf
        p = p - lr * g
    close(kp, p)
    if momentum:
        close(kbuf, buf)


@pytest.mark.parametrize("n", LENGTHS)
def test_lion(memory, rng, n):
    lr, beta1, beta2, decay, scale = 0.01, 0.9, 0.99, 0.1, 2.0
    p, m = normal(rng, n), np.zeros(n)
    kp, km = memory.put(p), memory.put(m)
    for _ in range(STEPS):
        grad = normal(rng, n)
        _core.lion(memory.put(grad), lr, beta1, beta2, decay, scale, kp, km)
        g = grad * scale
        p = p - lr * decay * p - lr * np.sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
    close(kp, p)
    close(km, m)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 8), (5, 33), (17, 127), (1, 8193), (0, 4)])
def test_adafactor_update(memory, rng, shape):
    grad, row, col = normal(rng, shape), normal(rng, shape[0]) ** 2, normal(rng, shape[1]) ** 2
    u = memory.put(np.zeros(shape))
    _core.adafactor_update(memory.put(grad), memory.put(row), memory.put(col), 0.5, 0.25, u)
    close(u, 0.5 * grad / np.sqrt(np.maximum(0.25, np.outer(row, col))))


def test_nan_stays_in_its_element(memory):
    grad = np.ones(37, np.float32)
    grad[[0, 20, 36]] = np.nan
    clean = np.isfinite(grad)

    def fresh():
        return memory.put(np.ones(37)), memory.put(np.zeros(37)), memory.put(np.zeros(37))

    for name, run in {
        "adamw": lambda p, m, v: _core.adamw(
            grad, 0.1, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.01, 1.0, p, m, v
        ),
        "adam_atan2": lambda p, m, v: _core.adam_atan2(
            grad, 0.9, 0.99, 0.1, 0.1, 1.0, 1.0, p, m, v
        ),
        "sgd": lambda p, m, v: _core.sgd(grad, 0.1, 0.9, 0.0, 0.1, 0, 1.0, p, m),
        "lion": lambda p, m, v: _core.lion(grad, 0.1, 0.9, 0.99, 0.1, 1.0, p, m),
    }.items():
        p, m, v = fresh()
        run(p, m, v)
        assert (np.isfinite(p) == clean).all() and (np.isfinite(m) == clean).all(), name


def test_an_untouched_parameter_stays(memory):
    p, m, v = memory.put(np.ones(5)), memory.put(np.zeros(5)), memory.put(np.zeros(5))
    zero = np.zeros(5, np.float32)
    _core.adamw(zero, 0.1, 0.9, 0.99, 1e-8, 0.0, 1.0, 1.0, 1.0, p, m, v)
    _core.adam_atan2(zero, 0.9, 0.99, 0.0, 0.1, 1.0, 1.0, p, m, v)
    _core.lion(zero, 0.1, 0.9, 0.99, 0.0, 1.0, p, m)
    assert (p == 1).all() and (m == 0).all() and (v == 0).all()


def test_threads_do_not_change_a_bit(rng):
    grad, start = rng.standard_normal((2, 50_021), dtype=np.float32)

    def run():
        p, q = start.copy(), start.copy()
        m, v, buf = (np.zeros_like(grad) for _ in range(3))
        _core.adam_atan2(grad, 0.9, 0.99, 0.1, 0.1, 1.0, 1.0, p, m, v)
        _core.adamw(grad, 0.1, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.01, 1.0, p, m, v)
        _core.sgd(grad, 0.1, 0.9, 0.0, 0.1, 1, 1.0, q, buf)
        _core.lion(grad, 0.1, 0.9, 0.99, 0.1, 1.0, q, buf)
        return p, m, v, q, buf

    on_threads(run)
