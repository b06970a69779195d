"""mlx_lm.lora: the command with mlx-lm's flags, defaults and meanings, and its functions."""

from __future__ import annotations

import argparse
import logging
import math
import types
from typing import Any

import numpy as np

from pyloss.distributed import group_of
from pyloss.errors import choices
from pyloss.io.bars import bar
from pyloss.io.console import out
from pyloss.mlx.optimizers import SGD, Adafactor, Adam, AdamW, Muon
from pyloss.mlx_lm.arrays import mx, seen_as_mlx
from pyloss.mlx_lm.checks import KINDS, check_options, check_settings
from pyloss.mlx_lm.command import as_command, flag_size
from pyloss.mlx_lm.names import absent
from pyloss.mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from pyloss.mlx_lm.tuner.datasets import CacheDataset, load_dataset
from pyloss.mlx_lm.tuner.trainer import (
    TrainingArgs,
    check_size,
    default_loss,
    evaluate,
    run_training,
)
from pyloss.mlx_lm.tuner.utils import (
    build_schedule,
    linear_to_lora_layers,
    load_adapters,
    print_trainable_parameters,
)
from pyloss.mlx_lm.utils import load
from pyloss.tuner import unfreeze_layers
from pyloss.tuner.run.yaml_file import read_yaml

log = logging.getLogger("pyloss")

__all__ = ["CONFIG_DEFAULTS", "build_parser", "evaluate_model", "main", "run", "train_model"]

__getattr__ = absent(__name__)

CONFIG_DEFAULTS: dict[str, Any] = {
    "model": "Qwen/Qwen3-0.6b",
    "train": False,
    "fine_tune_type": "lora",
    "optimizer": "adam",
    "optimizer_config": {"adam": {}, "adamw": {}, "muon": {}, "sgd": {}, "adafactor": {}},
    "data": "mlx-community/WikiSQL",
    "seed": 0,
    "num_layers": 16,
    "batch_size": 4,
    "iters": 1000,
    "val_batches": 25,
    "learning_rate": 1e-5,
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "resume_adapter_file": None,
    "adapter_path": "adapters",
    "save_every": 100,
    "test": False,
    "test_batches": 500,
    "max_seq_length": 2048,
    "config": None,
    "grad_checkpoint": False,
    "grad_accumulation_steps": 1,
    "clear_cache_threshold": 0,
    "lr_schedule": None,
    "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
    "mask_prompt": False,
    "report_to": None,
    "project_name": None,
    "trust_remote_code": False,
}

#: keys of a YAML file that have no default
_MORE_KEYS = ("hf_dataset", "prompt_feature", "completion_feature", "chat_feature", "text_feature")

OPTIMIZERS: dict[str, Any] = {
    "adam": Adam,
    "adamw": AdamW,
    "muon": Muon,
    "sgd": SGD,
    "adafactor": Adafactor,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of mlx_lm.lora's flags; an unset flag is None, so that a YAML file can set it."""
    parser = argparse.ArgumentParser(description="LoRA or QLoRA finetuning.")
    add = parser.add_argument
    add("--model", type=str, help="folder or GGUF file of the model, or its name on the hub")
    add("--train", action="store_true", default=None, help="train")
    add("--data", type=str, help="folder with train, valid and test.jsonl, or a hub dataset")
    add("--fine-tune-type", type=str, choices=KINDS, help="what is trained")
    add("--optimizer", type=str, choices=list(OPTIMIZERS), default=None, help="the optimizer")
    add("--mask-prompt", action="store_true", default=None, help="no loss on prompts")
    add("--num-layers", type=int, help="train the last N layers; -1: all (default 16)")
    add("--batch-size", type=int, help="samples per batch")
    add("--iters", type=int, help="iterations")
    add("--val-batches", type=int, help="batches per validation; -1: all")
    add("--learning-rate", type=float, help="learning rate")
    add("--steps-per-report", type=int, help="iterations between reports of the loss")
    add("--steps-per-eval", type=int, help="iterations between validations")
    add("--grad-accumulation-steps", type=int, help="batches per update")
    add("--resume-adapter-file", type=str, help="start from the weights in this file")
    add("--adapter-path", type=str, help="folder of the adapter")
    add("--save-every", type=int, help="iterations between saves")
    add("--test", action="store_true", default=None, help="measure the loss on the test set")
    add("--test-batches", type=int, help="batches of the test; -1: all")
    add("--max-seq-length", type=int, help="tokens of a sample, at most")
    add("-c", "--config", type=str, help="YAML file with the settings")
    text = "recompute activations in the backward pass"
    add("--grad-checkpoint", action="store_true", default=None, help=text)
    text = "no effect: pyloss has no such cache"
    add("--clear-cache-threshold", type=flag_size, default=0, help=text)
    text = "services that get the reports: wandb, swanlab, or several with commas"
    add("--report-to", type=str, default=None, help=text)
    add("--project-name", type=str, default=None, help="the project's name at the services")
    add("--seed", type=int, help="seed of the random numbers")
    text = "no effect: code of models is never run"
    add("--trust-remote-code", action="store_true", help=text)
    return parser


def train_model(
    args: Any,
    model: Any,
    train_set: Any,
    valid_set: Any,
    training_callback: TrainingCallback | None = None,
) -> None:
    """Train an adapter, or the last layers, as `args` say: the keys of `CONFIG_DEFAULTS`.

    Raises:
        ValueError: more layers than the model has, or a value that is not allowed.
        FileNotFoundError: no such file to resume from.
    """
    check_settings(args, OPTIMIZERS)
    optimizer = optimizer_of(args)
    mx.random.seed(args.seed)
    model.freeze()
    if args.num_layers > len(model.layers):
        raise ValueError(
            f"Requested to train {args.num_layers} layers "
            f"but the model only has {len(model.layers)} layers."
        )
    if args.fine_tune_type == "full":
        unfreeze_layers(model, args.num_layers if args.num_layers > 0 else -1)
        seen_as_mlx(model)
        args.lora_parameters = None
    else:
        dora = args.fine_tune_type == "dora"
        linear_to_lora_layers(model, args.num_layers, args.lora_parameters, use_dora=dora)
    if args.resume_adapter_file is not None:
        out(f"Loading fine-tuned weights from {args.resume_adapter_file}")
        model.load_weights(args.resume_adapter_file, strict=False)
    print_trainable_parameters(model)
    run_training(
        model,
        optimizer,
        CacheDataset(train_set),
        CacheDataset(valid_set),
        training_args(args),
        default_loss,
        training_callback=training_callback,
        adapter_config=vars(args),
    )


def optimizer_of(args: Any) -> Any:
    """The optimizer of checked settings. Raises ValueError for other options than it takes."""
    name = args.optimizer.lower()
    rate = build_schedule(args.lr_schedule) if args.lr_schedule else args.learning_rate
    options = (args.optimizer_config or {}).get(name) or {}
    check_options(name, OPTIMIZERS[name], options)
    return OPTIMIZERS[name](learning_rate=rate, **options)


def training_args(args: Any) -> TrainingArgs:
    """The settings of `tuner.trainer.train` in those of the command."""
    from pathlib import Path

    return TrainingArgs(
        batch_size=args.batch_size,
        iters=args.iters,
        val_batches=args.val_batches,
        steps_per_report=args.steps_per_report,
        steps_per_eval=args.steps_per_eval,
        steps_per_save=args.save_every,
        adapter_file=str(Path(args.adapter_path) / "adapters.safetensors"),
        max_seq_length=args.max_seq_length,
        grad_checkpoint=args.grad_checkpoint,
        grad_accumulation_steps=args.grad_accumulation_steps,
    )


def evaluate_model(args: Any, model: Any, test_set: Any) -> None:
    """Print the loss of `args.test_batches` batches of the test set (-1: all), and perplexity."""
    count = len(test_set) // args.batch_size
    if args.test_batches != -1:
        count = min(count, args.test_batches)
    with bar("test loss", count, "batch") as shown:
        loss = evaluate(
            model=model,
            dataset=CacheDataset(test_set),
            batch_size=args.batch_size,
            num_batches=args.test_batches,
            max_seq_length=args.max_seq_length,
            progress_callback=shown.step,
        )
    perplexity = math.exp(loss) if loss < 700 else math.inf
    out(f"Test loss {loss:.3f}, Test ppl {perplexity:.3f}.")


def run(args: Any, training_callback: TrainingCallback | None = None) -> None:
    """Train, test, or both, as `args` say: the keys of `CONFIG_DEFAULTS`.

    `training_callback` is called beside the services of `args.report_to`; mlx-lm drops it.
    Raises ValueError if neither `train` nor `test` is set, and for a value that is not allowed,
    before anything is read or written.
    """
    check_settings(args, OPTIMIZERS)
    if not args.train and not args.test:
        raise ValueError("Must provide at least one of --train or --test")
    if args.train:
        optimizer_of(args)
    if args.test and args.test_batches == 0:
        raise ValueError("test_batches is 0; it must be at least 1, or -1 for all")
    np.random.seed(args.seed)
    callback = get_reporting_callbacks(
        args.report_to, project_name=args.project_name, log_dir=args.adapter_path, config=vars(args)
    )
    out("Loading pretrained model")
    trusted = args.trust_remote_code
    model, tokenizer = load(
        args.model, tokenizer_config={"trust_remote_code": trusted}, trust_remote_code=trusted
    )
    out("Loading datasets")
    train_set, valid_set, test_set = load_dataset(args, tokenizer)
    if args.test:
        check_size(test_set, args.batch_size * group_of(None).size(), "the test data: ")
    if args.train:
        out("Training")
        train_model(args, model, train_set, valid_set, _both(training_callback, callback))
    elif args.adapter_path != "":
        load_adapters(model, args.adapter_path)
    if args.test:
        out("Testing")
        evaluate_model(args, model, test_set)


class _Both(TrainingCallback):
    """Passes reports to two callbacks."""

    def __init__(self, *callbacks: TrainingCallback) -> None:
        self.callbacks = callbacks

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_val_loss_report(val_info)


def _both(*callbacks: TrainingCallback | None) -> TrainingCallback | None:
    given = [callback for callback in callbacks if callback is not None]
    return _Both(*given) if len(given) > 1 else next(iter(given), None)


def settings_of(flags: dict[str, Any]) -> types.SimpleNamespace:
    """The settings of a command: flags, then the YAML file `config`, then `CONFIG_DEFAULTS`.

    The file's keys that mlx_lm.lora does not have are ignored, with a warning.
    """
    settings = dict(flags)
    if settings.get("config"):
        out(f"Loading configuration file {settings['config']}")
        found = read_yaml(settings["config"])
        unknown = [str(key) for key in found if key not in (*CONFIG_DEFAULTS, *_MORE_KEYS)]
        if unknown:
            log.warning(
                "%s: mlx_lm.lora does not have the keys %s, which are ignored (pyloss train "
                "refuses unknown keys)",
                settings["config"],
                choices(unknown),
            )
        for key, value in found.items():
            if settings.get(key) is None:
                settings[key] = value
    for key, value in CONFIG_DEFAULTS.items():
        if settings.get(key) is None:
            settings[key] = value
    return types.SimpleNamespace(**settings)


def main() -> None:
    """The command `python -m pyloss.mlx_lm.lora`."""
    run(settings_of(vars(build_parser().parse_args())))


if __name__ == "__main__":
    as_command(main)
