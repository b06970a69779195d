"""What every benchmark shares: interleaved best-of timing, one process per measured program, tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "build" / "bench"
THREADS = 2


def best_of(runs: int, *functions: Callable[[], object]) -> list[float]:
    """The shortest time of each function in seconds; they take turns, so that a slow moment of the machine meets all of them."""
    best = [float("inf")] * len(functions)
    for function in functions:
        function()
    for _ in range(runs):
        for i, function in enumerate(functions):
            begin = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - begin)
    return best


def _listed_gb(path: str, key: str) -> float:
    """A number of the lines "key: number kB"."""
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e6


def peak_gb() -> float:
    """The peak resident memory of this process; not getrusage's, which a new process inherits from the one that started it."""
    return _listed_gb("/proc/self/status", "VmHWM")


def resident_gb() -> float:
    """The resident memory of this process now."""
    return _listed_gb("/proc/self/status", "VmRSS")


def free_gb() -> float:
    """The memory of the machine that is free for use."""
    return _listed_gb("/proc/meminfo", "MemAvailable")


def environment(**extra: str) -> dict[str, str]:
    """The environment of a measured process: the same number of threads for everybody, nothing from a network."""
    names = (
        "PYLOSS_NUM_THREADS",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "POCL_MAX_PTHREAD_COUNT",
        "POCL_CPU_MAX_CU_COUNT",
    )
    return {
        **os.environ,
        **dict.fromkeys(names, str(THREADS)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **extra,
    }


def compiled() -> dict[str, str]:
    """Where torch.compile keeps its kernels, so that a second round does not compile them anew."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor")}


def run_json(script: str, *arguments: str, **extra_environment: str) -> dict:
    """Runs `benchmarks/<script>` in a process of its own and returns the JSON on the last line it prints."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(
        command, env=environment(**extra_environment), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def machine() -> str:
    """The processor, threads and versions the figures were taken on."""
    import platform

    import numpy
    import torch

    import pyloss

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = (
            line.split(":")[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        )
        name = next(models, name)
    versions = f"pyloss {pyloss.__version__}, torch {torch.__version__.split('+')[0]}, NumPy {numpy.__version__}"
    return f"{name}, {THREADS} threads, {pyloss.info()['isa']}; Python {platform.python_version()}, {versions}"
