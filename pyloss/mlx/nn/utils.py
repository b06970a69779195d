"""mlx.nn.utils: gradients by a module's parameters, checkpoints, means over processes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pyloss import nn as own
from pyloss.distributed import Group, average_gradients as mean_of_gradients
from pyloss.mlx.core.arrays import of, result, tree_raw
from pyloss.mlx.core.creation import zeros_like
from pyloss.mlx.core.gradients import checkpoint as checkpointed
from pyloss.mlx.core.refused import refusing
from pyloss.mlx.nn.module import Module
from pyloss.mlx.utils import tree_map, tree_map_with_path

__getattr__ = refusing("nn")


class _Flat:
    """A model as pyloss's `value_and_grad` asks for it: parameters by dotted name."""

    def __init__(self, model: own.Module):
        self._model = model

    def trainable_parameters(self) -> dict[str, Any]:
        return own.Module.trainable_parameters(self._model)

    def trained_attributes(self) -> list[tuple[dict[str, Any], str]]:
        return self._model.trained_attributes()


def value_and_grad(model: own.Module, fn: Callable) -> Callable:
    """A function that returns `(value, gradients)` of `fn` by the model's trainable parameters.

    `fn` returns a scalar, or a tuple that begins with one. The gradients have the form of
    `model.trainable_parameters()`: a tree, or a flat dict for a model of pyloss.
    """

    def inner(*args: Any, **kwargs: Any) -> Any:
        return tree_raw(fn(*args, **kwargs))

    differentiated = own.value_and_grad(_Flat(model), inner)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value, grads = differentiated(*args, **kwargs)
        found = {name: of(grad) for name, grad in grads.items()}
        if not isinstance(model, Module):
            return result(value), found
        # An array that is shared by two places, and one of whole numbers, has zeros there.
        tree = tree_map_with_path(
            lambda path, p: found[path] if path in found else zeros_like(p),
            model.trainable_parameters(),
        )
        return result(value), tree

    return wrapped


def checkpoint(module: own.Module, fn: Callable | None = None) -> Callable:
    """`fn`, or the module, which runs again in backward instead of keeping what it computed.

    Gradients of the module's parameters are computed, too.
    """
    function = module if fn is None else fn

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)  # type: ignore[operator]

    return checkpointed(call)


def average_gradients(
    gradients: Any,
    group: Group | None = None,
    all_reduce_size: int = 32 * 1024**2,
    communication_stream: Any = None,
) -> Any:
    """The mean of the processes' gradients, a tree; see `pyloss.distributed.average_gradients`."""
    plain = tree_map(lambda g: g.data, gradients)
    return result(mean_of_gradients(plain, group, all_reduce_size, communication_stream))
