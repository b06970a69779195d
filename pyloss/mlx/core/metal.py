"""mx.metal: there is no Metal here; the functions about memory are mx's."""

from __future__ import annotations

from pyloss.mlx.core.machine import (
    clear_cache,
    device_info,
    get_active_memory,
    get_cache_memory,
    get_peak_memory,
    reset_peak_memory,
    set_cache_limit,
    set_memory_limit,
    set_wired_limit,
)
from pyloss.mlx.core.refused import refusing

__getattr__ = refusing("metal")


def is_available() -> bool:
    """False."""
    return False


__all__ = [
    "clear_cache",
    "device_info",
    "get_active_memory",
    "get_cache_memory",
    "get_peak_memory",
    "is_available",
    "reset_peak_memory",
    "set_cache_limit",
    "set_memory_limit",
    "set_wired_limit",
]
