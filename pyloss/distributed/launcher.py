"""What the environment says about the launcher that started this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

#: launcher, and its variables for the number of processes and for the rank of this one
_VARIABLES = (
    ("mpirun of Open MPI", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK"),
    ("mpirun of MVAPICH", ("MV2_COMM_WORLD_SIZE",), "MV2_COMM_WORLD_RANK"),
    # MPICH, Intel MPI, and srun --mpi=pmi2
    (
        "a launcher with PMI",
        ("PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        "PMI_RANK",
    ),
    ("srun --mpi=pmix", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "PMIX_RANK"),
)


class Launch(NamedTuple):
    """A launcher, the rank that it gave this process, and the number of processes."""

    launcher: str
    rank: int
    size: int


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None


def launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """The launcher of this process by the environment; None if it was started without one.

    Raises ValueError if srun started several processes without MPI: each would take itself for
    the only one, and all would write the same files.
    """
    for launcher, sizes, rank_name in _VARIABLES:
        rank = _number(environ, rank_name)
        size = next((n for name in sizes if (n := _number(environ, name))), None)
        if rank is not None and size is not None and rank < size:
            return Launch(launcher, rank, size)
    # srun alone sets the number of a step's tasks; the script of an sbatch job has none.
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
    if tasks is not None and tasks > 1 and "SLURM_PROCID" in environ:
        raise ValueError(
            f"srun started {tasks} processes without MPI: give srun --mpi=pmix or --mpi=pmi2 "
            "(srun --mpi=list shows what there is), or start one process per run"
        )
    return None
