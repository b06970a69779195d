"""`init`: finds the launcher, joins the other processes, and sets up this one beside them."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from pyloss.checks.numbers import shown
from pyloss.distributed import faults, placement
from pyloss.distributed.group import Group
from pyloss.distributed.launcher import launch
from pyloss.io.console import be_piped

#: What `init` takes: MPI under a launcher, no MPI, or MPI whatever the environment says.
BACKENDS = ("auto", "off", "mpi")

_group: Group | None = None


def is_available() -> bool:
    """Whether mpi4py is installed, which groups of several processes need."""
    return importlib.util.find_spec("mpi4py") is not None


def init(backend: str = "auto") -> Group:
    """The group of all processes that the launcher started. Later calls return the same group.

    Args:
        backend: "auto" uses MPI where the environment is that of mpirun, srun or another launcher
            of several processes; "mpi" always does; "off" makes a group of one, whoever started
            the process.

    The first call sets the number of threads to this process's share of the machine's processors,
    unless PYLOSS_NUM_THREADS or OMP_NUM_THREADS say it. From then on an exception that ends one
    process ends all of them.

    Raises:
        ImportError: mpi4py is not installed (the message names the extra), or its MPI is another
            than the launcher's.
        ValueError: an unknown backend, a second call with another one than the first, or srun
            started several processes without MPI.
    """
    global _group
    if backend not in BACKENDS:
        raise ValueError(f"backend is {shown(backend)}; allowed: {', '.join(BACKENDS)}")
    if _group is not None:
        mpi = type(_group) is not Group
        if backend != "auto" and mpi != (backend == "mpi"):
            raise ValueError(
                f"backend is {backend!r}, and the processes have been joined as "
                f"{_group!r}: choose it in the first call"
            )
        return _group
    _group = Group() if backend == "off" else _joined(backend)
    return _group


def _joined(backend: str) -> Group:
    found = launch()
    if backend == "auto" and (found is None or found.size == 1):
        return Group()
    if not is_available():
        by = "" if found is None else f"{found.launcher} started {found.size} processes, and "
        raise ImportError(
            f"{by}working together over MPI needs the package mpi4py: pip install "
            '"pyloss[mpi]" (--distributed off lets each process work alone)'
        )
    from pyloss.distributed.mpi import MPIGroup

    group = MPIGroup(expected=None if found is None else found.size)
    if group.size() > 1:
        faults.end_all_together(group)
        placement.share(group)
        be_piped()
        if group.rank():
            # Rank 0 warns for all; an error is said by the rank that meets it.
            logging.getLogger("pyloss").setLevel(logging.ERROR)
    return group


def group_of(group: Any = None) -> Group:
    """The group that an argument `group` means: None is that of all processes."""
    return init() if group is None else group
