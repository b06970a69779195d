"""MLX's methods of modules, for pyloss's modules: `with_mlx_methods(model)`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from pyloss import nn
from pyloss.autograd.scope import local
from pyloss.autograd.tensor import Parameter, Tensor
from pyloss.mlx.core import dtypes
from pyloss.mlx.core.arrays import array, result, shared, tree_raw
from pyloss.mlx.core.files import load, save_safetensors, savez
from pyloss.mlx.nn.stored import GROUPS, show_stored
from pyloss.mlx.utils import (
    child_of,
    module_items,
    place_of,
    stored_floats,
    tree_flatten,
    tree_unflatten,
)
from pyloss.nn.display import ArrayTable
from pyloss.nn.places import TrainedPlaces, key_named
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

M = TypeVar("M", bound=nn.Module)

Filter = Callable[[Any, str, Any], bool]


def own_value(value: Any) -> Any:
    """A value as a module keeps it: arrays become ndarrays of its own, in containers too.

    What carries a gradient is kept as such until the recording ends.
    """
    if type(value) is array:
        found = value._value
        if isinstance(found, Tensor) and local.tape is not None and found._node is not None:
            return found if not isinstance(found, Parameter) else found.data
        return np.array(value.data)
    if isinstance(value, list | tuple | dict) and _holds_array(value):
        if isinstance(value, dict):
            return {key: own_value(item) for key, item in value.items()}
        return type(value)(own_value(item) for item in value)
    return value


def _holds_array(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_array, value.values()))
    return (
        any(map(_holds_array, value)) if isinstance(value, list | tuple) else type(value) is array
    )


def set_value(model: nn.Module, owner: Any, key: str, value: Any) -> None:
    """Puts an array or module into the place that `place_of` found."""
    if isinstance(owner, nn.Module):
        if isinstance(value, Tensor) and not isinstance(owner, Methods):
            raise TypeError(
                f"{key} is an array of a {type(owner).__name__}, which takes values without "
                "gradients: nn.value_and_grad(model, f) differentiates by a model's parameters"
            )
        setattr(owner, key, value)
        return
    model._changed(key)
    vars(model).pop("_trained", None)
    owner[key_named(owner, key) if isinstance(owner, dict) else int(key)] = value


class Standing(type):
    """The type of MLX's classes of which layers of pyloss are instances, too.

    Scripts ask so for the layers of a model, whose classes are pyloss's. `_stands_for` and
    `_but_not` of a class are those of pyloss that it has, and has not, as instances.
    """

    _stands_for: type
    _but_not: tuple[type, ...]

    def __instancecheck__(cls, x: Any) -> bool:
        if super().__instancecheck__(x):
            return True
        own = vars(cls)
        return "_stands_for" in own and (
            isinstance(x, own["_stands_for"]) and not isinstance(x, own.get("_but_not", ()))
        )


def _stores_floats(module: nn.Module) -> bool:
    """Whether a module's weight is a stored matrix of floats, which can become an array."""
    stored = vars(module).get("weight")
    return isinstance(stored, Weight | WeightStack) and stored.is_float


class Methods(nn.Module):
    """MLX's methods in place of pyloss's: trees, `update`, `freeze` with MLX's arguments, dicts.

    A module is asked like MLX's, which are dicts: `"bias" in layer`, `layer["weight"]`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and not isinstance(value, Methods):
            with_mlx_methods(value)
        super().__setattr__(name, own_value(value) if type(value) is array else value)

    def _trained_places(self) -> TrainedPlaces:
        """As pyloss's; stored float weights that are not frozen become float32 arrays before."""
        kept = vars(self).get("_trained")
        if kept is None or not kept.holds():
            for module in self.modules():
                if _stores_floats(module) and "weight" not in module._frozen:
                    module.weight = vars(module)["weight"].dequantize()
        return super()._trained_places()

    # As a dict

    @property
    def state(self) -> nn.Module:
        """The module, as a tree of all its arrays."""
        return self

    def items(self) -> Iterator[tuple[str, Any]]:
        """Arrays, submodules and containers, by name."""
        return ((k, _shown(self, k, v)) for k, v in module_items(self))

    def keys(self) -> list[str]:
        """The names of `items`."""
        return [name for name, _ in module_items(self)]

    def values(self) -> list[Any]:
        """The values of `items`."""
        return [value for _, value in self.items()]

    def get(self, key: str, default: Any = None) -> Any:
        """The array, submodule or container of this name."""
        return self[key] if key in self else default

    def __contains__(self, key: object) -> bool:
        return any(name == key for name, _ in module_items(self))

    def __getitem__(self, key: str) -> Any:
        return _shown(self, key, vars(self)[key])

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def pop(self, key: str, *default: Any) -> Any:
        """Removes the array, submodule or container of this name, and returns it."""
        if key not in self and default:
            return default[0]
        value = self[key]
        delattr(self, key)
        return value

    # Trees

    def parameters(self) -> dict[str, Any]:
        """As pyloss's, by dotted name, and the arrays of stored matrices of floats."""
        found = ArrayTable(nn.plain_parameters(self))
        for path, stored in self.stored().items():
            floats = stored_floats(stored) if isinstance(stored, Weight) else None
            if floats is not None:
                found[path] = floats
        return found

    @staticmethod
    def is_module(value: Any) -> bool:
        """Whether a value is a module."""
        return isinstance(value, nn.Module)

    @staticmethod
    def valid_child_filter(module: Any, key: str, value: Any) -> bool:
        """Modules and what may hold some."""
        return isinstance(value, nn.Module | dict | list)

    @staticmethod
    def valid_parameter_filter(module: Any, key: str, value: Any) -> bool:
        """Arrays, and what may hold some, unless their names begin with "_"."""
        return isinstance(value, nn.Module | dict | list | array) and not key.startswith("_")

    @staticmethod
    def trainable_parameter_filter(module: Any, key: str, value: Any) -> bool:
        """As `valid_parameter_filter`, without what is frozen."""
        return Methods.valid_parameter_filter(module, key, value) and key not in module._frozen

    def filter_and_map(
        self, filter_fn: Filter, map_fn: Callable | None = None, is_leaf_fn: Filter | None = None
    ) -> dict[str, Any]:
        """The tree of what `filter_fn(module, key, value)` chooses, with `map_fn` of its leaves.

        A leaf is what `is_leaf_fn(module, key, value)` says; by default an array.
        """
        return _chosen(
            self,
            filter_fn,
            map_fn or (lambda x: x),
            is_leaf_fn or (lambda m, k, v: not isinstance(v, nn.Module | dict | list)),
        )

    def children(self) -> dict[str, Any]:  # type: ignore[override]
        """The submodules as a tree."""
        return self.filter_and_map(
            self.valid_child_filter, is_leaf_fn=lambda m, k, v: isinstance(v, nn.Module)
        )

    def leaf_modules(self) -> dict[str, Any]:
        """The submodules without submodules, as a tree."""
        return self.filter_and_map(
            self.valid_child_filter,
            is_leaf_fn=lambda m, k, v: isinstance(v, nn.Module) and not any(v._children()),
        )

    def named_modules(self, prefix: str = "") -> list[tuple[str, nn.Module]]:  # type: ignore[override]
        """This module and all below it with dotted names."""
        return list(self._named_modules(prefix, ()))

    def modules(self) -> list[nn.Module]:  # type: ignore[override]
        """This module and all below it."""
        return [module for _, module in self.named_modules()]

    def apply_to_modules(self, apply_fn: Callable[[str, nn.Module], Any]) -> nn.Module:
        """Calls `apply_fn(dotted name, module)` for this module and all below it."""
        for name, module in self.named_modules():
            apply_fn(name, module)
        return self

    def update(self, parameters: Any, strict: bool = True) -> nn.Module:
        """Sets the arrays of a tree, nested or by dotted names, which may be a part of the model's.

        ValueError with `strict` for a name that the module does not have, and for no array.
        """
        for path, value in tree_flatten(parameters):
            try:
                owner, key = place_of(self, path)
                current = child_of(owner, key)
            except KeyError:
                if strict:
                    raise ValueError(f'Module does not have parameter named "{path}".') from None
                continue
            if not isinstance(current, array) and not (
                key == "weight" and isinstance(owner, nn.Module) and _stores_floats(owner)
            ):
                if strict:
                    raise ValueError(f'"{path}" is a {type(current).__name__}, not a parameter.')
                continue
            if not isinstance(value, array):
                if strict:
                    raise ValueError(f'Received invalid type: {type(value).__name__} for "{path}".')
                continue
            set_value(self, owner, key, own_value(value))
        return self

    def apply(self, map_fn: Callable, filter_fn: Filter | None = None) -> nn.Module:
        """Sets `map_fn(array)` in place of each array that the filter chooses, all by default."""
        return self.update(self.filter_and_map(filter_fn or Methods.valid_parameter_filter, map_fn))

    def update_modules(self, modules: Any, strict: bool = True) -> nn.Module:
        """Sets the modules of a tree, nested or by dotted names, in place of submodules.

        ValueError with `strict` for a name that no submodule has, and for no module.
        """
        for path, new in tree_flatten(modules, is_leaf=self.is_module):
            try:
                owner, key = place_of(self, path)
                current = child_of(owner, key)
            except KeyError:
                if strict:
                    raise ValueError(f'Module does not have sub-module named "{path}".') from None
                continue
            if isinstance(current, nn.Module) and isinstance(new, nn.Module):
                set_value(self, owner, key, new)
            elif strict:
                raise ValueError(f'Received invalid type: {type(new).__name__} for "{path}".')
        return self

    def freeze(  # type: ignore[override]
        self, *, recurse: bool = True, keys: Any = None, strict: bool = False
    ) -> nn.Module:
        """Excludes parameters from training: all, or those named by `keys` (a name or a list).

        `recurse=False`: of this module only. KeyError with `strict` for a name that is not there.
        """
        for module, names in self._named(recurse, keys, strict):
            module._frozen = module._frozen | names
        return self

    def unfreeze(  # type: ignore[override]
        self, *, recurse: bool = True, keys: Any = None, strict: bool = False
    ) -> nn.Module:
        """The opposite of `freeze`. Stored float weights become float32 arrays when they train."""
        for module, names in self._named(recurse, keys, strict):
            module._frozen = module._frozen - names if keys is not None else set()
        return self

    def _named(self, recurse: bool, keys: Any, strict: bool) -> list[tuple[nn.Module, set[str]]]:
        """The modules, with the names that `keys` means in each: of arrays and containers."""
        modules = self.modules() if recurse else [self]
        wanted = None if keys is None else set(keys if isinstance(keys, list | tuple) else [keys])
        if strict and wanted is not None:
            there = {name for module in modules for name, _ in module_items(module)}
            for key in sorted(wanted - there):
                raise KeyError(f"Module doesn't contain member {key}.")
        found = []
        for module in modules:
            own = {name for name, _, _ in module._own_arrays()}
            own |= {"weight"} if _stores_floats(module) else set()
            if wanted is None:
                found.append((module, own))
            else:
                parts = {name for name in own if name.split(".")[0] in wanted}
                found.append((module, wanted | parts))
        return found

    def set_dtype(
        self,
        dtype: Any,
        predicate: Callable[[Any], bool] | None = lambda x: dtypes.issubdtype(x, dtypes.floating),
    ) -> None:
        """Casts the parameters whose type `predicate` holds for: those of floats by default."""
        chosen = predicate or (lambda kind: True)
        self.apply(lambda x: x.astype(dtype) if chosen(x.dtype) else x)

    def load_weights(self, file_or_weights: Any, strict: bool = True) -> nn.Module:
        """Sets arrays by dotted names: of a .safetensors or .npz file, a dict, or pairs.

        With `strict` names and shapes must be those of the model; otherwise only names that the
        model has are used.
        """
        is_file = isinstance(file_or_weights, str | os.PathLike)
        weights = dict(load(file_or_weights) if is_file else file_or_weights)
        if strict:
            self._check_weights(weights)
        return self.update(tree_unflatten(list(weights.items())) if weights else {}, strict=False)

    def _check_weights(self, weights: dict[str, Any]) -> None:
        """ValueError unless weights fit the parameters exactly."""
        own = tree_flatten(self.parameters(), destination={})
        for names, text in (
            (weights.keys() - own.keys(), "Received {} parameters not in model: \n{}."),
            (own.keys() - weights.keys(), "Missing {} parameters: \n{}."),
        ):
            if names:
                raise ValueError(text.format(len(names), ",\n".join(sorted(names))))
        for name, value in own.items():
            new = weights[name]
            if not isinstance(new, array):
                raise ValueError(f"Expected mx.array but received {type(new)} for parameter {name}")
            if new.shape != value.shape:
                raise ValueError(
                    f"Expected shape {value.shape} but received shape {new.shape} for "
                    f"parameter {name}"
                )

    def save_weights(self, file: Any) -> None:
        """Writes the parameters to a .safetensors or .npz file."""
        arrays = tree_flatten(self.parameters(), destination={})
        if os.fspath(file).endswith(".npz"):
            savez(file, **arrays)
        elif os.fspath(file).endswith(".safetensors"):
            save_safetensors(file, arrays)
        else:
            raise ValueError(
                f"Unsupported file extension for {file}. Use '.npz' or '.safetensors'."
            )


def _shown(module: Any, key: str, value: Any) -> Any:
    """A module's value as MLX's code gets it: an array in place of an ndarray or stored floats."""
    if isinstance(value, Weight):
        floats = stored_floats(value)
        value = value if floats is None else floats
    if isinstance(value, np.ndarray | Tensor):
        return shared(value, lambda new: setattr(module, key, new))
    return value


def _chosen(module: Any, keep: Filter, convert: Callable, is_leaf: Filter) -> dict[str, Any]:
    found = {}
    for key, value in module_items(module):
        given = _shown(module, key, value)
        if keep(module, key, given):
            found[key] = _converted(module, key, given, keep, convert, is_leaf)
    return found


def _converted(
    module: Any, key: str, value: Any, keep: Filter, convert: Callable, is_leaf: Filter
) -> Any:
    if is_leaf(module, key, value):
        return convert(value)
    if isinstance(value, nn.Module):
        return _chosen(value, keep, convert, is_leaf)
    pairs: Iterable[tuple[Any, Any]] = (
        value.items() if isinstance(value, dict) else enumerate(value)
    )
    parts = []
    for name, part in pairs:
        path, given = f"{key}.{name}", _shown(module, key, part)
        kept = keep(module, path, given)
        parts.append(
            (name, _converted(module, path, given, keep, convert, is_leaf) if kept else {})
        )
    return dict(parts) if isinstance(value, dict) else [part for _, part in parts]


#: The class with MLX's methods for each class of modules.
_CLASSES: dict[type, type] = {}


def _of_arrays(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A module's computation, which gives `mx.array`s for `mx.array`s."""
    call = super(Methods, self).__call__
    if not any(type(x) is array for x in (*args, *kwargs.values())):
        return call(*args, **kwargs)
    return result(call(*tree_raw(args), **tree_raw(kwargs)))


def _to_quantized(
    self: Any,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    quantize_input: bool = False,
) -> nn.Module:
    """This layer of pyloss with a quantized weight."""
    from pyloss.mlx.nn.layers import quantized_like

    return quantized_like(self, group_size, bits, mode, quantize_input)


@functools.wraps(nn.Projecting.__call__)
def _projected(self: Any, x: Any) -> Any:
    """`_of_arrays` of a layer that is one projection."""
    return _of_arrays(self, x)


def class_with_methods(cls: type) -> type:
    """The class of pyloss's modules of this class that have MLX's methods."""
    if issubclass(cls, Methods):
        return cls
    if cls not in _CLASSES:
        # A class promises `recordable` for itself, not for its subclasses: these have its code.
        more = {name: vars(cls)[name] for name in ("recordable",) if name in vars(cls)}
        # pyloss's layers know a projection's computation by `__wrapped__`.
        more["__call__"] = _projected if cls.__call__ is nn.Projecting.__call__ else _of_arrays
        if cls in (nn.Linear, nn.Embedding):
            more["to_quantized"] = _to_quantized
        if issubclass(cls, nn.QuantizedLinear | nn.QuantizedEmbedding | nn.QuantizedSwitchLinear):
            more |= GROUPS
        _CLASSES[cls] = type(cls.__name__, (Methods, cls), {"__module__": cls.__module__, **more})
    return _CLASSES[cls]


def with_mlx_methods(model: M) -> M:
    """Gives a pyloss module, and all modules in it, MLX's methods; returns the same object.

    Afterwards `model.update(tree)`, `freeze(recurse=, keys=, strict=)`, `unfreeze`, `apply`,
    `update_modules`, `apply_to_modules`, `leaf_modules`, `children`, `named_modules`,
    `filter_and_map`, `set_dtype`, `load_weights(path | pairs, strict)`, `save_weights`, and
    `"bias" in layer` are MLX's. The model computes and trains as before, and pyloss's functions
    take it. Of `mx.array`s it computes such: `model(mx.array(tokens))`. `parameters()` and
    `trainable_parameters()` stay flat dicts of ndarrays by dotted name, which are trees to
    `mlx.utils` (`tree_flatten` gives `mx.array`s). Modules that are put into it later need a call
    of their own, unless they are MLX's.
    """
    for _, module in list(model._named_modules("", ())):
        cls = class_with_methods(type(module))
        if cls is not type(module):
            object.__setattr__(module, "__class__", cls)
            show_stored(vars(module).get("weight"))
            if _stores_floats(module):  # which pyloss does not train
                module._frozen = module._frozen | {"weight"}
    model._changed("")
    vars(model).pop("_trained", None)
    return model
