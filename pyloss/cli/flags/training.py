"""Flags of `pyloss train`: keys of a YAML file, see `tuner.run.settings`."""

from __future__ import annotations

from typing import Any

from pyloss.cli.parser import (
    OVERWRITE,
    command,
    data_flags,
    device_flag,
    distributed_flag,
    precision_flag,
    real,
    setting,
    whole,
)
from pyloss.optim import OPTIMIZERS
from pyloss.tuner.adapters.registry import KINDS
from pyloss.tuner.callbacks import SERVICES

#: --preview without a number shows 3 samples.
_PREVIEW: dict[str, Any] = {"nargs": "?", "const": 3, "type": whole, "metavar": "N"}


def train_parser(commands: Any) -> None:
    parser = command(
        commands,
        "train",
        text="fine-tune a model: LoRA, DoRA or full",
        description="Fine-tune a language model with adapters (LoRA, DoRA; QLoRA over a quantized\n"
        "model) or in full. The flags and YAML files are those of mlx_lm.lora; a flag\n"
        "overrides the file.",
        epilog="""examples:
  pyloss train --data examples/data --mask-prompt --iters 200 --learning-rate 1e-3
                              train the embedded small model; the adapter goes to adapters/
                              (the default rate is mlx-lm's 1e-5, too low for so few iterations)
  pyloss train --data examples/data --mask-prompt --preview
                              show the training data and stop
  pyloss train -c lora_config.yaml --iters 50
                              settings from a file, with one changed
  pyloss train -c lora_config.yaml --resume
                              continue a stopped run as if it had not stopped
  pyloss train --adapter-path adapters --data examples/data --mask-prompt --test
                              only test an existing adapter

An earlier run in the adapter's folder moves to previous-1, previous-2, ... there, unless
--overwrite is given. Ctrl-C (or SIGTERM) saves everything; --resume continues from there.""",
    )
    run_flags(parser)


def run_flags(parser: Any, lora_alpha: str = "--alpha") -> None:
    """Adds the flags of a run, with the flag `lora_alpha` for the adapters' alpha."""
    group = parser.add_argument_group("what to train")
    setting(group, "--train", "train; the default unless --test is given", action="store_true")
    setting(group, "--model", "a model's folder, a .gguf file, or a known name", metavar="PATH")
    setting(group, "--config", "YAML file with any of these settings", "-c", metavar="FILE")
    setting(
        group, "--adapter-path", "folder for the adapter and the state of the run", metavar="FOLDER"
    )
    setting(
        group,
        "--fine-tune-type",
        "lora and dora train adapters, full trains the layers' own weights",
        metavar="|".join((*KINDS, "full")),
    )
    group = parser.add_argument_group("data")
    data_flags(group)
    setting(
        group,
        "--preview",
        "print N decoded samples with trained tokens marked, and stop (N: 3)",
        **_PREVIEW,
    )
    group = parser.add_argument_group("layers and adapters")
    setting(group, "--num-layers", "train the last N layers; -1 for all", type=whole)
    setting(group, "--rank", "rank of the adapters", type=whole)
    setting(group, "--scale", "factor of the adapters' output", type=real)
    setting(
        group,
        lora_alpha,
        "instead of --scale: scale times rank, PEFT's lora_alpha",
        type=real,
        dest="alpha",
    )
    setting(
        group,
        "--rslora",
        f"with {lora_alpha}: scale is alpha / sqrt(rank) instead of alpha / rank",
        action="store_true",
    )
    setting(group, "--dropout", "dropout of the adapters' input", type=real)
    setting(
        group, "--init", "initial values of the adapters: default, pissa or loftq", metavar="NAME"
    )
    setting(
        group,
        "--loftq-model",
        "for --init loftq: the float model from which the base was quantized",
        metavar="PATH",
    )
    setting(
        group,
        "--lora-keys",
        "layers that get adapters (default: all linear layers)",
        nargs="+",
        metavar="KEY",
    )
    setting(
        group,
        "--full-keys",
        "parts of the layers that full fine-tuning trains (default: all)",
        nargs="+",
        metavar="KEY",
    )
    group = parser.add_argument_group("optimization")
    device_flag(group)
    distributed_flag(group)
    setting(
        group,
        "--shard-optimizer",
        "several processes: each keeps the optimizer's state of a part of the parameters",
        action="store_true",
    )
    setting(group, "--iters", "batches to train on", type=whole)
    setting(
        group,
        "--epochs",
        "passes over the training data, instead of --iters (default: off)",
        type=real,
    )
    setting(
        group,
        "--max-time",
        "stop after this time, as if the iterations were done; --resume goes on (default: off)",
        metavar="2h|90m|1h30m",
    )
    setting(group, "--learning-rate", "step size of the optimizer", type=real)
    setting(group, "--warmup", "updates over which the learning rate rises from 0", type=whole)
    setting(
        group,
        "--loraplus-lr-ratio",
        "LoRA+: learning rate of lora_b as a multiple of the others'",
        type=real,
    )
    setting(group, "--optimizer", ", ".join(OPTIMIZERS), metavar="NAME")
    setting(group, "--grad-accumulation-steps", "batches per update", type=whole)
    setting(group, "--max-grad-norm", "scale gradients down to this norm (default: off)", type=real)
    setting(
        group,
        "--grad-checkpoint",
        "recompute activations: less memory, more time",
        action="store_true",
    )
    precision_flag(group)
    setting(group, "--seed", "seed of adapters, data order and dropout", type=whole)
    group = parser.add_argument_group("validation, saving, resuming")
    setting(
        group, "--steps-per-report", "iterations between reports of the training loss", type=whole
    )
    setting(group, "--steps-per-eval", "iterations between validations", type=whole)
    setting(
        group,
        "--val-every",
        "instead of --steps-per-eval: a part of an epoch, or a number of iterations (default: off)",
        metavar="0.1ep|N",
    )
    setting(group, "--val-batches", "batches of a validation; -1 for all, 0 for none", type=whole)
    setting(
        group,
        "--patience",
        "stop after N validations in a row without a lower loss (default: off)",
        type=whole,
    )
    setting(
        group,
        "--keep-last",
        "end with the last adapter, not with the one of the lowest validation loss",
        action="store_false",
        dest="keep_best",
    )
    setting(group, "--save-every", "iterations between saves", type=whole)
    setting(
        group,
        "--resume",
        "continue the run in --adapter-path where it stopped, with its settings",
        action="store_true",
    )
    setting(
        group,
        "--resume-adapter-file",
        "start a new run from the weights in this adapter file or folder",
        metavar="FILE",
    )
    setting(group, "--overwrite", OVERWRITE, action="store_true")
    setting(
        group,
        "--test",
        "evaluate on the test data; with --train, after training",
        action="store_true",
    )
    setting(group, "--test-batches", "batches of the test; -1 for all", type=whole)
    group = parser.add_argument_group("reporting and compatibility")
    setting(
        group,
        "--report-to",
        f"also report to {', '.join(SERVICES)}, or several with commas",
        metavar="NAMES",
    )
    setting(group, "--project-name", "name of the project for --report-to")
    setting(
        group,
        "--packing",
        "accepted and without effect: batches are always computed without padding",
        action="store_true",
    )
    setting(
        group,
        "--clear-cache-threshold",
        "accepted and ignored: there is no such cache",
        metavar="SIZE",
    )
    setting(
        group,
        "--trust-remote-code",
        "accepted and ignored: code in a model's folder is never run",
        action="store_true",
    )
