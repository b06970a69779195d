"""What half precision does to training: losses from several seeds, and errors of gradients."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from statistics import fmean

from bases import MODEL, float_folder
from common import run_json, table
from shapes import narrow

LORA = "LoRA, Q4_1, example data"
RUNS: dict[str, tuple[str, ...]] = {
    LORA: (MODEL,),
    "LoRA, Q4_1, running text": (MODEL, "--data", "text"),
    "DoRA, Q4_1, example data": (MODEL, "--kind", "dora"),
}
COLUMNS = 6  # layers whose errors are shown


def mixture() -> str:
    """The config.json of a small mixture of experts."""
    sizes = {"hidden_size": 256, "intermediate_size": 128, "num_experts": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 4}
    return narrow("OLMoE-1B-7B", 4, 49152, **sizes, **heads)


def precision_tables(quick: bool) -> list[str]:
    """Tables of `RUNS` and of a mixture's training from random weights."""
    runs = dict(RUNS)
    if not quick:
        whole = (mixture(), "--tokenizer", MODEL, "--data", "text")
        runs["a mixture from random weights, running text"] = whole
    size = ("--steps", "10", "--seeds", "1") if quick else ("--steps", "200", "--seeds", "3")
    parts = []
    for title, program in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            saved = ("--save", folder) if title == LORA else ()
            found = run_json("precision_pyloss.py", *program, *size, *saved)
            peer = run_json("precision_peft.py", float_folder(), folder) if saved else {}
        parts += tables_of(title, found, peer.get("errors"))
    return parts


def tables_of(title: str, found: dict, peer: Sequence[float] | None) -> list[str]:
    """Of one program's runs: losses, and the errors of gradients by layer."""
    parts, steps = len(found["train"]["float32"][0]), found["steps"]
    heads = [f"training loss, steps to {steps * (i + 1) // parts}" for i in range(parts)]
    heads += ["validation loss before", "and after", "of each seed"]
    rows = []
    for name in reversed(found["train"]):  # float32 first
        runs = zip(found["train"][name], found["valid"][name], strict=True)
        means = [fmean(values) for values in zip(*(a + b for a, b in runs), strict=True)]
        ends = ", ".join(f"{valid[-1]:.4f}" for valid in found["valid"][name])
        rows.append((name, *(f"{mean:.4f}" for mean in means), ends))
    errors = dict(found["errors"])
    if peer:
        errors["torch + PEFT, bfloat16"] = peer
    layers = len(found["errors"]["bfloat16"])
    shown = sorted({round(i * (layers - 1) / (COLUMNS - 1)) for i in range(COLUMNS)})
    lines = [
        (name, *(f"{values[i]:.1%}" for i in shown), f"{fmean(values):.1%}")
        for name, values in errors.items()
    ]
    columns = ("error of gradients against float32", *(f"layer {i}" for i in shown), "mean")
    between = f"\nOf one batch against the next: {found['between_batches']:.0%}."
    return [table((title, *heads), rows), table(columns, lines) + between]
