"""Short convolutions along packed sequences, for training and for generation."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import Gradients, lazy_output, nodes_of, record_on
from pyloss.ops import wide
from pyloss.ops.arrays import Array, empty, f32, f32_matrix, index


@wide.in_float64(wide.short_conv, 3)
def short_conv(x: Array, weight: Array, bias: Array | None, offsets: np.ndarray) -> Array:
    """Gated short convolutions along packed sequences, as in LFM2; [N, D].

    x [N, 3 * D] has three parts b, c and v in each row. The result is c * conv(b * v), where conv
    is causal, for each column by itself: with weight [D, 1, K], row n is the sum over t of
    weight[:, 0, t] times row n - K + 1 + t, and bias [D] or None. int32 `offsets` [S + 1] bounds
    the sequences; rows before the first one of a sequence count as 0. Cheap: recomputed, not kept.
    """
    return _convolved(x, weight, bias, offsets, 3)


@wide.in_float64(wide.conv_silu, 3)
def conv_silu(x: Array, weight: Array, bias: Array | None, offsets: np.ndarray) -> Array:
    """silu(conv(x)) of x [N, D], as in Qwen3.5; otherwise as `short_conv`."""
    return _convolved(x, weight, bias, offsets, 1)


def _convolved(x: Array, weight: Array, bias: Array | None, offsets: Any, parts: int) -> Array:
    xd, w, b = _conv_arguments(x, weight, bias, parts)
    offsets = index(offsets, "offsets", xd)
    forward, grad = (
        (_core.short_conv_forward, _core.short_conv_grad)
        if parts == 3
        else (_core.conv_silu_forward, _core.conv_silu_grad)
    )

    def recompute() -> np.ndarray:
        y = empty(len(xd), len(w), like=xd)
        forward(xd, w, b, offsets, y)
        return y

    nodes = nodes_of(x, weight, bias)
    if nodes is None:
        return recompute()

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx = empty(*xd.shape, like=xd)
        dw = empty(*w.shape, like=w) if grads.wanted(1) else None
        db = empty(len(w), like=w) if grads.wanted(2) else None
        grad(dy, xd, w, b, offsets, dx, dw, db)
        grads.put(0, dx.reshape(len(dx), parts * len(w)))
        if dw is not None:
            grads.put(1, dw)
        if db is not None:
            grads.put(2, db)

    return record_on(nodes, lazy_output((len(xd), len(w)), recompute), vjp, recompute)


def short_conv_step(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    offsets: np.ndarray,
    store: np.ndarray,
    rows: np.ndarray,
    bounds: np.ndarray,
) -> np.ndarray:
    """`short_conv` of rows that continue sequences, without a gradient.

    The products b * v of all rows are kept in `store` [M, D], where int32 `bounds` has the begin
    and end of each sequence, its new rows included; those are `rows`, int32 [N].
    """
    xd, w, b = _conv_arguments(x, weight, bias, 3)
    y = empty(len(xd), len(w), like=xd)
    _core.short_conv_step(xd, w, b, offsets, bounds, rows, store, y)
    return y


def conv_silu_step(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    offsets: np.ndarray,
    store: np.ndarray,
    rows: np.ndarray,
    bounds: np.ndarray,
) -> np.ndarray:
    """`conv_silu` of rows that continue sequences, as `short_conv_step`; x itself is kept."""
    xd, w, b = _conv_arguments(x, weight, bias, 1)
    y = empty(len(xd), len(w), like=xd)
    _core.conv_silu_step(xd, w, b, offsets, bounds, rows, store, y)
    return y


def _conv_arguments(
    x: Array, weight: Array, bias: Array | None, parts: int
) -> tuple[Any, Any, Any]:
    xd, w = f32_matrix(x), f32(weight, "weight")
    if w.ndim != 3 or w.shape[1] != 1 or xd.shape[1] != parts * len(w):
        columns = "three times the columns" if parts == 3 else "as many columns"
        raise ValueError(
            f"a weight of shape {tuple(w.shape)} does not fit x of shape {tuple(xd.shape)}: "
            f"[columns, 1, taps] goes with {columns}"
        )
    by_part = xd.reshape(len(xd), 3, len(w)) if parts == 3 else xd
    return by_part, w, None if bias is None else f32(bias, "bias")
