"""The gated delta rule and the scan of Mamba-2 along packed sequences, for training and for
generation. Both are one operation of the core: q, k, v and beta of the rule are c, b, x and dt of
the scan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import Gradients, nodes_of, record_on, record_several, remembered
from pyloss.autograd.tensor import Tensor
from pyloss.checks.numbers import real, whole
from pyloss.ops import wide
from pyloss.ops.arrays import Array, check_matrix, column_sum, empty, f32, f32_matrix, index, zeros

#: The core's scale, eps and delta of a scan: keys of any length, and nothing is taken off at them.
_SCAN = 1.0, -1.0, 0


@wide.in_float64(wide.delta_rule, 5)
def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    offsets: np.ndarray,
    key_dim: int,
    scale: float,
    eps: float = 1e-6,
) -> Array:
    """The gated delta rule of packed sequences, whose states begin with 0: [N, H * E].

    q and k [N, G * key_dim] are heads of queries and keys, each serving H / G heads of values in
    v [N, H * E]; log gates g and rates beta [N, H]; int32 `offsets` [S + 1] bounds the sequences.
    A head of values has a state S [key_dim, E]. Each row makes e^g S of it, then adds the outer
    product of k and beta (v - k S), and results in scale * q S; k and q are divided by their
    lengths before, sqrt(sum of squares + eps). Yang et al., arXiv:2412.06464.
    """
    options = real(scale, "scale"), real(eps, "eps", 0), 1
    names = "q", "k", "v", "g", "beta"
    return _recurrence((q, k, v, g, beta), names, offsets, key_dim, "key_dim", options)


@wide.in_float64(wide.state_scan, 5)
def state_scan(
    x: Array, dt: Array, g: Array, b: Array, c: Array, offsets: np.ndarray, state_dim: int
) -> Array:
    """The scan of Mamba-2 along packed sequences, whose states begin with 0: [N, H * E].

    b and c [N, G * state_dim] are groups, each serving H / G heads of x [N, H * E]; steps dt and
    log gates g [N, H], g = dt A; int32 `offsets` [S + 1] bounds the sequences. A head has a state
    S [state_dim, E]. Each row makes e^g S of it, then adds the outer product of b and dt x, and
    results in c S. Dao & Gu, arXiv:2405.21060.
    """
    names = "c", "b", "x", "g", "dt"
    return _recurrence((c, b, x, g, dt), names, offsets, state_dim, "state_dim", _SCAN)


def _recurrence(
    arguments: Sequence[Array],
    names: Sequence[str],
    offsets: np.ndarray,
    key_dim: int,
    name: str,
    options: tuple[float, float, int],
) -> Array:
    """Either operation, of q, k, v, g and beta; scale, eps and delta are the core's `options`."""
    given = [
        check_matrix(x if isinstance(x, Tensor) else f32(x, name), name)
        for x, name in zip(arguments, names, strict=True)
    ]
    shapes = _shapes(given, names, whole(key_dim, name, 1))

    def by_heads() -> list[np.ndarray]:
        return [f32(x).reshape(shape) for x, shape in zip(given, shapes, strict=True)]

    def forward() -> np.ndarray:
        arrays = by_heads()
        out = empty(*shapes[2], like=arrays[2])
        bounds = index(offsets, "offsets", arrays[0])
        _core.delta_rule_forward(*arrays, bounds, None, *options, out, None)
        return _matrix(out)

    out = remembered(forward)
    nodes = nodes_of(*arguments)
    if nodes is None:
        return out

    def vjp(d_out: np.ndarray, grads: Gradients) -> None:
        arrays = by_heads()
        found = [empty(*shape, like=arrays[0]) for shape in shapes]
        bounds, d_out = index(offsets, "offsets", arrays[0]), d_out.reshape(shapes[2])
        _core.delta_rule_grad(d_out, None, *arrays, bounds, None, *options, *found, None)
        for i, slope in enumerate(found):
            grads.put(i, _matrix(slope))

    return record_on(nodes, out, vjp)


def delta_rule_step(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    g: np.ndarray,
    beta: np.ndarray,
    offsets: np.ndarray,
    key_dim: int,
    scale: float,
    states: np.ndarray,
    places: np.ndarray,
    next_places: np.ndarray,
    eps: float = 1e-6,
) -> np.ndarray:
    """`delta_rule` of rows that continue sequences, without a gradient.

    Sequence s begins with the state `states[places[s]]` and leaves its last one in
    `states[next_places[s]]`; float32 [C, H, key_dim, E], int32 [S]. Those of sequences without
    rows are left alone; the others' next places are all different.
    """
    names, options = ("q", "k", "v", "g", "beta"), (scale, eps, 1)
    return _step((q, k, v, g, beta), names, key_dim, options, offsets, states, places, next_places)


def state_scan_step(
    x: np.ndarray,
    dt: np.ndarray,
    g: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    offsets: np.ndarray,
    state_dim: int,
    states: np.ndarray,
    places: np.ndarray,
    next_places: np.ndarray,
) -> np.ndarray:
    """`state_scan` of rows that continue sequences, without a gradient; see `delta_rule_step`."""
    names = "c", "b", "x", "g", "dt"
    return _step((c, b, x, g, dt), names, state_dim, _SCAN, offsets, states, places, next_places)


def _step(
    given: Sequence[np.ndarray],
    names: Sequence[str],
    key_dim: int,
    options: tuple[float, float, int],
    offsets: np.ndarray,
    states: np.ndarray,
    places: np.ndarray,
    next_places: np.ndarray,
) -> np.ndarray:
    shapes = _shapes(given, names, key_dim)
    arrays = [x.reshape(shape) for x, shape in zip(given, shapes, strict=True)]
    out = empty(*shapes[2], like=given[2])
    _core.delta_rule_step(*arrays, offsets, places, next_places, *options, states, out)
    return _matrix(out)


def delta_gates(a: Array, b: Array, a_log: Array, dt_bias: Array) -> list[Array]:
    """Log gates and rates of the delta rule, [N, H] each.

    g = -exp(a_log) * softplus(a + dt_bias) and beta = sigmoid(b), with a and b [N, H], a_log and
    dt_bias [H].
    """
    if wide.is_wide(a, b, a_log, dt_bias):
        return wide.delta_gates(a, b, a_log, dt_bias)
    ad, bd = f32_matrix(a, "a"), f32_matrix(b, "b")
    rate, bias = f32(a_log, "a_log"), f32(dt_bias, "dt_bias")
    g, beta = empty(*ad.shape, like=ad), empty(*ad.shape, like=ad)
    _core.delta_gates_forward(ad, bd, rate, bias, g, beta)
    nodes = nodes_of(a, b, a_log, dt_bias)
    if nodes is None:
        return [g, beta]

    def vjp(slopes: list[Any], grads: Gradients) -> None:
        dg, dbeta = (_or_zeros(slope, ad) for slope in slopes)
        da, db = empty(*ad.shape, like=ad), empty(*ad.shape, like=ad)
        _core.delta_gates_grad(dg, dbeta, ad, bd, rate, bias, da, db)
        if grads.wanted(2):  # g is its own slope by a_log
            by_rate = empty(len(rate), like=rate)
            _core.column_dot(dg, g, None, by_rate)
            grads.put(2, by_rate)
        if grads.wanted(3):
            grads.put(3, column_sum(da))
        grads.put(0, da)
        grads.put(1, db)

    return record_several(nodes, [g, beta], vjp, (False, False))


def scan_gates(
    x: Array, a_log: Array, dt_bias: Array, limits: tuple[float, float] = (0.0, math.inf)
) -> list[Array]:
    """Steps and log gates of the scan, [N, H] each.

    dt = softplus(x + dt_bias), between `limits`, and g = -exp(a_log) * dt, with x [N, H], a_log and
    dt_bias [H].
    """
    if wide.is_wide(x, a_log, dt_bias):
        return wide.scan_gates(x, a_log, dt_bias, limits)
    xd, rate, bias = f32_matrix(x, "x"), f32(a_log, "a_log"), f32(dt_bias, "dt_bias")
    low, high = real(limits[0], "limits"), min(limits[1], float(np.finfo(np.float32).max))
    dt, g = empty(*xd.shape, like=xd), empty(*xd.shape, like=xd)
    _core.scan_gates_forward(xd, rate, bias, low, high, dt, g)
    nodes = nodes_of(x, a_log, dt_bias)
    if nodes is None:
        return [dt, g]

    def vjp(slopes: list[Any], grads: Gradients) -> None:
        ddt, dg = (_or_zeros(slope, xd) for slope in slopes)
        dx = empty(*xd.shape, like=xd)
        _core.scan_gates_grad(ddt, dg, xd, rate, bias, low, high, dx)
        if grads.wanted(1):  # g is its own slope by a_log
            by_rate = empty(len(rate), like=rate)
            _core.column_dot(dg, g, None, by_rate)
            grads.put(1, by_rate)
        if grads.wanted(2):
            grads.put(2, column_sum(dx))
        grads.put(0, dx)

    return record_several(nodes, [dt, g], vjp, (False, False))


def _or_zeros(slope: Any, like: np.ndarray) -> np.ndarray:
    return zeros(*like.shape, like=like) if slope is None else slope


def _matrix(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _shapes(given: Sequence[Any], names: Sequence[str], key_dim: int) -> list[tuple[int, ...]]:
    """The shapes of q, k, v, g and beta by heads."""
    q, k, v, g, beta = (tuple(x.shape) for x in given)
    for shape, name in zip((q, k), names, strict=False):
        if shape[1] % key_dim:
            raise ValueError(
                f"{name} has {shape[1]} columns, which are no whole number of heads of {key_dim}"
            )
    heads = g[1]
    if not heads or v[1] % heads:
        raise ValueError(
            f"{names[2]} has {v[1]} columns, which are not those of the {heads} heads of g"
        )
    groups = (q[0], q[1] // key_dim, key_dim), (k[0], k[1] // key_dim, key_dim)
    return [*groups, (v[0], heads, v[1] // heads), g, beta]
