"""Training killed from outside at random moments: the folder always has a complete adapter.

A resumed run has the bits of a run that was never stopped. `PYLOSS_KILLS=500 pytest -m slow
tests/tuner/run/test_kills.py` kills 500 runs, CI as many as `KILLS` says.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_training import Tiny, run, tiny_value_and_grad

import pyloss
from pyloss import nn, optim
from pyloss.io.locks import LOCK_FILE
from pyloss.tuner.adapters.folder import read_adapter
from pyloss.tuner.run import checkpoints as state, run_folder

KILLS = 20
ITERS = 200
EVERY = {"iters": ITERS, "steps_per_save": 2, "steps_per_eval": 3}

SCRIPT = """
import sys, pathlib
import tiny_training
from pyloss import optim
tiny_training.install()
class Printing(tiny_training.Recorder):
    def on_train_loss_report(self, info):
        print(info["iteration"], repr(info["train_loss"]), flush=True)
folder = pathlib.Path(sys.argv[1])
print("begin", flush=True)
tiny_training.run(folder, optimizer=optim.AdamW(0.05), iters=ITERS, steps_per_save=2, steps_per_eval=3,
                  callback=Printing(), resume="resume" in sys.argv)
print("end", flush=True)
""".replace("ITERS", str(ITERS))


@pytest.fixture(autouse=True)
def numpy_gradients(monkeypatch):
    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)


def start(folder, *arguments):
    package = str(Path(pyloss.__file__).parents[1])
    paths = os.pathsep.join(
        [package, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )


def losses_of(output):
    """Iterations and losses of complete lines; the last line may be cut."""
    pairs = [
        line.split()
        for line in output.splitlines(keepends=True)
        if line[:1].isdigit() and line.endswith("\n")
    ]
    return {int(number): float(loss) for number, loss in pairs}


def check_complete(folder):
    """The adapter loads, and its numbers are finite and have the shapes of the configuration."""
    for path in (
        folder,
        *folder.glob("[0-9]*_adapters.safetensors"),
        *folder.glob("best_adapters.safetensors"),
    ):
        found = read_adapter(path).layers["layers.0"].arrays
        for name, array in Tiny().arrays.items():
            assert found[name.rpartition(".")[2]].shape == array.shape
    assert all(
        np.isfinite(array).all() for array in load_file(folder / "adapters.safetensors").values()
    )
    checkpoint = state.load_checkpoint(folder)
    assert checkpoint.optimizer["step"] == checkpoint.progress.iteration


def kill_again_and_again(folder, kills, seed):
    """Kill runs in `folder`, which has an adapter, at random moments; return their losses."""
    rng, seen = random.Random(seed), {}
    for _ in range(kills):
        process = start(folder, "resume")
        assert process.stdout.readline() == "begin\n"
        output = ""
        while not (seen or losses_of(output)):  # one run at least comes so far
            output += process.stdout.readline()
        time.sleep(0.02 + 0.3 * rng.random())
        process.kill()
        output += process.communicate()[0]
        for iteration, loss in losses_of(output).items():
            assert seen.setdefault(iteration, loss) == loss
        check_complete(folder)
        if "end\n" in output:  # finished: start again, which sets the old run aside
            run(folder, optimizer=optim.AdamW(0.05), **EVERY | {"iters": 2})
    return seen


def survives(folder, whole_folder, kills, seed):
    run(folder, optimizer=optim.AdamW(0.05), **EVERY | {"iters": 2})
    seen = kill_again_and_again(folder, kills, seed)
    whole, whole_seen, _ = run(whole_folder, optimizer=optim.AdamW(0.05), **EVERY)
    assert seen and seen.items() <= whole_seen.losses.items()
    resumed, rest, _ = run(folder, Tiny(seed=8), optim.AdamW(0.05), resume=True, **EVERY)
    assert rest.losses.items() <= whole_seen.losses.items()
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(array, resumed.arrays[name])
    ours, theirs = (
        {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()}
        for place in (folder, whole_folder)
    )
    assert ours["adapters.safetensors"] == theirs["adapters.safetensors"]
    assert ours[run_folder.BEST_FILE] == theirs[run_folder.BEST_FILE]
    # Unfinished files of killed runs are removed, and so is their lock.
    assert not [name for name in ours if name.endswith(".tmp") or name == LOCK_FILE]


def test_killed_at_random_the_run_continues_to_the_same_bits(tmp_path):
    survives(tmp_path / "killed", tmp_path / "whole", 3, seed=1)


@pytest.mark.slow
def test_killed_often(tmp_path):
    kills = int(os.environ.get("PYLOSS_KILLS", KILLS))
    for seed in range(0, kills, KILLS):
        survives(
            tmp_path / f"killed{seed}",
            tmp_path / f"whole{seed}",
            min(KILLS, kills - seed),
            seed=100 + seed,
        )


def test_a_killed_run_leaves_nothing_that_the_next_keeps(tmp_path):
    """The next run takes over its lock and removes its half-written files."""
    run(tmp_path, optimizer=optim.AdamW(0.05), **EVERY | {"iters": 2})
    process = start(tmp_path, "resume")
    assert process.stdout.readline() == "begin\n"
    while not (tmp_path / LOCK_FILE).exists():
        time.sleep(0.001)
    process.kill()
    process.communicate()
    (tmp_path / f".trainer_state.safetensors.{process.pid}.0123abcd.tmp").write_bytes(b"half")
    assert (tmp_path / LOCK_FILE).exists()
    run(tmp_path, Tiny(seed=3), optim.AdamW(0.05), resume=True, **EVERY | {"iters": 4})
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
