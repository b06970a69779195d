"""`make bench`: measures products, experts, loading and imports of pyloss and its peers.

    python benchmarks/run.py [--quick]

Prints the tables. train.py measures training, losses.py the losses.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from bases import MODEL, float_folder, nf4_folder
from common import WORK, environment, machine, run_json, table
from matmul import products_table


def matmul(quick: bool) -> str:
    """Matrix products, each library in its own processes: torch's threads spin after a call."""
    best: dict[str, dict[str, float]] = {"torch": {}, "pyloss": {}}
    for _ in range(1 if quick else 4):
        for library, found in best.items():
            for key, speed in run_json("matmul.py", library, "10" if quick else "30").items():
                found[key] = max(speed, found.get(key, 0.0))
    return products_table(best["pyloss"], best["torch"])


def loading(quick: bool) -> str:
    """Loading time, and memory beyond the pages of the mapped files."""
    models = [
        ("pyloss, Q4_1 (GGUF)", "pyloss", MODEL),
        ("pyloss, NF4 (safetensors)", "pyloss", nf4_folder()),
        ("pyloss, float32 (safetensors)", "pyloss", float_folder()),
        ("transformers, float32 (safetensors)", "torch", float_folder()),
    ]
    rows = []
    for name, library, path in models:
        runs = [run_json("load.py", library, path) for _ in range(1 if quick else 3)]
        best = min(run["seconds"] for run in runs)
        rows.append(
            (
                name,
                f"{best:.2f}",
                f"{runs[0]['weights_mb']:.0f}",
                f"{min(run['private_mb'] for run in runs):.0f}",
            )
        )
    return table(("loading", "seconds", "weights, MB", "private memory after a token, MB"), rows)


def imports(quick: bool) -> str:
    """Best wall time of a fresh interpreter, minus the time of an empty one."""

    def seconds(code: str) -> float:
        best = float("inf")
        for _ in range(2 if quick else 7):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
            best = min(best, time.perf_counter() - begin)
        return best

    empty = seconds("pass")
    names = {
        "import numpy": "import numpy",
        "import pyloss": "import pyloss",
        "torch + transformers + PEFT": "import torch, transformers, peft",
    }
    return table(
        ("import", "seconds"),
        [(name, f"{seconds(code) - empty:.3f}") for name, code in names.items()],
    )


def experts(quick: bool) -> str:
    """A mixture of experts against a dense layer with the same active work; both with LoRA."""
    rows = []
    for hidden, inner in ((768, 384), (1024, 512), (2048, 1024)):
        got = run_json("experts_pyloss.py", str(hidden), str(inner), "3" if quick else "10")
        times = (got["dense"], got["experts"], got["experts"] / got["dense"])
        rows.append(
            (
                f"{hidden}, 64 experts x {inner}, 8 active",
                f"{times[0]:.0f}",
                f"{times[1]:.0f}",
                f"{times[2]:.2f}",
            )
        )
    return table(
        ("hidden size, experts (1024 tokens)", "dense layer, ms", "experts, ms", "ratio"), rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="few runs: checks that everything works"
    )
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    for part in (loading, matmul, experts, imports):
        print(f"\n{part(options.quick)}", flush=True)


if __name__ == "__main__":
    main()
