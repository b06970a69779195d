"""Gradients of some rows of a table, and the optimizer that updates these rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.checks.arrays import as_array
from pyloss.checks.numbers import real
from pyloss.optim.optimizer import Optimizer
from pyloss.optim.schedules import Schedule
from pyloss.optim.state import float32
from pyloss.runtime.device import DeviceArray, on_device_of, to_device


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

    def __repr__(self) -> str:
        return f"RowGradient(rows={self.rows.size}, dims={self.values.shape[-1]})"


class SparseSignSGD(Optimizer):
    """SignSGD of the rows of tables that a batch took; no other row is read or changed.

        p[row] -= lr wd p[row]
        p[row] -= lr sign(g[row])

    HRM and TRM train their puzzle embeddings so (CastedSparseEmbeddingSignSGD). A gradient is a
    `RowGradient`, whose repeated rows are summed before the sign. It may also be an array
    of the whole table; the rows are then those that are not 0 throughout, and a row
    whose gradient is 0 does not decay. `RowGradient.taken(array, rows)` names them.
    """

    def __init__(
        self,
        learning_rate: float | Schedule,
        weight_decay: float = 0.01,
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(learning_rate)
        self.weight_decay = real(weight_decay, "weight_decay", 0)
        self.groups = groups

    def _check(self, name: str, parameter: Any) -> None:
        super()._check(name, parameter)
        if parameter.ndim != 2:
            raise ValueError(
                f"SparseSignSGD updates rows of tables, and {name!r} has shape {parameter.shape}; "
                "MultiOptimizer gives it another optimizer"
            )

    def _gradient(self, name: str, grad: Any, parameter: Any) -> RowGradient:
        if not isinstance(grad, RowGradient):
            array = super()._gradient(name, grad, parameter)
            return RowGradient.taken(array, np.flatnonzero(np.asarray(array).any(axis=1)))
        rows, columns = parameter.shape
        if grad.values.shape[-1] != columns or (grad.rows.size and grad.rows[-1] >= rows):
            raise ValueError(
                f"the gradient of {name!r} has {grad.values.shape[-1]} columns and rows up to "
                f"{grad.rows[-1] if grad.rows.size else 0}; the parameter has {parameter.shape}"
            )
        return grad

    def _apply(
        self,
        grads: list[Any],
        parameters: list[Any],
        slots: list[list[Any]],
        rate: float,
        scale: float,
        first: bool,
    ) -> None:
        for grad, table in zip(grads, parameters, strict=True):
            if not grad.rows.size:
                continue
            rows = on_device_of(table, grad.rows)
            values = (
                to_device(grad.values, table)
                if isinstance(table, DeviceArray)
                else np.asarray(grad.values)
            )
            before = on_device_of(table, np.empty(values.shape, np.float32))
            _core.embedding_forward(rows, table, before)
            after = before.copy()
            unused = on_device_of(table, np.zeros(values.shape, np.float32))
            # Lion without momentum.
            _core.lion(values, rate, 0.0, 0.0, self.weight_decay, scale, after, unused)
            if isinstance(table, DeviceArray):
                _core.axpy(-1.0, before, after)
                _core.embedding_grad(after, rows, table)
            else:
                table[grad.rows] = after
