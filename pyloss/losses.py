"""The public loss functions: argument checks, reductions, and the kernels of `csrc/kernels/rowloss.tpl.h`."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _core, ops
from .autograd import Gradients, data, record, recording
from .weights import Weight

_REDUCTIONS = ("none", "sum", "mean")


def _row_labels(labels: Any, weights: Any, shape: tuple[int, ...], vocabulary: int, ignore_index: int) -> np.ndarray:
    """Labels as the kernels take them: int32 [N] in [0, V), -1 where ignored.

    A row of weight 0 is ignored as well: it stays out even when its loss is not finite.
    """
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"labels must be integers, not {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"labels have shape {array.shape}, expected one per row of logits: {shape}")
    ignored = array == ignore_index
    outside = ((array < 0) | (array >= vocabulary)) & ~ignored
    if outside.any():
        where = tuple(int(i) for i in np.argwhere(outside)[0])
        shown = where[0] if len(where) == 1 else where
        raise ValueError(
            f"label {array[where]} at position {shown} is outside [0, {vocabulary}) and not ignore_index {ignore_index}"
        )
    if weights is not None:
        if np.shape(weights) != shape:
            raise ValueError(f"weights have shape {np.shape(weights)}, expected one per label: {shape}")
        ignored = ignored | (np.asarray(weights) == 0)
    return np.where(ignored, -1, array).astype(np.int32).reshape(-1)


def _reduced(loss: Any, rows: np.ndarray, shape: tuple[int, ...], weights: Any, reduction: str) -> Any:
    """Per-row losses [N] to the result: weighted, then as `reduction` says; "mean" divides by the counted rows' weights."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, _REDUCTIONS))}, not {reduction!r}")
    dtype = data(loss).dtype
    counted = (rows != -1).astype(dtype)
    if weights is not None:
        counted = np.where(rows == -1, 0, np.asarray(weights, dtype).reshape(-1)).astype(dtype)
        loss = loss * counted
    if reduction == "none":
        return loss.reshape(shape)
    total = loss.sum(dtype=np.float64).astype(dtype) if isinstance(loss, np.ndarray) else loss.sum()
    if reduction == "sum":
        return total
    if not counted.any():
        return total * 0
    return total * dtype.type(1 / max(float(counted.sum(dtype=np.float64)), np.finfo(np.float64).tiny))


def softmax_cross_entropy(
    logits: Any, labels: Any, *, weights: Any = None, ignore_index: int = -100, reduction: str = "none"
) -> Any:
    """-log softmax(logits)[label] along the last axis.

    `logits` [..., V]: float64 is computed in float64, other real types in float32. `labels` integers [...] in [0, V); rows whose
    label is `ignore_index` give 0. `weights` [...] multiplies each row's loss. `reduction` is "none" ([...]), "sum", or "mean"
    over the counted rows' weights. -inf logits are masked vocabulary: probability 0. Raises TypeError and ValueError naming the
    argument; for a label its position and value.
    """
    source = data(logits)
    if source.ndim < 1 or source.shape[-1] < 1:
        raise ValueError(f"logits must be [..., V] with V at least 1, got shape {source.shape}")
    double = source.dtype.newbyteorder("=") == np.float64
    array = np.require(source, np.float64, ["C", "A"]) if double else ops.f32(logits, "logits")
    shape, vocabulary = array.shape[:-1], array.shape[-1]
    rows = _row_labels(labels, weights, shape, vocabulary, ignore_index)
    kernel, kind = (_core.softmax_cross_entropy_f64, "f64") if double else (_core.softmax_cross_entropy_f32, "f32")
    loss = _core.empty((len(rows),), kind)
    kernel(array, rows, None, loss, None)
    result: Any = loss
    if recording(logits):

        def vjp(dy: np.ndarray, grads: Gradients) -> None:
            dx = _core.empty(array.shape, kind)
            kernel(array, rows, np.ascontiguousarray(dy), _core.empty((len(rows),), kind), dx)
            grads.put(0, dx.astype(source.dtype, copy=False))

        result = record(loss, (logits,), vjp)
    return _reduced(result, rows, shape, weights, reduction)


def linear_cross_entropy(
    hidden: Any, weight: Any, labels: Any, *, weights: Any = None, ignore_index: int = -100, reduction: str = "none"
) -> Any:
    """`softmax_cross_entropy(hidden @ weight.T, labels)` without all logits at once.

    `hidden` float32 [..., D]; `weight` [V, D], an array or a stored `Weight`; `labels` [...]. Rows without a label are not
    computed. The other arguments are those of `softmax_cross_entropy`.
    """
    shape = np.shape(data(hidden))[:-1]
    if not isinstance(weight, Weight) and np.ndim(data(weight)) != 2:
        raise ValueError(f"weight must be [V, D], got shape {np.shape(data(weight))}")
    if np.shape(data(hidden))[-1:] != tuple(weight.shape[1:]):
        raise ValueError(f"hidden has shape {np.shape(data(hidden))}, which does not end in weight's {weight.shape[1]}")
    rows = _row_labels(labels, weights, shape, weight.shape[0], ignore_index)
    return _reduced(ops.head_cross_entropy(hidden, weight, rows), rows, shape, weights, reduction)
