"""One training script of tests/parity/mlx_scripts, under mlx-lm or, with other imports, pyloss.

    python benchmarks/mlx_script.py SIDE SCRIPT ROOM --updates 1 --rounds 3

Prints JSON: `tokens_per_s` of the best round's loop, `losses` of the first one. Rounds end when
LIMIT seconds have passed: a script of which one takes longer runs once. `--clock cpu` counts
seconds of the processor, of all threads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

from common import HERE

sys.path.insert(0, str(HERE.parent / "tests" / "parity"))

import script_runs

LIMIT = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("side", choices=("mlx", "pyloss"))
    parser.add_argument("script", choices=script_runs.NAMES)
    parser.add_argument("room", type=Path)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    run = script_runs.run if options.side == "mlx" else script_runs.run_ported
    out = options.room / "out" / options.side / options.script
    begin, best, losses = time.monotonic(), 0.0, None
    if options.clock == "cpu":
        time.perf_counter = time.process_time  # by which the scripts measure their loops
    with contextlib.redirect_stdout(sys.stderr):
        for _ in range(options.rounds):
            found = run(options.script, options.room / "model", out, options.updates)
            best = max(best, found["tokens"] / found["seconds"])
            losses = losses or found["losses"]
            if time.monotonic() - begin > LIMIT:
                break
    print(json.dumps({"tokens_per_s": best, "losses": losses}))


if __name__ == "__main__":
    main()
