"""Runs Python under mpirun, for the tests of several ranks."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyloss

#: more ranks than processors, without binding; as root, as containers are
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]

needs_mpi = pytest.mark.skipif(
    shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpirun (Debian: openmpi-bin) and mpi4py (pip install 'pyloss[mpi]')",
)


def environment(**more):
    """The environment of ranks: a thread each, and none of a launcher that runs the tests."""
    package = str(Path(pyloss.__file__).parents[1])
    tests = Path(__file__).parents[1]
    helpers = [str(tests / room) for room in ("distributed", "models", "tuner")]
    paths = [package, *helpers, os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYLOSS_NUM_THREADS": "1", **more}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI", "SLURM_"))}
    # Shared memory without a system call that containers forbid.
    return kept | {"OMPI_MCA_btl_vader_single_copy_mechanism": "none", **own}


def command(ranks, *words, options=()):
    return [*MPIRUN, *options, "-n", str(ranks), sys.executable, *map(str, words)]


def run(ranks, *words, check=True, options=(), timeout=120, cwd=None, **more):
    """Runs `python words...` with this many ranks; returns the ended process."""
    done = subprocess.run(
        command(ranks, *words, options=options),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment(**more),
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done
