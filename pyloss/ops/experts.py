"""Operations of mixtures of experts: routing, and the products of rows with experts' matrices.

A token's row visits k of E experts. `route` sorts the M = N k visits by expert, once for all
products of a block. `dispatch` copies the rows in this order, `expert_project` multiplies them, and
`combine` adds up a token's results. Arrays as in `layers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import Gradients, data, keep, record, recording
from pyloss.autograd.tensor import Tensor
from pyloss.ops import wide
from pyloss.ops.arrays import Array, check_matrix, empty, f32, gradient_buffer, integers
from pyloss.ops.product_kernels import Experts
from pyloss.ops.projection import Projection, project
from pyloss.runtime.device import on_device_of


@dataclass(frozen=True)
class Routing:
    """The visits of N tokens, sorted by expert, then by token.

    The arrays are on the device of the logits. Arrays on a device are also kept on the host.

    Attributes:
        tokens: int32 [M], the token of each visit.
        visits: int32 [N, k], the visits of each token.
        offsets: int32 [E + 1]; visits [offsets[e], offsets[e + 1]) go to expert e.
    """

    tokens: Any
    visits: Any
    offsets: Any


def _sorted_visits(experts: Any, count: int) -> Routing:
    """The routing of tokens to `experts` [N, k] of `count`, ascending in each row.

    Sorted on the host.
    """
    chosen = np.asarray(experts)
    flat = chosen.reshape(-1)
    # NumPy has a faster stable sort (radix) for 16-bit numbers.
    order = np.argsort(flat.astype(np.uint16) if count <= 1 << 16 else flat, kind="stable")
    places = np.empty(len(order), np.int32)
    places[order] = np.arange(len(order), dtype=np.int32)
    offsets = np.concatenate(([0], np.cumsum(np.bincount(flat, minlength=count)))).astype(np.int32)
    tokens = (order // max(chosen.shape[1], 1)).astype(np.int32)
    return Routing(
        *(on_device_of(experts, array) for array in (tokens, places.reshape(chosen.shape), offsets))
    )


def route(logits: Array, k: int, normalize: bool) -> tuple[Routing, Array]:
    """Routes each token to the `k` experts with its largest logits [N, E].

    Returns the routing and the weights of the visits, [M]: the softmax over all experts, and with
    `normalize` divided by its sum over the token's k. Weights are computed in float64. The chosen
    experts pass through the host, which sorts them. ValueError unless `k` is in [1, E].
    """
    source = f32(logits, "logits")
    rows, count = source.shape
    if not 1 <= k <= count:
        raise ValueError(f"the experts of a token must be from 1 to {count}, not {k}")
    chosen = integers((rows, k), source)
    _core.top_experts(source, chosen)
    routing = _sorted_visits(chosen, count)
    if wide.is_wide(logits):
        return routing, wide.visit_weights(logits, chosen, routing.visits, normalize)
    weights = empty(rows * k, like=source)
    _core.visit_weights(source, chosen, routing.visits, int(normalize), weights)
    if not recording(logits):
        return routing, weights

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dlogits = empty(*source.shape, like=source)
        _core.visit_weights_grad(dy, source, chosen, routing.visits, int(normalize), dlogits)
        grads.put(0, dlogits)

    return routing, record(weights, (logits,), vjp)


def route_sigmoid(
    logits: Array, k: int, normalize: bool, bias: Any = None, factor: float = 1.0
) -> tuple[Routing, Array]:
    """Routes each token to the `k` experts with the largest sigmoid(logits) + `bias`, [N, E].

    Returns the routing and the weights of the visits, [M]: `factor` times the sigmoid, without the
    bias [E], with `normalize` divided by its sum over the token's k. Computed in float64 on the
    host. ValueError unless `k` is in [1, E].
    """
    is_wide = wide.is_wide(logits)
    source = np.asarray(data(logits)) if is_wide else f32(logits, "logits")
    rows, count = source.shape
    if not 1 <= k <= count:
        raise ValueError(f"the experts of a token must be from 1 to {count}, not {k}")
    shares = 1 / (1 + np.exp(-np.asarray(source).astype(np.float64)))
    scores = shares if bias is None else shares + np.asarray(bias)
    chosen = np.empty((rows, k), np.int32)
    _core.top_experts(scores.astype(np.float32), chosen)
    on_host = _sorted_visits(chosen, count)
    visits = on_host.visits
    if is_wide:
        return on_host, wide.sigmoid_weights(logits, chosen, visits, normalize, factor)
    routing = Routing(
        *(on_device_of(source, part) for part in (on_host.tokens, visits, on_host.offsets))
    )
    shares = np.take_along_axis(shares, chosen, 1)
    total = shares.sum(1, keepdims=True) + wide.SIGMOID_EPS if normalize else np.ones((rows, 1))
    by_visit = np.empty(rows * k, np.float32)
    by_visit[visits] = factor * shares / total
    weights = on_device_of(source, by_visit)
    if not recording(logits):
        return routing, weights

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        slopes = np.asarray(dy)[visits] * (factor / total)
        if normalize:
            slopes -= (slopes * shares).sum(1, keepdims=True) / total
        dlogits = np.zeros((rows, count), np.float32)
        np.put_along_axis(dlogits, chosen, slopes * shares * (1 - shares), 1)
        grads.put(0, on_device_of(dy, dlogits))

    return routing, record(weights, (logits,), vjp)


@wide.in_float64(wide.dispatch, 1)
def dispatch(x: Array, routing: Routing) -> Array:
    """The rows of x [N, D] for each visit, [M, D]; copied a second time for the backward pass."""

    def rows(source: np.ndarray) -> np.ndarray:
        y = empty(len(routing.tokens), source.shape[1], like=source)
        _core.gather_rows(source, routing.tokens, y)
        return y

    y, shape = rows(f32(x)), x.shape
    if not recording(x):
        return y
    kept = keep(x)

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx, accumulate = gradient_buffer(grads, 0, shape, dy)
        _core.combine_rows(dy, routing.visits, accumulate, dx)
        grads.put(0, dx)

    return record(y, (x,), vjp, lambda: rows(f32(kept())))


@wide.in_float64(wide.combine, 1)
def combine(x: Array, routing: Routing) -> Array:
    """The sum of each token's visits in x [M, D], [N, D]."""
    xd = f32(x)
    y = empty(len(routing.visits), xd.shape[1], like=xd)
    _core.combine_rows(xd, routing.visits, 0, y)
    del xd
    if not recording(x):
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx = empty(len(routing.tokens), dy.shape[1], like=dy)
        _core.gather_rows(dy, routing.tokens, dx)
        grads.put(0, dx)

    return record(y, (x,), vjp)


@wide.in_float64(wide.scale_rows, 2)
def scale_rows(x: Array, factor: Array) -> Array:
    """Each row of x [M, D] times its factor [M]. Recomputed, not kept."""

    def scaled(source: np.ndarray) -> np.ndarray:
        y = empty(*source.shape, like=source)
        _core.scale_rows(source, factors, y)
        return y

    factors = f32(factor, "factor")
    y = scaled(f32(x))
    if not recording(x, factor):
        return y
    kept = keep(x)

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx, dfactor = empty(*dy.shape, like=dy), empty(len(factors), like=dy)
        _core.scale_rows_grad(dy, f32(kept()), factors, dx, dfactor)
        grads.put(0, dx)
        grads.put(1, dfactor)

    return record(y, (x, factor), vjp, lambda: scaled(f32(kept())))


def expert_project(x: Array, offsets: np.ndarray, projection: Projection) -> Array:
    """The projections of rows by their experts, x [M, I]: [M, O].

    Expert e has the rows [offsets[e], offsets[e + 1]), `offsets` int32 [E + 1]. The projection's
    arrays have a leading axis of E experts, and the adapter has mlx-lm's layout: weight [E, O, I],
    float32 or a `WeightStack`, bias, m and norm [E, O], lora_a [E, R, I], lora_b [E, O, R].
    """
    if wide.wide_projections(x, [projection]):
        return wide.expert_project(x, offsets, projection)
    x = check_matrix(x if isinstance(x, Tensor) else f32(x), "x")
    return project(x, projection, Experts(offsets))
