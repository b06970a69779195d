"""`make bench-distill`: distillation beside a plain loop in torch, and what the teacher costs.

    python benchmarks/distill.py [--quick]

Prints the tables. Teacher and student are SmolLM2-135M, the student with LoRA. Each measurement
runs in its own process; the programs take turns, and the best of the rounds counts.
"""

from __future__ import annotations

import argparse

from bases import MODEL, float_folder
from common import WORK, free_gb, machine, run_json, table

TORCH = "torch + PEFT, a loop with both logits"
TORCH_GB = 9  # of memory that the loop needs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="few runs: checks that everything works"
    )
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    floats = float_folder()
    ours, teacher = "step_pyloss.py", "--teacher"
    programs = {
        "pyloss, float32": (ours, floats, teacher, floats),
        "pyloss, Q4_1": (ours, MODEL, teacher, MODEL),
        "pyloss, float32, LoRA step alone": (ours, floats),
        "pyloss, Q4_1, LoRA step alone": (ours, MODEL),
        "pyloss, float32, evaluation alone": (ours, floats, "--evaluate"),
        "pyloss, Q4_1, evaluation alone": (ours, MODEL, "--evaluate"),
    }
    if free_gb() > TORCH_GB:
        programs = {TORCH: ("step_peft.py", floats, teacher, floats), **programs}
    passes = ("--passes", "1" if options.quick else "3")
    speed: dict[str, float] = {}
    peak: dict[str, float] = {}
    for _ in range(1 if options.quick else 3):
        for name, program in programs.items():
            got = run_json(*program, *passes)
            speed[name] = max(got["tokens_per_s"], speed.get(name, 0.0))
            peak[name] = min(got["peak_gb"], peak.get(name, got["peak_gb"]))
    rows = [
        (
            name,
            f"{speed[name]:.0f}",
            f"{speed[name] / speed[TORCH]:.2f}" if TORCH in speed else "",
            f"{peak[name]:.2f}",
        )
        for name in programs
    ]
    heads = ("4 x 256 tokens", "tokens/s", "speed / torch", "peak memory, GB")
    print(f"\n{table(heads, rows)}", flush=True)
    parts = []
    for base in ("float32", "Q4_1"):
        step = f"pyloss, {base}"
        alone = sum(1 / speed[f"{step}, {part} alone"] for part in ("LoRA step", "evaluation"))
        parts.append((base, f"{1 / speed[step] / alone:.2f}"))
    print(f"\n{table(('distillation', 'time / (LoRA step + evaluation)'), parts)}", flush=True)


if __name__ == "__main__":
    main()
