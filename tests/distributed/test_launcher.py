"""Launchers are known by what they put into the environment."""

import pytest

from pyloss.distributed import launch
from pyloss.distributed.starting import init


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "PMIX_RANK": "3"}, (3, 4)),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, (0, 2)),  # MPICH
        ({"PMI_RANK": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, (1, 2)),
        ({"PMIX_RANK": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, (5, 8)),
        ({"MV2_COMM_WORLD_SIZE": "3", "MV2_COMM_WORLD_RANK": "2"}, (2, 3)),
        # the script of an sbatch job, and srun -n 1
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "x", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "2"}, None),
    ],
)
def test_rank_and_size_come_from_the_environment(environ, found):
    known = launch(environ)
    assert (known and known[1:]) == found


def test_srun_without_mpi_is_refused():
    with pytest.raises(ValueError, match="srun started 4 processes without MPI: give srun --mpi"):
        launch({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"})


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend is 'gloo'; allowed: auto, off, mpi"):
        init("gloo")
