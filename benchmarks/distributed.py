"""`make bench-distributed`: training over MPI on this machine, and what more machines would do.

    python benchmarks/distributed.py [--rounds 3] [--tokens 256]

Steps of LoRA (rank 8, all layers of SmolLM2-135M in float32), 8 samples an update, in turn: one
process with two threads, two ranks with one thread each, one process with one thread, and two ranks
of torch's DistributedDataParallel (gloo) with PEFT; two ranks of each in half precision; full
fine-tuning. Then the time of a sum of gradients by itself at 2, 4 and 8 ranks. A model of the
exchange is fitted to these, and predicts steps on more nodes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from bases import float_folder
from common import HERE, environment, machine, table

MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
RANKS, NODES = (2, 4, 8), (1, 8, 64, 512)
#: bytes a second and seconds of a message, for links as they are sold
LINKS = {"1 Gbit/s": (0.118e9, 50e-6), "10 Gbit/s": (1.18e9, 20e-6), "100 Gbit/s": (11.8e9, 3e-6)}
#: trained parameters in float32, bytes: LoRA of rank 8 on all linear layers, and full fine-tuning
MODELS = {"135M, rank 8": 9.8e6, "1.7B, rank 8": 36e6, "8B, rank 8": 84e6, "135M, full": 425e6}


class Exchange(NamedTuple):
    """A fitted sum of arrays: the seconds of a sum's start, of a message, and of a byte handled.

    A rank sends and receives 2 (n - 1) / n of the array, in 2 (n - 1) messages a block, and adds
    (n - 1) pieces of 1 / n of it.
    """

    start: float
    message: float
    byte: float

    def seconds(self, ranks: int, size: float, rate: float = math.inf, delay: float = 0) -> float:
        """The seconds of a sum of `size` bytes over links of `rate` bytes a second."""
        if ranks == 1:
            return 0.0
        moved = 2 * (ranks - 1) / ranks * size
        messages = 2 * (ranks - 1)
        return self.start + messages * (self.message + delay) + moved * (self.byte + 1 / rate)


def fitted(measured: dict[int, Sequence[tuple[int, float]]], cores: int) -> Exchange:
    """The exchange by least squares of relative errors; ranks beyond `cores` share their time."""
    lines, seconds = [], []
    for ranks, rows in measured.items():
        shared = max(ranks / cores, 1.0)
        for size, time in rows:
            moved = 2 * (ranks - 1) / ranks * size
            lines.append(np.array([shared, 2 * (ranks - 1) * shared, moved * shared]) / time)
            seconds.append(1.0)
    found = np.linalg.lstsq(np.array(lines), np.array(seconds), rcond=None)[0]
    return Exchange(*np.maximum(found, 0).tolist())


def launched(ranks: int, threads: int, script: str, *words: str) -> dict | list:
    """The JSON that a script prints, run by one process or by mpirun."""
    start = [*MPIRUN, "-n", str(ranks)] if ranks > 1 else []
    command = [*start, sys.executable, str(HERE / script), *words]
    names = ("PYLOSS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    extra = dict.fromkeys(names, str(threads))
    done = subprocess.run(command, env=environment(**extra), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--largest", type=int, default=500_000_000, help="bytes of an exchange")
    options = parser.parse_args()
    print(f"{machine()}\n")
    words = [float_folder(), "--tokens", str(options.tokens)]
    programs = {
        "pyloss, 1 process x 2 threads": (1, 2, "distributed_pyloss.py", *words),
        "pyloss, 2 ranks x 1 thread": (2, 1, "distributed_pyloss.py", *words),
        "pyloss, 1 process x 1 thread": (1, 1, "distributed_pyloss.py", *words),
        "torch DDP (gloo) + PEFT, 2 ranks x 1 thread": (2, 1, "distributed_peft.py", *words),
        "pyloss, mixed precision, 2 ranks x 1 thread": (
            *(2, 1, "distributed_pyloss.py", *words),
            *("--precision", "mixed"),
        ),
        "torch DDP (gloo) + PEFT, bfloat16, 2 ranks x 1 thread": (
            *(2, 1, "distributed_peft.py", *words),
            *("--dtype", "bfloat16"),
        ),
        "pyloss in full, 1 process x 2 threads": (1, 2, "distributed_pyloss.py", *words, "--full"),
        "pyloss in full, 2 ranks x 1 thread": (2, 1, "distributed_pyloss.py", *words, "--full"),
        "the same, --shard-optimizer": (
            *(2, 1, "distributed_pyloss.py", *words, "--full"),
            "--shard-optimizer",
        ),
    }
    best: dict[str, dict] = {}
    for _ in range(options.rounds):
        for name, program in programs.items():
            found = launched(*program)
            assert isinstance(found, dict)
            if name not in best or found["step_s"] < best[name]["step_s"]:
                best[name] = found
    one = best["pyloss, 1 process x 2 threads"]["step_s"]
    rows = [
        [
            name,
            f"{row['step_s']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{one / row['step_s']:.2f}" if "full" not in name and "same" not in name else "",
            f"{row['peak_gb']:.2f}",
            f"{row['private_gb']:.2f}" if "private_gb" in row else "",
        ]
        for name, row in best.items()
    ]
    header = ["", "s a step", "tokens/s", "speed", "GB of all", "GB private of a rank"]
    print(f"{table(header, rows)}\n")

    measured = {
        ranks: launched(ranks, 1, "distributed_exchange.py", str(options.largest))
        for ranks in RANKS
    }
    sizes = [size for size, _ in measured[2]]
    rows = [
        [f"{size / 1e6:g} MB", *(f"{dict(measured[n])[size] * 1e3:.2f}" for n in RANKS)]
        for size in sizes
    ]
    print("Milliseconds of a sum of float32 by the number of ranks on this machine:\n")
    print(f"{table(['', *map(str, RANKS)], rows)}\n")
    exchange = fitted(measured, os.cpu_count() or 1)
    print(
        f"Fitted: {exchange.start * 1e6:.0f} us a sum, {exchange.message * 1e6:.0f} us a message, "
        f"{1 / exchange.byte / 1e9 if exchange.byte else float('inf'):.2f} GB/s\n"
    )
    print(
        f"Predicted efficiency of nodes with as much work each: the {one:.2f} s of a step above\n"
        "beside its exchange. Assumed: nodes as fast as this machine, one rank on each; a link's\n"
        "whole bandwidth in both directions between any two nodes; nothing of the exchange hidden\n"
        "behind the backward pass; messages of 50, 20 and 3 us.\n"
    )
    rows = []
    for name, size in MODELS.items():
        for link, (rate, delay) in LINKS.items():
            times = [exchange.seconds(nodes, size, rate, delay) for nodes in NODES]
            rows.append(
                [
                    f"{name}, {link}",
                    f"{size / 1e6:.0f} MB",
                    *(f"{time:.3f} s, {one / (one + time):.1%}" for time in times[1:]),
                ]
            )
    print(table(["", "a step", *(f"{nodes} nodes" for nodes in NODES[1:])], rows))


if __name__ == "__main__":
    main()
