"""The time of each operation of a pyloss step, and its work.

The flags are step_work's, --type and --processor-time.

Prints JSON of the fastest step:
- `operations`: {name: [calls, ms, GFLOP, GB of arguments]}, and `step_ms`;
- `shapes`: {name and shape of an operation: [calls, ms, GFLOP]}, each at the time of its quickest
  call, which other programs disturbed least;
- `base_gflop`: of the products with the base's weights, without adapters;
- the best speeds of this run: `matrix_gflops` of plain products of a layer's shape, `memory_gb_s`
  of reading.
"""

from __future__ import annotations

import json
import re
import time
from math import prod

import numpy as np
import step_work
from bases import load

from pyloss import _core, measuring
from pyloss.autograd.recorded import Recorded

CHUNK = 64  # rows that csrc/kernels/layers/delta_rule.tpl.h takes at a time


class Work:
    """The work of the counted calls.

    Attributes:
        flop: by operation.
        moved: bytes moved by operations that read only a part of an argument.
        base: FLOP of products with the base's weights.
        shapes: by operation and shape: calls, seconds of the quickest, FLOP of all.
    """

    def __init__(self) -> None:
        self.flop: dict[str, float] = {}
        self.moved: dict[str, float] = {}
        self.base = 0.0
        self.shapes: dict[str, tuple[int, float, float]] = {}

    def add(self, name: str, spec: str, arguments: tuple, seconds: float) -> None:
        flop = work_of(name, spec, arguments)
        self.flop[name] = self.flop.get(name, 0) + flop
        self.base += base_work(spec, arguments)
        if name == "embedding_forward":
            self.moved[name] = self.moved.get(name, 0) + 2 * arguments[-1].nbytes
        key = f"{name} {shape_of(name, spec, arguments)}"
        calls, quickest, total = self.shapes.get(key, (0, seconds, 0.0))
        self.shapes[key] = calls + 1, min(quickest, seconds), total + flop


WORK = Work()  # of the current step


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
    if name.startswith("delta_rule"):  # in chunks; the gradient does the forward pass again
        each = CHUNK * (size["D"] + size["E"]) + 3 * size["D"] * size["E"]
        return 2 * size["N"] * size["H"] * each * (3 if name.endswith("grad") else 1)
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


def base_work(spec: str, arguments: tuple) -> float:
    """The FLOP of a product with a weight, without its adapter; 0 for other operations."""
    size = dimensions(spec, arguments)
    return 2 * size["N"] * size["O"] * size["I"] if {"N", "O", "I"} <= size.keys() else 0


def shape_of(name: str, spec: str, arguments: tuple) -> str:
    """The sizes of an operation: a product's, attention's heads, else the result's."""
    size = dimensions(spec, arguments)
    if name.startswith("attention"):
        return f"{size['H']} heads of {size['D']}"
    if {"N", "O", "I"} <= size.keys():
        return f"{size['N']} x {size['I']} to {size['O']}"
    if name.startswith("matmul"):
        return " x ".join(str(size[letter]) for letter in "MKN")
    arrays = [a for a in arguments if isinstance(a, np.ndarray)]
    return " x ".join(map(str, arrays[-1].shape)) if arrays else ""


def calls_of(arguments: tuple) -> list[tuple]:
    """The calls that arguments with lists stand for."""
    lengths = [len(argument) for argument in arguments if isinstance(argument, list)]
    if not lengths:
        return [arguments]
    return [
        tuple(argument[i] if isinstance(argument, list) else argument for argument in arguments)
        for i in range(lengths[0])
    ]


def count_work() -> None:
    """Makes calls of the core add their work to WORK; recorded layers would bypass these calls."""
    Recorded.__call__ = lambda self, function, x, arrays: function(x)
    for name, spec in _core.ops():
        function = getattr(_core, name)

        def counted(*arguments, name=name, spec=spec, function=function):
            for call in calls_of(arguments):
                begin = time.perf_counter()
                function(*call)
                WORK.add(name, spec, call, time.perf_counter() - begin)

        setattr(_core, name, counted)


def plain_speed(model) -> float:
    """FLOP a second of the fastest plain product of the shape of a layer, over 512 tokens."""
    c = model.config
    shapes = [
        (c.intermediate_size, c.hidden_size),
        (c.hidden_size, c.intermediate_size),
        (c.hidden_size, c.hidden_size),
    ]
    return max(
        measuring.product_speed(np.ones(shape, np.float32), 512, seconds=0.5) for shape in shapes
    )


def main() -> None:
    global WORK
    parser = step_work.parser(__doc__)
    parser.add_argument("--type", help="of a config.json's random weights")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="time `shapes`, the step and plain products in seconds of the processor, which other "
        "programs disturb less; set PYLOSS_NUM_THREADS=1",
    )
    options = parser.parse_args()
    if options.processor_time:
        time.perf_counter = time.process_time  # measuring's clock too
    model = load(options.model, options.type)
    config = {"rank": step_work.RANK, "scale": step_work.SCALE}
    step = measuring.training_step(
        model, config, options.kind == "dora", options.checkpoint, step_work.RATE
    )
    batch = step_work.batches(options, model.vocab_size)[0]
    matrix = plain_speed(model)
    step(*batch)
    best, operations = float("inf"), {}
    for _ in range(options.passes):
        _core.profile(True)
        begin = time.perf_counter()
        step(*batch)
        seconds, calls = time.perf_counter() - begin, _core.profile(False)
        if seconds < best:
            best, operations = seconds, calls
        matrix = max(matrix, plain_speed(model))  # often: other programs slow down a moment
    memory = measuring.memory_speed(1)
    count_work()
    quickest: dict[str, float] = {}
    for _ in range(options.passes):  # not timed steps: counting takes time
        WORK = counted = Work()
        step(*batch)
        WORK = Work()  # plain products are not of the step
        matrix = max(matrix, plain_speed(model))
        for name, (_, seconds, _) in counted.shapes.items():
            quickest[name] = min(quickest.get(name, seconds), seconds)
    work = {
        name: [
            calls,
            1e3 * seconds,
            counted.flop.get(name, 0) / 1e9,
            counted.moved.get(name, size) / 1e9,
        ]
        for name, (calls, seconds, size) in operations.items()
    }
    found = {
        "step_ms": 1e3 * best,
        "matrix_gflops": matrix / 1e9,
        "memory_gb_s": memory / 1e9,
        "base_gflop": counted.base / 1e9,
        "operations": work,
        "shapes": {
            name: [calls, 1e3 * calls * quickest[name], flop / 1e9]
            for name, (calls, _, flop) in counted.shapes.items()
        },
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
