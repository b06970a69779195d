"""The arrays that optimizers keep for each parameter, and given arrays and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pyloss import _core
from pyloss.autograd.tensor import Tensor
from pyloss.checks.arrays import as_array
from pyloss.checks.numbers import real, shown, whole
from pyloss.runtime.device import DeviceArray, empty, is_bfloat16

Arrays = dict[str, np.ndarray]


class Owner(Protocol):
    """The optimizer whose count and rate a `State` reads and sets."""

    step: int
    learning_rate: Any


def empty_like(array: Any, shape: tuple[int, ...] | None = None) -> Any:
    """An uninitialized float32 array where `array` is, of its shape or another one."""
    wanted = tuple(array.shape) if shape is None else shape
    return (
        empty(wanted, np.float32, array) if isinstance(array, DeviceArray) else _core.empty(wanted)
    )


def in_betas(betas: Sequence[float]) -> tuple[float, float]:
    if isinstance(betas, str) or not hasattr(betas, "__len__") or len(betas) != 2:
        raise ValueError(
            f"betas is {shown(betas)}; it must be two numbers of at least 0 and below 1"
        )
    return real(betas[0], "betas[0]", 0, below=1), real(betas[1], "betas[1]", 0, below=1)


def float32(array: Any) -> Any:
    """`array` as contiguous float32; a copy only if it has another type or layout."""
    if isinstance(array, DeviceArray):
        return array.astype(np.float32, copy=False)
    return np.ascontiguousarray(array, np.float32)


def parameters_of(model: Any) -> Mapping[str, Any]:
    """The trainable parameters of a model, or a mapping of them as it is.

    TypeError while a function of the model is differentiated.
    """
    found = model if isinstance(model, Mapping) else model.trainable_parameters()
    if any(isinstance(x, Tensor) for x in found.values()):
        raise TypeError(
            "the model's parameters are being differentiated: change them when the gradients are "
            "there, outside of the function"
        )
    return found


def check_parameter(name: str, parameter: Any) -> None:
    """ValueError unless an array can be updated in place."""
    there = isinstance(parameter, DeviceArray)
    contiguous = there or parameter.flags.c_contiguous
    writable = there or parameter.flags.writeable
    if parameter.dtype != np.float32 or not (contiguous and writable):
        raise ValueError(
            f"parameter {name!r} is {parameter.dtype}, contiguous: {contiguous}, writable: "
            f"{writable}; only writable C-contiguous float32 arrays can be updated in place"
        )


def saved(value: Any, key: str) -> np.ndarray:
    """A flat float32 copy of the saved state's array under `key`.

    ValueError if it is not an array of numbers.
    """
    array = as_array(value, f"optimizer state {shown(key)}")
    if array.dtype.kind not in "fiu" and not is_bfloat16(array.dtype):
        raise ValueError(
            f"optimizer state has {shown(value)} for {shown(key)}; it must be an array of numbers"
        )
    return np.array(array, np.float32).reshape(-1)


def on_host(array: Any, copy: bool) -> np.ndarray:
    """A kept array as a NumPy array, by default one that later updates do not change."""
    return array.copy() if copy and isinstance(array, np.ndarray) else np.asarray(array)


class State(dict[str, Any]):
    """The arrays of each parameter. As in mlx, `step` and `learning_rate` are the optimizer's."""

    OWN = ("step", "learning_rate")

    def __init__(self, owner: Owner, arrays: Mapping[str, Arrays]) -> None:
        super().__init__()
        self._owner = owner
        for name, value in arrays.items():
            self[name] = value

    def __missing__(self, key: str) -> Any:
        if key in self.OWN:
            return getattr(self._owner, key)
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "step":
            self._owner.step = whole(value, "state['step']", 0)
        elif key == "learning_rate":
            self._owner.learning_rate = value
        else:
            super().__setitem__(key, value)
