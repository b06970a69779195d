"""Matrix multiplication on the layer shapes of SmolLM2-135M, against torch.mm: prints JSON."""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from common import THREADS, best_of

from pyloss import Weight, _core, set_num_threads

TOKENS = 1024
SHAPES = ((576, 1536), (1536, 576), (576, 576), (576, 49152))


def main(runs: int) -> None:
    torch.set_num_threads(THREADS)
    set_num_threads(THREADS)
    rng = np.random.default_rng(0)
    rows = []
    for inputs, outputs in SHAPES:
        x, w, dy = (rng.standard_normal(s, dtype=np.float32) for s in ((TOKENS, inputs), (outputs, inputs), (TOKENS, outputs)))
        y, dx = np.empty_like(dy), np.empty_like(x)
        tx, tw, tdy, ty, tdx = (torch.from_numpy(a) for a in (x, w, dy, np.empty_like(y), np.empty_like(dx)))
        for name, weight in (("f32", w), ("q4_1", Weight.quantize(w, "q4_1").handle)):
            n = max(3, runs * 576 * 1536 // (inputs * outputs))
            for direction, ours, theirs in (
                (
                    "forward",
                    lambda w=weight: _core.linear_forward(x, w, None, None, None, 0.0, y),
                    lambda: torch.mm(tx, tw.t(), out=ty),
                ),
                (
                    "input gradient",
                    lambda w=weight: _core.linear_input_grad(dy, w, None, None, 0, dx),
                    lambda: torch.mm(tdy, tw, out=tdx),
                ),
            ):
                seconds = best_of(n, ours, theirs)
                flops = 2 * TOKENS * inputs * outputs
                rows.append(
                    {"weight": f"{inputs}x{outputs}", "format": name, "direction": direction}
                    | dict(zip(("pyloss", "torch"), (flops / s / 1e9 for s in seconds), strict=True))
                )
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
