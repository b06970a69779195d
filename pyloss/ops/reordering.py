"""Rows and columns in another order, for matrices that store their columns so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import Gradients, keep, record, recording
from pyloss.ops.arrays import Array, empty, f32, index


def reorder_columns(x: Array, order: np.ndarray, inverse: np.ndarray) -> Array:
    """Columns `order` of x [..., D], an int32 permutation; copied again for the backward pass."""
    shape = tuple(x.shape)

    def chosen(source: Any, columns: Any) -> Any:
        rows = source.reshape(-1, shape[-1])
        y = empty(*rows.shape, like=source)
        _core.gather_columns(rows, index(columns, "columns", source), y)
        return y.reshape(shape)

    return _reordered(x, order, inverse, chosen)


def reorder_rows(x: Array, order: np.ndarray, inverse: np.ndarray) -> Array:
    """Rows `order` of a matrix x, otherwise as `reorder_columns`."""

    def chosen(source: Any, rows: Any) -> Any:
        y = empty(*source.shape, like=source)
        _core.gather_rows(source, index(rows, "rows", source), y)
        return y

    return _reordered(x, order, inverse, chosen)


def _reordered(
    x: Array, order: np.ndarray, inverse: np.ndarray, chosen: Callable[[Any, Any], Any]
) -> Array:
    y = chosen(f32(x), order)
    if not recording(x):
        return y
    kept = keep(x)

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        grads.put(0, chosen(f32(dy), inverse))

    return record(y, (x,), vjp, lambda: chosen(f32(kept()), order))
