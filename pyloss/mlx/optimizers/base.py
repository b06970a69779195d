"""MLX's base class of optimizers, and `MultiOptimizer`.

An optimizer of one's own overrides `init_single` and `apply_single`, as in MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyloss.mlx.core.arrays import array
from pyloss.mlx.core.dtypes import float32, uint64
from pyloss.mlx.nn.methods import own_value, set_value
from pyloss.mlx.utils import place_of, tree_flatten, tree_map, tree_merge, tree_unflatten
from pyloss.nn import Module

Rate = float | Callable[[Any], Any] | array


class Optimizer:
    """The common part: a tree of state, schedules, and updates of a model or a tree of arrays.

    `state` has `step`, `learning_rate`, and for each parameter what `init_single` puts there.
    """

    def __init__(self, schedulers: dict[str, Callable] | None = None):
        self._initialized = False
        self._state: dict[str, Any] = {"step": array(0, uint64)}
        self._schedulers = dict(schedulers or {})

    def update(self, model: Module, gradients: Any) -> None:
        """Applies gradients to the model's parameters."""
        for path, value in tree_flatten(self.apply_gradients(gradients, model)):
            owner, key = place_of(model, path)
            set_value(model, owner, key, own_value(value))

    def init(self, parameters: Any) -> None:
        """Makes the state for a tree of parameters; otherwise the first update does."""
        _extend(parameters, self._state)

        def begin(parameter: array, state: dict[str, Any]) -> None:
            if not state:
                self.init_single(parameter, state)

        tree_map(begin, parameters, self._state)
        self._initialized = True

    def init_single(self, parameter: array, state: dict[str, Any]) -> None:
        """Puts the first state of a parameter into `state`."""
        raise NotImplementedError(f"{type(self).__name__} has no init_single")

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The updated parameters, as a tree of the gradients' form. Counts one update."""
        self._advance(gradients)
        return tree_map(self.apply_single, gradients, parameters, self._state)

    def _advance(self, gradients: Any) -> None:
        """The state of an update: what is scheduled, and the count."""
        if not self._initialized:
            self.init(gradients)
        for name, schedule in self._schedulers.items():
            self._state[name] = as_number(schedule(self.step))
        self._state["step"] = self.step + 1

    def apply_single(self, gradient: array, parameter: array, state: dict[str, Any]) -> array:
        """The updated parameter; changes `state`."""
        raise NotImplementedError(f"{type(self).__name__} has no apply_single")

    @property
    def state(self) -> dict[str, Any]:
        """The tree of state; setting it goes on from it."""
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._initialized = False
        self._state = state

    @property
    def step(self) -> array:
        """How many updates were made."""
        return self._state["step"]

    @property
    def learning_rate(self) -> array:
        """The rate of the last update, or of the first one before that."""
        return self._state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | array) -> None:
        self._state["learning_rate"] = as_number(learning_rate)

    def _maybe_schedule(self, name: str, param: Rate) -> None:
        """Sets a part of the state, by a schedule if `param` is a function."""
        if callable(param):
            self._schedulers[name] = param
            param = param(self.step)
        self._state[name] = as_number(param)


def as_number(value: Any) -> array:
    """A number as an array, float32 unless it is one already."""
    return value if type(value) is array else array(value, float32)


def _extend(parameters: Any, state: Any) -> Any:
    """Gives the state an empty dict for each parameter that it lacks."""
    if isinstance(parameters, Module):
        parameters = parameters.parameters()
    if isinstance(parameters, dict):
        for key, value in parameters.items():
            try:
                owner, name = place_of(state, key)  # a dotted name: state of a file is nested
            except KeyError:
                owner, name = state, key
            known = owner[name] if name in owner else _empty(value)
            owner[name] = _extend(value, known)
        return state
    if isinstance(parameters, list | tuple):
        known = list(state)
        known += [_empty(value) for value in parameters[len(known) :]]
        return type(parameters)(_extend(value, known[i]) for i, value in enumerate(parameters))
    return state


def _empty(value: Any) -> Any:
    return tree_map(lambda _: {}, value)


class MultiOptimizer(Optimizer):
    """Several optimizers: each has the parameters for which its filter holds.

    `filters[i](dotted name, gradient)` belongs to `optimizers[i]`; the last one has the rest.
    """

    def __init__(self, optimizers: Sequence[Optimizer], filters: Sequence[Callable] = ()):
        super().__init__()
        self._state = {}
        if len(filters) != len(optimizers) - 1:
            raise ValueError(f"Given {len(filters)} filters but {len(optimizers) - 1} needed.")
        self.optimizers = list(optimizers)
        self.filters: list[Callable[..., Any]] = [*filters, lambda *args, **kwargs: True]

    def _split_dictionary(self, gradients: Any) -> list[Any]:
        parts: list[list[tuple[str, Any]]] = [[] for _ in self.optimizers]
        flat = tree_flatten(gradients)
        nested = not (isinstance(gradients, dict) and all(name in gradients for name, _ in flat))
        for name, gradient in flat:
            chosen = next(i for i, holds in enumerate(self.filters) if holds(name, gradient))
            parts[chosen].append((name, gradient))
        return [tree_unflatten(part) if part and nested else dict(part) for part in parts]

    def init(self, parameters: Any) -> None:
        for optimizer, part in zip(
            self.optimizers, self._split_dictionary(parameters), strict=True
        ):
            optimizer.init(part)

    def update(self, model: Module, gradients: Any) -> None:
        for optimizer, part in zip(self.optimizers, self._split_dictionary(gradients), strict=True):
            optimizer.update(model, part)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        tree: Any = {}
        for optimizer, part in zip(self.optimizers, self._split_dictionary(gradients), strict=True):
            tree = tree_merge(tree, optimizer.apply_gradients(part, parameters))
        return tree

    @property
    def state(self) -> dict[str, Any]:
        """The states of the optimizers."""
        return {"states": [optimizer.state for optimizer in self.optimizers]}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        if "states" not in state or len(state["states"]) != len(self.optimizers):
            raise ValueError(
                f"state must have 'states', a list of {len(self.optimizers)} optimizers' states"
            )
        for optimizer, part in zip(self.optimizers, state["states"], strict=True):
            optimizer.state = part

    @property
    def learning_rate(self) -> array:
        """The rate of the first optimizer; setting it sets that of all."""
        return self.optimizers[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | array) -> None:
        for optimizer in self.optimizers:
            optimizer.learning_rate = learning_rate
