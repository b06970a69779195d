"""Products of few rows, as in generation, in float32 and in int8: [FORMAT...].

A table of microseconds by format and shape: one row, 2 to 32 rows as in batches, and 512 as in
prompts, there with bfloat16 beside them. The precisions take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from common import THREADS, best_of, table

import pyloss
from pyloss import _core
from pyloss.runtime.precision import matmul_precision

FORMATS = ("q4_1", "q8_0", "q4_k")
SHAPES = ((576, 1536), (1024, 3072), (1024, 151936))
ROWS = (1, 2, 4, 8, 16, 32, 512)
ENCODED = 3072  # rows of a matrix that are encoded; longer ones repeat them


def stored(inputs: int, outputs: int, format: str) -> pyloss.Weight:
    rng = np.random.default_rng(0)
    unit = 256 if "_k" in format or format == "iq4_xs" else 32
    inputs = -(-inputs // unit) * unit
    own = min(outputs, ENCODED)
    some = pyloss.Weight.quantize(rng.standard_normal((own, inputs), dtype=np.float32), format)
    if outputs == own:
        return some
    row = some.raw.size // own
    raw = np.concatenate([some.raw] * -(-outputs // own))[: outputs * row]
    return pyloss.Weight(raw, format, (outputs, inputs))


def product(x: np.ndarray, weight: pyloss.Weight, precision: str) -> Callable[[], None]:
    y = np.empty((len(x), weight.shape[0]), np.float32)
    with matmul_precision(precision):
        setting = _core.matmul_precision()

    def run() -> None:
        _core.set_matmul_precision(setting)
        _core.linear_forward(x, weight.handle, None, None, None, 0.0, None, y)

    return run


def main(formats: list[str]) -> None:
    pyloss.set_num_threads(THREADS)
    rows = []
    for inputs, outputs in SHAPES:
        for format in formats or FORMATS:
            weight = stored(inputs, outputs, format)
            for m in ROWS:
                if outputs > 2**16 and m > 32:
                    continue
                x = np.random.default_rng(1).standard_normal((m, weight.shape[1])).astype("f4")
                names = ("float32", "int8", *(("bfloat16",) if m > 32 else ()))
                runs = max(5, min(200, 4 * 10**9 // (m * weight.shape[0] * weight.shape[1])))
                times = best_of(runs, *(product(x, weight, name) for name in names))
                cells = [f"{1e6 * t:.0f}" for t in times] + [""] * (3 - len(times))
                shape = f"{weight.shape[1]} to {outputs}"
                rows.append((format, shape, f"{m}", *cells, f"{times[0] / times[1]:.2f}"))
    heads = ("format", "shape", "rows", "float32, us", "int8, us", "bfloat16, us", "int8 faster")
    print(table(heads, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
