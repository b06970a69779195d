"""Gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyloss import _core
from pyloss.checks.numbers import real
from pyloss.optim.optimizer import Optimizer
from pyloss.optim.schedules import Schedule


class SGD(Optimizer):
    """Stochastic gradient descent with optional momentum, as torch computes it.

    g += wd p
    buf = momentum buf + (1 - dampening) g, without dampening in the first update
    p -= lr (g + momentum buf) with `nesterov`, else lr buf
    """

    def __init__(
        self,
        learning_rate: float | Schedule,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(learning_rate)
        self.momentum = real(momentum, "momentum", 0)
        self.weight_decay = real(weight_decay, "weight_decay", 0)
        self.dampening = real(dampening, "dampening")
        self.nesterov = bool(nesterov)
        self.slots = ("buf",) if self.momentum else ()
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "nesterov=True needs momentum above 0 and dampening 0, "
                f"not {momentum} and {dampening}"
            )
        self.groups = groups

    def _apply(
        self,
        grads: list[Any],
        parameters: list[Any],
        slots: list[list[Any]],
        rate: float,
        scale: float,
        first: bool,
    ) -> None:
        dampening = 0.0 if first or self.momentum == 0 else self.dampening
        settings = (rate, self.momentum, dampening, self.weight_decay, int(self.nesterov), scale)
        _core.sgd(grads, *settings, parameters, *(slots or (None,)))
