"""The time of each operation of a pyloss step, and its work; the flags are step_work's.

Prints JSON of the fastest step: `operations`, {name: [calls, ms, GFLOP, GB of arguments]}, and
`step_ms`; and the best speeds of this run: `matrix_gflops` of products of a layer's shape,
`memory_gb_s` of reading.
"""

from __future__ import annotations

import json
import re
import time
from math import prod

import numpy as np
import step_work

import pyloss
from pyloss import _core, measuring

FLOP: dict[str, float] = {}  # of the counted calls, by operation
MOVED: dict[str, float] = {}  # bytes moved by operations that read only a part of an argument


def dimensions(spec: str, arguments: tuple) -> dict[str, int]:
    """The sizes of the letters in an operation's specification (csrc/ops.def), from its arrays."""
    found: dict[str, int] = {}
    names = [part for part in spec.split() if ":" in part]
    for part, value in zip(names, arguments, strict=False):
        sizes = re.search(r"\[(.*)\]", part)
        if sizes is None or not isinstance(value, np.ndarray):
            continue
        letters = sizes[1].split(",")
        shape = list(value.shape)
        if letters[0].startswith("*"):
            rest = len(letters) - 1
            shape = [prod(shape[: len(shape) - rest]), *shape[len(shape) - rest :]]
        found |= {letter.lstrip("*"): size for letter, size in zip(letters, shape, strict=True)}
    return found


def pairs(offsets: np.ndarray, window: int) -> int:
    """The number of (query, visible key) pairs of all sequences."""
    total = 0
    for count in np.diff(offsets).tolist():
        seen = np.arange(1, count + 1)
        total += int((np.minimum(seen, window) if window else seen).sum())
    return total


def work_of(name: str, spec: str, arguments: tuple) -> float:
    """The FLOP of a matrix product or of attention; 0 for memory-bound operations."""
    size = dimensions(spec, arguments)
    if name.startswith("attention"):
        window = next(a for a in arguments if isinstance(a, int))
        offsets = next(a for a in arguments if isinstance(a, np.ndarray) and a.dtype == np.int32)
        return (
            2 * (5 if name.endswith("grad") else 2) * pairs(offsets, window) * size["H"] * size["D"]
        )
    if name.startswith("matmul"):
        return 2 * size["M"] * size["N"] * size["K"]
    if name == "adapted_norm":
        return 2 * size["O"] * size["I"] * size["R"]
    if {"N", "O", "I"} <= size.keys():
        given = [part.split(":")[0].rstrip("?") for part in spec.split() if ":" in part]
        here = {
            key
            for key, value in zip(given, arguments, strict=False)
            if isinstance(value, np.ndarray)
        }
        low_rank = size.get("R", 0) * (size["I"] * ("a" in here) + size["O"] * ("b" in here))
        return 2 * size["N"] * (size["O"] * size["I"] + low_rank)
    return 0


def count_work() -> None:
    """Makes calls of the core add their work to FLOP and MOVED."""
    for name, spec in _core.ops():
        function = getattr(_core, name)

        def counted(*arguments, name=name, spec=spec, function=function):
            FLOP[name] = FLOP.get(name, 0) + work_of(name, spec, arguments)
            if name == "embedding_forward":
                MOVED[name] = MOVED.get(name, 0) + 2 * arguments[-1].nbytes
            return function(*arguments)

        setattr(_core, name, counted)


def main() -> None:
    options = step_work.parser(__doc__).parse_args()
    model = pyloss.load_model(options.model)
    config = {"rank": step_work.RANK, "scale": step_work.SCALE}
    step = measuring.training_step(
        model, config, options.kind == "dora", options.checkpoint, step_work.RATE
    )
    batch = step_work.batches(options, model.vocab_size)[0]
    step(*batch)
    best, operations = float("inf"), {}
    for _ in range(options.passes):
        _core.profile(True)
        begin = time.perf_counter()
        step(*batch)
        seconds, calls = time.perf_counter() - begin, _core.profile(False)
        if seconds < best:
            best, operations = seconds, calls
    c = model.config
    layers = [
        (c.intermediate_size, c.hidden_size),
        (c.hidden_size, c.intermediate_size),
        (c.hidden_size, c.hidden_size),
    ]
    matrix = max(
        measuring.product_speed(np.ones(shape, np.float32), 1024, seconds=1) for shape in layers
    )
    memory = measuring.memory_speed(1)
    count_work()
    step(*batch)  # not a timed step: counting takes time
    work = {
        name: [calls, 1e3 * seconds, FLOP.get(name, 0) / 1e9, MOVED.get(name, size) / 1e9]
        for name, (calls, seconds, size) in operations.items()
    }
    found = {
        "step_ms": 1e3 * best,
        "matrix_gflops": matrix / 1e9,
        "memory_gb_s": memory / 1e9,
        "operations": work,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
