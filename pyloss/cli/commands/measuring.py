"""`pyloss bench` and `pyloss info`."""

from __future__ import annotations

from typing import Any

import numpy as np

import pyloss
from pyloss import models
from pyloss.checks.numbers import whole
from pyloss.cli.commands.shared import Flags, flag_text
from pyloss.errors import counted, size_text
from pyloss.io.console import out
from pyloss.runtime import precision
from pyloss.runtime.memory import peak_memory
from pyloss.tuner.run.settings import DEFAULT_MODEL


def bench(flags: Flags) -> int:
    """`pyloss bench`: measures this machine and a model, and prints each figure at once."""
    from pyloss import measuring
    from pyloss.models.synthetic import type_name

    for name in ("rank", "batch_size", "max_seq_length", "train_tokens"):
        whole(flags[name], flag_text(name), 1)
    model, title = _model(flags["model"], flags["type"])
    found = pyloss.info()
    out(
        f"pyloss {found['version']}: {found['isa']} (of {', '.join(found['isas'])}), "
        f"{found['threads']} threads",
        flush=True,
    )
    weights: dict[str, Any] = measuring.typical_weights(model)
    stored = size_text(sum(weight.nbytes for weight in model.stored().values()))
    batch, tokens = flags["batch_size"], flags["max_seq_length"]
    config, dora = {"rank": flags["rank"], "scale": 2.0}, flags["fine_tune_type"] == "dora"
    measuring.add_adapters(model, config, dora, flags["grad_checkpoint"])
    options = ", checkpointing" if flags["grad_checkpoint"] else ""
    name = flags["matmul_precision"]
    options += "" if name == "float32" else f", products in {name}"
    if name == "mixed":
        options = options.replace(name, "bfloat16, activations kept in bfloat16")
    out(f"model: {title} ({stored})")
    out(
        f"with {'DoRA' if dora else 'LoRA'} of rank {flags['rank']}, {batch} x {tokens} "
        f"tokens{options}:",
        flush=True,
    )
    with precision.matmul_precision(flags["matmul_precision"]):
        speed = measuring.training_speed(model, batch, tokens)
        # before the rest, so that the peak is that of training
        peak = peak_memory()
        out(
            f"  training: {_tokens(speed.median)} "
            f"(median of {counted(speed.runs, 'step')}; best {_shown(speed.best)}), "
            f"peak memory {size_text(peak)}"
        )
        minutes = flags["train_tokens"] / speed.median / 60
        out(f"  {flags['train_tokens']:,} tokens take about {minutes:.1f} minutes", flush=True)
        speed = measuring.evaluation_speed(model, batch, tokens)
        out(f"  evaluation: {_tokens(speed.median)}", flush=True)
        reading, generating = measuring.generation_speed(model, tokens)
        out(f"  reading a prompt of {counted(tokens, 'token')}: {_tokens(reading.median)}")
        out(f"  generation: {_tokens(generating.median)}", flush=True)
    out(f"memory: {measuring.memory_speed() / 1e9:.0f} GB/s")
    out(f"products of {batch * tokens} tokens with weights, forward and backward:")
    for format, weight in (
        {"f32": np.ones(next(iter(weights.values())).shape, np.float32)} | weights
    ).items():
        speeds = [f"{measuring.product_speed(weight, batch * tokens) / 1e9:.0f} GFLOP/s"]
        if precision.bfloat16_form().name != "emulated":
            with precision.matmul_precision("bfloat16"):
                speeds.append(
                    f"{measuring.product_speed(weight, batch * tokens) / 1e9:.0f} as bfloat16"
                )
        shape = f"{weight.shape[1]} to {weight.shape[0]}"
        out(f"  {type_name(format)}, {shape}: {', '.join(speeds)}", flush=True)
    return 0


def _model(name: str | None, stored_type: str | None) -> tuple[Any, str]:
    """The model to measure, with random weights where they lack or `stored_type` is given.

    Returns its description too.
    """
    from pyloss.models.reading import HUB_FILES
    from pyloss.models.synthetic import (
        SMALL,
        STORED_TYPES,
        lacks_weights,
        random_model,
        shape_of,
        type_name,
    )

    if stored_type is not None and stored_type not in STORED_TYPES:
        raise ValueError(f"--type is {stored_type!r}; it must be one of {', '.join(STORED_TYPES)}")
    format = None if stored_type is None else STORED_TYPES[stored_type]
    try:
        place = models.resolve_model(
            name or DEFAULT_MODEL, hub_files=HUB_FILES if format is None else ["config.json"]
        )
    except FileNotFoundError:
        if name:
            raise
        config, usual, shape = SMALL, "q4_1", "SmolLM2-135M"
    else:
        if format is None and not lacks_weights(place):
            return models.load_model(place), name or DEFAULT_MODEL
        config, usual = shape_of(place)
        shape = name or DEFAULT_MODEL
    format = format or usual
    title = f"random weights of the shape of {shape}, stored as {type_name(format)}"
    return random_model(config, format), title


def _shown(speed: float) -> str:
    """A speed with at least two digits."""
    return f"{speed:.1f}" if speed < 10 else f"{speed:.0f}"


def _tokens(speed: float) -> str:
    return f"{_shown(speed)} tokens/s"


def info(flags: Flags) -> int:
    """`pyloss info`: prints version, instruction set, threads and devices, or describes a model."""
    if flags["report"]:
        from pyloss.reports.machine import report

        if flags["model"]:
            raise ValueError("--report is about this machine: leave out MODEL")
        for line in report():
            out(line)
        return 0
    if flags["model"]:
        from pyloss.describing import describe_model

        for line in describe_model(models.resolve_model(flags["model"])):
            out(line)
        return 0
    for name, value in pyloss.info().items():
        out(f"{name}: {value}")
    return 0
