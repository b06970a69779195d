"""Gradients of some rows of a table."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.checks.arrays import as_array
from pyloss.optim.state import float32
from pyloss.runtime.device import DeviceArray, on_device_of


class RowGradient:
    """The gradient of some rows of a table [V, D].

    Args:
        rows: integers [...], the rows that a batch took; one may occur several times.
        values: floats [..., D], the gradient of each of these occurrences.

    Attributes:
        rows: int32 [U], each row once, in ascending order.
        values: float32 [U, D], the sums over the occurrences.
    """

    def __init__(self, rows: Any, values: Any) -> None:
        rows = as_array(rows, "rows")
        if rows.dtype.kind not in "iu":
            raise TypeError(f"rows is an array of {rows.dtype}; it must be of integers")
        there = isinstance(values, DeviceArray)
        array = float32(values if there else as_array(values, "values"))
        if array.ndim < 1 or tuple(array.shape[:-1]) != rows.shape:
            raise ValueError(
                f"values has shape {tuple(array.shape)}; for rows of shape {rows.shape} it must be "
                f"{(*rows.shape, 'D')}".replace("'D'", "D")
            )
        unique, inverse = np.unique(rows.reshape(-1), return_inverse=True)
        if unique.size and (unique[0] < 0 or unique[-1] >= 2**31):
            raise ValueError(
                f"rows has {unique[0] if unique[0] < 0 else unique[-1]}; "
                "rows are counted from 0, up to 2^31 - 1"
            )
        self.rows = unique.astype(np.int32)
        sums = on_device_of(array, np.zeros((unique.size, array.shape[-1]), np.float32))
        if unique.size:
            flat = array.reshape(-1, array.shape[-1])
            places = inverse.reshape(-1).astype(np.int32)
            _core.embedding_grad(flat, on_device_of(array, places), sums)
        self.values = sums

    @classmethod
    def taken(cls, gradient: Any, rows: Any) -> RowGradient:
        """The rows `rows`, which may repeat, of the gradient of a whole table [V, D].

        The gradient of a row is its sum over a batch already, so that a repeated row counts once.
        """
        whole = gradient if isinstance(gradient, DeviceArray) else as_array(gradient, "gradient")
        if whole.ndim != 2:
            raise ValueError(f"the gradient has shape {whole.shape}; a table's is [V, D]")
        unique = np.unique(as_array(rows, "rows"))
        if (
            unique.size
            and unique.dtype.kind in "iu"
            and not 0 <= unique[0] <= unique[-1] < len(whole)
        ):
            raise ValueError(
                f"rows has numbers from {unique[0]} to {unique[-1]}; "
                f"the table has {len(whole)} rows"
            )
        return cls(unique, np.asarray(whole)[unique])

    def __mul__(self, factor: Any) -> RowGradient:
        product = copy.copy(self)
        product.values = on_device_of(self.values, np.asarray(self.values) * np.float32(factor))
        return product

    def __repr__(self) -> str:
        return f"RowGradient(rows={self.rows.size}, dims={self.values.shape[-1]})"
