"""`make bench-scaling`: how the speed of a training step grows with the number of cores.

    python benchmarks/scaling.py MODEL [--type f32] [--batch 4] [--tokens 256]

Up to the cores of this machine, steps are measured, beside PEFT's with as many threads. Beyond, the
speed is predicted from each call's time on one thread, its pieces of work, the cost of a meeting of
threads, and the time between operations. The prediction assumes that each core is as fast as one is
here, memory included, and that a meeting costs log2(threads) times as much as with two threads.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from typing import NamedTuple

import numpy as np
import step_limits
import step_work
from bases import load
from common import run_json, table

from pyloss import _core, measuring
from pyloss.autograd.recorded import Recorded

CORES = (1, 2, 4, 8, 16, 32, 64)


class Call(NamedTuple):
    """A call of the core: its time on one thread, and how its work is cut."""

    name: str
    seconds: float
    meetings: int
    pieces: int


def predicted(call: Call, threads: int, meeting: float) -> float:
    """The seconds of a call on so many threads. `meeting`: of two threads."""
    if call.meetings == 0 or threads == 1:
        return call.seconds
    rounds = math.ceil(call.pieces / threads)  # the slowest thread has so many pieces
    return call.seconds * rounds / call.pieces + call.meetings * meeting * math.log2(threads)


def step_seconds(calls: list[Call], between: float, threads: int, meeting: float) -> float:
    """The seconds of a step, `between` of them outside of the calls."""
    return between + sum(predicted(call, threads, meeting) for call in calls)


def meeting_seconds() -> float:
    """The cost of a meeting of two threads: a call of two pieces against half of its work."""
    x = [np.ones(n, np.float32) for n in (8256, 4128)]  # the second call is one piece
    two, half = (
        measuring.best_seconds(lambda y=y: _core.scale(1.0, [y] * 100, [y] * 100), 0.3) / 100
        for y in x
    )
    return max(two - half, 0.0)


def calls_of_step(step, batch) -> list[Call]:
    """The calls of a step on one thread. Layers run as they are, so that each call is seen."""
    found: list[Call] = []
    plain = Recorded.__call__
    functions = {name: getattr(_core, name) for name, _ in _core.ops()}

    def counted(name):
        def run(*arguments):
            for call in step_limits.calls_of(arguments):
                begin = time.perf_counter()
                functions[name](*call)
                found.append(Call(name, time.perf_counter() - begin, *_core.pieces()))

        return run

    Recorded.__call__ = lambda self, function, x, arrays: function(x)
    for name in functions:
        setattr(_core, name, counted(name))
    try:
        step(*batch)
    finally:
        Recorded.__call__ = plain
        for name, function in functions.items():
            setattr(_core, name, function)
    return found


def between_operations(step, batch, passes: int = 3) -> float:
    """The seconds of a step outside of the core's operations, the fewest of some steps."""
    found = []
    for _ in range(passes):
        _core.profile(True)
        begin = time.perf_counter()
        step(*batch)
        seconds = time.perf_counter() - begin
        found.append(seconds - sum(row[1] for row in _core.profile(False).values()))
    return min(found)


def measured(options, threads: int) -> tuple[float, float | None]:
    """Tokens per second of pyloss and of PEFT on so many threads; None where PEFT cannot run."""
    flags = ["--batch", str(options.batch), "--tokens", str(options.tokens)]
    names = ("PYLOSS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    count = dict.fromkeys(names, str(threads))
    own = run_json("step_pyloss.py", options.model, *flags, **count)["tokens_per_s"]
    try:
        return own, run_json("step_peft.py", options.model, *flags, **count)["tokens_per_s"]
    except RuntimeError:  # a file that it cannot read, or a library that is missing
        return own, None


def main() -> None:
    parser = step_work.parser(__doc__)
    parser.add_argument("--type", help="of a config.json's random weights")
    options = parser.parse_args()
    here = len(os.sched_getaffinity(0))
    meeting = meeting_seconds() if here > 1 else 5e-6
    model = load(options.model, options.type)
    config = {"rank": step_work.RANK, "scale": step_work.SCALE}
    step = measuring.training_step(
        model, config, options.kind == "dora", options.checkpoint, step_work.RATE
    )
    batch = step_work.batches(options, model.vocab_size)[0]
    for _ in range(2):
        step(*batch)
    between = between_operations(step, batch)
    _core.set_num_threads(1)
    step(*batch)
    calls = calls_of_step(step, batch)

    rows = []
    for name in sorted({call.name for call in calls}):
        some = [call for call in calls if call.name == name]
        times = [1e3 * sum(predicted(call, n, meeting) for call in some) for n in (1, 16, 64)]
        pieces = sorted(call.pieces for call in some)
        middle, rounds = statistics.median_low(pieces), sum(call.meetings for call in some)
        rows.append((times[0], (name, len(some), middle, rounds, *(f"{t:.1f}" for t in times))))
    print(
        f"A meeting of two threads: {1e6 * meeting:.1f} us. Milliseconds of a step, by operation,"
    )
    print("on one thread, and predicted for 16 and 64:\n")
    header = ("operation", "calls", "pieces (median)", "meetings", "1", "16", "64")
    between_row = ("between operations", "", "", "", *[f"{1e3 * between:.1f}"] * 3)
    print(table(header, [*(row for _, row in sorted(rows, reverse=True)), between_row]))
    print("\nTokens per second of training; * predicted:\n")
    speeds = []
    for threads in CORES:
        if threads <= here:
            own, peer = measured(options, threads)
            speeds.append((threads, f"{own:.0f}", "" if peer is None else f"{peer:.0f}"))
        else:
            seconds = step_seconds(calls, between, threads, meeting)
            speeds.append((threads, f"{batch.tokens / seconds:.0f} *", ""))
    print(table(("cores", "pyloss", "PEFT"), speeds))


if __name__ == "__main__":
    main()
