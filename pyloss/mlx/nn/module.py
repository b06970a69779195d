"""`nn.Module` of MLX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss import nn as own
from pyloss.autograd.scope import OPEN
from pyloss.autograd.tensor import Parameter, Tensor
from pyloss.mlx.core.arrays import array, result, shared, tree_raw
from pyloss.mlx.nn.methods import Methods, own_value


class Module(Methods):
    """MLX's module: arrays are parameters, modules are submodules, in lists and dicts, too.

    It is a pyloss module with MLX's methods: `parameters()` is a nested tree. Attributes that are
    arrays are `mx.array`s when they are read.
    """

    def __init__(self) -> None:
        own.Module.__init__(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):
            cls.__call__ = _taking_both(vars(cls)["__call__"])  # type: ignore[method-assign]

    @property
    def _no_grad(self) -> set[str]:
        """The names of what is frozen, by MLX's name."""
        return self._frozen

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("_") and isinstance(value, np.ndarray | Tensor):
            if type(value) is not Parameter and isinstance(value, Tensor):
                value = self._settled(name, value)
            return shared(value, functools.partial(setattr, self, name))
        return value

    def _settled(self, name: str, value: Any) -> Any:
        """A value that carries a gradient, or its array if the recording has ended."""
        if value._node is not None and value._node.root in OPEN:
            return value
        vars(self)[name] = np.array(value.data)
        return vars(self)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        value = own_value(value)
        if isinstance(value, Tensor):
            if type(vars(self).get(name)) is Parameter:
                super().__setattr__(name, value)  # raises
            # The tape's value takes the place until the recording ends, as MLX's tracers do.
            self._changed(name)
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)

    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        """All arrays, as a tree of dicts and lists."""
        return self.filter_and_map(Methods.valid_parameter_filter)

    def trainable_parameters(self) -> dict[str, Any]:  # type: ignore[override]
        """The arrays that are not frozen, as a tree of dicts and lists."""
        return self.filter_and_map(Methods.trainable_parameter_filter)

    def train(self, mode: bool = True) -> Module:
        """Switches to training, or with `mode=False` to evaluation."""
        for module in self.modules():
            set_mode = getattr(module, "_set_training_mode", None)
            if set_mode is None:
                module._training = mode
            else:
                set_mode(mode)
        return self

    def _set_training_mode(self, mode: bool) -> None:
        self._training = mode

    def _extra_repr(self) -> str:
        return ""

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}({self._extra_repr()}"]
        for name, child in self._children():
            lines += f"({name}): {child!r}".splitlines()
        return lines[0] + ")" if len(lines) == 1 else "\n  ".join(lines) + "\n)"


def _taking_both(call: Callable) -> Callable:
    """A module's computation: of `mx.array`s it gives such, of pyloss's values pyloss's."""

    @functools.wraps(call)
    def computed(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, array)]
        if not given or any(type(x) is array for x in given):
            return call(self, *args, **kwargs)
        return tree_raw(
            call(self, *map(_mx, args), **{key: _mx(value) for key, value in kwargs.items()})
        )

    return computed


def _mx(value: Any) -> Any:
    return result(value) if isinstance(value, np.ndarray | Tensor) else value
