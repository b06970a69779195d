"""`make bench-families`: LoRA steps of each family, and what models of real sizes need.

    python benchmarks/families.py [--quick] [--only PART ...] [--models NAME ...]

Weights are random, of the shapes that published models have. Prints:
- families: a few layers at their real width over float32 weights, beside the time of the matrix
  products alone at the speed of plain ones, and beside torch + PEFT;
- mixers: the operations in place of attention, beside the limits of products and of memory;
- sizes: whole models over 4-bit weights, a table for the README; --models chooses them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from common import WORK, free_gb, machine, run_json, table
from shapes import SHAPES, narrow, shape_file
from step_work import RANK


class Part(NamedTuple):
    """The layers of a family that are measured, enough for one of each kind."""

    name: str
    layers: int
    peer: bool = True  # transformers runs it on a processor without further kernels
    changes: Mapping[str, int] = MappingProxyType({})


FAMILIES = (
    Part("LFM2-350M", 3),
    Part("Qwen2.5-0.5B", 3),
    Part("Qwen3-0.6B", 3),
    Part("Qwen3.5-0.8B", 4),
    Part("Gemma-3-1B", 6),
    Part("LFM2-1.2B", 3),
    Part("Llama-3.2-1B", 2),
    Part("OLMo-2-1B", 2),
    Part("OLMoE-1B-7B", 1, peer=False),
    Part("Granite-3.3-2B", 2),
    Part("Gemma-2-2B", 2),
    Part("Gemma-4-E2B", 10, changes={"num_kv_shared_layers": 5}),
    Part("SmolLM3-3B", 4),
    Part("Phi-4-mini", 2),
)
VOCABULARY = 16384  # few layers under a whole head would measure the head
TOKENS = 1024
SIZES = ("SmolLM2-135M", "LFM2-350M", "Qwen3-0.6B", "LFM2-1.2B", "SmolLM2-1.7B", "Qwen3-4B")
SIZE_TOKENS, LEAST_GB = 512, 4
PRECISIONS = ("float32", "mixed")
MIXERS = ("short_conv", "conv_silu", "delta_rule")


def product_limit(found: dict) -> float:
    """The milliseconds of a step's matrix products, adapters' included, at a plain one's speed."""
    work = [
        gflop
        for name, (_, _, gflop) in found["shapes"].items()
        if not name.startswith(("attention", *MIXERS))
    ]
    return 1e3 * sum(work) / found["matrix_gflops"]


def families(quick: bool, _: Sequence[str]) -> list[str]:
    """A step of each family, and the operations of its mixers."""
    rows, mixers = [], []
    sizes = ("--batch", "1", "--tokens", str(TOKENS))
    passes = ("--passes", "1" if quick else "3")
    for part in FAMILIES[:1] if quick else FAMILIES:
        file = narrow(part.name, part.layers, VOCABULARY, **part.changes)
        stored = ("--type", "f32")
        limits = run_json("step_limits.py", file, *sizes, *passes, *stored)
        products = product_limit(limits)
        ours, peer = {}, {}
        for _ in range(1 if quick else 2):  # in turn
            ours = faster(ours, run_json("step_pyloss.py", file, *sizes, *passes, *stored))
            if part.peer:
                peer = faster(peer, run_json("step_peft.py", file, *sizes, *passes))
        step_ms = min(limits["step_ms"], 1e3 * TOKENS / ours["tokens_per_s"])
        cells = [f"{ours['tokens_per_s']:.0f}", f"{ours['peak_gb']:.2f}"]
        if peer:
            cells.insert(1, f"{ours['tokens_per_s'] / peer['tokens_per_s']:.2f}")
            cells.append(f"{peer['peak_gb']:.2f}")
        else:
            cells = [cells[0], "", cells[1], ""]
        rows.append(
            (
                f"{part.name}, {part.layers} layers",
                f"{step_ms:.0f}",
                f"{products:.0f}",
                f"{step_ms / products:.2f}",
                *cells,
            )
        )
        mixers += mixer_rows(part.name, limits)
    heads = (
        f"LoRA step, 1 x {TOKENS}, float32",
        "ms",
        "products at plain speed, ms",
        "time / products",
        "tokens/s",
        "speed / PEFT",
        "peak GB",
        "PEFT, peak GB",
    )
    parts = [table(heads, rows)]
    if mixers:
        heads = ("mixers", "calls", "ms", "GFLOP/s", "GB/s", "limit / time")
        parts.append(table(heads, mixers))
    return parts


def faster(one: dict, other: dict) -> dict:
    """The faster of two runs, with the lower peak memory."""
    if not one:
        return other
    best = max(one, other, key=lambda run: run["tokens_per_s"])
    return {**best, "peak_gb": min(one["peak_gb"], other["peak_gb"])}


def mixer_rows(name: str, found: dict) -> list[tuple[str, ...]]:
    """The operations of a step that stand in place of attention."""
    rows = []
    for operation, (calls, ms, gflop, gigabytes) in found["operations"].items():
        if not operation.startswith(MIXERS):
            continue
        limit = 1e3 * max(gflop / found["matrix_gflops"], gigabytes / found["memory_gb_s"])
        speeds = (f"{1e3 * gflop / ms:.0f}" if gflop else "", f"{1e3 * gigabytes / ms:.1f}")
        rows.append((f"{name}: {operation}", f"{calls}", f"{ms:.1f}", *speeds, f"{limit / ms:.2f}"))
    return rows


def whole_models(quick: bool, names: Sequence[str]) -> list[str]:
    """LoRA and generation over 4-bit weights of whole models: what a machine can do."""
    rows, left = [], ""
    for name in names[:1] if quick else names:
        if rows and free_gb() < LEAST_GB:
            left = f"\nLarger ones were left out: less than {LEAST_GB} GB of memory are free."
            break
        file = shape_file(name)
        sizes = ("--batch", "1", "--tokens", str(SIZE_TOKENS), "--passes", "1" if quick else "3")
        runs = [
            run_json("step_pyloss.py", file, *sizes, "--type", "q4_1", "--precision", precision)
            for precision in PRECISIONS
        ]
        answer = run_json("generate_shape.py", file, "q4_1", "64")
        minutes = [100_000 / run["tokens_per_s"] / 60 for run in runs]
        rows.append(
            (
                name,
                f"{runs[0]['base_gb']:.2f}",
                *(f"{run['tokens_per_s']:.0f}" for run in runs),
                f"{max(minutes):.0f} to {min(minutes):.0f}",
                f"{runs[0]['peak_gb']:.2f} to {runs[-1]['peak_gb']:.2f}",
                f"{answer['tokens_per_s']:.1f}",
            )
        )
    heads = (
        "model",
        "weights, GB",
        *(f"training, {precision}, tokens/s" for precision in PRECISIONS),
        "minutes for 100,000 tokens",
        "peak memory, GB",
        "generating, tokens/s",
    )
    about = f"LoRA of rank {RANK} over 4-bit weights (Q4_1), 1 x {SIZE_TOKENS} tokens a step:\n\n"
    return [about + table(heads, rows) + left]


PARTS = {"families": families, "sizes": whole_models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="few runs: checks that everything works"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SIZES), metavar="NAME")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    for name, part in PARTS.items():
        if name in options.only:
            for text in part(options.quick, options.models):
                print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
