"""Groups of several processes: sums with the bits of their order, objects, failures."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launching import needs_mpi, run

from pyloss.distributed import Group, average_gradients

SCRIPT = Path(__file__).with_name("group_script.py")


@needs_mpi
@pytest.mark.parametrize(
    "ranks", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4))]
)
def test_sums_have_the_order_of_the_ranks_and_objects_arrive(ranks):
    done = run(ranks, SCRIPT, ranks)
    assert all(f"rank {r} is done" in done.stdout for r in range(ranks))


def test_a_group_of_one_returns_what_it_gets():
    group, array = Group(), np.arange(3.0)
    assert (group.rank(), group.size(), group.local_rank(), group.local_size()) == (0, 1, 0, 1)
    assert group.all_sum(array) is array and group.all_sum(array, out=array) is array
    out = np.empty(3)
    assert group.all_sum(array, out=out) is out and out.tolist() == [0, 1, 2]
    assert group.all_gather(5) == group.gather(5) == [5] and group.broadcast(5) == 5
    assert group.first(lambda: 7) == 7 and group.any(True) and not group.any(False)
    group.barrier()
    tree = {"a": array}
    assert average_gradients(tree, group) is tree


def test_gradients_of_the_wrong_kind_are_refused():
    class Two(Group):
        def size(self):
            return 2

    with pytest.raises(TypeError, match="gradients hold a str"):
        average_gradients({"a": "b"}, Two())
    with pytest.raises(ValueError, match="all_reduce_size is -1"):
        average_gradients({}, Two(), all_reduce_size=-1)


FAILING = """
import os, signal, sys, time
from pyloss.distributed import init
group = init()
how, who = sys.argv[1], int(sys.argv[2])
if who in (group.rank(), -1):
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory":
        raise MemoryError("no room for the batch")
    raise ValueError("this record is bad")
group.barrier()
time.sleep(60)
"""


@needs_mpi
@pytest.mark.parametrize(
    "how", ["raise", *(pytest.param(how, marks=pytest.mark.slow) for how in ("kill", "memory"))]
)
def test_a_failing_rank_ends_all_with_its_message(how):
    begun = time.monotonic()
    done = run(3, "-c", FAILING, how, 1, check=False)
    assert done.returncode and time.monotonic() - begun < 15
    said = {
        "raise": "ValueError: this record is bad",
        "memory": "MemoryError: no room",
        "kill": "9",
    }
    assert said[how] in done.stderr
    if how != "kill":
        assert "rank 1 on " in done.stderr and "rank 0 on " not in done.stderr


@needs_mpi
def test_what_fails_on_all_ranks_is_said_once():
    done = run(3, "-c", FAILING, "raise", -1, check=False)
    assert done.returncode and done.stderr.count("ValueError: this record is bad") == 1
    assert "MPI_ABORT" not in done.stderr


@needs_mpi
def test_a_launcher_of_another_mpi_is_named():
    done = run(
        1,
        "-c",
        "import os; os.environ['OMPI_COMM_WORLD_SIZE'] = '2'\n"
        "from pyloss.distributed import init; init()",
        check=False,
    )
    assert "started 2 processes, and mpi4py's MPI (Open MPI" in done.stderr


def test_mpi4py_is_named_where_it_is_missing():
    code = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'mpi4py' else found(name, *a)\n"
        "from pyloss.distributed import init\n"
        "assert init('off').size() == 1\n"
        "from pyloss.distributed import starting; starting._group = None\n"
        "try: init()\n"
        "except ImportError as e: print(e)"
    )
    import subprocess

    from launching import environment

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0"),
    )
    assert done.stdout == (
        "mpirun of Open MPI started 2 processes, and working together over MPI needs the package "
        'mpi4py: pip install "pyloss[mpi]" (--distributed off lets each process work alone)\n'
    ), done.stderr
