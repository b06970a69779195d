"""Gradients of several ranks: mlx-lm's `average_gradients`, and one buffer for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.checks.numbers import whole
from pyloss.distributed.group import Group
from pyloss.distributed.starting import group_of
from pyloss.runtime.device import DeviceArray, to_device


def average_gradients(
    gradients: Any,
    group: Group | None = None,
    all_reduce_size: int = 32 * 1024**2,
    communication_stream: Any = None,
) -> Any:
    """The mean of the ranks' gradients, as mlx's function of this name has it.

    Args:
        gradients: arrays in dicts, lists and tuples, of the same structure on all ranks.
        group: None is the group of all processes.
        all_reduce_size: arrays go together until they have this many bytes; 0: each by itself. The
            result has the same bits for any number.
        communication_stream: accepted for compatibility with mlx.
    """
    group = group_of(group)
    limit = whole(all_reduce_size, "all_reduce_size", 0)
    if group.size() == 1:
        return gradients
    leaves = list(_leaves(gradients))
    means: list[Any] = [None] * len(leaves)
    waiting: list[int] = []
    held = 0
    for index, leaf in enumerate(leaves):
        if waiting and leaf.dtype != leaves[waiting[0]].dtype:
            _average(group, leaves, means, waiting)
            waiting, held = [], 0
        waiting.append(index)
        held += leaf.nbytes
        if held >= limit:
            _average(group, leaves, means, waiting)
            waiting, held = [], 0
    if waiting:
        _average(group, leaves, means, waiting)
    return _rebuilt(gradients, iter(means))


def _average(group: Group, leaves: list[Any], means: list[Any], chosen: list[int]) -> None:
    flat = np.concatenate([np.asarray(leaves[index]).reshape(-1) for index in chosen])
    flat = group.all_sum(flat) / np.asarray(group.size(), flat.dtype)
    begin = 0
    for index in chosen:
        leaf = leaves[index]
        mean = flat[begin : begin + leaf.size].reshape(leaf.shape)
        means[index] = to_device(mean, leaf) if isinstance(leaf, DeviceArray) else mean
        begin += leaf.size


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _leaves(value)
    elif hasattr(tree, "dtype") and hasattr(tree, "shape"):
        yield tree
    else:
        raise TypeError(
            f"gradients hold a {type(tree).__name__}; they are arrays in dicts or lists"
        )


def _rebuilt(tree: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _rebuilt(value, leaves) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_rebuilt(value, leaves) for value in tree)
    return next(leaves)


class FlatGradients:
    """The gradients of all parameters as parts of one float32 array, which is summed at once.

    Attributes:
        flat: the array.
        parts: views of it by the parameters' names, with their shapes.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.flat = np.zeros(sum(int(array.size) for array in parameters.values()), np.float32)
        self.parts: dict[str, np.ndarray] = {}
        begin = 0
        for name, array in parameters.items():
            end = begin + int(array.size)
            self.parts[name] = self.flat[begin:end].reshape(array.shape)
            begin = end

    def add(self, gradients: Mapping[str, Any], weight: float) -> None:
        """Add `weight` times the gradients."""
        for name, gradient in gradients.items():
            host = np.ascontiguousarray(gradient, np.float32).reshape(-1)
            _core.axpy(weight, host, self.parts[name].reshape(-1))

    def clear(self) -> None:
        self.flat[...] = 0
