"""`make bench-opencl`: compares an OpenCL device with the C kernels in one run.

    python benchmarks/opencl.py [--device opencl:0] [--quick] [--only PART ...]

Prints the tables. Each measurement runs in its own process; the programs take turns, and the best
of the rounds counts. On a processor the device has as many threads as the C kernels. A GPU also
gets larger steps, and torch + PEFT as a peer if torch sees that card.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.util import find_spec

from bases import MODEL, float_folder
from common import WORK, machine, run_json, table
from loss_rows import LOSSES
from losses import TRAFFIC
from matmul import SHAPES, SQUARE
from train import Found, Program, eager, measured, ours

import pyloss

# caches of compiled kernels: pyloss's and the drivers'
CACHES = ("PYLOSS_CACHE", "POCL_CACHE_DIR", "CUDA_CACHE_PATH")
V = 49152


class Tables:
    """The parts of the run for one device; each returns its tables."""

    def __init__(self, device: pyloss.Device, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.gpu = device.kind != "cpu"

    def steps(self) -> list[str]:
        """LoRA steps on the device and with the C kernels."""
        passes = ("--passes", 2 if self.quick else 3)
        rounds = 1 if self.quick else 2
        parts = []
        for batch, tokens in ((4, 256), (8, 512)) if self.gpu else ((4, 256),):
            programs = []
            for base in ("q4_1", "f32"):
                here = ours("lora", base)
                programs += [
                    here,
                    here._replace(
                        name=on(here.name), flags=(*here.flags, "--device", self.device.id)
                    ),
                ]
            if self.gpu and sees_cuda():
                programs.append(
                    eager("lora", "--device", "cuda", name=", float32 without TF32, on the card")
                )
            found = measured(programs, "--batch", batch, "--tokens", tokens, *passes, rounds=rounds)
            ratios = (
                ("speed / C kernels", "speed / PEFT on the card")
                if programs[-1].peer
                else ("speed / C kernels",)
            )
            heads = (
                f"LoRA step, {batch} x {tokens}",
                "tokens/s",
                *ratios,
                "loss after the last step",
            )
            parts.append(table(heads, step_rows(programs, found)))
        return parts

    def first(self) -> list[str]:
        """The first step of a process with empty kernel caches, and of the next process."""
        flags = ("--device", self.device.id, "--passes", "2")
        rows = []
        for name, path in (("Q4_1", MODEL), ("float32", float_folder())):
            with tempfile.TemporaryDirectory() as folder:
                caches = {variable: f"{folder}/{variable}" for variable in CACHES}
                cold, warm = (run_json("step_pyloss.py", path, *flags, **caches) for _ in range(2))
            usual = 4 * 256 / max(cold["tokens_per_s"], warm["tokens_per_s"])
            rows.append((name, f"{cold['first_s']:.1f}", f"{warm['first_s']:.1f}", f"{usual:.1f}"))
        return [
            table(
                (
                    "the first step, LoRA, 4 x 256",
                    "compiling kernels, s",
                    "cached kernels, s",
                    "a later step, s",
                ),
                rows,
            )
        ]

    def products(self) -> list[str]:
        """Matrix products."""
        best: dict[str, dict[str, float]] = {"pyloss": {}, self.device.id: {}}
        for _ in range(1 if self.quick else 2):
            for library, found in best.items():
                for key, speed in run_json(
                    "matmul.py", library, "3" if self.quick else "10"
                ).items():
                    found[key] = max(speed, found.get(key, 0.0))
        heads = (
            f"products, {SHAPES[0][0]} rows, inputs x outputs",
            "the device, GFLOP/s",
            "C kernels, GFLOP/s",
            "speed / C kernels",
        )
        return [table(heads, product_rows(best[self.device.id], best["pyloss"]))]

    def losses(self) -> list[str]:
        """Row losses against the bandwidth of memory."""
        rows, seconds = (4096 if self.gpu else 512), "0.1" if self.quick else "0.5"
        found: dict[str, float] = {}
        limits: dict[str, float] = {}
        for _ in range(1 if self.quick else 2):
            for library, best in ((f"memory-{self.device.id}", limits), (self.device.id, found)):
                for work, ms in run_json(
                    "loss_rows.py", library, str(rows), str(V), "f32", seconds
                ).items():
                    best[work] = min(ms, best.get(work, ms))
        nbytes = 4 * rows * V
        memory = max(gigabytes(work, nbytes) / ms * 1e3 for work, ms in limits.items())
        heads = (
            f"losses, {rows} x {V} f32; memory {memory:.0f} GB/s",
            "ms",
            "GB/s",
            "speed / memory",
        )
        return [table(heads, loss_rows(found, nbytes, memory))]


def on(name: str) -> str:
    return f"{name}, on the device"


def sees_cuda() -> bool:
    """Whether torch + PEFT can run on a GPU."""
    if not (find_spec("torch") and find_spec("peft")):
        return False
    import torch

    return torch.cuda.is_available()


def step_rows(programs: list[Program], found: Found) -> list[tuple[str, ...]]:
    """Tokens/s, their ratios to the C kernels and to PEFT (if it ran), and the losses."""
    peers = [found[p.name] for p in programs if p.peer]
    rows = []
    for name, f in found.items():
        here = next((found[other] for other in found if on(other) == name), None)
        ratios = [
            f"{f['tokens_per_s'] / other['tokens_per_s']:.2f}" if other else ""
            for other in (here, *peers)
        ]
        rows.append((name, f"{f['tokens_per_s']:.0f}", *ratios, f"{f['loss']:.4f}"))
    return rows


def product_rows(device: dict[str, float], host: dict[str, float]) -> list[tuple[str, ...]]:
    """One row for each product measured on the device; keys are matmul.py's."""
    rows = []
    for key, speed in device.items():
        shape, stored, _, direction = key.split(" ", 3)
        title = f"{shape}, {stored}, {direction}" + (
            f", {SQUARE} rows" if shape == f"{SQUARE}x{SQUARE}" else ""
        )
        cells = (f"{host[key]:.0f}", f"{speed / host[key]:.2f}") if key in host else ("", "")
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
            spent = ms[f"{loss} {direction}"]
            speed = gigabytes(traffic, nbytes) / spent * 1e3
            rows.append(
                (f"{loss}, {title}", f"{spent:.2f}", f"{speed:.0f}", f"{speed / memory:.2f}")
            )
    return rows


PARTS = ("steps", "first", "products", "losses")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="opencl:0", help="opencl:<number> (default: opencl:0)")
    parser.add_argument(
        "--quick", action="store_true", help="few runs: checks that everything works"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    options = parser.parse_args()
    known = {device.id: device for device in pyloss.devices()[1:]}
    if options.device not in known:
        present = ", ".join(known) or "no OpenCL device"
        parser.error(f"--device is {options.device!r}; this machine has {present}")
    device = known[options.device]
    WORK.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}; {device.id}: {device.name} ({device.platform})", flush=True)
    tables = Tables(device, options.quick)
    for part in PARTS:
        if part in options.only:
            for text in getattr(tables, part)():
                print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
