"""The memory of this process and of the machine."""

from __future__ import annotations

import os
import sys


def peak_memory() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    # On Linux getrusage is wrong: a new process inherits the peak of its parent.
    listed = _listed("/proc/self/status", "VmHWM")
    if listed is not None:
        return listed
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def mapped_memory() -> int:
    """Return the resident bytes of mapped files, which processes share; 0 where not known."""
    return _listed("/proc/self/status", "RssFile") or 0


def total_memory() -> int | None:
    """Return the memory of the machine in bytes; None where it is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def free_memory() -> int | None:
    """Return the memory that processes can still get, in bytes; None where it is not known."""
    return _listed("/proc/meminfo", "MemAvailable")


def _listed(path: str, key: str) -> int | None:
    """The bytes of the line "key: number kB" of a file of Linux."""
    try:
        with open(path, encoding="ascii") as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return None
