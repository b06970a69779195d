"""Rows of a table by their numbers, also of one with an adapter, and their gradients.

`layers.py` says what operations take and return.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import (
    Gradients,
    nodes_of,
    record_on,
)
from pyloss.checks.numbers import real
from pyloss.ops import wide
from pyloss.ops.arrays import (
    Array,
    core_table,
    empty,
    f32,
    f32_matrix,
    first_array,
    i32,
    trainable,
    zeros,
)
from pyloss.ops.projection import (
    quotient,
)
from pyloss.runtime.device import on_device_of
from pyloss.weights.weight import Weight


@wide.in_float64(wide.embedding, 2)
def embedding(ids: Any, weight: Array | Weight) -> Array:
    """Rows `ids` [...] (integers in [0, V)) of weight [V, D]: [..., D]."""
    w, shape = core_table(weight)
    found = on_device_of(first_array(w), i32(ids))
    y = empty(*found.shape, shape[1], like=found)
    _core.embedding_forward(found, w, y)
    nodes = nodes_of(trainable(weight))
    if nodes is None:
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        grads.put(0, _scattered(dy, found, shape))

    return record_on(nodes, y, vjp)


def adapted_embedding(
    ids: Any,
    weight: Array | Weight,
    lora_a: Array,
    lora_b: Array,
    scale: float,
    dropout: float = 0.0,
    seed: int = 0,
    m: Array | None = None,
) -> Array:
    """Rows of an adapted table: W[ids] + scale dropout(A[ids] B), [..., D].

    `ids` integers [...], weight W [V, D], A [V, R], B [R, D]. `dropout` in [0, 1); `seed`
    determines its mask. With m [V], each row is scaled by m[ids] over its norm without dropout, a
    constant to the gradient; rows of norm 0 stay 0 (DoRA, Liu et al., arXiv:2402.09353).
    """
    (w, shape), ad, bd = (
        core_table(weight),
        f32_matrix(lora_a, "lora_a"),
        f32_matrix(lora_b, "lora_b"),
    )
    if ad.shape != (shape[0], ad.shape[1]) or bd.shape != (ad.shape[1], shape[1]):
        raise ValueError(
            f"lora_a {ad.shape} and lora_b {bd.shape} do not fit a weight of shape {tuple(shape)}"
        )
    scale, dropout = real(scale, "scale"), real(dropout, "dropout", 0, below=1)
    found = on_device_of(ad, i32(ids))
    rows, flat = found.reshape(-1), (found.size, shape[1])
    h, sums = empty(len(rows), ad.shape[1], like=ad), empty(*flat, like=ad)
    _core.embedding_forward(rows, ad, h)
    _core.embedding_forward(rows, w, sums)
    norm = None if m is None else empty(len(rows), like=ad)
    if dropout:
        branch = empty(*flat, like=ad)
        _core.matmul_nn(h, bd, scale, 0, branch)
        if norm is not None:
            whole = empty(*flat, like=ad)
            _core.add(sums, branch, whole)
            _core.row_norms(whole, norm)
        _core.dropout(branch, seed, dropout, branch)
        _core.axpy(1.0, branch, sums)
    else:
        _core.matmul_nn(h, bd, scale, 1, sums)
        if norm is not None:
            _core.row_norms(sums, norm)
    y, factor = sums, None
    if norm is not None:
        lengths, y = empty(len(rows), 1, like=ad), empty(*flat, like=ad)
        _core.embedding_forward(rows, f32(m, "m").reshape(-1, 1), lengths)
        factor = quotient(lengths.reshape(-1), norm)
        _core.scale_rows(sums, factor, y)
    inputs = (trainable(weight), lora_a, lora_b, m)
    nodes = nodes_of(*inputs)
    if nodes is None:
        return y.reshape(*found.shape, flat[1])

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dy = dy.reshape(flat)
        if factor is not None:
            scaled, dots = empty(*flat, like=dy), empty(len(rows), like=dy)
            _core.scale_rows_grad(dy, sums, factor, scaled, dots)
            if grads.wanted(3):
                slope = quotient(dots, norm)
                grads.put(3, _scattered(slope.reshape(-1, 1), rows, (shape[0], 1)).reshape(-1))
            dy = scaled
        if grads.wanted(0):
            grads.put(0, _scattered(dy, rows, shape))
        if dropout and (grads.wanted(1) or grads.wanted(2)):
            dropped = empty(*flat, like=dy)
            _core.dropout(dy, seed, dropout, dropped)
            dy = dropped
        if grads.wanted(1):
            dh = empty(*h.shape, like=h)
            _core.matmul_nt(dy, bd, scale, 0, dh)
            grads.put(1, _scattered(dh, rows, ad.shape))
        if grads.wanted(2):
            db = empty(*bd.shape, like=bd)
            _core.matmul_tn(h, dy, scale, 0, db)
            grads.put(2, db)

    return record_on(nodes, y.reshape(*found.shape, flat[1]), vjp)


def _scattered(dy: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient [V, D] of a table whose `rows` got dy [N, D]."""
    found = zeros(*shape, like=dy)
    _core.embedding_grad(dy, rows, found)
    return found
