"""MLX's optimizers without a kernel of pyloss: RMSprop, Adagrad, AdaDelta, Adamax, Adafactor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyloss.mlx.core.arrays import array
from pyloss.mlx.core.creation import zeros, zeros_like
from pyloss.mlx.core.elementwise import abs, maximum, minimum, rsqrt, sqrt, square
from pyloss.mlx.core.reductions import mean
from pyloss.mlx.core.shaping import expand_dims
from pyloss.mlx.optimizers.base import Optimizer, Rate
from pyloss.mlx.optimizers.fused import _check_betas


def _check_eps(name: str, eps: float) -> None:
    if eps <= 0.0:
        raise ValueError(f"{name} epsilon should be >0, {eps} was provided instead")


class RMSprop(Optimizer):
    """v = alpha v + (1 - alpha) g^2;  p -= lr g / (sqrt(v) + eps)."""

    def __init__(self, learning_rate: Rate, alpha: float = 0.99, eps: float = 1e-8):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.alpha, self.eps = alpha, eps
        if alpha < 0.0:
            raise ValueError(f"RMSprop alpha should be >=0, {alpha} was provided instead")
        _check_eps("RMSprop", eps)

    def init_single(self, parameter: array, state: dict[str, Any]) -> None:
        state["v"] = zeros_like(parameter)

    def apply_single(self, gradient: array, parameter: array, state: dict[str, Any]) -> array:
        rate = self.learning_rate.astype(gradient.dtype)
        state["v"] = v = self.alpha * state["v"] + (1 - self.alpha) * square(gradient)
        return parameter - rate * gradient / (sqrt(v) + self.eps)


class Adagrad(Optimizer):
    """v = v + g^2;  p -= lr g / (sqrt(v) + eps)."""

    def __init__(self, learning_rate: Rate, eps: float = 1e-8):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.eps = eps
        _check_eps("Adagrad", eps)

    def init_single(self, parameter: array, state: dict[str, Any]) -> None:
        state["v"] = zeros_like(parameter)

    def apply_single(self, gradient: array, parameter: array, state: dict[str, Any]) -> array:
        rate = self.learning_rate.astype(gradient.dtype)
        state["v"] = v = state["v"] + square(gradient)
        return parameter - rate * gradient / (sqrt(v) + self.eps)


class AdaDelta(Optimizer):
    """v = rho v + (1 - rho) g^2;  d = sqrt(u + eps) / sqrt(v + eps) g;  p -= lr d.

    u is the mean of d^2, as v is of g^2.
    """

    def __init__(self, learning_rate: Rate, rho: float = 0.9, eps: float = 1e-6):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.rho, self.eps = rho, eps
        if rho < 0.0:
            raise ValueError(f"AdaDelta rho should be >=0, {rho} was provided instead")
        _check_eps("AdaDelta", eps)

    def init_single(self, parameter: array, state: dict[str, Any]) -> None:
        state["v"], state["u"] = zeros_like(parameter), zeros_like(parameter)

    def apply_single(self, gradient: array, parameter: array, state: dict[str, Any]) -> array:
        rate, rho = self.learning_rate.astype(gradient.dtype), self.rho
        v, u = rho * state["v"] + (1 - rho) * square(gradient), state["u"]
        d = sqrt(u + self.eps) / sqrt(v + self.eps) * gradient
        state["v"], state["u"] = v, rho * u + (1 - rho) * square(d)
        return parameter - rate * d


class Adamax(Optimizer):
    """m = b1 m + (1 - b1) g;  v = max(b2 v, |g|);  p -= lr m / (v + eps)."""

    def __init__(
        self, learning_rate: Rate, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8
    ):
        super().__init__()
        _check_betas("Adam", betas)
        if not eps >= 0.0:
            raise ValueError(f"Adam epsilon should be >=0, {eps} was provided instead")
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas, self.eps = list(betas), eps

    def init_single(self, parameter: array, state: dict[str, Any]) -> None:
        state["m"], state["v"] = zeros_like(parameter), zeros_like(parameter)

    def apply_single(self, gradient: array, parameter: array, state: dict[str, Any]) -> array:
        rate, (b1, b2) = self.learning_rate.astype(gradient.dtype), self.betas
        state["m"] = m = b1 * state["m"] + (1 - b1) * gradient
        state["v"] = v = maximum(b2 * state["v"], abs(gradient))
        return parameter - rate * m / (v + self.eps)


class Adafactor(Optimizer):
    """Adafactor as MLX computes it (Shazeer and Stern, arXiv:1804.04235).

    Unlike pyloss's, which is torch's: eps[0] is added to g^2, there are no floors of the means,
    weight decay grows with the relative step, and `beta_1` keeps a first moment.
    """

    def __init__(
        self,
        learning_rate: Rate | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta_1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
    ):
        super().__init__()
        if learning_rate is not None:
            self._maybe_schedule("learning_rate", learning_rate)
        elif not relative_step:
            raise ValueError("relative_step=False needs a learning_rate")
        self.eps, self.clip_threshold, self.decay_rate = eps, clip_threshold, decay_rate
        self.beta_1, self.weight_decay = beta_1, weight_decay
        self.scale_parameter, self.relative_step = scale_parameter, relative_step
        self.warmup_init = warmup_init

    def init_single(self, parameter: array, state: dict[str, Any]) -> None:
        if parameter.ndim >= 2:
            shape, kind = parameter.shape, parameter.dtype
            state["exp_avg_sq_row"] = zeros(shape[:-1], kind)
            state["exp_avg_sq_col"] = zeros(shape[:-2] + shape[-1:], kind)
        else:
            state["exp_avg_sq"] = zeros_like(parameter)
        if self.beta_1 is not None:
            state["exp_avg"] = zeros_like(parameter)

    def _rate(self, parameter: array) -> array:
        step = self.step
        if self.relative_step:
            rate = minimum(1e-6 * step if self.warmup_init else 1e-2, rsqrt(step))
        else:
            rate = self.learning_rate
        rate = rate.astype(parameter.dtype)
        return maximum(self.eps[1], _rms(parameter)) * rate if self.scale_parameter else rate

    def _scaled(self, gradient: array, state: dict[str, Any]) -> array:
        """The gradient over the root of the means of its squares."""
        share = (self.step**self.decay_rate).astype(gradient.dtype)
        squares = square(gradient) + self.eps[0]

        def moved(name: str, values: array) -> array:
            state[name] = (1 - share) * state[name] + share * values
            return state[name]

        if gradient.ndim < 2:
            return rsqrt(moved("exp_avg_sq", squares)) * gradient
        row = moved("exp_avg_sq_row", mean(squares, axis=-1))
        column = moved("exp_avg_sq_col", mean(squares, axis=-2))
        by_row = rsqrt(row / mean(row, axis=-1, keepdims=True))
        return expand_dims(by_row, -1) * expand_dims(rsqrt(column), -2) * gradient

    def apply_single(self, gradient: array, parameter: array, state: dict[str, Any]) -> array:
        rate = self._rate(parameter)
        update = self._scaled(gradient, state)
        update = rate * (update / maximum(1.0, _rms(update) / self.clip_threshold))
        if self.beta_1 is not None:
            update = self.beta_1 * state["exp_avg"] + (1 - self.beta_1) * update
            state["exp_avg"] = update
        if self.weight_decay != 0:
            parameter = parameter - parameter * (self.weight_decay * rate)
        return parameter - update


def _rms(x: array) -> array:
    return sqrt(mean(square(x)))
