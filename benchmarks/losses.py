"""`make bench-losses`: measures the losses of pyloss and its peers in one run.

    python benchmarks/losses.py [--quick] [--only PART ...]

Prints the tables. Each library runs in its own processes; they take turns, and the best of the
rounds counts. The bandwidth limit is the time to read each array of logits once and write one
gradient. All work on arrays that do not fit into caches. Columns and rows of peers that are not
installed are missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from bases import MODEL
from common import WORK, compiled, free_gb, machine, run_json, table
from loss_rows import LOSSES

import pyloss

SHAPES = ((512, 49152), (128, 151936))
TRAFFIC = {  # arrays that a loss must read and write: forward, and with the (student's) gradient
    "cross entropy": ("read 1", "read 1, write 1"),
    "KL": ("read 2", "read 2, write 1"),
    "JS": ("read 2", "read 2, write 1"),
    "stablemax cross entropy": ("read 1", "read 1, write 1"),
}
PEERS = {
    "torch": "torch eager",
    "compile": "torch.compile",
    "mlx": "mlx-lm, CPU",
    "opencl:0": "pyloss, OpenCL",
}


def opencl() -> str:
    """The name of the first OpenCL device, or ""."""
    return next((device.name for device in pyloss.devices() if device.id == "opencl:0"), "")


def rows_table(rows: int, v: int, dtype: str, quick: bool) -> str:
    """The row losses of one shape and type."""
    libraries = ["memory", "pyloss", "torch", "compile", *(["opencl:0"] if opencl() else [])]
    best: dict[str, dict[str, float]] = {library: {} for library in libraries}
    # The addresses of its arrays make a process fast or slow, so the limit is measured more often.
    turns = ["memory", "pyloss", "memory", *libraries[2:], "memory"]
    for _ in range(1 if quick else 3):
        for library in turns:
            found, seconds = best[library], "0.1" if quick else "1"
            for work, ms in run_json(
                "loss_rows.py", library, str(rows), str(v), dtype, seconds, **compiled()
            ).items():
                found[work] = min(ms, found.get(work, ms))
    # A call takes seconds: measure it once.
    if (rows, v, dtype) == (*SHAPES[0], "f32") and find_spec("mlx_lm"):
        best["mlx"] = run_json("loss_rows.py", "mlx", str(rows), str(v), dtype, "0")
    peers = [library for library in PEERS if library in best]
    heads = [f"{rows} x {v} {dtype}", "bandwidth limit, ms", "pyloss, ms", "time / limit"]
    for library in peers:
        heads += [f"{PEERS[library]}, ms", "time / pyloss"]
    lines = []
    for loss in LOSSES:
        for direction, traffic in zip(("forward", "both"), TRAFFIC[loss], strict=True):
            work, limit = f"{loss} {direction}", best["memory"][traffic]
            ours = best["pyloss"][work]
            what = f"{loss}, {'loss + gradient' if direction == 'both' else 'loss'}"
            line = [what, f"{limit:.1f}", f"{ours:.1f}", f"{ours / limit:.2f}"]
            for library in peers:
                line += [f"{best[library][work]:.1f}", f"{best[library][work] / ours:.1f}"]
            lines.append(line)
    return table(heads, lines)


def linear_table(quick: bool) -> str:
    """The output head and the loss together."""
    shape = ("2048", "576", "49152")
    libraries = {"pyloss": "pyloss", "torch": "torch, logits first"}
    if find_spec("cut_cross_entropy") and find_spec("triton"):
        libraries["cce"] = "cut-cross-entropy, torch_compile"
    best: dict[str, dict[str, float]] = {}
    for _ in range(1 if quick else 3):
        for library in libraries:
            got = run_json(
                "loss_linear.py",
                library,
                "cross_entropy",
                *shape,
                "1" if quick else "3",
                **compiled(),
            )
            best[library] = {
                key: min(value, best.get(library, got)[key]) for key, value in got.items()
            }
    ours = best["pyloss"]["seconds"]
    lines = [
        (
            title,
            f"{best[library]['seconds']:.2f}",
            f"{best[library]['seconds'] / ours:.2f}",
            f"{best[library]['extra_mb']:.0f}",
        )
        for library, title in libraries.items()
    ]
    heads = (
        "linear cross entropy, 2048 tokens x 576 -> 49152, f32, loss + hidden gradient",
        "s",
        "time / pyloss",
        "extra memory, MB",
    )
    return table(heads, lines)


def memory_table(quick: bool) -> str:
    """Peak extra memory where the logits are 2.5 GB."""
    d = 64 if quick else 576
    lines = []
    for loss, title in (
        ("cross_entropy", "linear_cross_entropy"),
        ("kl", "linear_kl_div"),
        ("js", "linear_js_div"),
    ):
        line = [title]
        for library in ("pyloss", "torch"):
            if library == "torch" and (free_gb() < 14 or loss != "cross_entropy"):
                line += ["", ""]
                continue
            got = run_json("loss_linear.py", library, loss, "4096", str(d), "151936", "1")
            line += [f"{got['extra_mb']:.0f}", f"{got['seconds']:.1f}"]
        lines.append(line)
    heads = (
        f"4096 tokens x {d} -> 151936, f32",
        "pyloss, extra MB",
        "s",
        "torch, logits first, extra MB",
        "s",
    )
    return table(heads, lines)


def filter_table(quick: bool) -> str:
    """The speed and the error of the fused losses' gradient filter."""
    exponents = (12, 14, 16)
    found = run_json(
        "loss_filter.py", MODEL, "1024", "1" if quick else "5", *(str(2.0**-n) for n in exponents)
    )
    lines = []
    for kind, filters in found.items():
        for exponent, f in zip(exponents, filters.values(), strict=True):
            cells = (
                f"{f['kept']:.0%}",
                f"{f['speedup']:.2f}",
                f"{f['error']:.1%}",
                f"{f['cosine']:.5f}",
            )
            lines.append((f"2**-{exponent}, {kind}", *cells))
    heads = (
        "linear_cross_entropy's gradient_filter, SmolLM2-135M, 1024 tokens",
        "classes kept",
        "speedup",
    )
    return table((*heads, "relative error", "cosine"), lines)


def error_table(quick: bool) -> str:
    """Errors against float64."""
    lines = []
    for work, found in run_json("loss_errors.py", "16" if quick else "128", "49152").items():
        loss, dtype = work.rsplit(" ", 1)
        columns = zip(found["pyloss"], found["torch"], strict=True)
        lines.append([loss, dtype, *(f"{error:.1e}" for pair in columns for error in pair)])
    names = [f"{what} {kind}" for what in ("loss", "gradient") for kind in ("max", "mean")]
    heads = [
        "error against float64",
        "logits",
        *(f"{name}, {library}" for name in names for library in ("pyloss", "torch")),
    ]
    return table(heads, lines)


PARTS: dict[str, Callable[[bool], str]] = {
    f"{rows}x{v}-{dtype}": partial(rows_table, rows, v, dtype)
    for rows, v in SHAPES
    for dtype in ("f32", "bf16")
} | {"linear": linear_table, "memory": memory_table, "filter": filter_table, "errors": error_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="few runs: checks that everything works"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    print(machine() + (f"; OpenCL: {opencl()}" if opencl() else ""), flush=True)
    for name, part in PARTS.items():
        if name in options.only:
            print(f"\n{part(options.quick)}", flush=True)


if __name__ == "__main__":
    main()
