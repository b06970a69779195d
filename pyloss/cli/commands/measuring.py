"""`pyloss bench` and `pyloss info`."""

from __future__ import annotations

from typing import Any

import numpy as np

import pyloss
from pyloss import models
from pyloss.checks.numbers import whole
from pyloss.cli.commands.shared import Flags, flag_text
from pyloss.errors import size_text
from pyloss.io.console import out
from pyloss.runtime import precision
from pyloss.tuner.run.settings import DEFAULT_MODEL


def bench(flags: Flags) -> int:
    """`pyloss bench`: measures this machine, and prints each figure at once."""
    from pyloss import measuring
    from pyloss.models.synthetic import random_model

    for name in ("rank", "batch_size", "max_seq_length", "train_tokens"):
        whole(flags[name], flag_text(name), 1)
    title = flags["model"] or DEFAULT_MODEL
    try:
        model = models.load_model(title)
    except FileNotFoundError:
        if flags["model"]:
            raise
        model, title = random_model(format="q4_1"), "random weights of SmolLM2-135M's shape"
    found = pyloss.info()
    out(
        f"pyloss {found['version']}: {found['isa']} (of {', '.join(found['isas'])}), "
        f"{found['threads']} threads",
        flush=True,
    )
    weights: dict[str, Any] = measuring.typical_weights(model)
    batch, tokens = flags["batch_size"], flags["max_seq_length"]
    config, dora = {"rank": flags["rank"], "scale": 2.0}, flags["fine_tune_type"] == "dora"
    step = measuring.training_step(model, config, dora, flags["grad_checkpoint"])
    with precision.matmul_precision(flags["matmul_precision"]):
        # first, so that the peak is the step's
        speed, peak = measuring.step_speed(step, model.vocab_size, batch, tokens)
    options = ", checkpointing" if flags["grad_checkpoint"] else ""
    options += ", products in bfloat16" if flags["matmul_precision"] == "bfloat16" else ""
    out(
        f"{'DoRA' if dora else 'LoRA'} step of {title}, rank {flags['rank']}, "
        f"{batch} x {tokens} tokens{options}:"
    )
    out(f"  {speed:.0f} tokens/s, peak memory {size_text(peak)}")
    out(
        f"  {flags['train_tokens']:,} tokens take about "
        f"{flags['train_tokens'] / speed / 60:.1f} minutes",
        flush=True,
    )
    out(f"memory: {measuring.memory_speed() / 1e9:.0f} GB/s")
    out(f"products of {batch * tokens} tokens with weights, forward and backward:")
    for format, weight in (
        {"f32": np.ones(next(iter(weights.values())).shape, np.float32)} | weights
    ).items():
        speeds = [f"{measuring.product_speed(weight, batch * tokens) / 1e9:.0f} GFLOP/s"]
        if precision.has_instructions():
            with precision.matmul_precision("bfloat16"):
                speeds.append(
                    f"{measuring.product_speed(weight, batch * tokens) / 1e9:.0f} as bfloat16"
                )
        out(f"  {format}, {weight.shape[1]} to {weight.shape[0]}: {', '.join(speeds)}", flush=True)
    return 0


def info(flags: Flags) -> int:
    """`pyloss info`: prints version, instruction set, threads and devices."""
    for name, value in pyloss.info().items():
        out(f"{name}: {value}")
        if name == "bfloat16":
            out(
                "  measured: steps with it were 1.6 times as fast on an AMD EPYC (Zen 4), 0.6 times"
            )
            out("  on an Intel Xeon with amx_bf16; `pyloss bench` compares both on this machine")
    return 0
