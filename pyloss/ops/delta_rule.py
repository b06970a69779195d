"""The gated delta rule along packed sequences, for training and for generation."""

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
    given = [
        check_matrix(x if isinstance(x, Tensor) else f32(x, name), name)
        for x, name in ((q, "q"), (k, "k"), (v, "v"), (g, "g"), (beta, "beta"))
    ]
    shapes, scalars = _shapes(given, key_dim), (real(scale, "scale"), real(eps, "eps", 0))

    def by_heads() -> list[np.ndarray]:
        return [f32(x).reshape(shape) for x, shape in zip(given, shapes, strict=True)]

    def forward() -> np.ndarray:
        arrays = by_heads()
        out = empty(*shapes[2], like=arrays[2])
        bounds = index(offsets, "offsets", arrays[0])
        _core.delta_rule_forward(*arrays, bounds, None, *scalars, out, None)
        return _matrix(out)

    out = remembered(forward)
    nodes = nodes_of(q, k, v, g, beta)
    if nodes is None:
        return out

    def vjp(d_out: np.ndarray, grads: Gradients) -> None:
        arrays = by_heads()
        found = [empty(*shape, like=arrays[0]) for shape in shapes]
        bounds, d_out = index(offsets, "offsets", arrays[0]), d_out.reshape(shapes[2])
        _core.delta_rule_grad(d_out, None, *arrays, bounds, None, *scalars, *found, None)
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
    shapes = _shapes((q, k, v, g, beta), key_dim)
    arrays = [x.reshape(shape) for x, shape in zip((q, k, v, g, beta), shapes, strict=True)]
    out = empty(*shapes[2], like=v)
    _core.delta_rule_step(*arrays, offsets, places, next_places, scale, eps, states, out)
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


def _or_zeros(slope: Any, like: np.ndarray) -> np.ndarray:
    return zeros(*like.shape, like=like) if slope is None else slope


def _matrix(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _shapes(given: Sequence[Any], key_dim: int) -> list[tuple[int, ...]]:
    """The shapes of q, k, v, g and beta by heads."""
    key_dim = whole(key_dim, "key_dim", 1)
    q, k, v, g, beta = (tuple(x.shape) for x in given)
    for shape, name in ((q, "q"), (k, "k")):
        if shape[1] % key_dim:
            raise ValueError(
                f"{name} has {shape[1]} columns, which are no whole number of heads of {key_dim}"
            )
    heads = g[1]
    if not heads or v[1] % heads:
        raise ValueError(f"v has {v[1]} columns, which are not those of the {heads} heads of g")
    groups = (q[0], q[1] // key_dim, key_dim), (k[0], k[1] // key_dim, key_dim)
    return [*groups, (v[0], heads, v[1] // heads), g, beta]
