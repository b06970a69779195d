"""The norm of gradients, and its bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.checks.numbers import real
from pyloss.optim.rows import RowGradient
from pyloss.optim.state import float32
from pyloss.runtime.device import DeviceArray, to_device


def squared_norms(grads: Mapping[str, Any]) -> list[float]:
    """The sum of the squares of each gradient, in float64."""
    arrays = [float32(g.values if isinstance(g, RowGradient) else g) for g in grads.values()]
    places: dict[bool, list[int]] = {True: [], False: []}
    for i, array in enumerate(arrays):
        places[isinstance(array, DeviceArray)].append(i)
    parts = np.zeros((len(arrays), 1))
    _core.sum_squares([arrays[i] for i in places[False]], [parts[i] for i in places[False]])
    if on_device := places[True]:
        found = to_device(np.zeros((len(on_device), 1)), arrays[on_device[0]])
        _core.sum_squares([arrays[i] for i in on_device], list(found))
        parts[on_device] = found.numpy()
    return parts[:, 0].tolist()


def grad_norm(grads: Mapping[str, Any]) -> float:
    """The Euclidean norm of all gradients, summed in float64; nan or inf if any of them is."""
    total = 0.0
    for part in squared_norms(grads):  # not sum(), whose result depends on Python's version
        total += part
    return math.sqrt(total)


def clip_scale(norm: float, max_norm: float | None) -> float:
    """The factor that reduces gradients of norm `norm` to `max_norm`, as in torch and mlx.

    1.0 if `max_norm` is None.
    """
    if max_norm is None or max_norm == math.inf:
        return 1.0
    return min(real(max_norm, "max_norm", 0) / (norm + 1e-6), 1.0)


def clip_grad_norm(grads: Mapping[str, Any], max_norm: float) -> tuple[dict[str, Any], float]:
    """Gradients scaled so that their norm is at most `max_norm`, and their norm before."""
    norm = grad_norm(grads)
    scale = np.float32(clip_scale(norm, max_norm))
    return {name: grad if scale == 1 else grad * scale for name, grad in grads.items()}, norm
