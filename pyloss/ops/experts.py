"""Operations of mixtures of experts: routing, and the products of rows with experts' matrices.

A token's row visits k of E experts. `route` sorts the M = N k visits by expert, once for all
products of a block. `dispatch` copies the rows in this order, `expert_project` multiplies them, and
`combine` adds up a token's results. Arrays as in `layers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import Gradients, keep, record, recording
from pyloss.autograd.tensor import Tensor
from pyloss.ops import wide
from pyloss.ops.arrays import Array, check_matrix, empty, f32, gradient_buffer, integers
from pyloss.ops.product_kernels import Experts
from pyloss.ops.projection import Projection, project
from pyloss.runtime.device import DeviceArray, on_device_of


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


def route(logits: Array, k: int, normalize: bool) -> tuple[Routing, Array]:
    """Routes each token to the `k` experts with its largest logits [N, E].

    Returns the routing and the weights of the visits, [M]: the softmax over all experts, and with
    `normalize` divided by its sum over the token's k. Weights are computed in float64. ValueError
    unless `k` is in [1, E].
    """
    source, chosen, routing = _routed(logits, k, lambda scores: scores)
    if wide.is_wide(logits):
        return routing, wide.visit_weights(logits, chosen, routing.visits, normalize)
    return routing, _weights(logits, source, chosen, routing, normalize, False, 1.0)


def route_sigmoid(
    logits: Array, k: int, normalize: bool, bias: Any = None, factor: float = 1.0
) -> tuple[Routing, Array]:
    """Routes each token to the `k` experts with the largest sigmoid(logits) + `bias`, [N, E].

    Returns the routing and the weights of the visits, [M]: `factor` times the sigmoid, without the
    bias [E], with `normalize` divided by 1e-6 + its sum over the token's k. Computed in float64.
    ValueError unless `k` is in [1, E].
    """

    def scores_of(source: Any) -> Any:
        scores = empty(*source.shape, like=source)
        _core.sigmoid_scores(source, None if bias is None else f32(bias, "bias"), scores)
        return scores

    source, chosen, routing = _routed(logits, k, scores_of)
    if wide.is_wide(logits):
        return routing, wide.sigmoid_weights(logits, chosen, routing.visits, normalize, factor)
    return routing, _weights(logits, source, chosen, routing, normalize, True, factor)


def _routed(logits: Array, k: int, scores_of: Callable[[Any], Any]) -> tuple[Any, Any, Routing]:
    """The logits' float32 array, the experts of its tokens [N, k], and the routing to them."""
    source = f32(logits, "logits")
    rows, count = source.shape
    if not 1 <= k <= count:
        raise ValueError(f"the experts of a token must be from 1 to {count}, not {k}")
    chosen = integers((rows, k), source)
    _core.top_experts(scores_of(source), chosen)
    return source, chosen, _sorted(chosen, source)


def _sorted(chosen: Any, logits: Any) -> Routing:
    """The routing of tokens to the experts `chosen` [N, k]; of the logits only sizes are read."""
    if isinstance(chosen, DeviceArray):
        # Calls check indices on the host: arrays that are made there need not be copied back.
        there = _sorted(np.asarray(chosen), np.empty(logits.shape, np.float32))
        return Routing(
            *(on_device_of(chosen, part) for part in (there.tokens, there.visits, there.offsets))
        )
    tokens, visits = integers(chosen.shape, chosen), integers(chosen.shape, chosen)
    offsets = integers((logits.shape[1] + 1,), chosen)
    _core.sort_visits(chosen, logits, tokens, visits, offsets)
    return Routing(tokens.reshape(-1), visits, offsets)


def _weights(
    logits: Array,
    source: Any,
    chosen: Any,
    routing: Routing,
    normalize: bool,
    sigmoid: bool,
    factor: float,
) -> Array:
    """The weights of the visits, [M]."""
    rule = int(normalize), int(sigmoid), factor
    weights = empty(len(routing.tokens), like=source)
    _core.visit_weights(source, chosen, routing.visits, routing.tokens, *rule, weights)
    if not recording(logits):
        return weights

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dlogits = empty(*source.shape, like=source)
        _core.visit_weights_grad(dy, source, chosen, routing.visits, *rule, dlogits)
        grads.put(0, dlogits)

    return record(weights, (logits,), vjp)


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
