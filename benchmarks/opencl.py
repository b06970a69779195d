"""`make bench-opencl`: compares an OpenCL device with the C kernels in one run.

    python benchmarks/opencl.py [--device opencl:0] [--sizes gpu] [--quick] [--only PART ...]

Prints the tables. Each measurement runs in its own process; the programs take turns, and the best
of the rounds counts. On a processor the device has as many threads as the C kernels. Sizes for a
GPU are not measured with the C kernels, which would take minutes for each; what torch, PEFT and
Liger do with them on the same card is the part "peers". A program that fails leaves its error in
place of its table, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

import matmul
import numpy as np
from bases import MODEL, float_folder
from common import KERNEL_CACHES, WORK, compiled, machine, run_json, table
from loss_rows import DTYPES, LOSSES
from losses import TRAFFIC
from shapes import narrow, shape_file
from train import BASES, NAMES, OURS, PEFT, Found, Program, measured, ours

import pyloss
from pyloss import _core

#: formats of the base in steps
STORED = ("q4_1", "f32")


class Step(NamedTuple):
    """A measured step: a file that gives a config.json, or None for the embedded model."""

    name: str
    config: Callable[[], str] | None
    batch: int
    tokens: int


class Sizes(NamedTuple):
    """What is measured; `host`: with the C kernels, too."""

    host: bool
    steps: tuple[Step, ...]
    products: str  # of matmul.SIZES
    losses: tuple[int, int]  # rows, classes
    dtypes: tuple[str, ...]


SIZES = {
    "cpu": Sizes(True, (Step("SmolLM2-135M", None, 4, 256),), "usual", (512, 49152), ("f32",)),
    # Models of random weights: no file is needed, and PEFT makes the same shapes.
    "gpu": Sizes(
        False,
        (
            Step("SmolLM2-135M", lambda: shape_file("SmolLM2-135M"), 8, 512),
            Step("Qwen3-0.6B", lambda: shape_file("Qwen3-0.6B"), 4, 512),
        ),
        "gpu",
        (4096, 151936),
        ("f32", "bf16"),
    ),
    # Tries what the sizes for a GPU run, on a processor.
    "small": Sizes(
        False,
        (
            Step("SmolLM2-135M, 2 layers", lambda: narrow("SmolLM2-135M", 2, 4096), 2, 32),
            Step("Qwen3-0.6B, 2 layers", lambda: narrow("Qwen3-0.6B", 2, 4096), 1, 32),
        ),
        "small",
        (64, 4096),
        ("f32", "bf16"),
    ),
}


class Tables:
    """The parts of the run for one device; each yields its tables."""

    def __init__(self, device: pyloss.Device, sizes: Sizes, quick: bool) -> None:
        self.device, self.sizes, self.quick = device, sizes, quick
        self.rounds = 1 if quick else 2

    def steps(self) -> Iterator[str]:
        """LoRA steps on the device and with the C kernels."""
        for step in self.sizes.steps:
            programs = []
            for base in STORED:
                here = program_of(step, base)
                there = here._replace(
                    name=on(here.name), flags=(*here.flags, "--device", self.device.id)
                )
                programs += [here, there] if self.sizes.host else [there]
            yield self._steps(step, programs)

    def _steps(self, step: Step, programs: list[Program]) -> str:
        flags = ("--batch", step.batch, "--tokens", step.tokens, "--passes", 2 if self.quick else 3)
        found = measured(programs, *flags, rounds=self.rounds)
        heads = (
            f"LoRA step of {step.name}, {step.batch} x {step.tokens}",
            "tokens/s",
            *(("speed / C kernels",) if self.sizes.host else ()),
            "first step, s",
            "loss after the last step",
        )
        return table(heads, step_rows(found, self.sizes.host))

    def first(self) -> Iterator[str]:
        """The first step of a process with empty kernel caches, and of the next process."""
        flags = ("--device", self.device.id, "--passes", "2")
        rows = []
        for name, path in (("Q4_1", MODEL), ("float32", float_folder())):
            with tempfile.TemporaryDirectory() as folder:
                caches = {variable: f"{folder}/{variable}" for variable in KERNEL_CACHES}
                cold, warm = (run_json("step_pyloss.py", path, *flags, **caches) for _ in range(2))
            usual = 4 * 256 / max(cold["tokens_per_s"], warm["tokens_per_s"])
            rows.append((name, f"{cold['first_s']:.1f}", f"{warm['first_s']:.1f}", f"{usual:.1f}"))
        heads = (
            "the first step, LoRA, 4 x 256",
            "compiling kernels, s",
            "cached kernels, s",
            "a later step, s",
        )
        yield table(heads, rows)

    def products(self) -> Iterator[str]:
        """Matrix products."""
        best: dict[str, dict[str, float]] = {self.device.id: {}}
        if self.sizes.host:
            best["pyloss"] = {}
        for _ in range(self.rounds):
            for library, found in best.items():
                for key, speed in self._products(library).items():
                    found[key] = max(speed, found.get(key, 0.0))
        heads = ["products, rows x inputs to outputs", "the device, GFLOP/s"]
        if self.sizes.host:
            heads += ["C kernels, GFLOP/s", "speed / C kernels"]
        yield table(heads, product_rows(best[self.device.id], best.get("pyloss")))

    def _products(self, library: str) -> dict[str, float]:
        """GFLOP/s by matmul.py's keys."""
        calls = "3" if self.quick and self.sizes.host else "10"
        return run_json("matmul.py", library, calls, self.sizes.products)

    def losses(self) -> Iterator[str]:
        """Row losses against the bandwidth of memory."""
        for dtype in self.sizes.dtypes:
            yield self._losses(dtype, f"memory-{self.device.id}", self.device.id, "the device")

    def _losses(self, dtype: str, memory: str, library: str, name: str) -> str:
        rows, v = fitting(self.device, *self.sizes.losses, dtype)
        found: dict[str, float] = {}
        limits: dict[str, float] = {}
        seconds = "0.1" if self.quick else "0.5"
        for _ in range(self.rounds):
            for program, best in ((memory, limits), (library, found)):
                given = (program, str(rows), str(v), dtype, seconds)
                for work, ms in run_json("loss_rows.py", *given, **compiled()).items():
                    best[work] = min(ms, best.get(work, ms))
        nbytes = np.dtype(DTYPES[dtype]).itemsize * rows * v
        speeds = {work: gigabytes(work, nbytes) / ms * 1e3 for work, ms in limits.items()}
        memory_gb, copy_gb = max(speeds.values()), speeds["read 1, write 1"]
        heads = (
            f"losses, {name}, {rows} x {v} {dtype}; memory {memory_gb:.0f} GB/s, "
            f"a copy {copy_gb:.0f}",
            "ms",
            "GB/s",
            "speed / memory",
        )
        return table(heads, loss_rows(found, nbytes, memory_gb))

    def peers(self) -> Iterator[str]:
        """What torch, PEFT and Liger do with the same sizes on the same card."""
        missing = "torch" if not find_spec("torch") else "" if sees_cuda() else "a CUDA card"
        if missing:
            yield f"peers: not measured, for torch needs {missing}."
            return
        yield from attempted("products, torch", self._peer_products)
        for dtype in self.sizes.dtypes:
            for name, what in PEERS.items():
                yield from attempted(
                    f"losses, {what}, {dtype}",
                    lambda: self._losses(dtype, "memory-cuda", name, what),
                )
        for step in self.sizes.steps:
            yield from attempted(f"step, PEFT, {step.name}", lambda: self._peer_step(step))

    def _peer_products(self) -> str:
        found = run_json("matmul.py", "torch-cuda", "10", self.sizes.products)
        heads = ("products by torch.mm, float32 without TF32, rows x inputs to outputs", "GFLOP/s")
        return table(heads, product_rows(found, None))

    def _peer_step(self, step: Step) -> str:
        name = f"torch + PEFT, {NAMES['lora']}, float32 without TF32, on the card"
        path = step.config() if step.config else float_folder()
        flags = ("--kind", "lora", "--device", "cuda")
        return self._steps(step, [Program(name, PEFT, path, flags)])


PEERS = {"cuda": "torch", "cuda-compile": "torch.compile", "cuda-liger": "Liger"}
failures: list[str] = []


def attempted(name: str, measure: Callable[[], str]) -> Iterator[str]:
    """A table, or a line that says why there is none."""
    try:
        yield measure()
    except (RuntimeError, OSError) as error:
        failures.append(name)
        yield f"{name}: failed.\n{error}"


def program_of(step: Step, base: str) -> Program:
    """The step with the C kernels, over a base in this format."""
    if step.config is None:
        return ours("lora", base)
    name = f"pyloss, {NAMES['lora']}, {BASES[base][0]}"
    return Program(name, OURS, step.config(), ("--kind", "lora", "--type", base))


def on(name: str) -> str:
    return f"{name}, on the device"


def sees_cuda() -> bool:
    """Whether torch can run on a GPU."""
    import torch

    return torch.cuda.is_available()


def fitting(device: pyloss.Device, rows: int, v: int, dtype: str) -> tuple[int, int]:
    """The shape of logits, with fewer rows where the device lacks memory."""
    limits = _core.opencl_devices()[0][int(device.id.partition(":")[2])]
    while rows > 1:
        nbytes = rows * v * np.dtype(DTYPES[dtype]).itemsize
        if nbytes <= limits["max_allocation"] and 5 * nbytes <= limits["memory"]:
            break
        rows //= 2
    return rows, v


def step_rows(found: Found, host: bool) -> list[tuple[str, ...]]:
    """Tokens/s, with their ratios to the C kernels, seconds of the first step, and losses."""
    rows = []
    for name, f in found.items():
        here = next((found[other] for other in found if on(other) == name), None)
        ratio = f"{f['tokens_per_s'] / here['tokens_per_s']:.2f}" if here else ""
        rows.append(
            (
                name,
                f"{f['tokens_per_s']:.0f}",
                *((ratio,) if host else ()),
                f"{f['first_s']:.1f}",
                f"{f['loss']:.4f}",
            )
        )
    return rows


def product_rows(device: dict[str, float], host: dict[str, float] | None) -> list[tuple[str, ...]]:
    """One row for each product measured on the device; keys are matmul.py's."""
    tokens = {
        f"{inputs}x{outputs}": rows
        for shapes in matmul.SIZES.values()
        for rows, inputs, outputs in shapes
    }
    rows = []
    for key, speed in device.items():
        shape, stored, _, direction = key.split(" ", 3)
        title = f"{tokens[shape]} x {shape.replace('x', ' to ')}, {stored}, {direction}"
        cells = (f"{host[key]:.0f}", f"{speed / host[key]:.2f}") if host is not None else ()
        rows.append((title, f"{speed:.0f}", *cells))
    return rows


def gigabytes(traffic: str, nbytes: int) -> float:
    """The size of traffic such as "read 2, write 1" over arrays of `nbytes` bytes."""
    return sum(int(part.split()[1]) for part in traffic.split(", ")) * nbytes / 1e9


def loss_rows(ms: dict[str, float], nbytes: int, memory: float) -> list[tuple[str, ...]]:
    """Bandwidths by the bytes that a loss must move; `ms` from loss_rows.py, `memory` in GB/s."""
    rows = []
    for loss in LOSSES:
        for direction, title, traffic in zip(
            ("forward", "both"), ("loss", "loss + gradient"), TRAFFIC[loss], strict=True
        ):
            spent = ms.get(f"{loss} {direction}")
            if spent is None:  # the library has no such loss
                continue
            speed = gigabytes(traffic, nbytes) / spent * 1e3
            rows.append(
                (f"{loss}, {title}", f"{spent:.2f}", f"{speed:.0f}", f"{speed / memory:.2f}")
            )
    return rows


PARTS = ("steps", "first", "products", "losses", "peers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="opencl:0", help="opencl:<number> (default: opencl:0)")
    parser.add_argument(
        "--sizes", choices=SIZES, help="default: gpu, or cpu where the device is a processor"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few runs: checks that everything works"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"{', '.join(PARTS)}; default: all, without first for other sizes than cpu",
    )
    options = parser.parse_args()
    known = {device.id: device for device in pyloss.devices()[1:]}
    if options.device not in known:
        present = ", ".join(known) or "no OpenCL device"
        parser.error(f"--device is {options.device!r}; this machine has {present}")
    device = known[options.device]
    sizes = SIZES[options.sizes or ("cpu" if device.kind == "cpu" else "gpu")]
    WORK.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}; {device.id}: {device.name} ({device.platform})", flush=True)
    tables = Tables(device, sizes, options.quick)
    wanted = options.only or [part for part in PARTS if part != "first" or sizes.host]
    for part in (part for part in PARTS if part in wanted):
        try:
            for text in getattr(tables, part)():
                print(f"\n{text}", flush=True)
        except RuntimeError as error:
            failures.append(part)
            print(f"\n{part}: failed.\n{error}", flush=True)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
