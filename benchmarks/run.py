"""`make bench`: measures pyloss and its peers in one run, prints the README's tables and draws its picture.

    python benchmarks/run.py [--quick] [--picture docs/benchmark.svg]

Each step measurement is a process of its own, so that its peak memory is its own; the programs take turns, and the best of the
rounds counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from common import WORK, environment, machine, run_json, table

import pyloss
from pyloss.models import quantize_model

MODEL = "smollm2-135m"


def float_folder() -> Path:
    """SmolLM2-135M as a float32 Hugging Face folder: the same weights for everybody."""
    folder = WORK / "smollm2-f32"
    if not (folder / "config.json").exists():
        model, tokenizer = pyloss.load(MODEL)
        model.save(folder, tokenizer)
    return folder


def nf4_folder() -> Path:
    """The same weights in QLoRA's NF4, as `pyloss convert --quantize nf4` writes them."""
    folder = WORK / "smollm2-nf4"
    if not (folder / "config.json").exists():
        model, tokenizer = pyloss.load(float_folder())
        quantize_model(model, "nf4")
        model.save(folder, tokenizer)
    return folder


def matmul(quick: bool) -> str:
    """Each library in processes of its own: torch's waiting threads keep the processors busy for a while after a call."""
    best: dict[str, dict[str, float]] = {"torch": {}, "pyloss": {}}
    for _ in range(1 if quick else 4):
        for library, found in best.items():
            for key, speed in run_json("matmul.py", library, "10" if quick else "30").items():
                found[key] = max(speed, found.get(key, 0.0))
    rows = []
    for key, speed in best["pyloss"].items():
        weight, stored, direction = key.split(" ", 2)
        peer = best["torch"][f"{weight} f32 {direction}"]
        rows.append((weight, stored, direction, f"{speed:.0f}", f"{peer:.0f}", f"{speed / peer:.2f}"))
    return table(("weight (in x out)", "stored as", "direction", "pyloss, GFLOP/s", "torch.mm (f32), GFLOP/s", "ratio"), rows)


Program = tuple[str, str, str, str, str]  # name, script, model, checkpointing, kind of adapter


def best_steps(programs: list[Program], shape: tuple[int, int], rounds: int, count: int) -> dict[str, dict]:
    """The best step of each program, which take turns, and its least peak memory."""
    best: dict[str, dict] = {}
    for _ in range(rounds):
        for name, script, model, checkpoint, kind in programs:
            got = run_json(script, model, *map(str, shape), checkpoint, str(count), kind)
            if name not in best or got["tokens_per_s"] > best[name]["tokens_per_s"]:
                best[name] = {**got, "name": name, "peak_gb": min(got["peak_gb"], best.get(name, got)["peak_gb"])}
    return best


def steps(quick: bool) -> tuple[str, list[dict]]:
    """LoRA steps at batch 4 x 256."""
    folder = str(float_folder())
    programs = [
        ("torch + PEFT, eager", "step_peft.py", folder, "0", "lora"),
        ("pyloss, float32 base", "step_pyloss.py", folder, "0", "lora"),
        ("pyloss, Q4_1 base", "step_pyloss.py", MODEL, "0", "lora"),
        ("torch + PEFT, checkpointing", "step_peft.py", folder, "1", "lora"),
        ("pyloss, float32 base, checkpointing", "step_pyloss.py", folder, "1", "lora"),
        ("pyloss, Q4_1 base, checkpointing", "step_pyloss.py", MODEL, "1", "lora"),
    ]
    best = best_steps(programs, (4, 256), 1 if quick else 3, 3 if quick else 5)
    peer = best["torch + PEFT, eager"]
    rows = [
        (
            name,
            f"{b['tokens_per_s']:.0f}",
            f"{b['tokens_per_s'] / peer['tokens_per_s']:.2f}",
            f"{b['peak_gb']:.2f}",
            f"{b['loss']:.4f}",
        )
        for name, b in best.items()
    ]
    heads = ("LoRA step, batch 4 x 256", "tokens/s", "of PEFT", "peak memory, GB", "loss after 5 steps")
    return table(heads, rows), list(best.values())


def adapters(quick: bool) -> str:
    """DoRA and quantised bases beside LoRA over float32: the time of a step as a multiple of the same library's."""
    folder = str(float_folder())
    programs = [
        ("torch + PEFT, LoRA", "step_peft.py", folder, "0", "lora"),
        ("torch + PEFT, DoRA", "step_peft.py", folder, "0", "dora"),
        ("pyloss, LoRA", "step_pyloss.py", folder, "0", "lora"),
        ("pyloss, DoRA", "step_pyloss.py", folder, "0", "dora"),
        ("pyloss, LoRA, Q4_1 base", "step_pyloss.py", MODEL, "0", "lora"),
        ("pyloss, DoRA, Q4_1 base", "step_pyloss.py", MODEL, "0", "dora"),
        ("pyloss, LoRA, NF4 base", "step_pyloss.py", str(nf4_folder()), "0", "lora"),
        ("pyloss, DoRA, NF4 base", "step_pyloss.py", str(nf4_folder()), "0", "dora"),
    ]
    full = best_steps(programs, (4, 256), 1 if quick else 3, 2 if quick else 5)
    short = best_steps(programs, (4, 48), 1 if quick else 3, 3 if quick else 10)
    rows = []
    for name, found in full.items():
        cells = [name]
        for best in (full, short):
            peer = best[f"{name.split(',')[0]}, LoRA"]["tokens_per_s"]
            cells += [f"{best[name]['tokens_per_s']:.0f}", f"{peer / best[name]['tokens_per_s']:.2f}"]
        rows.append((*cells, f"{found['peak_gb']:.2f}", f"{found['base_gb']:.2f}"))
    speeds = ("4 x 256, tokens/s", "time of LoRA's", "4 x 48, tokens/s", "time of LoRA's")
    heads = ("step, rank 8", *speeds, "peak memory (4 x 256), GB", "the base's weights, GB")
    return table(heads, rows)


def loading(quick: bool) -> str:
    """Time of loading, and memory beyond the pages of the mapped files."""
    models = [
        ("pyloss, Q4_1 (GGUF)", "pyloss", MODEL),
        ("pyloss, NF4 (safetensors)", "pyloss", str(nf4_folder())),
        ("pyloss, float32 (safetensors)", "pyloss", str(float_folder())),
        ("transformers, float32 (safetensors)", "torch", str(float_folder())),
    ]
    rows = []
    for name, library, path in models:
        runs = [run_json("load.py", library, path) for _ in range(1 if quick else 3)]
        best = min(run["seconds"] for run in runs)
        rows.append((name, f"{best:.2f}", f"{runs[0]['weights_mb']:.0f}", f"{min(run['private_mb'] for run in runs):.0f}"))
    return table(("loading", "seconds", "weights, MB", "private memory after a token, MB"), rows)


def imports(quick: bool) -> str:
    """Best wall time of a fresh interpreter, less the time of an empty one."""

    def seconds(code: str) -> float:
        best = float("inf")
        for _ in range(2 if quick else 7):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
            best = min(best, time.perf_counter() - begin)
        return best

    empty = seconds("pass")
    names = {
        "import numpy": "import numpy",
        "import pyloss": "import pyloss",
        "torch + transformers + PEFT": "import torch, transformers, peft",
    }
    return table(("import", "seconds"), [(name, f"{seconds(code) - empty:.3f}") for name, code in names.items()])


def experts(quick: bool) -> str:
    """A mixture of experts costs its active work: against a dense layer with as much, forward and backward with LoRA."""
    rows = []
    for hidden, inner in ((768, 384), (1024, 512), (2048, 1024)):
        got = run_json("experts_pyloss.py", str(hidden), str(inner), "3" if quick else "10")
        times = (got["dense"], got["experts"], got["experts"] / got["dense"])
        rows.append((f"{hidden}, 64 experts x {inner}, 8 active", f"{times[0]:.0f}", f"{times[1]:.0f}", f"{times[2]:.2f}"))
    return table(("hidden size, experts (1024 tokens)", "dense layer, ms", "experts, ms", "ratio"), rows)


def generation(quick: bool) -> str:
    got = run_json("generate_pyloss.py", MODEL, "256", "20" if quick else "64")
    return table(
        ("generation, Q4_1, one sequence", "tokens/s"),
        [("reading a prompt of 256", f"{got['prompt_tokens_per_s']:.0f}"), ("generating", f"{got['tokens_per_s']:.0f}")],
    )


def draw(results: list[dict], path: Path) -> None:
    """Speed and memory of the LoRA step as two rows of bars."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pyloss"  # the same file for the same figures
    import matplotlib.pyplot as plt

    names = [r["name"] for r in results][::-1]
    colors = ["#c44e52" if "PEFT" in name else "#4c72b0" for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
    for axis, key, title in (
        (axes[0], "tokens_per_s", "tokens/s (more is better)"),
        (axes[1], "peak_gb", "peak memory, GB (less is better)"),
    ):
        bars = axis.barh(names, [r[key] for r in results][::-1], color=colors)
        axis.bar_label(bars, fmt="%.0f" if key == "tokens_per_s" else "%.2f", padding=3, fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle("A LoRA step of SmolLM2-135M, batch 4 x 256, 2 CPU threads", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few runs: to see that everything works")
    parser.add_argument("--picture", type=Path, help="where to draw the picture (SVG)")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    step_table, results = steps(options.quick)
    print(f"\n{step_table}", flush=True)
    print(f"\n{adapters(options.quick)}", flush=True)
    print(f"\n{loading(options.quick)}", flush=True)
    print(f"\n{matmul(options.quick)}", flush=True)
    print(f"\n{experts(options.quick)}", flush=True)
    print(f"\n{generation(options.quick)}", flush=True)
    print(f"\n{imports(options.quick)}", flush=True)
    if options.picture:
        draw(results, options.picture)
        print(f"\ndrew {options.picture}")


if __name__ == "__main__":
    main()
