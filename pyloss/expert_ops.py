"""The differentiable operations of mixtures of experts: routing, and the products of rows with the matrices of their experts.

A token's row goes to k of E experts. `route` sorts these M = N k visits by expert, once for all products of a block. `dispatch`
makes the sorted rows, `expert_linear` and `expert_lora` multiply them, `combine` adds a token's results up. As `ops` otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import _core
from .arrays import Array, column_sum, empty, f32, frozen, into, matrix
from .autograd import Gradients, keep, record, recording
from .weight_stack import WeightStack


@dataclass(frozen=True)
class Routing:
    """Where the rows of N tokens go: visits sorted by expert, those of an expert in the order of their tokens."""

    tokens: np.ndarray
    """int32 [M]: the token of each visit."""
    visits: np.ndarray
    """int32 [N, k]: the visits of each token."""
    offsets: np.ndarray
    """int32 [E + 1]: visits [offsets[e], offsets[e + 1]) are those of expert e."""


def _sorted_visits(experts: np.ndarray, count: int) -> tuple[Routing, np.ndarray]:
    """The routing of tokens to `experts` [N, k], ascending in each row, of `count`; and the order of visits that it is."""
    flat = experts.reshape(-1)
    # Of 16-bit numbers NumPy sorts the digits.
    order = np.argsort(flat.astype(np.uint16) if count <= 1 << 16 else flat, kind="stable")
    places = np.empty(len(order), np.int32)
    places[order] = np.arange(len(order), dtype=np.int32)
    offsets = np.concatenate(([0], np.cumsum(np.bincount(flat, minlength=count)))).astype(np.int32)
    tokens = (order // max(experts.shape[1], 1)).astype(np.int32)
    return Routing(tokens, places.reshape(experts.shape), offsets), order


def route(logits: Array, k: int, normalise: bool) -> tuple[Routing, Array]:
    """Sends each token to the `k` experts of its largest logits [N, E]; the routing, and the weight of each visit, [M].

    Weights are the softmax over all experts, and with `normalise` divided by their sum over a token's k. In float64.

    Raises ValueError for a `k` outside [1, E].
    """
    source = f32(logits, "logits")
    count = source.shape[1]
    if not 1 <= k <= count:
        raise ValueError(f"the experts of a token must be from 1 to {count}, not {k}")
    chosen = np.argpartition(-source, k - 1, axis=1)[:, :k] if k < count else np.broadcast_to(np.arange(count), source.shape)
    chosen = np.sort(chosen, axis=1)
    routing, order = _sorted_visits(chosen, count)
    wide = source.astype(np.float64)
    with np.errstate(invalid="ignore"):  # what is not finite spoils its own token alone
        powers = np.exp(wide - wide.max(axis=1, keepdims=True, initial=-np.inf))
        of_chosen = np.take_along_axis(powers, chosen, axis=1)
        weights = of_chosen / (of_chosen if normalise else powers).sum(axis=1, keepdims=True)
        share = None if normalise else powers / powers.sum(axis=1, keepdims=True)
    visit_weights = weights.reshape(-1)[order].astype(np.float32)
    if not recording(logits):
        return routing, visit_weights

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        slope = weights * dy[routing.visits]
        mean = slope.sum(axis=1, keepdims=True)
        if share is None:
            dlogits = np.zeros(source.shape)
            slope -= weights * mean
        else:
            dlogits = -share * mean
        dlogits[np.arange(len(slope))[:, None], chosen] += slope
        grads.put(0, dlogits.astype(np.float32))

    return routing, record(visit_weights, (logits,), vjp)


def dispatch(x: Array, routing: Routing) -> Array:
    """The rows of x [N, D] for each visit, [M, D]. Copied again for the backward pass, not kept."""

    def rows(source: np.ndarray) -> np.ndarray:
        y = empty(len(routing.tokens), source.shape[1])
        _core.gather_rows(source, routing.tokens, y)
        return y

    y, shape = rows(f32(x)), x.shape
    if not recording(x):
        return y
    kept = keep(x)

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx, accumulate = into(grads, 0, shape)
        _core.combine_rows(dy, routing.visits, accumulate, dx)
        grads.put(0, dx)

    return record(y, (x,), vjp, lambda: rows(f32(kept())))


def combine(x: Array, routing: Routing) -> Array:
    """The sum of each token's visits in x [M, D], [N, D]."""
    xd = f32(x)
    y = empty(len(routing.visits), xd.shape[1])
    _core.combine_rows(xd, routing.visits, 0, y)
    del xd
    if not recording(x):
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx = empty(len(routing.tokens), dy.shape[1])
        _core.gather_rows(dy, routing.tokens, dx)
        grads.put(0, dx)

    return record(y, (x,), vjp)


def scale_rows(x: Array, factor: Array) -> Array:
    """Each row of x [M, D] times its factor [M]. Cheap: recomputed, not kept."""

    def scaled(source: np.ndarray) -> np.ndarray:
        y = empty(*source.shape)
        _core.scale_rows(source, factors, y)
        return y

    factors = f32(factor, "factor")
    y = scaled(f32(x))
    if not recording(x, factor):
        return y
    kept = keep(x)

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx, dfactor = empty(*dy.shape), empty(len(factors))
        _core.scale_rows_grad(dy, f32(kept()), factors, dx, dfactor)
        grads.put(0, dx)
        grads.put(1, dfactor)

    return record(y, (x, factor), vjp, lambda: scaled(f32(kept())))


def _weight_grad(dy: np.ndarray, x: np.ndarray, offsets: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """alpha dy^T x over the rows of each expert: [E, O, I] of dy [M, O] and x [M, I]."""
    dw = empty(len(offsets) - 1, dy.shape[1], x.shape[1])
    _core.experts_weight_grad(dy, x, offsets, alpha, dw)
    return dw


def _bias_grad(dy: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    db = np.zeros((len(offsets) - 1, dy.shape[1]), np.float32)
    for expert in np.flatnonzero(np.diff(offsets)):
        db[expert] = column_sum(dy[offsets[expert] : offsets[expert + 1]])
    return db


def expert_linear(x: Array, weight: Array | WeightStack, bias: Array | None, offsets: np.ndarray) -> Array:
    """x [M, I] sorted by expert (int32 `offsets` [E + 1]), weight [E, O, I], bias [E, O]: each row times its own, [M, O]."""
    xd, w, b = f32(x), matrix(weight), None if bias is None else f32(bias, "bias")
    y = empty(len(xd), weight.shape[1])
    _core.experts_forward(xd, w, b, offsets, None, None, 0.0, None, y)
    inputs = (x, frozen(weight), bias)
    if not recording(*(v for v in inputs if v is not None)):
        return y
    kept, shape = keep(x), xd.shape

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        if grads.wanted(0):
            dx, accumulate = into(grads, 0, shape)
            _core.experts_input_grad(dy, w, offsets, None, None, accumulate, None, dx)
            grads.put(0, dx)
        if grads.wanted(1):
            grads.put(1, _weight_grad(dy, f32(kept()), offsets))
        if grads.wanted(2):
            grads.put(2, _bias_grad(dy, offsets))

    del xd
    return record(y, inputs, vjp)


def expert_lora(
    x: Array,
    weight: Array | WeightStack,
    bias: Array | None,
    offsets: np.ndarray,
    lora_a: Array,
    lora_b: Array,
    scale: float,
    dropout: float = 0.0,
    seed: int = 0,
) -> Array:
    """`expert_linear` and, for each row, scale b[e] a[e] dropout(x) of its expert: lora_a [E, r, I], lora_b [E, O, r].

    `dropout` in [0, 1) acts on the adapter's input alone; its mask is a function of `seed`.
    """
    xd, w, bd = f32(x), matrix(weight), None if bias is None else f32(bias, "bias")
    a, b = f32(lora_a, "lora_a"), f32(lora_b, "lora_b")
    h, y = empty(len(xd), a.shape[1]), empty(len(xd), weight.shape[1])
    if dropout:
        dropped = empty(*xd.shape)
        _core.dropout(xd, seed, dropout, dropped)
        _core.experts_forward(dropped, a, None, offsets, None, None, 0.0, None, h)
        _core.experts_forward(xd, w, bd, offsets, h, b, scale, None, y)
        del dropped
    else:
        _core.experts_lora_forward(xd, w, bd, offsets, a, b, scale, None, h, y)
    inputs = (x, frozen(weight), bias, lora_a, lora_b)
    if not recording(*(v for v in inputs if v is not None)):
        return y
    kept, shape = keep(x), xd.shape

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dh = empty(*h.shape)
        if dropout or not grads.wanted(0):
            _core.experts_input_grad(dy, b, offsets, None, None, 0, None, dh)
            _core.scale(scale, dh, dh)
        if grads.wanted(0):
            dx, accumulate = into(grads, 0, shape)
            if dropout:
                branch = empty(*shape)
                _core.experts_input_grad(dh, a, offsets, None, None, 0, None, branch)
                _core.dropout(branch, seed, dropout, branch)
                _core.experts_input_grad(dy, w, offsets, None, None, accumulate, None, dx)
                _core.axpy(1.0, branch, dx)
                del branch
            else:
                _core.experts_lora_input_grad(dy, w, offsets, a, b, scale, accumulate, None, dh, dx)
            grads.put(0, dx)
        if grads.wanted(1) or grads.wanted(3):
            inner = f32(kept())
            if grads.wanted(1):
                grads.put(1, _weight_grad(dy, inner, offsets))
            if grads.wanted(3):
                if dropout:
                    again = empty(*shape)
                    _core.dropout(inner, seed, dropout, again)
                    inner = again
                grads.put(3, _weight_grad(dh, inner, offsets))
        if grads.wanted(2):
            grads.put(2, _bias_grad(dy, offsets))
        if grads.wanted(4):
            # As [E, r, O]: the few rows of h^T stay in registers while dy streams by.
            grads.put(4, np.ascontiguousarray(_weight_grad(h, dy, offsets, scale).swapaxes(1, 2)))

    del xd
    return record(y, inputs, vjp)
