"""Products with quantized matrices whose scales are trained, see `pyloss.weights.scales`.

Forward and input gradients are those of stored matrices: kernels expand them a panel at a time. The
matrix's own gradient exists a few rows at a time, and is summed by blocks at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import Gradients, data, keep, nodes_of, record_on
from pyloss.ops.arrays import Array, empty, f32, gradient_buffer, i32
from pyloss.ops.product_kernels import Dense
from pyloss.weights.scales import Scales

_DENSE = Dense()
#: Values of a matrix's gradient that exist at once.
_AT_ONCE = 1 << 23


def scaled_linear(x: Array, scales: Scales, change: Array, bias: Any = None) -> Array:
    """x [..., I] with a matrix W [O, I] of changed scales: x W^T + bias, [..., O].

    `change` is float32, `scales.shape`. The rounding of the changed scales to the format's type has
    the gradient 1. `bias` gets no gradient.
    """
    weight, source = scales.weight_of(f32(change, "change")), f32(x)
    shape, (outputs, inputs) = source.shape, weight.shape
    flat = (math.prod(shape[:-1]), inputs)
    y = empty(*shape[:-1], outputs)
    bias = None if bias is None else f32(data(bias), "bias")
    rows = source.reshape(flat)
    _DENSE.forward(rows, weight.handle, bias, None, None, 0.0, None, y.reshape(-1, outputs))
    nodes = nodes_of(x, change)
    if nodes is None:
        return y
    kept = keep(x)

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dy = np.ascontiguousarray(dy.reshape(-1, outputs))
        if grads.wanted(0):
            dx, accumulate = gradient_buffer(grads, 0, shape)
            _DENSE.input_grad(dy, weight.handle, accumulate, None, dx.reshape(flat))
            grads.put(0, dx)
        if grads.wanted(1):
            rows = f32(kept()).reshape(flat)
            found = np.empty(scales.shape, np.float32)
            step = max(1, _AT_ONCE // inputs)
            for begin in range(0, outputs, step):
                part = np.ascontiguousarray(dy[:, begin : begin + step])
                dw = _DENSE.weight_grad(part, rows, None)
                found[:, begin : begin + step] = scales.by_change(dw, begin)
            grads.put(1, found)

    return record_on(nodes, y, vjp)


def scaled_rows(ids: Any, scales: Scales, change: Array) -> Array:
    """Rows `ids` [...] of a matrix of changed scales, [..., I]; see `scaled_linear`."""
    found = i32(ids)
    weight, rows = scales.weight_of(f32(change, "change")), found.reshape(-1)
    y = empty(*found.shape, weight.shape[1])
    _core.embedding_forward(rows, weight.handle, y.reshape(len(rows), -1))
    nodes = nodes_of(change)
    if nodes is None:
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        gradient = scales.by_change_of_rows(dy.reshape(len(rows), -1), rows)
        total = np.zeros(scales.shape, np.float32)
        for whole, part in zip(total, gradient, strict=True):
            _core.embedding_grad(np.ascontiguousarray(part), rows, whole)
        grads.put(0, total)

    return record_on(nodes, y, vjp)


def scaled_matrix(scales: Scales, change: Array) -> Array:
    """The whole matrix of changed scales, float32 [O, I]; see `scaled_linear`.

    For operations that take a float matrix, such as the losses under a head.
    """
    weight = scales.weight_of(f32(change, "change"))
    y = scales.values(weight, np.arange(weight.shape[0], dtype=np.int32))
    nodes = nodes_of(change)
    if nodes is None:
        return y
    return record_on(nodes, y, lambda dy, grads: grads.put(0, scales.by_change(dy)))


def scaled_stack(scales: Sequence[Scales], change: Array) -> Array:
    """The matrices of E experts with changed scales, float32 [E, O, I].

    `change` is [E, *scales[0].shape].
    """
    changes = f32(change, "change")
    y = np.stack([scaled_matrix(each, part) for each, part in zip(scales, changes, strict=True)])
    nodes = nodes_of(change)
    if nodes is None:
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        found = [each.by_change(part) for each, part in zip(scales, dy, strict=True)]
        grads.put(0, np.stack(found))

    return record_on(nodes, y, vjp)
