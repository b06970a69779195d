"""Optimizers and learning-rate schedules.

An optimizer updates the float32 arrays of `model.trainable_parameters()` in place, with one fused
call of the C core for all that have the same rate. A schedule is a function of the number of
updates made so far.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.checks.arrays import as_array
from pyloss.checks.numbers import real, shown, whole
from pyloss.errors import nearest
from pyloss.runtime.device import DeviceArray, is_bfloat16, on_device_of, to_device

Schedule = Callable[[int], float]
Arrays = dict[str, np.ndarray]


def _in_betas(betas: Sequence[float]) -> tuple[float, float]:
    if isinstance(betas, str) or not hasattr(betas, "__len__") or len(betas) != 2:
        raise ValueError(
            f"betas is {shown(betas)}; it must be two numbers of at least 0 and below 1"
        )
    return real(betas[0], "betas[0]", 0, below=1), real(betas[1], "betas[1]", 0, below=1)


def _float32(array: Any) -> Any:
    """`array` as contiguous float32; a copy only if it has another type or layout."""
    if isinstance(array, DeviceArray):
        return array.astype(np.float32, copy=False)
    return np.ascontiguousarray(array, np.float32)


def _saved(value: Any, key: str) -> np.ndarray:
    """A flat float32 copy of the saved state's array under `key`.

    ValueError if it is not an array of numbers.
    """
    array = as_array(value, f"optimizer state {shown(key)}")
    if array.dtype.kind not in "fiu" and not is_bfloat16(array.dtype):
        raise ValueError(
            f"optimizer state has {shown(value)} for {shown(key)}; it must be an array of numbers"
        )
    return np.array(array, np.float32).reshape(-1)


class _State(dict[str, Any]):
    """The arrays of each parameter. As in mlx, `step` and `learning_rate` are the optimizer's."""

    OWN = ("step", "learning_rate")

    def __init__(self, owner: Optimizer, arrays: Mapping[str, Arrays]) -> None:
        super().__init__()
        self._owner = owner
        for name, value in arrays.items():
            self[name] = value

    def __missing__(self, key: str) -> Any:
        if key in self.OWN:
            return getattr(self._owner, key)
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "step":
            self._owner.step = whole(value, "state['step']", 0)
        elif key == "learning_rate":
            self._owner.learning_rate = value
        else:
            super().__setitem__(key, value)


class Optimizer:
    """The common part of all optimizers: learning rate, count of updates, checks, saved state.

    Attributes:
        learning_rate: a number, or a schedule.
        rate_scales: multiplies the rate for some parameters, like parameter groups of torch:
            `{"lora_b": 16.0}` for parameters whose names end in `.lora_b` (LoRA+,
            arXiv:2402.12354). Decoupled weight decay grows with it. Like the rate, it is not saved.
        step: the number of updates.
        state: the arrays kept for each parameter.
    """

    #: names of the float32 arrays kept for each parameter
    slots: tuple[str, ...] = ()

    def __init__(self, learning_rate: float | Schedule) -> None:
        self.step = 0
        self.state = {}
        self.learning_rate = learning_rate
        self.rate_scales = {}

    @property
    def state(self) -> dict[str, Any]:
        """The arrays of each parameter; `state["step"]` is `step`, and can be set, as in mlx."""
        return self._state

    @state.setter
    def state(self, arrays: Mapping[str, Any]) -> None:
        self._state = _State(self, arrays)

    def _rate_of(self, step: int) -> float:
        """The rate of update `step`, counting from 0."""
        if self.schedule is None:
            return self._rate
        try:
            return real(
                self.schedule(step), f"the learning rate that the schedule has for update {step}", 0
            )
        except OverflowError:
            raise ValueError(
                f"the learning rate that the schedule has for update {step} is too large for a "
                "float"
            ) from None

    @property
    def learning_rate(self) -> float:
        """The rate of the latest update, or of the first one before that."""
        if self.schedule is None:
            return self._rate
        return self._rate_of(max(self.step - 1, 0))

    @learning_rate.setter
    def learning_rate(self, value: float | Schedule) -> None:
        self.schedule: Schedule | None = value if callable(value) else None
        self._rate = 0.0 if callable(value) else real(value, "learning_rate", 0)

    @property
    def rate_scales(self) -> dict[str, float]:
        """Factors of the learning rate, by the last part of parameters' names; default 1."""
        return dict(self._rate_scales)

    @rate_scales.setter
    def rate_scales(self, scales: Mapping[str, float]) -> None:
        found = {name: real(scale, f"rate_scales[{name!r}]", 0) for name, scale in scales.items()}
        self._rate_scales = found

    def update(self, model: Any, grads: Mapping[str, Any], grad_scale: float = 1.0) -> None:
        """Apply `grads` to the model's trainable parameters, in place, and count one update.

        `grads`: flat dict of arrays keyed and shaped as `model.trainable_parameters()`; a parameter
        without a gradient stays as it is. Every gradient is multiplied by `grad_scale` first.
        Raises ValueError, before anything is changed, for an unknown name, a wrong shape, or a
        parameter that is not a writable C-contiguous float32 array.
        """
        parameters = model if isinstance(model, Mapping) else model.trainable_parameters()
        work = []
        for name, grad in grads.items():
            if name not in parameters:
                hint = nearest(name, parameters)
                raise ValueError(
                    f"gradient for {name!r}, which is not a trainable parameter"
                    + (
                        f"; the nearest is {hint!r}"
                        if hint
                        else f"; the model has {len(parameters)} of them"
                    )
                )
            parameter, slots = parameters[name], self.state.get(name)
            there = isinstance(parameter, DeviceArray)
            array = to_device(grad, parameter) if there else np.asarray(grad)
            if array.shape != parameter.shape:
                raise ValueError(
                    f"gradient for {name!r} has shape {array.shape}; "
                    f"the parameter has {parameter.shape}"
                )
            contiguous = there or parameter.flags.c_contiguous
            writable = there or parameter.flags.writeable
            if parameter.dtype != np.float32 or not (contiguous and writable):
                raise ValueError(
                    f"parameter {name!r} is {parameter.dtype}, contiguous: {contiguous}, writable: "
                    f"{writable}; only writable C-contiguous float32 arrays can be updated in place"
                )
            if slots is not None:
                for slot in slots.values():
                    if slot.size != parameter.size:
                        raise ValueError(
                            f"optimizer state of {name!r} has another size than the parameter "
                            f"{parameter.shape}"
                        )
            work.append((name, _float32(array), parameter))

        rate = self._rate_of(self.step)
        self.step += 1
        # Parameters of one rate, by its factor and whether this is their first update.
        groups: dict[tuple[float, bool], list[tuple[Any, ...]]] = {}
        for name, grad, parameter in work:
            slots = self.state.get(name)
            first = slots is None
            if slots is None:
                slots = {slot: np.zeros(parameter.size, np.float32) for slot in self.slots}
            if first or isinstance(parameter, DeviceArray):
                slots = {slot: on_device_of(parameter, array) for slot, array in slots.items()}
                self.state[name] = slots
            factor = self._rate_scales.get(name.rpartition(".")[2], 1.0)
            row = (grad, parameter, *(slots[slot] for slot in self.slots))
            groups.setdefault((factor, first), []).append(row)
        for (factor, first), rows in groups.items():
            arrays, updated, *kept = map(list, zip(*rows, strict=True))
            self._apply(arrays, updated, kept, rate * factor, float(grad_scale), first)

    def _apply(
        self,
        grads: list[Any],
        parameters: list[Any],
        slots: list[list[Any]],
        rate: float,
        scale: float,
        first: bool,
    ) -> None:
        """Updates parameters. `slots` has a list of arrays for each name in `self.slots`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """A flat dict: `step`, and `"<slot>.<parameter>"` to a flat float32 array.

        The arrays are not copied, except from a device. Settings such as the learning rate are
        arguments of the constructor, not state.
        """
        flat: dict[str, Any] = {"step": self.step}
        for name, slots in self.state.items():
            flat.update({f"{slot}.{name}": np.asarray(array) for slot, array in slots.items()})
        return flat

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`; arrays are copied.

        ValueError for the state of another kind of optimizer.
        """
        loaded: dict[str, Arrays] = {}
        for key, value in state.items():
            if key == "step":
                continue
            slot, _, name = key.partition(".")
            if slot not in self.slots or not name:
                kept = ", ".join(self.slots)
                raise ValueError(
                    f"optimizer state has {shown(key)}; "
                    f"{type(self).__name__} keeps {kept or 'nothing'} for each"
                )
            loaded.setdefault(name, {})[slot] = _saved(value, key)
        for name, slots in loaded.items():
            if missing := set(self.slots) - set(slots):
                raise ValueError(f"optimizer state of {name!r} lacks {', '.join(sorted(missing))}")
        if "step" not in state:
            raise ValueError("optimizer state lacks 'step'")
        self.step, self.state = whole(state["step"], "the step of the optimizer state", 0), loaded


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
    ) -> None:
        super().__init__(learning_rate)
        self.betas = _in_betas(betas)
        self.eps = real(eps, "eps", 0)
        self.weight_decay = real(weight_decay, "weight_decay", 0)
        self.bias_correction = bool(bias_correction)

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
    ) -> None:
        super().__init__(learning_rate, betas, eps, 0.0, bias_correction)


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
    ) -> None:
        super().__init__(learning_rate)
        self.betas = _in_betas(betas)
        self.weight_decay = real(weight_decay, "weight_decay", 0)

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


OPTIMIZERS: dict[str, type[Optimizer]] = {"adam": Adam, "adamw": AdamW, "lion": Lion, "sgd": SGD}


def build_optimizer(
    name: str,
    learning_rate: float | Schedule,
    config: Mapping[str, Any] | None = None,
    source: str = "optimizer",
) -> Optimizer:
    """The optimizer `name` (in any case) with the keyword arguments `config`.

    ValueError lists what is allowed; its message begins with `source`, where the name was given.
    """
    kind = OPTIMIZERS.get(str(name).lower())
    if kind is None:
        raise ValueError(f"{source}: {name!r} is not available; allowed: {', '.join(OPTIMIZERS)}")
    allowed = [p for p in inspect.signature(kind).parameters if p != "learning_rate"]
    for key in config or {}:
        if key not in allowed:
            raise ValueError(
                f"{source}: {name} has no option {key!r}; allowed: {', '.join(allowed)}"
            )
    try:
        return kind(learning_rate, **(config or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {name}: {error}") from error


def grad_norm(grads: Mapping[str, Any]) -> float:
    """The Euclidean norm of all gradients, summed in float64; nan or inf if any of them is."""
    arrays = [_float32(grad) for grad in grads.values()]
    places: dict[bool, list[int]] = {True: [], False: []}
    for i, array in enumerate(arrays):
        places[isinstance(array, DeviceArray)].append(i)
    parts = np.zeros((len(arrays), 1))
    _core.sum_squares([arrays[i] for i in places[False]], [parts[i] for i in places[False]])
    if on_device := places[True]:
        found = to_device(np.zeros((len(on_device), 1)), arrays[on_device[0]])
        _core.sum_squares([arrays[i] for i in on_device], list(found))
        parts[on_device] = found.numpy()
    total = 0.0
    for part in parts[:, 0].tolist():  # not sum(), whose result depends on Python's version
        total += part
    return math.sqrt(total)


def clip_scale(norm: float, max_norm: float | None) -> float:
    """The factor that reduces gradients of norm `norm` to `max_norm`, as in torch and mlx.

    1.0 if `max_norm` is None.
    """
    if max_norm is None or max_norm == math.inf:
        return 1.0
    return min(real(max_norm, "max_norm", 0) / (norm + 1e-6), 1.0)


def clip_grad_norm(
    grads: Mapping[str, Any], max_norm: float
) -> tuple[dict[str, np.ndarray], float]:
    """Gradients scaled so that their norm is at most `max_norm`, and their norm before."""
    norm = grad_norm(grads)
    scale = np.float32(clip_scale(norm, max_norm))
    return {name: grad if scale == 1 else grad * scale for name, grad in grads.items()}, norm


# Schedules ----------------------------------------------------------------------------------------


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
