"""Adam and its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyloss import _core
from pyloss.checks.numbers import real
from pyloss.optim.optimizer import Optimizer
from pyloss.optim.schedules import Schedule
from pyloss.optim.state import in_betas


class AdamW(Optimizer):
    """Adam with decoupled weight decay, as torch computes it.

        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g^2
        p -= lr wd p
        p -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    `bias_correction=False` leaves out 1 - b1^t and 1 - b2^t, which is mlx's default.
    """

    slots = ("m", "v")

    def __init__(
        self,
        learning_rate: float | Schedule,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(learning_rate)
        self.betas = in_betas(betas)
        self.eps = real(eps, "eps", 0)
        self.weight_decay = real(weight_decay, "weight_decay", 0)
        self.bias_correction = bool(bias_correction)
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
        beta1, beta2 = self.betas
        bias1, bias2 = (
            (1 - beta1**self.step, 1 - beta2**self.step) if self.bias_correction else (1.0, 1.0)
        )
        settings = (rate, beta1, beta2, self.eps, self.weight_decay, bias1, bias2, scale)
        _core.adamw(grads, *settings, parameters, *slots)


class Adam(AdamW):
    """AdamW without weight decay."""

    def __init__(
        self,
        learning_rate: float | Schedule,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        bias_correction: bool = True,
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(learning_rate, betas, eps, 0.0, bias_correction)
        self.groups = groups


class AdamATan2(Optimizer):
    """AdamW without eps: the step is an angle (Everett et al., arXiv:2407.05872), so that the scale
    of the loss makes no difference.

        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g^2
        p -= lr wd p
        p -= a lr / (1 - b1^t) atan2(m, b sqrt(v / (1 - b2^t)))

    This is the update of the package adam-atan2, with which the authors train the Hierarchical
    Reasoning Model and the Tiny Recursive Model. `correct_angle=True` corrects m inside the angle,
    as the paper and the package adam-atan2-pytorch do (the latter with a = 1.27):

        p -= a lr atan2(m / (1 - b1^t), b sqrt(v / (1 - b2^t)))
    """

    slots = ("m", "v")

    def __init__(
        self,
        learning_rate: float | Schedule,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        a: float = 1.0,
        b: float = 1.0,
        correct_angle: bool = False,
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(learning_rate)
        self.betas = in_betas(betas)
        self.weight_decay = real(weight_decay, "weight_decay", 0)
        self.a, self.b = real(a, "a", above=0), real(b, "b", above=0)
        self.correct_angle = bool(correct_angle)
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
        beta1, beta2 = self.betas
        bias1, bias2 = 1 - beta1**self.step, 1 - beta2**self.step
        step, scale_v, decay = self.a * rate, self.b**2 / bias2, rate * self.weight_decay
        if self.correct_angle:
            scale_v *= bias1**2  # instead of m / bias1
        else:
            step /= bias1
        settings = (beta1, beta2, decay, step, scale_v, scale)
        _core.adam_atan2(grads, *settings, parameters, *slots)
