"""Schedules: the learning rate as a function of the number of updates made so far."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyloss.checks.numbers import real, shown, whole

#: A learning rate by the number of updates made so far: a function of an int that returns a float.
Schedule = Callable[[int], float]


def schedule_name(schedule: Schedule) -> str:
    """The name of the function or class that made a schedule."""
    name = getattr(schedule, "__qualname__", type(schedule).__name__)
    return str(name.partition(".")[0] if ".<locals>" in name else name)


def _in_steps(name: str, steps: Any) -> int:
    return whole(int(steps) if isinstance(steps, float) and steps.is_integer() else steps, name, 1)


def linear_schedule(init: float, end: float, steps: int) -> Schedule:
    """From `init` to `end` in equal parts over `steps` updates, then `end`."""
    count, init, end = _in_steps("steps", steps), real(init, "init"), real(end, "end")
    return lambda step: end if step >= count else init + step * ((end - init) / count)


def exponential_decay(init: float, decay_rate: float) -> Schedule:
    """`init * decay_rate ** step`."""
    init, decay_rate = real(init, "init"), real(decay_rate, "decay_rate")
    return lambda step: init * decay_rate**step


def step_decay(init: float, decay_rate: float, step_size: int) -> Schedule:
    """`init`, multiplied by `decay_rate` after every `step_size` updates."""
    size, init, decay_rate = (
        _in_steps("step_size", step_size),
        real(init, "init"),
        real(decay_rate, "decay_rate"),
    )
    return lambda step: init * decay_rate ** (step // size)


def cosine_decay(init: float, decay_steps: int, end: float = 0.0) -> Schedule:
    """From `init` down to `end` along half a cosine over `decay_steps` updates, then `end`."""
    count, init, end = _in_steps("decay_steps", decay_steps), real(init, "init"), real(end, "end")
    return lambda step: (
        end + 0.5 * (1.0 + math.cos(math.pi / count * min(step, count))) * (init - end)
    )


def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after the other.

    `schedules[i + 1]` begins at update `boundaries[i]` and counts from 0 there.
    """
    if not schedules or len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"{len(schedules)} schedules and {len(boundaries)} boundaries given; "
            "at least one schedule, and one boundary fewer than schedules, are needed"
        )

    def schedule(step: int) -> float:
        index = sum(step >= boundary for boundary in boundaries)
        return schedules[index](step - boundaries[index - 1] if index else step)

    return schedule


class WarmUp:
    """A linear warm-up over `warmup` updates from `init` to `after`'s first rate, then `after`.

    As in mlx-lm, update `warmup` (counting from 0) has the full rate, and `after` starts one later.
    """

    def __init__(self, after: float | Schedule, warmup: int, init: float = 0.0) -> None:
        self.warmup = _in_steps("warmup", warmup)
        rate = 0.0 if callable(after) else real(after, "after", 0)
        follow: Schedule = after if callable(after) else lambda step: rate
        self._schedule = join_schedules(
            [linear_schedule(init, follow(0), self.warmup), follow], [self.warmup + 1]
        )

    def __call__(self, step: int) -> float:
        return self._schedule(step)


#: Schedules by their names in settings.
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine_decay": cosine_decay,
    "exponential_decay": exponential_decay,
    "linear_schedule": linear_schedule,
    "step_decay": step_decay,
}


def build_schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule that mlx-lm's YAML describes: `{name, arguments, warmup, warmup_init}`.

    `arguments` are the schedule's, in order. `warmup` counts optimizer updates, not micro-batches.
    ValueError for other content.
    """
    known = ("name", "arguments", "warmup", "warmup_init")
    for key in config:
        if key not in known:
            raise ValueError(f"lr_schedule: unknown key {shown(key)}; allowed: {', '.join(known)}")
    name, arguments = config.get("name"), config.get("arguments")
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(f"lr_schedule: name is {shown(name)}; allowed: {', '.join(SCHEDULES)}")
    signature = inspect.signature(SCHEDULES[name])
    try:
        if not isinstance(arguments, (list, tuple)):
            raise TypeError("not a list of numbers")
        signature.bind(*arguments)
    except TypeError as error:
        wanted = ", ".join(str(p).split(":")[0] for p in signature.parameters.values())
        raise ValueError(
            f"lr_schedule: arguments is {shown(arguments)}; {name} takes [{wanted}]"
        ) from error
    warmup, warmup_init = config.get("warmup") or 0, config.get("warmup_init") or 0.0
    try:
        schedule = SCHEDULES[name](*arguments)  # type: ignore[misc]
        return WarmUp(schedule, warmup, real(warmup_init, "warmup_init", 0)) if warmup else schedule
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_schedule: {error}") from error
