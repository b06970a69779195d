"""Matrix multiplication on the layer shapes of SmolLM2-135M, with pyloss or torch.mm: LIBRARY CALLS; prints GFLOP/s as JSON."""

from __future__ import annotations

import json
import sys

import numpy as np
from common import THREADS, best_of

TOKENS = 1024
SHAPES = ((576, 1536), (1536, 576), (576, 576), (576, 49152))


def products(library: str, x: np.ndarray, w: np.ndarray, dy: np.ndarray):
    """Yields (stored format, direction, function) of the two products of a layer x [T, I], w [O, I], dy [T, O]."""
    y, dx = np.empty_like(dy), np.empty_like(x)
    if library == "torch":
        import torch

        torch.set_num_threads(THREADS)
        tx, tw, tdy, ty, tdx = (torch.from_numpy(a) for a in (x, w, dy, y, dx))
        yield "f32", "forward", lambda: torch.mm(tx, tw.t(), out=ty)
        yield "f32", "input gradient", lambda: torch.mm(tdy, tw, out=tdx)
        return
    import pyloss
    from pyloss import _core

    pyloss.set_num_threads(THREADS)
    for name, weight in (("f32", w), ("q4_1", pyloss.Weight.quantize(w, "q4_1").handle)):
        yield name, "forward", lambda weight=weight: _core.linear_forward(x, weight, None, None, None, 0.0, None, y)
        yield name, "input gradient", lambda weight=weight: _core.linear_input_grad(dy, weight, None, None, 0, None, dx)


def main(library: str, calls: int) -> None:
    rng = np.random.default_rng(0)
    speeds = {}
    for inputs, outputs in SHAPES:
        x, w, dy = (rng.standard_normal(s, dtype=np.float32) for s in ((TOKENS, inputs), (outputs, inputs), (TOKENS, outputs)))
        n = max(3, calls * 576 * 1536 // (inputs * outputs))
        for name, direction, function in products(library, x, w, dy):
            speeds[f"{inputs}x{outputs} {name} {direction}"] = 2 * TOKENS * inputs * outputs / best_of(n, function)[0] / 1e9
    print(json.dumps(speeds))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
