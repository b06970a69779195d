"""Time of an update by each optimizer, and by torch's: `python benchmarks/optimizers.py [--quick]`.

The models have the shapes of the Hierarchical Reasoning Model's transformer blocks: of hidden size
512 (27 million parameters, which do not fit in caches), and 128.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from common import THREADS, best_of, machine, table

import pyloss
from pyloss import optim

BLOCKS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the small model, few runs")
    options = parser.parse_args()
    pyloss.set_num_threads(THREADS)
    print(machine(), flush=True)
    for hidden in (128,) if options.quick else (512, 128):
        print(f"\n{times_of(shapes(hidden), 2 if options.quick else 7)}", flush=True)


def shapes(hidden: int) -> dict[str, tuple[int, int]]:
    """The matrices of the blocks: queries, keys and values, output, gate and up, down."""
    inner = -(-8 * hidden // 3 // 256) * 256
    block = {
        "qkv": (3 * hidden, hidden),
        "out": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    return {f"{i}.{name}": shape for i in range(BLOCKS) for name, shape in block.items()}


def times_of(wanted: dict[str, tuple[int, int]], runs: int) -> str:
    """A row for each optimizer: milliseconds of an update."""
    import torch

    torch.set_num_threads(THREADS)
    rng = np.random.default_rng(0)
    arrays, grads = (
        {n: rng.standard_normal(shape, np.float32) for n, shape in wanted.items()} for _ in range(2)
    )
    weights = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in arrays.items()}
    for name, weight in weights.items():
        weight.grad = torch.tensor(grads[name])
    given: list[Any] = list(weights.values())
    count = sum(array.size for array in arrays.values())
    rows, base = [], 0.0
    average = optim.EMA(arrays)
    ours: dict[str, Callable[[], object]] = {
        **{
            kind.__name__: _update(kind(1e-4), arrays, grads)
            for kind in (optim.AdamW, optim.AdamATan2, optim.Lion)
        },
        "SGD with momentum": _update(optim.SGD(1e-4, momentum=0.9), arrays, grads),
        "EMA": lambda: average.update(arrays),
        "Adafactor": _update(optim.Adafactor(1e-4), arrays, grads),
        "Muon": _update(optim.Muon(1e-4), arrays, grads),
    }
    theirs = {
        "AdamW": torch.optim.AdamW(given, 1e-4, fused=True).step,
        "SGD with momentum": torch.optim.SGD(given, 1e-4, momentum=0.9, fused=True).step,
        "Adafactor": torch.optim.Adafactor(given, 1e-4).step,
    }
    for name, update in ours.items():
        # Muon takes as long as many others together.
        taken = best_of(1 if name == "Muon" else runs, update, theirs.get(name, lambda: None))
        base = base or taken[0]
        peer = f"{taken[1] * 1e3:.1f}" if name in theirs else ""
        rows.append([name, f"{taken[0] * 1e3:.1f}", f"{taken[0] / base:.2f}", peer])
    return table(
        [f"{count / 1e6:.1f} million parameters", "pyloss, ms", "of AdamW's", "torch, ms"], rows
    )


def _update(
    optimizer: optim.Optimizer, arrays: dict[str, np.ndarray], grads: dict[str, np.ndarray]
) -> Callable[[], object]:
    return lambda: optimizer.update(arrays, grads)


if __name__ == "__main__":
    main()
