"""`make bench-distill`: distillation beside a plain loop in torch, and what the teacher costs.

    python benchmarks/distill.py [--quick]

Prints the tables. Teacher and student are SmolLM2-135M, the student with LoRA. Products in bfloat16
are measured where the processor has instructions for them. Each measurement runs in its own
process; the programs take turns, and the best of the rounds counts.
"""

from __future__ import annotations

import argparse

from bases import MODEL, float_folder
from common import WORK, free_gb, machine, run_json, table

from pyloss.runtime.precision import has_instructions

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
    floats, teacher = float_folder(), "--teacher"
    bases = {"float32": (floats,), "Q4_1": (MODEL,)}
    if has_instructions():
        half = ("--precision", "bfloat16")
        bases |= {f"{base}, bfloat16 products": (*of, *half) for base, of in bases.items()}
    programs: dict[str, tuple[str, ...]] = {}
    if free_gb() > TORCH_GB:
        loop = ("step_peft.py", floats, teacher, floats)
        programs[TORCH] = loop
        if has_instructions():
            programs[f"{TORCH}, bfloat16"] = (*loop, "--dtype", "bfloat16")
    for base, (model, *flags) in bases.items():
        ours = ("step_pyloss.py", model, *flags)
        programs[f"pyloss, {base}"] = (*ours, teacher, model)
        programs[f"pyloss, {base}, LoRA step alone"] = ours
        programs[f"pyloss, {base}, evaluation alone"] = (*ours, "--evaluate")
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
    for base in bases:
        step = f"pyloss, {base}"
        alone = sum(1 / speed[f"{step}, {part} alone"] for part in ("LoRA step", "evaluation"))
        parts.append((base, f"{1 / speed[step] / alone:.2f}"))
    print(f"\n{table(('distillation', 'time / (LoRA step + evaluation)'), parts)}", flush=True)


if __name__ == "__main__":
    main()
