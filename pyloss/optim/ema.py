"""An exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pyloss import _core
from pyloss.checks.numbers import real, whole
from pyloss.errors import counted
from pyloss.optim.state import check_parameter, on_host, parameters_of, saved
from pyloss.runtime.device import on_device_of


class EMA:
    """An exponential moving average of a model's trainable parameters.

        average = decay average + (1 - decay) parameter

    The averages begin as the parameters are when this is made. They lie where the parameters lie.

    Attributes:
        decay: the share that an average keeps at an update.
        step: the number of updates.
        averages: the averages, keyed and shaped as `model.trainable_parameters()`.
    """

    def __init__(self, model: Any, decay: float = 0.999) -> None:
        self.decay = real(decay, "decay", 0, 1)
        self._model_has_averages = False
        self.register(model)

    def register(self, model: Any) -> None:
        """Begin again with the model's present parameters."""
        self._refuse_while_swapped("register")
        parameters = parameters_of(model)
        for name, parameter in parameters.items():
            check_parameter(name, parameter)
        if not parameters:
            raise ValueError("the model has no trainable parameters to average")
        self.step = 0
        self.averages: dict[str, Any] = {name: p.copy() for name, p in parameters.items()}

    def update(self, model: Any) -> None:
        """Take in the model's present parameters. Call it after `optimizer.update`."""
        self._refuse_while_swapped("update")
        names, parameters = self._matched(model)
        averages = [
            on_device_of(p, self.averages[n]) for n, p in zip(names, parameters, strict=True)
        ]
        # SGD's update of the average towards the parameter.
        _core.sgd(parameters, 1 - self.decay, 0.0, 0.0, 1.0, 0, -1.0, averages, None)
        self.averages = dict(zip(names, averages, strict=True))
        self.step += 1

    def copy_to(self, model: Any) -> None:
        """Overwrite the model's parameters with the averages, for good."""
        self._refuse_while_swapped("copy_to")
        for name, parameter in zip(*self._matched(model), strict=True):
            parameter[...] = self.averages[name]

    @contextmanager
    def swapped(self, model: Any) -> Iterator[Any]:
        """`with ema.swapped(model): ...` evaluates or saves the model with the averages.

        The trained parameters are back in place afterwards, also after an error.
        """
        self._refuse_while_swapped("swapped")
        self._matched(model)
        self._exchange(model)
        self._model_has_averages = True
        try:
            yield model
        finally:
            self._model_has_averages = False
            self._exchange(model)

    def state_dict(self) -> dict[str, Any]:
        """A flat dict: `step`, and `"average.<parameter>"` to a copy of its average."""
        self._refuse_while_swapped("state_dict")
        averages = {f"average.{name}": on_host(a, True) for name, a in self.averages.items()}
        return {"step": self.step, **averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`; arrays are copied.

        Raises ValueError if its parameters are others than those that this has.
        """
        self._refuse_while_swapped("load_state_dict")
        if "step" not in state:
            raise ValueError("the state of the average lacks 'step'")
        found = {}
        for name, average in self.averages.items():
            key = f"average.{name}"
            if key not in state:
                raise ValueError(f"the state of the average lacks {key!r}")
            array = saved(state[key], key)
            if array.size != average.size:
                raise ValueError(
                    f"the state of the average has {array.size} numbers for {name!r}, "
                    f"which has the shape {average.shape}"
                )
            found[name] = array.reshape(average.shape)
        if extra := set(state) - {f"average.{name}" for name in found} - {"step"}:
            raise ValueError(
                f"the state of the average has {sorted(extra)[0]!r}, which is not averaged here"
            )
        self.step, self.averages = whole(state["step"], "the step of the average", 0), found

    def __repr__(self) -> str:
        count = len(self.averages)
        return f"EMA(decay={self.decay}, parameters={count}; {counted(self.step, 'update')})"

    def _matched(self, model: Any) -> tuple[list[str], list[Any]]:
        """Names and parameters, or ValueError unless they are those of the averages."""
        parameters = parameters_of(model)
        if other := sorted(set(parameters) ^ set(self.averages)):
            where = "the model" if other[0] in parameters else "the average"
            raise ValueError(
                f"{other[0]!r} is a trainable parameter of {where} only; "
                "register(model) begins a new average"
            )
        for name, parameter in parameters.items():
            check_parameter(name, parameter)
            if parameter.shape != self.averages[name].shape:
                raise ValueError(
                    f"the average of {name!r} has shape {self.averages[name].shape}; "
                    f"the parameter has {parameter.shape}"
                )
        return list(parameters), list(parameters.values())

    def _exchange(self, model: Any) -> None:
        """Exchange the values of parameters and averages, one parameter at a time."""
        for name, parameter in parameters_of(model).items():
            values = parameter.copy()
            parameter[...] = self.averages[name]
            self.averages[name][...] = values

    def _refuse_while_swapped(self, what: str) -> None:
        if self._model_has_averages:
            raise RuntimeError(
                f"{what}: the model holds the averages until `with ema.swapped(model)` ends"
            )
