"""Shared by all benchmarks: interleaved best-of timing, one process per program, tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "build" / "bench"
THREADS = 2
#: variables of the caches of compiled OpenCL kernels: pyloss's and the drivers'
KERNEL_CACHES = ("PYLOSS_CACHE", "POCL_CACHE_DIR", "CUDA_CACHE_PATH")


def best_of(runs: int, *functions: Callable[[], object]) -> list[float]:
    """The shortest time of each function in seconds; they take turns, so slow moments hit all."""
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
    """The number of the line "key: number kB", in GB."""
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e6


def peak_gb() -> float:
    """The peak resident memory of this process. getrusage's peak is inherited from the parent."""
    return _listed_gb("/proc/self/status", "VmHWM")


def resident_gb() -> float:
    """The resident memory of this process now."""
    return _listed_gb("/proc/self/status", "VmRSS")


def free_gb() -> float:
    """The available memory of the machine."""
    return _listed_gb("/proc/meminfo", "MemAvailable")


def environment(**extra: str) -> dict[str, str]:
    """The environment of a measured process: the same number of threads for all, no network."""
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
    """A cache for torch.compile's kernels, so that a second round does not compile them."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor")}


def run_json(script: str, *arguments: str, **extra_environment: str) -> dict:
    """Runs `benchmarks/<script>` in its own process; returns the JSON of its last line."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(
        command, env=environment(**extra_environment), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def machine() -> str:
    """The processor, threads and versions of a measurement."""
    import platform

    import numpy

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
    try:
        torch = f"torch {version('torch').split('+')[0]}, "
    except PackageNotFoundError:
        torch = ""
    versions = f"pyloss {pyloss.__version__}, {torch}NumPy {numpy.__version__}"
    isa, python = pyloss.info()["isa"], platform.python_version()
    return f"{name}, {THREADS} threads, {isa}; Python {python}, {versions}"
