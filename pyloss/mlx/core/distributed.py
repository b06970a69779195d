"""mx.distributed over `pyloss.distributed`: the processes that mpirun or srun started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss import distributed as own
from pyloss.distributed import Group
from pyloss.mlx.core.arrays import array, of, raw
from pyloss.mlx.core.elementwise import constant
from pyloss.mlx.core.refused import refusing

__getattr__ = refusing("distributed")


def is_available(backend: str = "any") -> bool:
    """Whether mpi4py is installed, which groups of several processes need."""
    return backend in ("any", "mpi") and own.is_available()


def init(strict: bool = False, backend: str = "any", all_gather_factory: Any = None) -> Group:
    """The group of all processes; a group of one outside of a launcher, unless `strict`."""
    if backend not in ("any", "mpi"):
        raise ValueError(f"backend is {backend!r}; pyloss's processes talk by MPI: 'any' or 'mpi'")
    if all_gather_factory is not None:
        raise ValueError("all_gather_factory is for MLX's own backends; pyloss's is MPI")
    group = own.init()
    if strict and group.size() == 1:
        raise RuntimeError("strict=True, and this process was not started by mpirun or srun")
    return group


def _value(x: Any, name: str) -> np.ndarray:
    return np.asarray(constant(raw(array(x) if not hasattr(x, "dtype") else x), name))


def all_sum(x: Any, *, group: Group | None = None, stream: Any = None) -> array:
    """The sum over all processes."""
    value = _value(x, "distributed.all_sum")
    return of(np.array((group or init()).all_sum(value)))


def _gathered(x: Any, name: str, group: Group | None) -> list[np.ndarray]:
    return (group or init()).all_gather(_value(x, name))


def all_gather(x: Any, *, group: Group | None = None, stream: Any = None) -> array:
    """The arrays of all processes, one after the other along the first axis."""
    parts = _gathered(x, "distributed.all_gather", group)
    return of(np.concatenate([np.atleast_1d(part) for part in parts]))


def _reduced(x: Any, name: str, function: Callable, group: Group | None) -> array:
    return of(np.asarray(function(np.stack(_gathered(x, name, group)), 0)))


def all_max(x: Any, *, group: Group | None = None, stream: Any = None) -> array:
    """The largest elements of all processes."""
    return _reduced(x, "distributed.all_max", np.max, group)


def all_min(x: Any, *, group: Group | None = None, stream: Any = None) -> array:
    """The smallest elements of all processes."""
    return _reduced(x, "distributed.all_min", np.min, group)


__all__ = ["Group", "all_gather", "all_max", "all_min", "all_sum", "init", "is_available"]
