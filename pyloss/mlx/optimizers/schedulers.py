"""MLX's schedules: pyloss's, of steps and with results that are arrays; and `clip_grad_norm`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from pyloss import optim
from pyloss.mlx.core.arrays import array
from pyloss.mlx.core.dtypes import float32, is_float
from pyloss.mlx.utils import tree_flatten, tree_map
from pyloss.optim.schedules import Schedule


def _of_arrays(schedule: Schedule) -> Callable[[Any], array]:
    """A schedule of pyloss, of a count that may be an array, to a rate that is one."""

    @functools.wraps(schedule)
    def computed(step: Any) -> array:
        count = step.item() if isinstance(step, array) else step
        return array(float(schedule(count)), float32)

    return computed


def exponential_decay(init: float, decay_rate: float) -> Callable[[Any], array]:
    """`init * decay_rate ** step`."""
    return _of_arrays(optim.exponential_decay(init, decay_rate))


def step_decay(init: float, decay_rate: float, step_size: int) -> Callable[[Any], array]:
    """`init`, multiplied by `decay_rate` after every `step_size` updates."""
    return _of_arrays(optim.step_decay(init, decay_rate, step_size))


def cosine_decay(init: float, decay_steps: int, end: float = 0.0) -> Callable[[Any], array]:
    """From `init` down to `end` along half a cosine over `decay_steps` updates, then `end`."""
    return _of_arrays(optim.cosine_decay(init, decay_steps, end))


def linear_schedule(init: float, end: float, steps: int) -> Callable[[Any], array]:
    """From `init` to `end` in equal parts over `steps` updates, then `end`."""
    return _of_arrays(optim.linear_schedule(init, end, steps))


def join_schedules(
    schedules: Sequence[Callable], boundaries: Sequence[int]
) -> Callable[[Any], array]:
    """One schedule after the other: `schedules[i + 1]` counts from `boundaries[i]` on."""
    of_numbers = [lambda step, one=one: float(one(array(step))) for one in schedules]
    return _of_arrays(optim.join_schedules(of_numbers, boundaries))


def clip_grad_norm(grads: Any, max_norm: float) -> tuple[Any, array]:
    """The tree of gradients scaled so that its norm is at most `max_norm`, and its norm before."""
    if max_norm < 0:
        raise ValueError(f"max_norm should be >=0, {max_norm} was provided instead")
    flat = {str(i): g.data for i, (_, g) in enumerate(tree_flatten(grads))}
    norm = optim.grad_norm(flat)
    scale = optim.clip_scale(norm, max_norm)

    def scaled(g: array) -> array:
        return g if scale == 1 else (g * scale).astype(g.dtype if is_float(g.dtype) else float32)

    return tree_map(scaled, grads), array(norm)
