"""The gradients since the latest update, of one rank or of all, and the update with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.distributed import Group
from pyloss.distributed.gradients import FlatGradients
from pyloss.ops.arrays import f32
from pyloss.optim import clip_scale, grad_norm
from pyloss.runtime.device import on_device_of
from pyloss.tuner.run.args import TrainingArgs

Arrays = dict[str, np.ndarray]


class Updates:
    """Accumulates the gradients of batches and updates the parameters with them.

    Each target token counts equally, in every batch and on every rank. The ranks of a group add
    their gradients at an update only, in one buffer; then all have the same gradients, and update
    their parameters alike.
    """

    def __init__(self, trained: Any, optimizer: Any, args: TrainingArgs, group: Group) -> None:
        self.trained, self.optimizer, self.group = trained, optimizer, group
        self.parameters: Arrays = trained.trainable_parameters()
        self.alone, self.max_norm = args.grad_accumulation_steps == 1, args.max_grad_norm
        self.accumulated: Arrays = {}
        self.flat = FlatGradients(self.parameters) if group.size() > 1 else None

    def add(self, grads: Mapping[str, Any], weight: float) -> None:
        """Add the gradients of this rank's batch, which has `weight` target tokens."""
        if self.flat is not None:
            self.flat.add(grads, weight)
            self.accumulated = self.flat.parts
            return
        if self.alone:
            self.accumulated = dict(grads)
            return
        for name, grad in grads.items():
            if name not in self.accumulated:
                self.accumulated[name] = np.zeros(grad.shape, np.float32)
            to = self.accumulated[name] = on_device_of(grad, self.accumulated[name])
            _core.axpy(weight, f32(grad).reshape(-1), to.reshape(-1))

    def apply(self, weight: float, not_finite: Callable[[str], str]) -> float:
        """Update the parameters with the mean over `weight` target tokens; return its norm.

        Raises FloatingPointError with the text of `not_finite` if the norm is not finite; the
        parameters are unchanged then.
        """
        scale = 1.0 if self.alone else 1.0 / weight
        if self.flat is not None:
            self.group.all_sum(self.flat.flat, out=self.flat.flat)
            self.accumulated, scale = self.flat.parts, 1.0 / weight
        norm = grad_norm(self.accumulated) * scale
        if not math.isfinite(norm):
            raise FloatingPointError(not_finite(f"the norm of the gradients is {norm}"))
        scale *= clip_scale(norm, self.max_norm)
        self.optimizer.update(self.trained, self.accumulated, grad_scale=scale)
        return norm

    def clear(self) -> None:
        self.accumulated = {}
        if self.flat is not None:
            self.flat.clear()

    def pending(self) -> Arrays:
        """The accumulated gradients for a checkpoint, on rank 0 of a group the sum of all ranks'.

        The other ranks' are zero afterwards, so that the run goes on as one that is resumed.
        """
        if self.flat is not None and self.group.any(bool(self.accumulated)):
            self.group.all_sum(self.flat.flat, out=self.flat.flat)
            self.accumulated = self.flat.parts
            if self.group.rank():
                self.flat.clear()
        return self.accumulated

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state for a checkpoint; the ranks of a group call this together."""
        return self.optimizer.state_dict(copy=False)

    def restore_optimizer(self, state: Mapping[str, Any]) -> None:
        """Set the optimizer's state to that of a checkpoint."""
        self.optimizer.load_state_dict(state)

    def restore(self, saved: Mapping[str, np.ndarray]) -> None:
        """Set the accumulated gradients to those of a checkpoint."""
        if self.flat is None:
            self.accumulated = {name: np.array(array) for name, array in saved.items()}
        elif saved and self.group.rank() == 0:
            self.add(saved, 1.0)
