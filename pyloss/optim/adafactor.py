"""Adafactor: a second moment of rows and columns, so that its state is small."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyloss.checks.numbers import real, shown
from pyloss.optim.optimizer import Optimizer
from pyloss.optim.schedules import Schedule

FLOAT32_EPS = float(np.finfo(np.float32).eps)


def _rms(array: np.ndarray) -> float:
    return float(np.linalg.norm(array)) / math.sqrt(max(array.size, 1))


def _mean_squares(grad: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(
        np.einsum("...ij,...ij->...i" if axis == -1 else "...ij,...ij->...j", grad, grad)
        / grad.shape[axis]
    )


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

    It runs in NumPy; arrays on a device are copied to the host and back.
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
        g = np.asarray(grad) * np.float32(scale)
        p = np.asarray(parameter)
        eps1, eps2 = self.eps
        floor = FLOAT32_EPS if eps1 is None else eps1
        share = np.float32(self.step**self.beta2_decay)
        rho = min(rate, self.step**-0.5) if self.relative_step else rate
        alpha = max(eps2, _rms(p)) * rho if self.scale_parameter else rho
        if len(kept) == 2:
            row, col = (
                self._moved(slot, _mean_squares(g, axis).reshape(-1), share)
                for slot, axis in zip(kept, (-1, -2), strict=True)
            )
            row = row.reshape(*p.shape[:-1], 1)
            col = col.reshape(*p.shape[:-2], 1, p.shape[-1])
            mean = np.maximum(row.mean(axis=-2, keepdims=True), np.float32(floor))
            u = row / mean * col
        else:
            u = self._moved(kept[0], (g * g).reshape(-1), share).reshape(p.shape).copy()
        np.maximum(u, np.float32(floor * floor), out=u)
        np.sqrt(u, out=u)
        np.divide(g, u, out=u)
        u *= np.float32(alpha / max(1.0, _rms(u) / self.d))
        parameter[...] = p * np.float32(1 - rate * self.weight_decay) - u

    def _moved(self, slot: Any, towards: np.ndarray, share: np.float32) -> np.ndarray:
        """Moves a kept mean by the share towards new values; returns it on the host."""
        mean = np.asarray(slot)
        mean = mean + share * (towards - mean)
        slot[...] = mean
        return mean
