"""Where arrays are in modules: their names, the trained ones, and Parameters in their places."""

from __future__ import annotations

import functools
import operator
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pyloss.autograd.tensor import Parameter, Tensor
from pyloss.runtime.device import DeviceArray, is_bfloat16

if TYPE_CHECKING:
    from pyloss.nn.module import Module

ARRAYS = (np.ndarray, DeviceArray, Parameter)
CONTAINERS = (list, tuple, dict)


def is_trainable(array: Any) -> bool:
    """Whether an array's type is that of parameters: float32 or shorter."""
    kind = array.dtype
    return (kind.kind == "f" and kind.itemsize < 8) or is_bfloat16(kind)


def key_named(owner: dict, part: str) -> Any:
    """The key of a dict whose name in a path is `part`."""
    return next((key for key in owner if str(key) == part), part)


def leaves(name: str, container: Any) -> Iterator[tuple[str, Any]]:
    """What lists, tuples and dicts of any depth hold, with dotted names."""
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in items:
        if isinstance(value, CONTAINERS):
            yield from leaves(f"{name}.{key}", value)
        else:
            yield f"{name}.{key}", value


class TrainedPlaces:
    """Where a module's trainable parameters are: a walk over all modules takes milliseconds.

    Attributes:
        places: (dotted name, a function that gets the array) of each.
        shown: (a module's attributes, name) wherever a trained array is, in a container or not.
    """

    def __init__(self, root: Module):
        # Not the module itself: a cycle would keep a large model until it is collected.
        self.kind, self.structure = type(root), root.structure
        self.places: list[tuple[str, Callable[[], Any]]] = []
        # Lists and dicts, with what was in them: they may change unseen.
        self.containers: list[tuple[list | dict, list]] = []
        trained: set[int] = set()
        wide: list[str] = []
        single: list[str] = []
        modules = list(root.named_modules())
        for path, module in modules:
            for name, value in vars(module).items():
                if isinstance(value, CONTAINERS) and not name.startswith("_"):
                    self._watch(value)
                elif isinstance(value, np.float32 | np.float16) and not name.startswith("_"):
                    single.append(joined(path, name))
            single += [joined(path, name) for name in _class_arrays(module)]
            for name, value, is_parameter in module._own_arrays():
                if (
                    is_parameter
                    and name not in module._frozen
                    and id(array_of(value)) not in trained
                ):
                    trained.add(id(array_of(value)))
                    self.places.append((joined(path, name), _getter(module, name)))
                elif not is_parameter and value.dtype == np.float64:
                    if name.split(".")[0] not in module._buffers:
                        wide.append(joined(path, name))
        names: set[str] = set()
        for name, _ in self.places:
            check_new(name, names)
            names.add(name)
        self.shown = [
            (vars(module), name)
            for _, module in modules
            for name, value in vars(module).items()
            if _holds_one_of(value, trained, name)
        ]
        if wide:
            warnings.warn(
                f"float64 arrays are not trained: {', '.join(wide)}. Parameters are float32 "
                "(array.astype(numpy.float32)); register_buffer(name, array) says that one is "
                "constant",
                stacklevel=4,
            )
        if single:
            warnings.warn(
                f"not trained, since they are no arrays of a module: {', '.join(single)}. A "
                "parameter is set in __init__, and one number is numpy.array(x, numpy.float32); "
                "float(x), or a name that begins with '_', says that a value is constant",
                stacklevel=4,
            )

    def _watch(self, container: Any) -> None:
        if not isinstance(container, tuple):
            self.containers.append((container, _items(container)))
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, CONTAINERS):
                self._watch(value)

    def holds(self) -> bool:
        """Whether the modules are as they were."""
        return self.structure is self.kind.structure and all(
            _same_items(_items(container), items) for container, items in self.containers
        )


def _class_arrays(module: Module) -> list[str]:
    """The names of arrays of short floats that a module's class has, and not the module."""
    kind: Any = type(module)
    return [name for name in _arrays_of(kind) if name not in vars(module)]


@functools.cache
def _arrays_of(kind: Any) -> list[str]:
    """The names of arrays of short floats among a class's attributes."""
    return [
        name
        for base in kind.__mro__
        for name, value in vars(base).items()
        if isinstance(value, np.ndarray) and is_trainable(value) and not name.startswith("_")
    ]


def array_of(value: Any) -> Any:
    """The array of a Parameter; another value as it is."""
    return value.data if isinstance(value, Parameter) else value


def _getter(module: Module, path: str) -> Callable[[], Any]:
    """A function that gets the array at `path` in a module's attributes."""
    name, *keys = path.split(".")
    if not keys:
        return lambda: vars(module)[name]

    def get() -> Any:
        value = vars(module)[name]
        for key in keys:
            value = value[key_named(value, key)] if isinstance(value, dict) else value[int(key)]
        return value

    return get


def _holds_one_of(value: Any, arrays: set[int], name: str) -> bool:
    if isinstance(value, CONTAINERS) and not name.startswith("_"):
        return any(id(array_of(leaf)) in arrays for _, leaf in leaves(name, value))
    return isinstance(value, ARRAYS) and id(array_of(value)) in arrays


def _items(container: list | tuple | dict) -> list:
    """What is in a container; arrays in place of Parameters, and what is in tuples."""
    found: list = list(container) if isinstance(container, dict) else []
    for value in container.values() if isinstance(container, dict) else container:
        found += _items(value) if isinstance(value, tuple) else [array_of(value)]
    return found


def _same_items(a: list, b: list) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _replaced(name: str, value: Any, replace: Callable[[str, Any], Any]) -> Any:
    """`value` with `replace(dotted name, leaf)` in place of its leaves.

    Lists and dicts are changed in place, so that what else changes in them stays; tuples are new.
    """
    if isinstance(value, tuple):
        new = [_replaced(f"{name}.{i}", leaf, replace) for i, leaf in enumerate(value)]
        if all(map(operator.is_, new, value)):
            return value
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    if isinstance(value, list | dict):
        for key, leaf in value.items() if isinstance(value, dict) else enumerate(value):
            value[key] = _replaced(f"{name}.{key}", leaf, replace)
        return value
    return replace(name, value)


class _Place:
    """An attribute that holds trained arrays, while Parameters stand in their places.

    Attributes:
        entered: how many `shown` have entered it.
        arrays: the arrays, by dotted name.
        by_parameter: (Parameter, array), by the identity of the Parameter.
        taken: the names of arrays whose place another Tensor took.
    """

    __slots__ = ("arrays", "attributes", "by_parameter", "entered", "name", "parameters", "taken")

    def __init__(self, attributes: dict[str, Any], name: str, parameters: dict[int, Parameter]):
        self.attributes, self.name, self.entered = attributes, name, 1
        self.parameters = parameters
        self.taken: list[str] = []
        self.arrays: dict[str, Any] = {}
        self.by_parameter: dict[int, tuple[Parameter, Any]] = {}
        self._replace(self._show)

    def restore(self) -> list[str]:
        """Puts the arrays back. Returns the names of those whose place another Tensor took."""
        if self.name in self.attributes:
            self._replace(self._back)
        return self.taken

    def _replace(self, replace: Callable[[str, Any], Any]) -> None:
        value = self.attributes[self.name]
        in_container = isinstance(value, CONTAINERS)
        self.attributes[self.name] = (
            _replaced(self.name, value, replace) if in_container else replace(self.name, value)
        )

    def _show(self, path: str, leaf: Any) -> Any:
        parameter = self.parameters.get(id(leaf))
        if parameter is None:
            return leaf
        self.arrays[path] = leaf
        self.by_parameter[id(parameter)] = parameter, leaf
        return parameter

    def _back(self, path: str, leaf: Any) -> Any:
        if id(leaf) in self.by_parameter:
            return self.by_parameter[id(leaf)][1]
        if isinstance(leaf, Tensor) and path in self.arrays:
            self.taken.append(path)
            return self.arrays[path]
        return leaf


class shown:
    """Arrays are Parameters in the modules' attributes while this is entered.

    Several threads may differentiate one model at once: the last one puts the arrays back.
    TypeError on leaving, if a Tensor was put in the place of an array of a list or dict.

    Args:
        places: see `Module.trained_attributes`.
        arrays: by the identity of an array, the one in its Parameter: itself or another.
    """

    _lock = threading.Lock()
    _entered: ClassVar[dict[tuple[int, str], _Place]] = {}

    def __init__(self, places: list[tuple[dict, str]], arrays: dict[int, Any]):
        self.places = places
        self.parameters = {key: Parameter(array) for key, array in arrays.items()}

    def __enter__(self) -> None:
        with self._lock:
            for attributes, name in self.places:
                place = self._entered.get((id(attributes), name))
                if place is not None:
                    place.entered += 1
                else:
                    place = _Place(attributes, name, self.parameters)
                    self._entered[id(attributes), name] = place

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        taken = []
        with self._lock:
            for attributes, name in self.places:
                place = self._entered[id(attributes), name]
                place.entered -= 1
                if not place.entered:
                    del self._entered[id(attributes), name]
                    taken += place.restore()
        if taken and kind is None:
            raise TypeError(TAKEN.format(taken[0]))


TAKEN = (
    "{} is an array of the module, and a Tensor of a recording would take its place: use another "
    "name, or pyloss.stop_gradient(t).copy()"
)


def check_new(name: str, names: Any) -> None:
    """ValueError for a name that is among `names`."""
    if name in names:
        raise ValueError(
            f"two arrays of the model have the name {name!r}: keys of dicts must differ as text "
            "and hold no '.'"
        )


def joined(path: str, name: str) -> str:
    """The dotted name of what is called `name` in the module at `path`."""
    return f"{path}.{name}" if path else name
