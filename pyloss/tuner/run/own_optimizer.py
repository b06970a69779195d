"""Adapts a user's own optimizer to the training loop."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from pyloss.checks.numbers import real
from pyloss.optim import Optimizer


class WrappedOptimizer:
    """Wraps an optimizer with mlx's interface: `update(model, grads)`, `learning_rate`, `state`.

    The wrapper counts updates, scales gradients and saves `state`, which holds nested mappings of
    arrays, numbers and strings. `state` is optional.

    Attributes:
        inner: the user's optimizer.
        step: updates done.
        rate_scales: always empty: the user's optimizer has one learning rate for all parameters.
        schedule: always None.

    Raises:
        TypeError: the object lacks `update` or `learning_rate`.
    """

    schedule = None

    def __init__(self, inner: Any) -> None:
        for name in ("update", "learning_rate"):
            if not hasattr(inner, name):
                needs = "it needs update(model, grads) and learning_rate"
                raise TypeError(
                    f"the optimizer is a {type(inner).__name__} without {name!r}; {needs}"
                )
        self.inner = inner
        self.step = 0
        self.rate_scales: dict[str, float] = {}

    @property
    def learning_rate(self) -> float:
        rate = self.inner.learning_rate
        return real(rate.item() if hasattr(rate, "item") else rate, "learning_rate", 0)

    @property
    def name(self) -> str:
        return type(self.inner).__name__

    def update(self, model: Any, grads: Mapping[str, Any], grad_scale: float = 1.0) -> None:
        """Run one update of the user's optimizer on the gradients times `grad_scale`."""
        if grad_scale != 1:
            grads = {name: grad * np.float32(grad_scale) for name, grad in grads.items()}
        self.inner.update(model, grads)
        self.step += 1

    def state_dict(self, copy: bool = True) -> dict[str, Any]:
        state = getattr(self.inner, "state", None)
        found: dict[str, Any] = {"step": self.step}
        if isinstance(state, Mapping):
            found["state"] = dict(state)
            try:
                found["inner_step"] = int(state["step"])
            except (KeyError, TypeError, ValueError):
                pass
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`. Raises ValueError if it has no integer `step`."""
        if not isinstance(state.get("step"), int):
            raise ValueError("optimizer state lacks 'step'")
        self.step = state["step"]
        own = getattr(self.inner, "state", None)
        if isinstance(own, MutableMapping):
            for key, value in dict(state.get("state") or {}).items():
                own[key] = value
            if "inner_step" in state:
                own["step"] = state["inner_step"]


def own_optimizer(optimizer: Any) -> Any:
    """Return a pyloss optimizer unchanged, any other one wrapped."""
    return optimizer if isinstance(optimizer, Optimizer) else WrappedOptimizer(optimizer)


def optimizer_name(optimizer: Any) -> str:
    """The optimizer's name in a saved state: the class name of the user's or pyloss's optimizer."""
    return optimizer.name if isinstance(optimizer, WrappedOptimizer) else type(optimizer).__name__
