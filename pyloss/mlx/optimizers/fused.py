"""MLX's optimizers whose formulas pyloss's kernels have: Adam, AdamW, SGD, Lion, Muon."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyloss import nn, optim
from pyloss.mlx.core.arrays import array, keep_values, of, raw
from pyloss.mlx.core.creation import zeros_like
from pyloss.mlx.core.dtypes import float32, is_float
from pyloss.mlx.nn.methods import own_value, set_value
from pyloss.mlx.optimizers.base import Optimizer, Rate
from pyloss.mlx.utils import child_of, place_of, tree_flatten
from pyloss.optim.state import float32 as dense

#: References to an array of the state that nobody else holds: the dict's and the call's.
_ALONE = 2


class Fused(Optimizer):
    """An optimizer by an `_apply` of pyloss's, for all parameters in one call.

    Parameters that are float32 are changed where they are, other types through float32.
    `mx.array`s that stand for them keep their values.
    """

    slots: tuple[str, ...] = ()

    def _own(self) -> optim.Optimizer:
        """pyloss's optimizer with the current settings."""
        raise NotImplementedError

    def _prepared(self, gradient: np.ndarray, parameter: np.ndarray) -> np.ndarray:
        """The gradient that pyloss's optimizer gets."""
        return gradient

    def _takes(self, parameter: Any) -> bool:
        """Whether pyloss's optimizer has this parameter's formula."""
        return True

    def init_single(self, parameter: array, state: dict[str, Any]) -> None:
        for slot in self.slots:
            state[slot] = zeros_like(parameter)

    def _run(self, grads: list[Any], parameters: list[Any], kept: list[list[Any]]) -> None:
        own = self._own()
        own.step = int(self.step.item())
        own._apply(grads, parameters, kept, float(self.learning_rate.item()), 1.0, False)

    def apply_single(self, gradient: array, parameter: array, state: dict[str, Any]) -> array:
        new = np.array(parameter.data, np.float32)
        kept = [np.array(state[slot].data, np.float32).reshape(-1) for slot in self._kept()]
        grad = self._prepared(dense(gradient.data), new)
        self._run([grad], [new], [[slot] for slot in kept])
        for slot, values in zip(self._kept(), kept, strict=True):
            state[slot] = of(values.reshape(parameter.shape))
        return of(new).astype(parameter.dtype)

    def _kept(self) -> tuple[str, ...]:
        """The slots that an update reads and changes."""
        return self.slots

    def update(self, model: nn.Module, gradients: Any) -> None:
        if not getattr(type(self).apply_single, "_fused", False):
            super().update(model, gradients)  # a subclass has a formula of its own
            return
        self._advance(gradients)
        trained = nn.Module.trainable_parameters(model) if isinstance(model, nn.Module) else {}
        grads, parameters, kept = [], [], []
        seen: set[int] = set()
        for path, gradient in tree_flatten(gradients):
            owner, key = place_of(model, path)
            parameter = trained[path] if path in trained else child_of(owner, key)
            if id(parameter) in seen or not is_float(parameter.dtype):
                continue
            seen.add(id(parameter))
            if gradient.shape != parameter.shape:
                raise ValueError(
                    f"the gradient of {path!r} has shape {gradient.shape}, and the parameter "
                    f"{parameter.shape}"
                )
            state = child_of(*place_of(self._state, path))
            if not (_changeable(parameter) and self._takes(parameter)):
                value = self.apply_single(gradient, of(parameter), state)
                set_value(model, owner, key, own_value(value))
                continue
            keep_values(parameter)
            grads.append(self._prepared(dense(raw(gradient)), parameter))
            parameters.append(parameter)
            kept.append([_own_state(state, slot) for slot in self._kept()])
        if grads:
            self._run(grads, parameters, [list(slot) for slot in zip(*kept, strict=True)])


Fused.apply_single._fused = True  # type: ignore[attr-defined]


def _changeable(parameter: Any) -> bool:
    """Whether pyloss's optimizers can change a parameter where it is."""
    return (
        isinstance(parameter, np.ndarray)
        and parameter.dtype == np.float32
        and parameter.flags.c_contiguous
        and parameter.flags.writeable
    )


def _own_state(state: dict[str, Any], slot: str) -> np.ndarray:
    """The flat float32 array of a slot, which nobody else holds."""
    held = sys.getrefcount(state[slot]) > _ALONE
    values = state[slot].data
    if held or not _changeable(values):
        values = np.array(values, np.float32)
        state[slot] = of(values)
    return values.reshape(-1)


def _check_betas(name: str, betas: Sequence[float]) -> None:
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} beta{i + 1} should be in [0, 1), {beta} was provided instead")


class SGD(Fused):
    """g += weight_decay p;  v = momentum v + (1 - dampening) g;  p -= lr v.

    With `nesterov` p -= lr (g + momentum v).
    """

    slots = ("v",)

    def __init__(
        self,
        learning_rate: Rate,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
    ):
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening.")
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.dampening, self.nesterov = dampening, nesterov

    def _kept(self) -> tuple[str, ...]:
        return ("v",) if self.momentum > 0 else ()

    def _own(self) -> optim.Optimizer:
        return optim.SGD(0.0, self.momentum, self.weight_decay, self.dampening, self.nesterov)


class Adam(Fused):
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p -= lr m / (sqrt(v) + eps).

    `bias_correction=True` divides m by 1 - b1^t and v by 1 - b2^t, as pyloss's Adam does.
    """

    slots = ("m", "v")

    def __init__(
        self,
        learning_rate: Rate,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        bias_correction: bool = False,
    ):
        super().__init__()
        _check_betas("Adam", betas)
        if not eps >= 0.0:
            raise ValueError(f"Adam epsilon should be >=0, {eps} was provided instead")
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas, self.eps, self.bias_correction = list(betas), eps, bias_correction

    def _own(self) -> optim.Optimizer:
        return optim.Adam(0.0, self.betas, self.eps, self.bias_correction)


class AdamW(Adam):
    """Adam after p *= 1 - lr weight_decay."""

    def __init__(
        self,
        learning_rate: Rate,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = False,
    ):
        super().__init__(learning_rate, betas, eps, bias_correction)
        self.weight_decay = weight_decay

    def _own(self) -> optim.Optimizer:
        return optim.AdamW(0.0, self.betas, self.eps, self.weight_decay, self.bias_correction)


class Lion(Fused):
    """p -= lr (sign(b1 m + (1 - b1) g) + weight_decay p);  m = b2 m + (1 - b2) g."""

    slots = ("m",)

    def __init__(
        self,
        learning_rate: Rate,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__()
        _check_betas("Lion", betas)
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas, self.weight_decay = list(betas), weight_decay

    def _own(self) -> optim.Optimizer:
        return optim.Lion(0.0, self.betas, self.weight_decay)


class Muon(Fused):
    """Momentum whose matrices are made orthogonal by `ns_steps` Newton-Schulz iterations.

    g += weight_decay p; the rest is pyloss's Muon. Arrays of one axis get the momentum alone; of
    arrays with more than two axes, the last ones count as one.
    """

    slots = ("v",)

    def __init__(
        self,
        learning_rate: Rate,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        nesterov: bool = True,
        ns_steps: int = 5,
    ):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.nesterov, self.ns_steps = nesterov, ns_steps

    def _own(self) -> optim.Optimizer:
        return optim.Muon(0.0, 0.0, self.momentum, self.nesterov, ns_steps=self.ns_steps)

    def _takes(self, parameter: Any) -> bool:
        return len(parameter.shape) == 2

    def _prepared(self, gradient: np.ndarray, parameter: np.ndarray) -> np.ndarray:
        if self.weight_decay == 0:
            return gradient
        return gradient + np.float32(self.weight_decay) * parameter

    def apply_single(self, gradient: array, parameter: array, state: dict[str, Any]) -> array:
        if parameter.ndim == 2:
            return super().apply_single(gradient, parameter, state)
        rate, rest = self.learning_rate, 1 - self.momentum
        grad = gradient + self.weight_decay * parameter if self.weight_decay else gradient
        state["v"] = v = self.momentum * state["v"] + rest * grad
        update = grad * rest + v * self.momentum if self.nesterov else v
        if parameter.ndim < 2:
            return (parameter - rate * update).astype(parameter.dtype)
        matrix = dense(update.reshape(update.shape[0], -1).astype(float32).data)
        coefficients = (3.4445, -4.7750, 2.0315)
        found = optim.muon.orthogonalized(matrix, coefficients, self.ns_steps)
        factor = math.sqrt(max(1.0, update.shape[-2] / update.shape[-1]))
        return (parameter - rate * factor * of(found).reshape(update.shape)).astype(parameter.dtype)


Muon.apply_single._fused = True  # type: ignore[attr-defined]
