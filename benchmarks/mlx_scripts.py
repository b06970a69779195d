"""`make bench-mlx`: mlx-lm's training scripts by their imports, beside mlx-lm itself on the CPU.

    python benchmarks/mlx_scripts.py [--only plain_tuner,dpo_by_hand] [--clock cpu] [--quick]

The scripts are those of tests/parity/mlx_scripts, and the model is SmolLM2-135M in float32. A row
is one script: trained tokens per second of its loop under mlx-lm and, with four substitutions in
its imports, under pyloss, and by how much the losses of both differ. Each side runs in a process
of its own, in turn, and the best round counts. An update takes mlx a minute on a CPU, so its rounds
are few, and pyloss's have more updates: all scripts take more than an hour.

`--clock cpu` counts seconds of the processor, for machines that others use. mlx has one thread, so
that this ratio is less than that of the times on a quiet machine with two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from bases import float_folder
from common import HERE, WORK, machine, run_json, table

sys.path.insert(0, str(HERE.parent / "tests" / "parity"))

import script_runs

UNITS = {"wall": "tokens/s", "cpu": "tokens per CPU second"}
ROUNDS = 5  # of pyloss, at the least: one takes a second or two


def room() -> Path:
    """The folder with the model, which teaches itself, and the scripts' data."""
    folder = WORK / "mlx-scripts"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model", "teacher"):
        if not (folder / name).exists():
            (folder / name).symlink_to(float_folder(), target_is_directory=True)
    script_runs.write_room(folder)
    return folder


def difference(found: list[float], expected: list[float]) -> float:
    """The largest difference of two lists of losses, relative to the larger of 1 and the loss."""
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} losses were found, and {len(expected)} expected")
    pairs = zip(found, expected, strict=True)
    return max(abs(a - b) / max(abs(b), 1.0) for a, b in pairs)


def row(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table, from what `mlx_script.py` printed of either side."""
    speeds = theirs["tokens_per_s"], ours["tokens_per_s"]
    apart = difference(ours["losses"], theirs["losses"])
    return (
        name.replace("_", " "), f"{speeds[0]:.1f}", f"{speeds[1]:.0f}",
        f"{speeds[1] / speeds[0]:.0f}", f"{apart:.0e}",
    )  # fmt: skip


def mean_ratio(measured: list[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """The geometric mean of the scripts' ratios."""
    logs = [math.log(ours["tokens_per_s"] / theirs["tokens_per_s"]) for theirs, ours in measured]
    return math.exp(sum(logs) / len(logs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(script_runs.NAMES), help="scripts, with commas")
    parser.add_argument("--quick", action="store_true", help="one round of mlx-lm")
    parser.add_argument("--updates", type=int, default=1, help="of a script in one round")
    parser.add_argument("--rounds", type=int, default=3, help="of mlx-lm, at most")
    parser.add_argument("--clock", choices=tuple(UNITS), default="wall", help="what is counted")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(script_runs.NAMES)):
        parser.error(
            f"no script is called {unknown[0]!r}; there are {', '.join(script_runs.NAMES)}"
        )
    updates, rounds = options.updates, 1 if options.quick else options.rounds
    folder = room()
    print(machine(), flush=True)
    unit = UNITS[options.clock]
    heads = ("script", f"mlx-lm, {unit}", f"pyloss, {unit}", "pyloss / mlx-lm", "losses differ by")
    print(f"\n{table(heads, [])}", flush=True)
    measured = []
    for name in names:
        given = (name, str(folder), "--updates", str(updates), "--clock", options.clock)
        ours = run_json("mlx_script.py", "pyloss", *given, "--rounds", str(max(rounds, ROUNDS)))
        theirs = run_json("mlx_script.py", "mlx", *given, "--rounds", str(rounds))
        measured.append((theirs, ours))
        print(table((), [row(name, theirs, ours)]).splitlines()[-1], flush=True)
    print(f"\nThe geometric mean of the ratios is {mean_ratio(measured):.0f}.", flush=True)


if __name__ == "__main__":
    main()
