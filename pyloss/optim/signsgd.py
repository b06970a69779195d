"""SignSGD of the rows of tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.checks.numbers import real
from pyloss.optim.optimizer import Optimizer
from pyloss.optim.rows import RowGradient
from pyloss.optim.schedules import Schedule
from pyloss.optim.state import empty_like
from pyloss.runtime.device import DeviceArray, on_device_of, to_device


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
            taken, unused = empty_like(values), empty_like(values)
            _core.gather_rows(table, rows, taken)
            _core.scale(0.0, taken, unused)
            # Lion without momentum.
            _core.lion(values, rate, 0.0, 0.0, self.weight_decay, scale, taken, unused)
            _core.put_rows(taken, rows, table)
