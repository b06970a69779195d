"""Modules: trees of named parameters, frozen or trained, and their gradients."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from pyloss.autograd.differentiation import leaf_gradient, run_backward
from pyloss.autograd.recorded import Recorded
from pyloss.autograd.scope import current_tape
from pyloss.autograd.tape import Tape
from pyloss.autograd.tensor import Parameter, Tensor, refuse_outer
from pyloss.autograd.trees import tree_leaves, tree_map
from pyloss.checks.arrays import as_array
from pyloss.errors import listed
from pyloss.nn.display import ArrayTable, Shown, summary, tree_html, tree_text
from pyloss.nn.places import (
    ARRAYS,
    CONTAINERS,
    TAKEN,
    TrainedPlaces,
    array_of,
    check_new,
    is_trainable,
    joined,
    key_named,
    leaves,
    shown,
)
from pyloss.runtime.device import DeviceArray, is_bfloat16
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight


class Module:
    """A tree of parameters.

    ndarray attributes of float32 or a shorter float type are parameters, `Module` attributes are
    submodules, also in lists, tuples and dicts of any depth; attributes whose names begin with `_`
    are neither. Parameters are trained unless frozen. Other arrays (integers, bool, float64, and
    names given to `register_buffer`) are buffers: saved and loaded, never trained. A `Weight` (a
    stored matrix) is never trained.

    While `value_and_grad` runs a function, trained parameters are Tensors.
    """

    #: Changes whenever an attribute of any module is set; facts about modules may then be outdated.
    assignments: ClassVar[object] = object()
    #: As `assignments`, but for `results`.
    structure: ClassVar[object] = object()
    #: Attributes that hold results computed from the others.
    results: ClassVar[frozenset[str]] = frozenset()
    #: Whether instances of this very class, not of its subclasses, make the same calls of the core
    #: whatever the values of their arrays and inputs; see `recorded_module`.
    recordable: ClassVar[bool] = False

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and isinstance(vars(self).get(name), ARRAYS):
            raise TypeError(TAKEN.format(name))
        self._changed(name)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deep copies: arrays, also while they are differentiated."""
        return {
            name: tree_map(array_of, value)
            if any(type(leaf) is Parameter for leaf in tree_leaves(value))
            else value
            for name, value in self._kept().items()
        }

    def __copy__(self) -> Module:
        other = type(self).__new__(type(self))
        vars(other).update(self._kept())
        return other

    def _kept(self) -> dict[str, Any]:
        """The attributes, without what is made again when it is needed."""
        again = ("_trained", "_recorded")
        return {name: value for name, value in vars(self).items() if name not in again}

    def __delattr__(self, name: str) -> None:
        self._changed(name)
        super().__delattr__(name)

    def _changed(self, name: str) -> None:
        Module.assignments = object()
        if name not in self.results:
            Module.structure = object()

    def __init__(self) -> None:
        self._frozen: set[str] = set()
        self._buffers: set[str] = set()
        self._training = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward computation")

    __repr__ = tree_text
    _repr_html_ = tree_html

    def summary(self) -> Shown:
        """The tree that `repr` shows, and a table of the parameters by class: a text."""
        return summary(self)

    def recorded_inputs(self) -> list[Any]:
        """What its recorded calls read and what changes between runs: arrays, and drawn seeds."""
        return []

    def children(self) -> Iterator[tuple[str, Module]]:
        """The submodules of this module with their names, such as `("layers.0", ...)`."""
        return self._children()

    def _children(self) -> Iterator[tuple[str, Module]]:
        for name, value in vars(self).items():
            if isinstance(value, Module):
                if not name.startswith("_"):
                    yield name, value
            elif isinstance(value, CONTAINERS) and not name.startswith("_"):
                yield from ((k, v) for k, v in leaves(name, value) if isinstance(v, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, with dotted names; this one's name is `prefix`.

        ValueError for a module that is in itself.
        """
        return self._named_modules(prefix, ())

    def _named_modules(self, path: str, above: tuple[Module, ...]) -> Iterator[tuple[str, Module]]:
        if "_frozen" not in vars(self):
            raise TypeError(
                f"{type(self).__name__}.__init__ has not called super().__init__(), which must "
                "come first"
            )
        if any(module is self for module in above):
            raise ValueError(
                f"the module {path!r} is one that it is in. Attributes are parts of a module, "
                "unless their names begin with '_'"
            )
        yield path, self
        for name, child in self._children():
            yield from child._named_modules(joined(path, name), (*above, self))

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        return (module for _, module in self.named_modules())

    def set_module(self, path: str, module: Module) -> None:
        """Replaces the submodule with the dotted name `path` by `module`."""
        *parents, last = path.split(".")
        owner: Any = self
        self._changed(last)  # also where the owner is a list or a dict
        vars(self).pop("_trained", None)
        for part in parents:
            if isinstance(owner, list | tuple):
                owner = owner[int(part)]
            else:
                in_dict = isinstance(owner, dict)
                owner = owner[key_named(owner, part)] if in_dict else getattr(owner, part)
        if isinstance(owner, tuple):
            raise TypeError(f"{path} is in a tuple; modules that are replaced must be in a list")
        if isinstance(owner, list):
            owner[int(last)] = module
        elif isinstance(owner, dict):
            owner[key_named(owner, last)] = module
        else:
            setattr(owner, last, module)

    def register_buffer(self, name: str, array: Any) -> None:
        """Sets an attribute that is saved and loaded with the parameters and never trained."""
        if name.startswith("_") or "." in name:
            raise ValueError(f"a buffer's name must not begin with '_' or hold '.': {name!r}")
        if not isinstance(array, ARRAYS):
            array = np.asarray(array)
        self._buffers.add(name)
        setattr(self, name, array)

    def _own_arrays(self) -> Iterator[tuple[str, Any, bool]]:
        """This module's own arrays with their names, and whether each is a parameter."""
        for name, value in vars(self).items():
            if name.startswith("_"):
                continue
            if isinstance(value, ARRAYS):
                yield name, value, is_trainable(value) and name not in self._buffers
            elif isinstance(value, CONTAINERS):
                for path, leaf in leaves(name, value):
                    if isinstance(leaf, ARRAYS):
                        yield path, leaf, is_trainable(leaf) and name not in self._buffers

    def _arrays_by_name(self, parameters: bool) -> dict[str, Any]:
        found = ArrayTable()
        for path, module in self.named_modules():
            for name, value, is_parameter in module._own_arrays():
                if is_parameter == parameters:
                    check_new(joined(path, name), found)
                    found[joined(path, name)] = value
        return found

    def parameters(self) -> dict[str, np.ndarray]:
        """All parameters by dotted name, without the stored matrices."""
        return self._arrays_by_name(True)

    def buffers(self) -> dict[str, np.ndarray]:
        """All arrays that are no parameters, by dotted name."""
        return self._arrays_by_name(False)

    def trainable_parameters(self) -> dict[str, np.ndarray]:
        """The parameters that are not frozen, by dotted name; a shared array appears once.

        The dict is shown as a table of names, shapes, types and counts.
        """
        return ArrayTable({path: get() for path, get in self._trained_places().places})

    def trained_attributes(self) -> list[tuple[dict[str, Any], str]]:
        """Where trained arrays are: a module's attributes and the name of one."""
        return self._trained_places().shown

    def _trained_places(self) -> TrainedPlaces:
        kept: TrainedPlaces | None = vars(self).get("_trained")
        if kept is None or not kept.holds():
            kept = TrainedPlaces(self)
            object.__setattr__(self, "_trained", kept)
        return kept

    def stored(self) -> dict[str, Weight | WeightStack]:
        """The stored matrices, and stacks of them, by dotted name."""
        return {
            joined(path, name): value
            for path, module in self.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Weight | WeightStack)
        }

    def freeze(self, *, recurse: bool = True, keys: Iterable[str] | None = None) -> Module:
        """Excludes parameters from training: all, or those with the names `keys`.

        A name is that of an attribute, or of an array in it (`"scales.0"`).
        `recurse=False`: in this module only. ValueError for a name that no parameter has.
        """
        for module, names in self._with_names(recurse, keys):
            module._frozen |= names
        return self

    def unfreeze(self, *, recurse: bool = True, keys: Iterable[str] | None = None) -> Module:
        """The opposite of `freeze`."""
        for module, names in self._with_names(recurse, keys):
            module._frozen -= names
        return self

    def _with_names(
        self, recurse: bool, keys: Iterable[str] | None
    ) -> list[tuple[Module, set[str]]]:
        """The modules with those of their parameters' names that `keys` names."""
        if isinstance(keys, str):
            raise TypeError(f"keys must be a list of names, not the string {keys!r}")
        modules = list(self.modules()) if recurse else [self]
        own = [
            {name for name, _, parameter in module._own_arrays() if parameter} for module in modules
        ]
        if keys is None:
            return list(zip(modules, own, strict=True))
        wanted = set(keys)
        chosen = [
            {name for name in names if name in wanted or name.split(".")[0] in wanted}
            for names in own
        ]
        known = {name for names in own for name in (*names, *(n.split(".")[0] for n in names))}
        if wanted - known:
            raise ValueError(
                f"no parameter is named {', '.join(map(repr, sorted(wanted - known)))}; "
                f"the names are {', '.join(sorted(known)) or 'none: there are no parameters'}"
            )
        return list(zip(modules, chosen, strict=True))

    @property
    def training(self) -> bool:
        """Whether dropout acts."""
        return self._training

    def train(self, mode: bool = True) -> Module:
        """Switches to training, or with `mode=False` to evaluation."""
        for module in self.modules():
            module._training = mode
        return self

    def eval(self) -> Module:
        """Switches to evaluation: no dropout."""
        return self.train(False)

    def moved(self, put: Callable[[Any], Any]) -> Module:
        """This module, with `put`'s results for its arrays and weights; shared ones stay shared."""
        known: dict[int, Any] = {}
        vars(self).pop("_trained", None)

        def moved(value: Any) -> Any:
            if not isinstance(value, np.ndarray | DeviceArray | Weight | WeightStack):
                return value
            if id(value) not in known:
                known[id(value)] = (
                    value,
                    value.moved(put) if hasattr(value, "moved") else put(value),
                )
            return known[id(value)][1]

        for module in self.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, np.ndarray | DeviceArray | Weight | WeightStack):
                    setattr(module, name, moved(value))
                elif isinstance(value, CONTAINERS) and not name.startswith("_"):
                    if any(isinstance(leaf, ARRAYS) for _, leaf in leaves(name, value)):
                        setattr(module, name, tree_map(moved, value))
        return self

    def load_weights(self, weights: Any, strict: bool = True) -> Module:
        """Copies `weights` into the parameters and buffers of the same names.

        `weights` is a dict, (name, array) pairs, or the path of a safetensors file. ValueError,
        before any change, for unknown names, other shapes, values that the array's type cannot
        hold (fractions in one of integers), and with `strict` for missing arrays.
        """
        if isinstance(weights, str | os.PathLike):
            from pyloss.io.safetensors import read_safetensors

            weights = {
                name: tensor.values() for name, tensor in read_safetensors(weights).tensors.items()
            }
        own = {**self.parameters(), **self.buffers()}
        weights = {
            k: v if isinstance(v, DeviceArray) else as_array(v, k) for k, v in dict(weights).items()
        }
        problems = [f"{k}: no such parameter" for k in weights if k not in own]
        problems += [
            f"{k}: shape {v.shape}, expected {own[k].shape}"
            if v.shape != own[k].shape
            else f"{k}: values of {v.dtype}, which {own[k].dtype} cannot hold"
            for k, v in weights.items()
            if k in own and (v.shape != own[k].shape or not _holds(own[k].dtype, v))
        ]
        problems += [f"{k}: missing" for k in own if strict and k not in weights]
        if problems:
            raise ValueError(f"these weights do not fit the model:{listed(problems)}")
        for name, value in weights.items():
            own[name][...] = value
        return self

    def save_weights(self, path: str | os.PathLike) -> None:
        """Writes parameters and buffers to a safetensors file, for `load_weights`.

        The stored matrices of a quantized model are not among them: `model.save` writes these.
        """
        from pyloss.io.files import write_safetensors

        arrays = {**self.parameters(), **self.buffers()}
        write_safetensors(path, {name: array_of(value) for name, value in arrays.items()})

    def apply(self, function: Callable[[Module], Any]) -> Module:
        """Calls `function` with every module, this one last."""
        for module in reversed(list(self.modules())):
            function(module)
        return self


def _holds(kind: np.dtype, values: Any) -> bool:
    """Whether an array of type `kind` can hold these values, floats as rounded."""
    given = values.dtype
    if kind.kind == "f" or is_bfloat16(kind):
        return given.kind in "fiub" or is_bfloat16(given)
    if given.kind not in "iub" or isinstance(values, DeviceArray):
        return given == kind
    return np.can_cast(given, kind) or bool(np.array_equal(values.astype(kind), values))


def count_parameters(model: Any) -> tuple[int, int]:
    """How many numbers of a model are trained, and how many it has, stored matrices included."""
    trained = sum(math.prod(array.shape) for array in model.trainable_parameters().values())
    stored = model.stored().values() if hasattr(model, "stored") else ()
    every = (*plain_parameters(model).values(), *stored)
    return trained, sum(math.prod(array.shape) for array in every)


def plain_parameters(model: Any) -> dict[str, Any]:
    """`model.parameters()` without stored matrices, which a model with MLX's methods shows, too."""
    return Module.parameters(model) if isinstance(model, Module) else model.parameters()


def recorded_module(module: Module) -> Recorded | None:
    """What records the calls of a module, as it is now; None if that cannot be."""
    parameters: list[np.ndarray] = []
    constants: list[Any] = []
    changing: list[Module] = []
    for part in module.modules():
        if not vars(type(part)).get("recordable", False):
            return None
        if type(part).recorded_inputs is not Module.recorded_inputs:
            changing.append(part)
        for name, value in vars(part).items():
            value = array_of(value)
            if isinstance(value, DeviceArray):
                return None
            if isinstance(value, Weight):
                constants += [value.handle, *(value.orders or ())]
            elif isinstance(value, WeightStack):
                constants.append(value.handle)
            elif isinstance(value, np.ndarray):
                (constants if name.startswith("_") else parameters).append(value)
    return Recorded(
        parameters, constants, lambda: [a for part in changing for a in part.recorded_inputs()]
    )


def run_recorded(
    module: Module, function: Callable[[Any], Any], x: Any, arrays: Sequence[Any]
) -> Any:
    """`function(x)`, what `module` computes, by its recorded calls where that is possible.

    `arrays` are what else the function is given. The recording is kept with the module until any
    module changes.
    """
    kept = vars(module).get("_recorded")
    if kept is None or kept[0] is not Module.structure:
        kept = Module.structure, recorded_module(module)
        object.__setattr__(module, "_recorded", kept)
    return function(x) if kept[1] is None else kept[1](function, x, arrays)


def value_and_grad(model: Any, function: Callable, has_aux: bool = False) -> Callable:
    """A function that returns `(value, grads)` of `function`, by the trainable parameters.

    `model` is a Module, or another object with `trainable_parameters()` and, for Tensors in place
    of arrays, `trained_attributes()`. `function` returns a scalar, or a tuple that begins with one;
    with `has_aux` it must return `(value, aux)`. `grads` is a flat dict keyed like
    `model.trainable_parameters()`, with zeros for parameters that took no part. While `function`
    runs, the trained attributes of `model` are Tensors: NumPy's functions of them carry gradients
    or raise TypeError.
    """

    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, np.ndarray]]:
        parameters = {path: array_of(value) for path, value in model.trainable_parameters().items()}
        if current_tape() is not None:
            for array in parameters.values():
                refuse_outer(array)
        attributes: list = getattr(model, "trained_attributes", list)()
        with Tape() as tape, shown(attributes, {id(array): array for array in parameters.values()}):
            leaves = {name: tape.watch(array) for name, array in parameters.items()}
            value = run_backward(tape, function(*args, **kwargs), has_aux)
        return value, {name: leaf_gradient(leaf, parameters[name]) for name, leaf in leaves.items()}

    return wrapped
