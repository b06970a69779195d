"""One rank fails, is killed or told to stop: all end within seconds, and the run can be resumed."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from launching import command, environment, needs_mpi, run
from safetensors.numpy import load_file

from pyloss.tuner.run import checkpoints

pytestmark = needs_mpi
SCRIPT = Path(__file__).with_name("faulty_run.py")
#: kills of `make test-all`; `PYLOSS_KILLS=50 pytest -m slow tests/distributed/test_faults.py`
KILLS = 4
#: seconds until all ranks must have ended; machines may be busy
SECONDS = 15


def losses_of(output):
    lines = [line.split() for line in output.splitlines() if line[:1].isdigit()]
    return {int(number): float(loss) for number, loss in lines}


def complete(folder):
    """The adapter loads, its numbers are finite, and the state is one of a whole iteration."""
    arrays = load_file(folder / "adapters.safetensors")
    assert arrays and all(np.isfinite(array).all() for array in arrays.values())
    state = checkpoints.load_checkpoint(folder)
    assert state.optimizer["step"] == state.progress.iteration // 2
    return state


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("record", "ValueError: sample 7 has no answer"),
        pytest.param("memory", "MemoryError: no room", marks=pytest.mark.slow),
    ],
)
def test_an_error_on_one_rank_ends_all_and_names_it(tmp_path, how, said):
    folder = tmp_path / "run"
    begun = time.monotonic()
    done = run(3, SCRIPT, folder, how, 2, 8, check=False)
    assert done.returncode and time.monotonic() - begun < SECONDS
    assert said in done.stderr and "rank 2 on " in done.stderr
    assert complete(folder).progress.iteration == 6 and "end" not in done.stdout


@pytest.mark.parametrize(
    ("how", "said"),
    [
        pytest.param("nan", "FloatingPointError: iteration 8: the loss is nan", id="nan"),
        pytest.param("data", "training data differs: rank 1 on ", marks=pytest.mark.slow),
        pytest.param("model", "trainable parameters differs: rank 1 on ", marks=pytest.mark.slow),
    ],
)
def test_all_ranks_learn_of_a_loss_or_a_node_that_does_not_fit(tmp_path, how, said):
    """All fail alike, so the message comes once, and MPI need not abort."""
    done = run(2, SCRIPT, tmp_path / "run", how, 1, 8, check=False)
    assert done.returncode and done.stderr.count(said) == 1 and "MPI_ABORT" not in done.stderr


def test_sigterm_of_one_rank_saves_and_another_number_of_ranks_goes_on(tmp_path):
    folder = tmp_path / "run"
    whole = losses_of(run(2, SCRIPT, tmp_path / "whole", "resume", 0, 0).stdout)
    done = run(2, SCRIPT, folder, "term", 1, 9, check=False)
    assert done.returncode and "end" not in done.stdout
    assert f"interrupted after iteration 9: saved to {folder}" in done.stderr
    assert complete(folder).progress.iteration == 9  # in the middle of an update
    found = losses_of(done.stdout) | losses_of(run(3, SCRIPT, folder, "resume", 0, 0).stdout)
    # Tiny's noise in place of dropout differs between numbers of ranks.
    assert sorted(found) == sorted(whole) and {i: found[i] for i in range(1, 10)}.items() <= (
        whole.items()
    )


def runs(pid):
    """Whether a process still works; one that has ended may wait for its parent to hear of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def kill_again_and_again(folder, kills, seed):
    rng = random.Random(seed)
    ranks = 2
    run(ranks, SCRIPT, folder, "resume", 0, 0, ITERS="4")
    pids = Path(f"{folder}.pids")
    for _ in range(kills):
        pids.unlink(missing_ok=True)
        process = subprocess.Popen(
            command(ranks, SCRIPT, folder, "resume", 0, 0),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(ITERS="100000"),
        )
        while not pids.exists() or pids.read_text().count("\n") < ranks:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        time.sleep(rng.random())
        victim = rng.choice(pids.read_text().splitlines()).split()
        os.kill(int(victim[1]), signal.SIGKILL)
        begun = time.monotonic()
        process.communicate(timeout=SECONDS)
        assert process.returncode and time.monotonic() - begun < SECONDS
        numbers = [int(line.split()[1]) for line in pids.read_text().splitlines()]
        while any(map(runs, numbers)):  # mpirun does not wait for those that it kills
            assert time.monotonic() - begun < SECONDS
            time.sleep(0.05)
        complete(folder)
        ranks = rng.choice([1, 2, 3, 4])
    before = complete(folder).progress.iteration
    done = run(ranks, SCRIPT, folder, "resume", 0, 0, ITERS=str(before + 4))
    assert "end" in done.stdout and complete(folder).progress.iteration == before + 4
    # Unfinished files of killed ranks are removed by the next run, and so is their lock.
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_random_ranks_are_killed_often(tmp_path):
    kill_again_and_again(tmp_path / "run", int(os.environ.get("PYLOSS_KILLS", KILLS)), seed=2)


def test_a_rank_that_ends_alone_says_so(tmp_path):
    """Python tells nobody of sys.exit on one rank: it must at least not be silent."""
    script = tmp_path / "early.py"
    script.write_text(
        "import sys, time\n"
        "from pyloss.distributed import faults, init\n"
        "faults.LEAVE_SECONDS = 0.3\n"
        "if init().rank() == 1:\n"
        "    sys.exit()\n"
        "time.sleep(1.5)\n"
    )
    done = run(2, script)
    assert "rank 1 on " in done.stderr and "has ended and waits" in done.stderr
    assert "rank 0 on " not in done.stderr


@pytest.mark.slow
def test_standard_input_is_refused(tmp_path):
    words = ("-m", "pyloss", "train", "--model", "smollm2-135m", "--data", "-")
    done = run(2, *words, check=False, cwd=tmp_path)
    assert done.returncode and "standard input, which one rank alone gets" in done.stderr
