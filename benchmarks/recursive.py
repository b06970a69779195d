"""`make bench-recursive`: one update of HRM and TRM beside torch, and beside its products alone.

    python benchmarks/recursive.py [--quick] [--only CASE ...]

Each library's update runs in a process of its own. The processes take turns, and the best update of
all rounds counts, with the least peak memory. The cases are those of recursive_work.py: 32 puzzles
of 81 cells, hidden sizes 256 and 512, and the network of TRM's paper for Sudoku. An update has the
forward and backward passes of a step of deep supervision, and AdamW.

The limit of an update is the work of its matrix products, attention's left out, at the speed of the
fastest plain product of a layer's shape that either library reached in this run, in the precision
of the row.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from common import WORK, compiled, machine, run_json, table
from recursive_work import BATCH, CASES, config_of

EAGER, COMPILED = "torch", "torch, torch.compile"
#: the program of a row, and the precision of most of its products
SIDES = {
    EAGER: (("recursive_peer.py",), "float32"),
    COMPILED: (("recursive_peer.py", "--compile"), "float32"),
    "torch, bfloat16": (("recursive_peer.py", "--dtype", "bfloat16"), "bfloat16"),
    "torch, bfloat16, torch.compile": (
        ("recursive_peer.py", "--dtype", "bfloat16", "--compile"),
        "bfloat16",
    ),
    "pyloss": (("recursive_pyloss.py",), "float32"),
    "pyloss, bfloat16 products": (("recursive_pyloss.py", "--precision", "bfloat16"), "bfloat16"),
    "pyloss, mixed precision": (("recursive_pyloss.py", "--precision", "mixed"), "bfloat16"),
}
HEADS = (
    "s an update",
    "limit, s",
    "limit / time",
    f"speed / {EAGER}",
    f"speed / {COMPILED}",
    "peak memory, GB",
    "loss",
)


def measured(case: str, rounds: int, passes: int) -> tuple[dict[str, dict], dict[str, float]]:
    """The best of each side, and the seconds of an update's products by precision."""
    best: dict[str, dict] = {}
    speeds: dict[str, float] = {}
    gflop = 0.0
    for _ in range(rounds):
        for program in ("recursive_pyloss.py", "recursive_peer.py"):
            found = run_json(program, case, "--products")
            gflop = found.get("gflop", gflop)
            for precision, speed in found["gflops"].items():
                speeds[precision] = max(speed, speeds.get(precision, 0.0))
        for name, ((program, *flags), _) in SIDES.items():
            found = run_json(program, case, *flags, "--passes", str(passes), **compiled())
            best[name] = better(best.get(name, found), found)
    return best, {precision: gflop / speed for precision, speed in speeds.items()}


def better(one: Mapping, other: Mapping) -> dict:
    """The faster of two runs of a side, with the lower peak memory."""
    peak = min(one["peak_gb"], other["peak_gb"])
    return {**min(one, other, key=lambda run: run["update_s"]), "peak_gb": peak}


def rows_of(best: Mapping[str, Mapping], limits: Mapping[str, float]) -> list[tuple[str, ...]]:
    """A row for each side."""
    rows = []
    for name, found in best.items():
        seconds, limit = found["update_s"], limits[SIDES[name][1]]
        ratios = (best[peer]["update_s"] / seconds for peer in (EAGER, COMPILED))
        cells = (f"{seconds:.3f}", f"{limit:.3f}", f"{limit / seconds:.2f}")
        memory = f"{found['peak_gb']:.2f}"
        rows.append((name, *cells, *(f"{r:.2f}" for r in ratios), memory, f"{found['loss']:.4f}"))
    return rows


def title(case: str) -> str:
    """The first head of a case's table."""
    kind, config = config_of(case)
    mixer = "MLP" if config.mlp_t else "attention"
    return f"{kind.upper()}, {mixer}, {BATCH} x {config.tokens}, hidden {config.hidden_size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="few runs: checks that everything works"
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    rounds, passes = (1, 1) if options.quick else (2, 3)
    for case in options.only:
        best, limits = measured(case, rounds, passes)
        print(f"\n{table((title(case), *HEADS), rows_of(best, limits))}", flush=True)


if __name__ == "__main__":
    main()
