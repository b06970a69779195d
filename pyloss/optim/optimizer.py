"""What all optimizers share: rate, updates, checks, saved state."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyloss.checks.numbers import real, shown, whole
from pyloss.errors import counted, nearest
from pyloss.optim.groups import Groups
from pyloss.optim.rows import RowGradient
from pyloss.optim.schedules import Schedule, schedule_name
from pyloss.optim.state import (
    Arrays,
    State,
    check_parameter,
    float32,
    on_host,
    parameters_of,
    saved,
)
from pyloss.runtime.device import DeviceArray, on_device_of, to_device

#: name, gradient and parameter, and the index of the parameter's group, -1 for none
Work = tuple[str, Any, Any, int]


def check_names(grads: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """ValueError for the gradient of something that is not among the parameters."""
    for name in grads:
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


class Optimizer:
    """The common part of all optimizers: learning rate, count of updates, checks, saved state.

    Attributes:
        learning_rate: a number, or a schedule.
        groups: mappings that give parameters settings of their own. `{"match": "*.bias",
            "weight_decay": 0}`: parameters whose names match the pattern (see `groups.Matcher`)
            have this weight decay. `learning_rate` (a number or a schedule) replaces the rate,
            `rate_scale` multiplies it, any other argument of the constructor replaces that. A
            parameter belongs to the first group that it matches.
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
        self._groups = Groups(self, ())

    @property
    def groups(self) -> Any:
        """The groups, as they were given."""
        return self._groups.given

    @groups.setter
    def groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._groups = Groups(self, groups)

    @property
    def state(self) -> dict[str, Any]:
        """The arrays of each parameter; `state["step"]` is `step`, and can be set, as in mlx."""
        return self._state

    @state.setter
    def state(self, arrays: Mapping[str, Any]) -> None:
        self._state = State(self, arrays)

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

    def check(self, model: Any) -> None:
        """ValueError if this optimizer cannot update a trainable parameter of the model, or if a
        group matches none."""
        parameters = parameters_of(model)
        for name, parameter in parameters.items():
            self._check(name, parameter)
        self._groups.find(parameters)

    def update(self, model: Any, grads: Mapping[str, Any], grad_scale: float = 1.0) -> None:
        """Apply `grads` to the model's trainable parameters, in place, and count one update.

        `grads`: flat dict of arrays keyed and shaped as `model.trainable_parameters()`; a parameter
        without a gradient stays as it is. Every gradient is multiplied by `grad_scale` first.
        Raises ValueError, before anything is changed, for an unknown name, a wrong shape, or a
        parameter that is not a writable C-contiguous float32 array.
        """
        work = self._work(parameters_of(model), grads)
        self._run(work, self._rates(), float(grad_scale))

    def _rates(self) -> list[float]:
        """The rates of this update: that of each group, and last that of the other parameters."""
        rate = self._rate_of(self.step)
        indices = (*range(len(self._groups)), -1)
        return [self._groups.rate(index, rate, self.step) for index in indices]

    def _work(self, parameters: Mapping[str, Any], grads: Mapping[str, Any]) -> list[Work]:
        """What an update works on, checked: names, gradients where the parameters are, and these.

        Nothing is changed.
        """
        check_names(grads, parameters)
        work = []
        groups = self._groups.find(parameters) if len(self._groups) else {}
        for name, grad in grads.items():
            parameter, slots = parameters[name], self.state.get(name)
            self._check(name, parameter)
            array = self._gradient(name, grad, parameter)
            if slots is not None:
                sizes = self._groups.of(self, groups.get(name, -1))._sizes(parameter)
                if {slot: kept.size for slot, kept in slots.items()} != sizes:
                    raise ValueError(
                        f"optimizer state of {name!r} has another size than the parameter "
                        f"{parameter.shape}"
                    )
            work.append((name, array, parameter, groups.get(name, -1)))
        return work

    def _run(self, work: list[Work], rates: list[float], scale: float) -> None:
        """Updates what `_work` has checked, at the rates of `_rates`, and counts the update."""
        self.step += 1
        kinds = [self._groups.of(self, index) for index in (*range(len(self._groups)), -1)]
        # Parameters of one group, one factor of the rate and one kind of state, and whether this is
        # their first update.
        batches: dict[tuple[int, float, bool, tuple[str, ...]], list[tuple[Any, ...]]] = {}
        for name, grad, parameter, group in work:
            slots = self.state.get(name)
            first = slots is None
            if slots is None:
                sizes = kinds[group]._sizes(parameter)
                slots = {slot: np.zeros(size, np.float32) for slot, size in sizes.items()}
            if first or isinstance(parameter, DeviceArray):
                slots = {slot: on_device_of(parameter, array) for slot, array in slots.items()}
                self.state[name] = slots
            factor = self._rate_scales.get(name.rpartition(".")[2], 1.0)
            row = (grad, parameter, *slots.values())
            batches.setdefault((group, factor, first, tuple(slots)), []).append(row)
        for (group, factor, first, _), rows in batches.items():
            arrays, updated, *kept = map(list, zip(*rows, strict=True))
            kinds[group]._apply(arrays, updated, kept, rates[group] * factor, scale, first)

    # What kinds of optimizers may replace.

    def _check(self, name: str, parameter: Any) -> None:
        """ValueError unless the optimizer can update this parameter."""
        check_parameter(name, parameter)

    def _gradient(self, name: str, grad: Any, parameter: Any) -> Any:
        """A given gradient as float32 of the parameter's shape, where the parameter is.

        ValueError for another shape.
        """
        if isinstance(grad, RowGradient):
            raise TypeError(
                f"the gradient of {name!r} is a {type(grad).__name__}, and {type(self).__name__} "
                "updates whole arrays; SparseSignSGD updates rows"
            )
        array = (
            to_device(grad, parameter) if isinstance(parameter, DeviceArray) else np.asarray(grad)
        )
        if array.shape != parameter.shape:
            raise ValueError(
                f"gradient for {name!r} has shape {array.shape}; "
                f"the parameter has {parameter.shape}"
            )
        return float32(array)

    def _sizes(self, parameter: Any) -> dict[str, int]:
        """The names of the float32 arrays kept for a parameter, with their numbers of elements."""
        return dict.fromkeys(self.slots, parameter.size)

    def _slot_sets(self) -> tuple[tuple[str, ...], ...]:
        """The sets of arrays that a parameter may have."""
        kinds = [self._groups.of(self, index) for index in (-1, *range(len(self._groups)))]
        return tuple(dict.fromkeys(kind.slots for kind in kinds))

    def _apply(
        self,
        grads: list[Any],
        parameters: list[Any],
        slots: list[list[Any]],
        rate: float,
        scale: float,
        first: bool,
    ) -> None:
        """Updates parameters of one rate, with the same names of kept arrays.

        `slots` has a list for each of these names; all lists are in the order of the parameters.
        """
        raise NotImplementedError

    def state_dict(self, copy: bool = True) -> dict[str, Any]:
        """A flat dict: `step`, and `"<slot>.<parameter>"` to a flat float32 array.

        Without `copy` the arrays are those that updates change. Settings such as the learning rate
        are arguments of the constructor, not state.
        """
        flat: dict[str, Any] = {"step": self.step}
        for name, slots in self.state.items():
            flat |= {f"{slot}.{name}": on_host(array, copy) for slot, array in slots.items()}
        return flat

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`; arrays are copied.

        ValueError for the state of another kind of optimizer.
        """
        loaded: dict[str, Arrays] = {}
        sets = self._slot_sets()
        known = list(dict.fromkeys(slot for names in sets for slot in names))
        for key, value in state.items():
            if key == "step":
                continue
            slot, _, name = key.partition(".")
            if slot not in known or not name:
                kept = ", ".join(known)
                raise ValueError(
                    f"optimizer state has {shown(key)}; "
                    f"{type(self).__name__} keeps {kept or 'nothing'} for each"
                )
            loaded.setdefault(name, {})[slot] = saved(value, key)
        for name, slots in loaded.items():
            wanted = min(sets, key=lambda names: len(set(names) ^ set(slots)))
            if missing := set(wanted) - set(slots):
                raise ValueError(f"optimizer state of {name!r} lacks {', '.join(sorted(missing))}")
            loaded[name] = {slot: slots[slot] for slot in wanted}
        if "step" not in state:
            raise ValueError("optimizer state lacks 'step'")
        self.step, self.state = whole(state["step"], "the step of the optimizer state", 0), loaded

    @classmethod
    def _options(cls) -> list[str]:
        """The names of the constructor's arguments after the rate."""
        return [p for p in inspect.signature(cls).parameters if p != "learning_rate"]

    def __repr__(self) -> str:
        rate = f"{self.learning_rate:.4g}"
        if self.schedule is not None:
            rate += f" by {schedule_name(self.schedule)}"
        names = [name for name in self._options() if name != "groups" and hasattr(self, name)]
        said = [f"learning_rate={rate}", *(f"{name}={getattr(self, name)}" for name in names)]
        if len(self._groups):
            said.append(f"groups={self._groups}")
        if self._rate_scales:
            said.append(f"rate_scales={self._rate_scales}")
        return f"{type(self).__name__}({', '.join(said)}; {counted(self.step, 'update')})"
