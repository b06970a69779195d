"""Lion: the sign of a mean of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyloss import _core
from pyloss.checks.numbers import real
from pyloss.optim.optimizer import Optimizer
from pyloss.optim.schedules import Schedule
from pyloss.optim.state import in_betas


class Lion(Optimizer):
    """Lion: `p -= lr (sign(b1 m + (1-b1) g) + wd p);  m = b2 m + (1-b2) g`.

    Use a rate 3 to 10 times lower than AdamW's, and a weight decay higher by the same factor.
    """

    slots = ("m",)

    def __init__(
        self,
        learning_rate: float | Schedule,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(learning_rate)
        self.betas = in_betas(betas)
        self.weight_decay = real(weight_decay, "weight_decay", 0)
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
        _core.lion(grads, rate, *self.betas, self.weight_decay, scale, parameters, *slots)
