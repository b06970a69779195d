"""Several optimizers in place of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyloss.checks.numbers import shown, whole
from pyloss.errors import counted
from pyloss.optim.groups import Matcher
from pyloss.optim.optimizer import Optimizer, check_names
from pyloss.optim.schedules import Schedule
from pyloss.optim.state import parameters_of


class MultiOptimizer(Optimizer):
    """Several optimizers, each for some of the parameters, as in MLX.

        MultiOptimizer([Muon(0.02), AdamW(1e-3)], ["*.mlp.*.weight"])

    A parameter belongs to the first optimizer whose filter it matches, and to the last optimizer,
    which has no filter, if it matches none. A filter is a pattern of names, several of them, or a
    function of name and parameter (see `groups.Matcher`); each must match some parameter.

    `learning_rate` is that of the first optimizer; setting it, or `rate_scales`, sets those of all.
    `step` counts the updates of all.

    Attributes:
        optimizers: the optimizers.
        reported: the index of the optimizer whose rate is `learning_rate`.
    """

    reported = 0

    def __init__(self, optimizers: Sequence[Optimizer], filters: Sequence[Any] = ()) -> None:
        if (
            not isinstance(optimizers, Sequence)
            or not optimizers
            or not all(isinstance(one, Optimizer) for one in optimizers)
        ):
            raise ValueError(
                f"optimizers is {shown(optimizers)}; it must be a list of pyloss's optimizers"
            )
        filters = [filters] if isinstance(filters, str) or callable(filters) else list(filters)
        if len(filters) != len(optimizers) - 1:
            raise ValueError(
                f"{counted(len(optimizers), 'optimizer')} and {counted(len(filters), 'filter')} "
                "given; one filter fewer than optimizers is needed, as the last has the rest"
            )
        self.optimizers = list(optimizers)
        self.matchers = [
            match if isinstance(match, Matcher) else Matcher(match, f"filters[{i}]")
            for i, match in enumerate(filters)
        ]
        self.step = 0

    @property  # type: ignore[misc]
    def state(self) -> dict[str, Any]:
        """The states of the optimizers, as in mlx."""
        return {"states": [one.state for one in self.optimizers]}

    @property
    def learning_rate(self) -> float:
        return self.optimizers[self.reported].learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float | Schedule) -> None:
        for one in self.optimizers:
            one.learning_rate = value

    @property
    def schedule(self) -> Schedule | None:  # type: ignore[override]
        """The schedule of `learning_rate`."""
        return self.optimizers[self.reported].schedule

    @property
    def rate_scales(self) -> dict[str, float]:
        return self.optimizers[0].rate_scales

    @rate_scales.setter
    def rate_scales(self, scales: Mapping[str, float]) -> None:
        for one in self.optimizers:
            one.rate_scales = scales

    @property
    def slots(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of the arrays of the optimizer that keeps the most."""
        return max((one.slots for one in self.optimizers), key=len)

    def split(self, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The parameters of each optimizer; ValueError for a filter that matches none."""
        parts: list[dict[str, Any]] = [{} for _ in self.optimizers]
        for index, matcher in enumerate(self.matchers):
            matcher.check(parameters, f"filters[{index}]")
        for name, parameter in parameters.items():
            matches = (i for i, match in enumerate(self.matchers) if match(name, parameter))
            parts[next(matches, -1)][name] = parameter
        return parts

    def check(self, model: Any) -> None:
        for one, part in zip(self.optimizers, self.split(parameters_of(model)), strict=True):
            one.check(part)

    def update(self, model: Any, grads: Mapping[str, Any], grad_scale: float = 1.0) -> None:
        parameters = parameters_of(model)
        check_names(grads, parameters)
        parts = self.split(parameters)
        each = list(zip(self.optimizers, parts, strict=True))
        works = [
            one._work(part, {name: grads[name] for name in part if name in grads})
            for one, part in each
        ]
        rates = [one._rates() for one in self.optimizers]
        for one, work, own in zip(self.optimizers, works, rates, strict=True):
            one._run(work, own, float(grad_scale))
        self.step += 1

    def state_dict(self, copy: bool = True) -> dict[str, Any]:
        """A flat dict: `step`, and `"<i>.<key>"` for each key of optimizer i's state."""
        flat: dict[str, Any] = {"step": self.step}
        for index, one in enumerate(self.optimizers):
            flat |= {f"{index}.{key}": value for key, value in one.state_dict(copy).items()}
        return flat

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "step" not in state:
            raise ValueError("optimizer state lacks 'step'")
        parts: list[dict[str, Any]] = [{} for _ in self.optimizers]
        for key, value in state.items():
            index, _, rest = key.partition(".")
            if key == "step":
                continue
            if not index.isdecimal() or int(index) >= len(parts):
                raise ValueError(
                    f"optimizer state has {shown(key)}; it must begin with the number of one of "
                    f"the {len(parts)} optimizers"
                )
            parts[int(index)][rest] = value
        before = [one.state_dict(copy=False) for one in self.optimizers]
        try:
            for one, part in zip(self.optimizers, parts, strict=True):
                one.load_state_dict(part)
            self.step = whole(state["step"], "the step of the optimizer state", 0)
        except (TypeError, ValueError):
            for one, part in zip(self.optimizers, before, strict=True):
                one.load_state_dict(part)
            raise

    def __repr__(self) -> str:
        said = [
            f"{match}: {one}" for match, one in zip(self.matchers, self.optimizers, strict=False)
        ]
        return f"MultiOptimizer({'; '.join([*said, repr(self.optimizers[-1])])})"
