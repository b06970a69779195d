"""mlx.nn.init: functions that give an array's first values, by pyloss's random state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss.mlx.core import creation, random
from pyloss.mlx.core.arrays import array, of
from pyloss.mlx.core.dtypes import float32
from pyloss.mlx.core.refused import refusing
from pyloss.nn.init import _fans

__getattr__ = refusing("init")

Initializer = Callable[..., array]


def constant(value: float, dtype: Any = float32) -> Initializer:
    """`value` everywhere."""
    return lambda a: creation.full(a.shape, value, dtype)


def normal(mean: float = 0.0, std: float = 1.0, dtype: Any = float32) -> Initializer:
    """Normal."""
    return lambda a: random.normal(a.shape, dtype, mean, std)


def uniform(low: float = 0.0, high: float = 1.0, dtype: Any = float32) -> Initializer:
    """Even in [low, high)."""
    return lambda a: random.uniform(low, high, a.shape, dtype)


def identity(dtype: Any = float32) -> Initializer:
    """The identity matrix."""

    def initializer(a: Any) -> array:
        if len(a.shape) != 2 or a.shape[0] != a.shape[1]:
            raise ValueError(
                f"The input array must be a square matrix but got shape {tuple(a.shape)}"
            )
        return creation.eye(a.shape[0], dtype=dtype)

    return initializer


def glorot_normal(dtype: Any = float32) -> Initializer:
    """Normal with deviation gain sqrt(2 / (in + out))."""

    def initializer(a: Any, gain: float = 1.0) -> array:
        std = gain * math.sqrt(2.0 / sum(_fans(a.shape, "glorot_normal")))
        return random.normal(a.shape, dtype, scale=std)

    return initializer


def glorot_uniform(dtype: Any = float32) -> Initializer:
    """Even in +-gain sqrt(6 / (in + out))."""

    def initializer(a: Any, gain: float = 1.0) -> array:
        limit = gain * math.sqrt(6.0 / sum(_fans(a.shape, "glorot_uniform")))
        return random.uniform(-limit, limit, a.shape, dtype)

    return initializer


def _fan(a: Any, mode: str) -> int:
    inputs, outputs = _fans(a.shape, "he")
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"Invalid mode: {mode}. Valid modes are: fan_in, fan_out")
    return inputs if mode == "fan_in" else outputs


def he_normal(dtype: Any = float32) -> Initializer:
    """Normal with deviation gain / sqrt(fan)."""

    def initializer(a: Any, mode: str = "fan_in", gain: float = 1.0) -> array:
        return random.normal(a.shape, dtype, scale=gain / math.sqrt(_fan(a, mode)))

    return initializer


def he_uniform(dtype: Any = float32) -> Initializer:
    """Even in +-gain sqrt(3 / fan)."""

    def initializer(a: Any, mode: str = "fan_in", gain: float = 1.0) -> array:
        limit = gain * math.sqrt(3.0 / _fan(a, mode))
        return random.uniform(-limit, limit, a.shape, dtype)

    return initializer


def sparse(
    sparsity: float, mean: float = 0.0, std: float = 1.0, dtype: Any = float32
) -> Initializer:
    """Normal, with a share of each row 0."""

    def initializer(a: Any) -> array:
        if len(a.shape) != 2:
            raise ValueError(f"Only tensors with 2 dimensions are supported, got {a.shape}")
        count = math.ceil(sparsity * a.shape[1])
        order = np.argsort(random.uniform(shape=a.shape).data, 1)
        values = np.array(random.normal(a.shape, dtype, mean, std).data)
        np.put_along_axis(values, order[:, :count], 0, 1)
        return of(values)

    return initializer


def orthogonal(gain: float = 1.0, dtype: Any = float32) -> Initializer:
    """An orthogonal matrix times `gain`."""

    def initializer(a: Any) -> array:
        if len(a.shape) != 2:
            raise ValueError(f"Orthogonal initialization requires a 2D array, got {a.shape}")
        size = max(a.shape)
        q, r = np.linalg.qr(random.normal((size, size)).data)
        q = (q * np.sign(np.diag(r)))[: a.shape[0], : a.shape[1]]
        return of((gain * q).astype(dtype))

    return initializer
