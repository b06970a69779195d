"""The gated delta rule, the scan and their gates: against float64 central differences."""

import itertools

import numpy as np
import pytest
from ops_checks import check, normal

from pyloss import ops

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def delta_rule_by_steps(q, k, v, g, beta, offsets, d, scale):
    """One head of keys and values at a time, row by row."""
    out, share = np.zeros_like(v), g.shape[1] * d // k.shape[1]
    e = v.shape[1] // g.shape[1]
    for head in range(g.shape[1]):
        of_k = slice(head // share * d, (head // share + 1) * d)
        of_v = slice(head * e, (head + 1) * e)
        for begin, end in itertools.pairwise(offsets):
            state = np.zeros((d, e))
            for n in range(begin, end):
                key, query = (x[n, of_k] / np.sqrt(np.sum(x[n, of_k] ** 2) + 1e-6) for x in (k, q))
                state *= np.exp(g[n, head])
                state += np.outer(key, beta[n, head] * (v[n, of_v] - key @ state))
                out[n, of_v] = scale * query @ state
    return out


@pytest.mark.parametrize("lengths", [[0], [1], [4, 0, 1, 3]])
@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (1, 2), (2, 2)])
def test_delta_rule(rng, lengths, groups, heads):
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    n, d = int(offsets[-1]), 3
    q, k, v = normal(rng, n, groups * d), normal(rng, n, groups * d), normal(rng, n, heads * 2)
    g, beta = -np.abs(normal(rng, n, heads)), np.abs(normal(rng, n, heads))

    def operation(*arrays):
        return ops.delta_rule(*arrays, offsets, d, 0.7)

    def reference(*arrays):
        return delta_rule_by_steps(*arrays, offsets, d, 0.7)

    check(rng, operation, reference, q, k, v, g, beta)
    np.testing.assert_allclose(
        operation(q, k, v, g, beta), reference(q, k, v, g, beta), rtol=1e-12, atol=1e-12
    )


def scan_by_steps(x, dt, g, b, c, offsets, d):
    """One head at a time, row by row."""
    out, share = np.zeros_like(x), g.shape[1] * d // b.shape[1]
    e = x.shape[1] // g.shape[1]
    for head in range(g.shape[1]):
        group = slice(head // share * d, (head // share + 1) * d)
        own = slice(head * e, (head + 1) * e)
        for begin, end in itertools.pairwise(offsets):
            state = np.zeros((d, e))
            for n in range(begin, end):
                state = np.exp(g[n, head]) * state
                state += dt[n, head] * np.outer(b[n, group], x[n, own])
                out[n, own] = c[n, group] @ state
    return out


@pytest.mark.parametrize("lengths", [[0], [1], [4, 0, 1, 3]])
@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (1, 2), (2, 2)])
def test_state_scan(rng, lengths, groups, heads):
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    n, d = int(offsets[-1]), 3
    b, c, x = normal(rng, n, groups * d), normal(rng, n, groups * d), normal(rng, n, heads * 2)
    g, dt = -np.abs(normal(rng, n, heads)), np.abs(normal(rng, n, heads))

    def operation(*arrays):
        return ops.state_scan(*arrays, offsets, d)

    def reference(*arrays):
        return scan_by_steps(*arrays, offsets, d)

    check(rng, operation, reference, x, dt, g, b, c)
    np.testing.assert_allclose(
        operation(x, dt, g, b, c), reference(x, dt, g, b, c), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("which", [0, 1])
def test_delta_gates(rng, which):
    a, b, a_log, dt_bias = normal(rng, 4, 3), normal(rng, 4, 3), normal(rng, 3), normal(rng, 3)

    def operation(*arrays):
        return ops.delta_gates(*arrays)[which]

    def reference(a, b, a_log, dt_bias):
        return 1 / (1 + np.exp(-b)) if which else -np.exp(a_log) * np.logaddexp(0, a + dt_bias)

    check(rng, operation, reference, a, b, a_log, dt_bias)
    np.testing.assert_allclose(
        operation(a, b, a_log, dt_bias), reference(a, b, a_log, dt_bias), rtol=1e-12
    )


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("limits", [(0.0, np.inf), (0.3, 1.1)])
def test_scan_gates(rng, which, limits):
    x, a_log, dt_bias = normal(rng, 5, 3), normal(rng, 3), normal(rng, 3)

    def operation(*arrays):
        return ops.scan_gates(*arrays, limits)[which]

    def reference(x, a_log, dt_bias):
        dt = np.clip(np.logaddexp(0, x + dt_bias), *limits)
        return -np.exp(a_log) * dt if which else dt

    check(rng, operation, reference, x, a_log, dt_bias)
    np.testing.assert_allclose(
        operation(x, a_log, dt_bias), reference(x, a_log, dt_bias), rtol=1e-12
    )
