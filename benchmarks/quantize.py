"""`make bench-quantize`: quantized models beside llama.cpp's and mlx-lm's.

    python benchmarks/quantize.py [--only mixtures,tuned] [--quick]

mixtures: K-quants and IQ4 of `pyloss export` beside llama.cpp's quantization of the same float
file: bytes, and the KL divergence from the float model and the perplexity, both measured by pyloss,
so that the encoders alone differ. Needs llama-cpp-python (`pip install llama-cpp-python`, which
compiles llama.cpp).

tuned: `pyloss quantize --tune` beside mlx-lm's DWQ, on the same samples for as many steps. The cost
is CPU time, since mlx uses one thread. Its products are slow on a CPU: a step takes minutes there,
so the steps are few.

The original is SmolLM2-135M's embedded file in float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from bases import documents, float_folder
from common import HERE, WORK, machine, run_json, table

import pyloss

MIXTURES = ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs", "iq4_nl")
WINDOW, WINDOWS = 512, 12
BITS = (3, 4)
#: of mlx-lm's DWQ, absolute: its default, and what moves a scale as far as pyloss's 1e-3 does
RATES = ("1e-6", "1e-4")


def qualities(
    original: Any, models: dict[str, Any], windows: list[list[int]]
) -> dict[str, tuple[float, float]]:
    """The KL divergence from the original and the perplexity of each model on some text.

    All models read a window before the next one, so that the original computes it once.
    """
    divergence, loss = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    for window in windows:
        tokens = np.array([window], np.int32)
        teacher = original(tokens)[0, :-1]
        for name, model in models.items():
            logits = teacher if model is original else model(tokens)[0, :-1]
            divergence[name] += float(pyloss.kl_div_loss(logits, teacher, reduction="sum"))
            loss[name] += float(
                pyloss.softmax_cross_entropy(logits, tokens[0, 1:], reduction="sum")
            )
    count = sum(len(window) - 1 for window in windows)
    return {name: (divergence[name] / count, math.exp(loss[name] / count)) for name in models}


def mixtures(quick: bool) -> str:
    """The table of GGUF's types."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama.cpp's quantizer is missing: pip install llama-cpp-python"
    original, tokenizer = pyloss.load(float_folder())
    source = WORK / "smollm2-f32.gguf"
    if not source.exists():
        pyloss.export(original, source, "gguf", tokenizer, type="f32")
    kinds = MIXTURES[:2] if quick else MIXTURES
    models, sizes, seconds = {"original": original}, {}, {}
    for kind in kinds:
        ours, theirs = (WORK / f"{kind}-{name}.gguf" for name in ("pyloss", "llama"))
        begin = time.perf_counter()
        pyloss.export(original, ours, "gguf", tokenizer, type=kind, overwrite=True)
        took = time.perf_counter() - begin
        found = run_json("quantize_llama.py", str(source), str(theirs), kind)
        seconds[kind] = f"{took:.0f} / {found['seconds']:.0f}"
        sizes[kind] = " / ".join(f"{path.stat().st_size / 1e6:.1f}" for path in (ours, theirs))
        models |= {f"{kind} ours": pyloss.load_model(ours)}
        models |= {f"{kind} theirs": pyloss.load_model(theirs)}
    tokens = tokenizer.encode(documents())
    starts = range(0, WINDOW * (2 if quick else WINDOWS), WINDOW)
    quality = qualities(original, models, [tokens[i : i + WINDOW] for i in starts])
    rows = [("original", "", "", "", f"{quality['original'][1]:.3f}", "", "", "")]
    for kind in kinds:
        (kl, perplexity), (their_kl, their_perplexity) = (
            quality[f"{kind} {whose}"] for whose in ("ours", "theirs")
        )
        rows.append(
            (
                kind, sizes[kind], f"{kl:.4f}", f"{their_kl:.4f}", f"{perplexity:.3f}",
                f"{their_perplexity:.3f}", f"{perplexity / their_perplexity:.4f}", seconds[kind],
            )
        )  # fmt: skip
    heads = (
        "type", "MB, pyloss / llama.cpp", "KL, pyloss", "KL, llama.cpp", "perplexity, pyloss",
        "perplexity, llama.cpp", "ratio", "seconds, pyloss / llama.cpp",
    )  # fmt: skip
    return table(heads, rows)


def tuned(quick: bool, steps: int, rates: list[str], bits: list[int]) -> str:
    """The table of trained scales."""
    folder = float_folder()
    original, tokenizer = pyloss.load(folder)
    config = SimpleNamespace(
        data=str(HERE.parent / "examples" / "data"), mask_prompt=False, train_on="all"
    )
    train, valid, _ = pyloss.load_dataset(config, tokenizer)
    # mlx-lm pads to multiples of 32, and these are as long as that.
    cut = {
        name: [list(map(int, data.sample(i).tokens))[:65] for i in range(count)]
        for name, data, count in (("train", train, 4 * steps), ("valid", valid, 4))
    }
    data = WORK / "tuned.json"
    data.write_text(json.dumps(cut))
    models, costs = {"original": original}, {}
    for width in bits:
        runs = {"pyloss": ("tune_pyloss.py", "1e-3")}
        runs |= {f"mlx-lm, rate {rate}": ("tune_mlx.py", rate) for rate in rates}
        for name, (script, rate) in runs.items():
            out = WORK / f"tuned-{width}-{Path(script).stem}-{rate}"
            command = (script, folder, str(data), str(out), "--bits", str(width), "--rate", rate)
            costs[f"{width} bits, {name}"] = run_json(*command)
            if script == "tune_pyloss.py":
                models[f"{width} bits, untuned"] = pyloss.load_model(out / "untuned")
            models[f"{width} bits, {name}"] = pyloss.load_model(out / "tuned")
    measured = range(4 if quick else len(valid))
    windows = [list(map(int, valid.sample(i).tokens)) for i in measured]
    rows = []
    for name, (kl, perplexity) in qualities(original, models, windows).items():
        got = costs.get(name)
        cost = (
            ("", "", "") if got is None else (steps, f"{got['cpu_s']:.0f}", f"{got['peak_gb']:.2f}")
        )
        rows.append((name, f"{kl:.4f}", f"{perplexity:.2f}", *cost))
    heads = ("", "KL", "perplexity", "steps of 4 x 64 tokens", "CPU seconds", "peak memory, GB")
    return table(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="mixtures,tuned", help="parts, with commas")
    parser.add_argument("--quick", action="store_true", help="little text: checks the script")
    parser.add_argument("--steps", type=int, default=6, help="of tuning")
    parser.add_argument("--rates", nargs="*", default=list(RATES), help="of mlx-lm's DWQ")
    parser.add_argument("--bits", type=int, nargs="*", default=list(BITS))
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    for part in options.only.split(","):
        if part == "mixtures":
            print(f"\n{mixtures(options.quick)}", flush=True)
        else:
            found = tuned(options.quick, options.steps, options.rates, options.bits)
            print(f"\n{found}", flush=True)


if __name__ == "__main__":
    main()
