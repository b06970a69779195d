"""Adafactor: a second moment of rows and columns, so that its state is small."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.checks.numbers import real, shown
from pyloss.optim.clipping import grad_norm
from pyloss.optim.optimizer import Optimizer
from pyloss.optim.schedules import Schedule
from pyloss.optim.state import empty_like
from pyloss.runtime.device import on_device_of

FLOAT32_EPS = float(np.finfo(np.float32).eps)


#: float32's smallest normal number
SMALLEST = float(np.finfo(np.float32).tiny)


def _rms(array: Any) -> float:
    return grad_norm({"": array}) / math.sqrt(max(array.size, 1))


class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern, arXiv:1804.04235), as torch computes it.

    For a matrix g, with the share w = t^beta2_decay of update t:

        row = (1 - w) row + w mean of g^2 along rows;  col likewise along columns
        v = max(row col^T / max(mean(row), eps1), eps1^2)
        u = g / sqrt(v)
        p -= lr wd p
        p -= rho max(eps2, rms(p)) / max(1, rms(u) / d) u, with rho = min(lr, 1 / sqrt(t))

    A vector's v is a mean of g^2 of its own size. Of arrays with more axes the last two count as
    rows and columns. `eps` is (eps1, eps2); eps1 None is float32's epsilon. `relative_step=False`
    makes rho the learning rate, `scale_parameter=False` leaves out the size of p: together they are
    the fixed rates that transformers' Adafactor has with the same settings.

    The core computes it, by four walks over a gradient.
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1e-2,
        beta2_decay: float = -0.8,
        eps: Sequence[float | None] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(learning_rate)
        self.beta2_decay = real(beta2_decay, "beta2_decay", high=0)
        if isinstance(eps, str) or not isinstance(eps, Sequence) or len(eps) != 2:
            raise ValueError(f"eps is {shown(eps)}; it must be two numbers, or None and a number")
        first = None if eps[0] is None else real(eps[0], "eps[0]", 0)
        self.eps = (first, real(eps[1], "eps[1]", 0))
        self.d = real(d, "d", 1)
        self.weight_decay = real(weight_decay, "weight_decay", 0)
        self.scale_parameter, self.relative_step = bool(scale_parameter), bool(relative_step)
        self.groups = groups

    def _slot_sets(self) -> tuple[tuple[str, ...], ...]:
        return (("row", "col"), ("variance",))

    def _sizes(self, parameter: Any) -> dict[str, int]:
        if parameter.ndim < 2:
            return {"variance": parameter.size}
        *others, rows, columns = parameter.shape
        matrices = math.prod(others)
        return {"row": matrices * rows, "col": matrices * columns}

    def _apply(
        self,
        grads: list[Any],
        parameters: list[Any],
        slots: list[list[Any]],
        rate: float,
        scale: float,
        first: bool,
    ) -> None:
        for grad, parameter, *kept in zip(grads, parameters, *slots, strict=True):
            self._update_one(grad, parameter, kept, rate, scale)

    def _update_one(
        self, grad: Any, parameter: Any, kept: list[Any], rate: float, scale: float
    ) -> None:
        if not parameter.size:
            return
        floor = max(FLOAT32_EPS if self.eps[0] is None else self.eps[0], SMALLEST)
        rho = min(rate, self.step**-0.5) if self.relative_step else rate
        alpha = max(self.eps[1], _rms(parameter)) * rho if self.scale_parameter else rho
        # A vector is a matrix of one row.
        rows, columns = parameter.shape[-2:] if parameter.ndim > 1 else (1, parameter.size)
        g = grad.reshape(-1, rows, columns)
        u = empty_like(g)
        for index in range(len(g)):
            row, col = self._moved(g[index], kept, index, scale)
            row = row / max(float(row.mean()), floor) if parameter.ndim > 1 else row
            factors = (on_device_of(g, np.float32(factor)) for factor in (row, col))
            _core.adafactor_update(g[index], *factors, scale, max(floor**2, SMALLEST), u[index])
        step = alpha / max(1.0, _rms(u) / self.d)
        # SGD's update: p -= rate weight_decay p + step u.
        _core.sgd(u, 1.0, 0.0, 0.0, rate * self.weight_decay, 0, step, parameter, None)

    def _moved(
        self, g: Any, kept: list[Any], index: int, scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Moves the kept means of matrix `index` towards those of g^2; returns those of rows and
        columns, or 1 and the vector's own."""
        rows, columns = g.shape
        by_column = on_device_of(g, np.empty(columns, np.float32))
        _core.column_dot(g, g, None, by_column)
        if len(kept) == 1:
            return np.ones(1), self._towards(kept[0], 0, np.asarray(by_column) * scale**2)
        by_row = on_device_of(g, np.empty(rows))
        _core.row_squares(g, by_row)
        row, col = kept
        return (
            self._towards(row, index * rows, np.asarray(by_row) * (scale**2 / columns)),
            self._towards(col, index * columns, np.asarray(by_column) * (scale**2 / rows)),
        )

    def _towards(self, kept: Any, begin: int, values: np.ndarray) -> np.ndarray:
        """Moves a part of a kept mean towards new values; returns it on the host."""
        part = kept[begin : begin + values.size]
        mean = np.asarray(part)
        mean = mean + self.step**self.beta2_decay * (values - mean)
        part[...] = mean.astype(np.float32)
        return mean
