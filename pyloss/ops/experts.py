"""The differentiable operations of mixtures of experts: routing, and the products of rows with the matrices of their experts.

A token's row goes to k of E experts. `route` sorts these M = N k visits by expert, once for all products of a block. `dispatch`
makes the sorted rows, `expert_project` multiplies them, `combine` adds a token's results up. As `ops` otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import Gradients, keep, record, recording
from pyloss.ops.arrays import Array, core_weight, empty, f32, gradient_buffer, integers, zeros
from pyloss.ops.projection import SMALL_FACTOR, Projection, any_small, quotient, times
from pyloss.runtime.device import DeviceArray, on_device_of


@dataclass(frozen=True)
class Routing:
    """Where the rows of N tokens go: visits sorted by expert, those of an expert in the order of their tokens.

    The arrays lie where the logits do; those on a device have their values on the host as well.
    """

    tokens: Any
    """int32 [M]: the token of each visit."""
    visits: Any
    """int32 [N, k]: the visits of each token."""
    offsets: Any
    """int32 [E + 1]: visits [offsets[e], offsets[e + 1]) are those of expert e."""


def _sorted_visits(experts: Any, count: int) -> Routing:
    """The routing of tokens to `experts` [N, k], ascending in each row, of `count`; sorted on the host."""
    chosen = np.asarray(experts)
    flat = chosen.reshape(-1)
    # Of 16-bit numbers NumPy sorts the digits.
    order = np.argsort(flat.astype(np.uint16) if count <= 1 << 16 else flat, kind="stable")
    places = np.empty(len(order), np.int32)
    places[order] = np.arange(len(order), dtype=np.int32)
    offsets = np.concatenate(([0], np.cumsum(np.bincount(flat, minlength=count)))).astype(np.int32)
    tokens = (order // max(chosen.shape[1], 1)).astype(np.int32)
    return Routing(
        *(on_device_of(experts, array) for array in (tokens, places.reshape(chosen.shape), offsets))
    )


def route(logits: Array, k: int, normalise: bool) -> tuple[Routing, Array]:
    """Sends each token to the `k` experts of its largest logits [N, E]; the routing, and the weight of each visit, [M].

    Weights are the softmax over all experts, and with `normalise` divided by their sum over a token's k; computed in float64.
    The numbers of the experts pass through the host, where they are sorted.

    Raises ValueError for a `k` outside [1, E].
    """
    source = f32(logits, "logits")
    rows, count = source.shape
    if not 1 <= k <= count:
        raise ValueError(f"the experts of a token must be from 1 to {count}, not {k}")
    chosen = integers((rows, k), source)
    _core.top_experts(source, chosen)
    routing = _sorted_visits(chosen, count)
    weights = empty(rows * k, like=source)
    _core.visit_weights(source, chosen, routing.visits, int(normalise), weights)
    if not recording(logits):
        return routing, weights

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dlogits = empty(*source.shape, like=source)
        _core.visit_weights_grad(dy, source, chosen, routing.visits, int(normalise), dlogits)
        grads.put(0, dlogits)

    return routing, record(weights, (logits,), vjp)


def dispatch(x: Array, routing: Routing) -> Array:
    """The rows of x [N, D] for each visit, [M, D]. Copied again for the backward pass, not kept."""

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


def scale_rows(x: Array, factor: Array) -> Array:
    """Each row of x [M, D] times its factor [M]. Cheap: recomputed, not kept."""

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


def _weight_grad(
    dy: np.ndarray, x: np.ndarray, offsets: np.ndarray, alpha: float = 1.0
) -> np.ndarray:
    """alpha dy^T x over the rows of each expert: [E, O, I] of dy [M, O] and x [M, I]."""
    dw = empty(len(offsets) - 1, dy.shape[1], x.shape[1], like=dy)
    _core.experts_weight_grad(dy, x, offsets, alpha, dw)
    return dw


def _rows(offsets: np.ndarray) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which these are."""
    bounds = np.asarray(offsets).tolist()
    for expert, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end > begin:
            yield expert, slice(begin, end)


class _Product:
    """What experts make of their rows, and the gradients; see `expert_project`."""

    def __init__(self, projection: Projection, offsets: np.ndarray):
        p = self.p = projection
        self.offsets = offsets
        self.weight, self.bias = (
            core_weight(p.weight),
            None if p.bias is None else f32(p.bias, "bias"),
        )
        self.factor: np.ndarray | None = None
        self.h: np.ndarray | None = None
        if p.lora_a is not None:
            self.a, self.b = f32(p.lora_a, "lora_a"), f32(p.lora_b, "lora_b")
            self.scaled_b = self.b
            if p.m is not None:
                assert p.norm is not None
                self.factor = quotient(f32(p.m, "m"), p.norm)
                self.scaled_b = times(self.b, self.factor, rows=True)

    def _dropped(self, x: np.ndarray) -> np.ndarray:
        """The rows as the adapter sees them."""
        if not self.p.dropout:
            return x
        out = empty(*x.shape, like=x)
        _core.dropout(x, self.p.seed, self.p.dropout, out)
        return out

    def forward(self, x: np.ndarray) -> np.ndarray:
        p, y = self.p, empty(len(x), self.p.weight.shape[1], like=x)
        if p.lora_a is None:
            _core.experts_forward(x, self.weight, self.bias, self.offsets, None, None, 0.0, None, y)
            return y
        self.h = empty(len(x), self.a.shape[1], like=x)
        if p.dropout:
            _core.experts_forward(
                self._dropped(x), self.a, None, self.offsets, None, None, 0.0, None, self.h
            )
            self._forward_given(x, self.bias, self.scaled_b, self.factor, y)
        else:
            rest = (self.a, self.scaled_b, p.scale, self.factor, self.h, y)
            _core.experts_lora_forward(x, self.weight, self.bias, self.offsets, *rest)
        return y

    def _forward_given(
        self, x: Any, bias: Any, b: np.ndarray, factor: np.ndarray | None, y: np.ndarray
    ) -> None:
        _core.experts_forward(
            x, self.weight, bias, self.offsets, self.h, b, self.p.scale, factor, y
        )

    def by_rows(self, dy: np.ndarray, dx: np.ndarray | None, accumulate: int) -> np.ndarray | None:
        """The gradient by the rows, into `dx` if that is wanted; gives the one by h, [M, R]."""
        p, offsets, dh = (
            self.p,
            self.offsets,
            None if self.h is None else empty(*self.h.shape, like=dy),
        )
        if dh is not None and dx is not None and not p.dropout:
            rest = (self.a, self.scaled_b, p.scale, accumulate, self.factor, dh, dx)
            _core.experts_lora_input_grad(dy, self.weight, offsets, *rest)
            return dh
        if dh is not None:
            _core.experts_input_grad(dy, self.scaled_b, offsets, None, None, 0, None, dh)
            _core.scale(p.scale, dh, dh)
        if dx is not None:
            _core.experts_input_grad(
                dy, self.weight, offsets, None, None, accumulate, self.factor, dx
            )
            if dh is not None:
                branch = empty(*dx.shape, like=dx)
                _core.experts_input_grad(dh, self.a, offsets, None, None, 0, None, branch)
                _core.dropout(branch, p.seed, p.dropout, branch)
                _core.axpy(1.0, branch, dx)
        return dh

    def by_weight(self, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
        dw = _weight_grad(dy, x, self.offsets)
        return dw if self.factor is None else times(dw, self.factor, rows=True)

    def by_a(self, dh: np.ndarray | None, x: np.ndarray) -> np.ndarray:
        assert dh is not None
        return _weight_grad(dh, self._dropped(x), self.offsets)

    def by_b(self, dy: np.ndarray) -> np.ndarray:
        assert self.h is not None
        if isinstance(dy, DeviceArray):
            db = _weight_grad(dy, self.h, self.offsets, self.p.scale)
        else:
            # As [E, R, O]: the few rows of h^T stay in registers while dy streams by.
            db = np.ascontiguousarray(
                _weight_grad(self.h, dy, self.offsets, self.p.scale).swapaxes(1, 2)
            )
        return db if self.factor is None else times(db, self.factor, rows=True)

    def by_bias(self, dy: np.ndarray) -> np.ndarray:
        dbias = zeros(len(self.offsets) - 1, dy.shape[1], like=dy)
        for expert, rows in _rows(self.offsets):
            _core.column_sum(dy[rows], dbias[expert])
        return dbias

    def _dots(self, dy: np.ndarray, y: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        """The sums over an expert's rows of dy (y - bias), [E, O]."""
        sums = zeros(len(self.offsets) - 1, dy.shape[1], like=dy)
        for expert, rows in _rows(self.offsets):
            _core.column_dot(
                dy[rows], y[rows], None if bias is None else bias[expert], sums[expert]
            )
        return sums

    def by_m(self, dy: np.ndarray, y: np.ndarray, x: Callable[[], np.ndarray]) -> np.ndarray:
        """The sums over an expert's rows of dy times what the factor multiplies, over the norm."""
        p, factor = self.p, self.factor
        assert p.norm is not None and factor is not None
        slope = quotient(self._dots(dy, y, self.bias), f32(p.m, "m"))
        if not any_small(factor):
            return slope
        slope, norm = np.asarray(slope), np.asarray(p.norm)
        few = (np.abs(np.asarray(factor)) < SMALL_FACTOR) & (norm > 0)
        if few.any():
            whole = empty(*dy.shape, like=dy)
            self._forward_given(x(), None, self.b, None, whole)
            slope[few] = np.asarray(self._dots(dy, whole, None))[few] / norm[few]
        return on_device_of(dy, slope)


def expert_project(x: Array, offsets: np.ndarray, projection: Projection) -> Array:
    """What the experts make of their rows: those [offsets[e], offsets[e + 1]) of x [M, I] are expert e's (int32 [E + 1]); [M, O].

    `projection` as for one layer, each with a leading axis of E experts and the adapter as mlx-lm stores it: weight [E, O, I]
    (float32 or a `WeightStack`), bias, m and norm [E, O], lora_a [E, R, I], lora_b [E, O, R].
    """
    xd = f32(x)
    product, shape = _Product(projection, offsets), xd.shape
    y = product.forward(xd)
    if not recording(*(inputs := (x, *projection.inputs()))):
        return y
    by_m = recording(projection.m)
    kept, output = keep(x), y if by_m else None
    del xd

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        wanted = [grads.wanted(i) for i in range(6)]
        dx, accumulate = gradient_buffer(grads, 0, shape, dy) if wanted[0] else (None, 0)
        dh = product.by_rows(dy, dx, accumulate) if wanted[0] or wanted[3] else None
        if dx is not None:
            grads.put(0, dx)
        if wanted[1]:
            grads.put(1, product.by_weight(dy, f32(kept())))
        if wanted[2]:
            grads.put(2, product.by_bias(dy))
        if wanted[3]:
            grads.put(3, product.by_a(dh, f32(kept())))
        if wanted[4]:
            grads.put(4, product.by_b(dy))
        if wanted[5]:
            assert output is not None
            grads.put(5, product.by_m(dy, output, lambda: f32(kept())))

    return record(y, inputs, vjp, reads_output=by_m)
