"""Losses of hidden states under an output head, fused: the logits exist a few rows at a time, and so do their gradients.

The losses are those of `losses.py`; here are the walk over the rows and what of it is matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _core, device, ops
from .autograd import data
from .row_losses import is_bfloat16
from .weights import Weight

# Head and loss go through the rows in about this many bytes of logits.
LOGITS_BYTES = 66 << 20


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


def _parts(total: int, row_bytes: int) -> Iterator[slice]:
    """Rows in even parts of bounded size: a short last one would pack the whole head for few rows."""
    most = max(LOGITS_BYTES // row_bytes // 16 * 16, 16)
    parts = max(-(-total // most), 1)
    n = max(min(-(-total // parts) + 15, most), 16) // 16 * 16
    for begin in range(0, total, n):
        yield slice(begin, min(begin + n, total))


def fused(
    heads: Sequence[Head],
    counted: np.ndarray | None,
    kernel: Callable[[slice, Sequence[np.ndarray], np.ndarray | None, np.ndarray, Sequence[np.ndarray | None]], None],
) -> Callable:
    """`row_losses.Call`'s run for a loss of the logits of `heads`.

    `kernel(part, logits, dloss, loss, dlogits)` is the loss of some of the counted rows; dlogits[i] is logits[i]'s own buffer,
    or None. `counted` int32 [M] are the rows to compute, None for all; the others give 0.
    """
    total = len(heads[0].rows) if counted is None else len(counted)

    def run(dloss: np.ndarray | None, wanted: Sequence[bool], loss: np.ndarray) -> list[np.ndarray | None]:
        wanted = wanted or (False, False) * len(heads)
        rows, values, factors = [h.rows for h in heads], loss.reshape(-1), None if dloss is None else dloss.reshape(-1)
        if counted is not None:
            rows, values = [_gathered(r, counted) for r in rows], ops.empty(total)
            factors = None if factors is None else np.ascontiguousarray(factors[counted])
        slots = [(wanted[2 * i], wanted[2 * i + 1]) for i in range(len(heads))]
        dx = [ops.empty(*r.shape) if w[0] else None for r, w in zip(rows, slots, strict=True)]
        dw = [np.zeros(h.stored.shape, np.float32) if w[1] else None for h, w in zip(heads, slots, strict=True)]
        buffers: list[np.ndarray] = []
        for part in _parts(total, 4 * sum(h.vocabulary for h in heads)):
            n = part.stop - part.start
            buffers = buffers or [ops.empty(n, h.vocabulary) for h in heads]
            logits = [b[:n] for b in buffers]
            for h, r, out in zip(heads, rows, logits, strict=True):
                _core.linear_forward(r[part], ops.matrix(h.stored), None, None, None, 0.0, out)
            slopes = [out if any(w) else None for out, w in zip(logits, slots, strict=True)]
            kernel(part, logits, None if factors is None else factors[part], values[part], slopes)
            for i, h in enumerate(heads):
                to, into = dx[i], dw[i]
                if to is not None:
                    _core.linear_input_grad(logits[i], ops.matrix(h.stored), None, None, 0, to[part])
                if into is not None:
                    _core.matmul_tn(logits[i], rows[i][part], 1.0, 1, into)
        if counted is not None:
            loss.reshape(-1)[...] = _spread(values, counted, loss.size)
        found: list[np.ndarray | None] = []
        for h, to, into in zip(heads, dx, dw, strict=True):
            full = None if to is None else to if counted is None else _spread(to, counted, len(h.rows))
            found += [None if full is None else full.reshape(h.shape), into]
        return found

    return run


def _gathered(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    out = ops.empty(len(counted), values.shape[1])
    _core.gather_rows(values, counted, out)
    return out


def _spread(values: np.ndarray, counted: np.ndarray, total: int) -> np.ndarray:
    """Rows [M, ...] to where they were among `total`; the others are 0."""
    out, width = ops.empty(total, *values.shape[1:]), math.prod(values.shape[1:])
    _core.scatter_add_rows(values.reshape(len(counted), width), counted, out.reshape(total, width))
    return out
