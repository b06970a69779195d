"""Losses of hidden states under an output head, fused: the logits exist a few rows at a time, and so do their gradients.

The losses are those of `losses.py`; here are the walk over the rows and what of it is matrix products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _core, device, ops
from .autograd import data
from .row_losses import is_bfloat16
from .weights import Weight

# Head and loss go through the rows in about this many bytes of logits, but not in fewer rows than FEW_ROWS while these take no
# more than MOST_BYTES: each part of the rows reads and packs the whole head.
LOGITS_BYTES = 40 << 20
FEW_ROWS = 126
MOST_BYTES = 160 << 20
TILE_ROWS = 42  # what the widest tiles of the matrix product divide
FILTERED_COLUMNS = 2048  # classes that are gathered at once where the gradient is filtered


class Head(NamedTuple):
    """Hidden states [..., D] and the weight [V, D] that makes logits of them, as given and as computed with."""

    hidden: Any
    weight: Any
    rows: np.ndarray  # float32 [N, D]
    stored: Any  # a stored matrix, or a float32 array

    @property
    def vocabulary(self) -> int:
        return int(self.stored.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(np.shape(data(self.hidden)))

    def inputs(self) -> tuple[Any, Any]:
        """What the tape sees: stored matrices are never trained."""
        return self.hidden, ops.frozen(self.weight)


def head(hidden: Any, weight: Any, suffix: str = "") -> Head:
    """Checks hidden states and weight; float16 and bfloat16 weights are read as they are. `suffix` ends the names in errors."""
    source = data(hidden)
    stored = weight
    if not isinstance(weight, Weight):
        array = device.on_host(data(weight), f"weight{suffix}")
        if array.ndim != 2 or not array.size:
            raise ValueError(f"weight{suffix} must be [V, D] with V and D at least 1, got shape {array.shape}")
        if (array.dtype == np.float16 or is_bfloat16(array.dtype)) and array.dtype.isnative:
            raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
            stored = Weight(raw, "f16" if array.dtype == np.float16 else "bf16", array.shape)
        else:
            stored = ops.f32(weight, f"weight{suffix}")
    if source.shape[-1:] != tuple(stored.shape[1:]):
        raise ValueError(f"hidden{suffix} has shape {source.shape}, which does not end in weight{suffix}'s {stored.shape[1]}")
    rows = ops.f32(hidden, f"hidden{suffix}").reshape(-1, stored.shape[1])
    return Head(hidden, weight, rows, stored)


def rows_at_once(row_bytes: int, logits_bytes: int | None = None) -> int:
    """The most rows whose logits are held together, for so many bytes of logits a row; None: LOGITS_BYTES of them."""
    return max((logits_bytes or LOGITS_BYTES) // row_bytes, min(FEW_ROWS, MOST_BYTES // row_bytes), 16)


def _parts(total: int, row_bytes: int, logits_bytes: int | None = None) -> list[slice]:
    """Rows in even parts of bounded size: a short last one would pack the whole head for few rows."""
    most = rows_at_once(row_bytes, logits_bytes)
    count = -(-total // most)
    whole = -(-total // max(count, 1) // TILE_ROWS) * TILE_ROWS
    if whole <= most and 2 * (total - (count - 1) * whole) >= whole:
        bounds = [min(i * whole, total) for i in range(count + 1)]
    else:
        bounds = [i * total // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def fused(
    heads: Sequence[Head],
    counted: np.ndarray | None,
    gradient_filter: float,
    kernel: Callable[[slice, Sequence[np.ndarray], np.ndarray | None, np.ndarray, Sequence[np.ndarray | None]], None],
    logits_bytes: int | None = None,
) -> Callable:
    """`row_losses.Call`'s run for a loss of the logits of `heads`.

    `kernel(part, logits, dloss, loss, dlogits)` is the loss of some of the counted rows; dlogits[i] is logits[i]'s own buffer,
    or None. `counted` int32 [M] are the rows to compute, None for all; the others give 0. Classes for which no row of a part has
    a gradient above `gradient_filter` (of its own loss by its logits) are left out of the products with it.
    """
    total = len(heads[0].rows) if counted is None else len(counted)
    parts = _parts(total, 4 * sum(h.vocabulary for h in heads), logits_bytes)

    def run(dloss: np.ndarray | None, wanted: Sequence[bool], loss: np.ndarray) -> list[np.ndarray | None]:
        wanted = wanted or (False, False) * len(heads)
        rows, values, factors = [h.rows for h in heads], loss.reshape(-1), None if dloss is None else dloss.reshape(-1)
        if counted is not None:
            rows, values = [_gathered(r, counted) for r in rows], ops.empty(total)
            factors = None if factors is None else np.ascontiguousarray(factors[counted])
        slots = [(wanted[2 * i], wanted[2 * i + 1]) for i in range(len(heads))]
        dx = [ops.empty(*r.shape) if w[0] else None for r, w in zip(rows, slots, strict=True)]
        dw = [ops.empty(*h.stored.shape) if w[1] else None for h, w in zip(heads, slots, strict=True)]
        for into in dw:
            if into is not None and (gradient_filter or not parts):
                into[...] = 0  # else the first part writes all of it
        buffers = [ops.empty(max(p.stop - p.start for p in parts), h.vocabulary) for h in heads if parts]
        for part in parts:
            logits = [b[: part.stop - part.start] for b in buffers]
            for h, r, out in zip(heads, rows, logits, strict=True):
                _core.linear_forward(r[part], ops.matrix(h.stored), None, None, None, 0.0, None, out)
            slopes = [out if any(w) else None for out, w in zip(logits, slots, strict=True)]
            scale = None if factors is None else factors[part]
            kernel(part, logits, scale, values[part], slopes)
            for h, r, slope, to, into in zip(heads, rows, slopes, dx, dw, strict=True):
                if slope is not None:
                    classes = _classes(slope, scale, gradient_filter)
                    add = part.start > 0 or gradient_filter > 0
                    _products(h, slope, r[part], classes, None if to is None else to[part], into, add)
        if counted is not None:
            loss.reshape(-1)[...] = _spread(values, counted, loss.size)
        found: list[np.ndarray | None] = []
        for h, to, into in zip(heads, dx, dw, strict=True):
            full = None if to is None else to if counted is None else _spread(to, counted, len(h.rows))
            found += [None if full is None else full.reshape(h.shape), into]
        return found

    return run


def _classes(slopes: np.ndarray, scale: np.ndarray | None, gradient_filter: float) -> np.ndarray | None:
    """int32 [M]: the classes for which a row's gradient is above the filter or NaN; None for all, as soon as half of them are."""
    if not gradient_filter:
        return None
    bounds = np.full(len(slopes), gradient_filter, np.float32)
    above = np.empty(slopes.shape[1], np.uint8)
    _core.columns_above(slopes, bounds if scale is None else bounds * np.abs(scale), above)
    classes = np.flatnonzero(above).astype(np.int32)
    return classes if 2 * len(classes) < len(above) else None


def _products(
    head: Head,
    slopes: np.ndarray,
    rows: np.ndarray,
    classes: np.ndarray | None,
    dx: np.ndarray | None,
    dw: np.ndarray | None,
    add: bool,
) -> None:
    """dx [N, D] = slopes weight and dw [V, D] (+)= slopes^T rows, over some of the classes, of slopes [N, V]."""
    weight = ops.matrix(head.stored)
    if classes is None:
        if dx is not None:
            _core.linear_input_grad(slopes, weight, None, None, 0, None, dx)
        if dw is not None:
            _core.matmul_tn(slopes, rows, 1.0, int(add), dw)
        return
    if dx is not None and not len(classes):
        dx[...] = 0
    for begin in range(0, len(classes), FILTERED_COLUMNS):
        some = classes[begin : begin + FILTERED_COLUMNS]
        gathered, vectors = ops.empty(len(rows), len(some)), ops.empty(len(some), rows.shape[1])
        _core.gather_columns(slopes, some, gathered)
        if dx is not None:
            _core.embedding_forward(some, weight, vectors)
            _core.matmul_nn(gathered, vectors, 1.0, int(begin > 0), dx)
        if dw is not None:
            _core.matmul_tn(gathered, rows, 1.0, 0, vectors)
            _core.embedding_grad(vectors, some, dw)


def _gathered(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    out = ops.empty(len(counted), values.shape[1])
    _core.gather_rows(values, counted, out)
    return out


def _spread(values: np.ndarray, counted: np.ndarray, total: int) -> np.ndarray:
    """Rows [M, ...] to where they were among `total`; the others are 0."""
    out, width = ops.empty(total, *values.shape[1:]), math.prod(values.shape[1:])
    _core.scatter_add_rows(values.reshape(len(counted), width), counted, out.reshape(total, width))
    return out
