"""`pyloss train`, and the loss that `pyloss eval` prints too."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyloss.random
from pyloss import models
from pyloss.cli.commands.shared import Flags, base_of, join, move
from pyloss.distributed import Group, group_of
from pyloss.errors import counted
from pyloss.io.bars import bar
from pyloss.io.console import colored, out, say
from pyloss.io.files import check_target, user_path
from pyloss.optim import Optimizer, Schedule, WarmUp, build_optimizer, build_schedule
from pyloss.runtime import precision
from pyloss.tuner.adapters.layout import adapter_place
from pyloss.tuner.callbacks import get_reporting_callbacks
from pyloss.tuner.data.batching import NoTargets
from pyloss.tuner.data.targets import resolve_train_on
from pyloss.tuner.datasets import CacheDataset, load_dataset
from pyloss.tuner.losses import default_loss
from pyloss.tuner.run.checkpoints import restore_arrays
from pyloss.tuner.run.run_folder import ADAPTER_FILE, read_adapter_config
from pyloss.tuner.run.settings import DEFAULT_MODEL, merge_settings, resumed_settings
from pyloss.tuner.run.stored import checkpoint_file

#: makes the loss of a run, from its settings, student, tokenizer, training and validation data
Objective = Callable[[SimpleNamespace, Any, Any, Any, Any], Callable[..., Any]]


def train(flags: Flags) -> int:
    """`pyloss train`: trains, tests, or previews the training data."""
    return fit(flags)


def fit(flags: Flags, objective: Objective | None = None) -> int:
    """Trains, tests or previews as the flags say; with an `objective` the run is a distillation."""
    settings = merge_settings(flags, flags.get("config"), {"model": None})
    group = join(settings.distributed)
    if settings.model is None:
        tested = None if settings.train else settings.adapter_path
        settings.model = base_of(tested) or DEFAULT_MODEL
    if settings.train and settings.resume:
        settings = _resumed(settings, flags, group.size())
    if not (settings.train or settings.test):
        raise ValueError("nothing to do: train and test are both false")
    if settings.resume and settings.resume_adapter_file:
        raise ValueError(
            "--resume continues a run as it was, --resume-adapter-file starts a new one: "
            "give one of them"
        )
    if objective is None and settings.train and settings.distillation:
        raise ValueError(
            "the settings have a distillation section: pyloss distill runs and resumes them"
        )
    if settings.train and not settings.preview:
        _check_folder(settings.adapter_path)
    optimizer = make_optimizer(settings)
    model, tokenizer = models.load(settings.model)
    train_set, valid_set, test_set = load_dataset(settings, tokenizer)
    if settings.preview:
        from pyloss.tuner.data.preview import preview

        data = train_set if settings.train else test_set
        out(
            preview(
                data,
                tokenizer,
                settings.preview,
                max_seq_length=settings.max_seq_length,
                color=colored(),
            )
        )
        return 0
    if settings.train:
        loss = default_loss
        if objective is not None:
            # The objective may read the data, and no sample is tokenized twice.
            train_set, valid_set = (
                CacheDataset(data) if len(data) else data for data in (train_set, valid_set)
            )
            loss = objective(settings, model, tokenizer, train_set, valid_set)
        _train(settings, model, optimizer, train_set, valid_set, loss, group)
    else:
        from pyloss.tuner.utils import load_adapters

        load_adapters(model, settings.adapter_path)
        say(f"testing {settings.model} with the adapter in {settings.adapter_path}; --train trains")
        move(model, settings.device)
    if settings.test:
        print_loss(settings, model, test_set, "test")
    return 0


def _check_folder(path: str) -> None:
    """Refuses a place where a run cannot write its folder."""
    if user_path(path).is_file() or checkpoint_file(path):
        advice = "training writes a folder (--resume-adapter-file reads a file)"
        raise ValueError(f"--adapter-path {path} is a file: {advice}")
    check_target(path, folder=True)


def make_optimizer(settings: SimpleNamespace) -> Optimizer:
    """The optimizer of the settings, with its learning rate or schedule."""
    rate: float | Schedule = settings.learning_rate
    if settings.lr_schedule:
        rate = build_schedule(settings.lr_schedule)
    elif settings.warmup:
        rate = WarmUp(settings.learning_rate, settings.warmup)
    return build_optimizer(
        settings.optimizer, rate, settings.optimizer_config.get(settings.optimizer)
    )


def _resumed(settings: SimpleNamespace, flags: Flags, ranks: int) -> SimpleNamespace:
    """The settings of --resume: flags, then the YAML file, then the settings of the run.

    The run's batches stay as they were, so that each of the `ranks` has its part of them.
    """
    saved = read_adapter_config(user_path(settings.adapter_path))
    of_run = resumed_settings(saved) if "peft_type" not in saved else {}
    if samples := of_run.get("batch_size"):
        of_run["batch_size"] = samples // ranks
        if samples % ranks:
            raise ValueError(
                f"the run to resume in {settings.adapter_path} has batches of {samples} samples, "
                f"which {ranks} ranks cannot share: their number must divide {samples}"
            )
    settings = merge_settings(flags, flags.get("config"), of_run)
    before = SimpleNamespace(**{"mask_prompt": False, "train_on": None, **of_run})
    if of_run and _trained_on(settings) != (trained := _trained_on(before)):
        raise ValueError(
            f"the run to resume in {settings.adapter_path} trains on {trained!r} tokens, "
            f"not on {_trained_on(settings)!r}: their losses are not comparable; "
            f"give --train-on {trained}, or start a new run with --resume-adapter-file"
        )
    return settings


def _trained_on(settings: SimpleNamespace) -> str:
    return resolve_train_on(settings.train_on, settings.mask_prompt)


#: Settings that `TrainingArgs` has under the same names.
_SHARED = (
    "batch_size",
    "iters",
    "val_batches",
    "steps_per_report",
    "steps_per_eval",
    "max_seq_length",
    "seed",
    "matmul_precision",
    "grad_checkpoint",
    "grad_accumulation_steps",
    "max_grad_norm",
    "loraplus_lr_ratio",
    "patience",
    "max_time",
    "epochs",
    "val_every",
    "keep_best",
    "resume",
    "overwrite",
    "shard_optimizer",
)


def _train(
    settings: SimpleNamespace,
    model: Any,
    optimizer: Optimizer,
    train_set: Any,
    valid_set: Any,
    loss: Callable[..., Any],
    group: Group,
) -> None:
    from pyloss.tuner.trainer import TrainingArgs, train as run
    from pyloss.tuner.utils import add_adapters, unfreeze_layers

    folder = user_path(settings.adapter_path)
    pyloss.random.seed(settings.seed)
    if settings.fine_tune_type == "full":
        unfreeze_layers(model, settings.num_layers, settings.full_keys)
    else:
        add_adapters(model, settings.fine_tune_type, settings.num_layers, settings.lora_parameters)
    if settings.resume_adapter_file:
        file = _adapter_file(settings.resume_adapter_file)
        restore_arrays(model.trainable_parameters(), _weights(file), str(file))
        say(f"starting from the adapter in {file}")
    move(model, settings.device)
    args = TrainingArgs(
        **{name: getattr(settings, name) for name in _SHARED},
        steps_per_save=settings.save_every,
        adapter_file=folder / ADAPTER_FILE,
        # The samples of all ranks: as many as one rank would need for the same run.
        adapter_config=vars(settings)
        | {"batch_size": settings.batch_size * group.size()}
        | (model.adapter_config or {}),
    )
    callback = None
    if group.rank() == 0:
        callback = get_reporting_callbacks(
            settings.report_to, settings.project_name, str(folder), vars(settings)
        )
    try:
        valid = valid_set or None
        sets = (train_set, valid)
        run(model, optimizer, *sets, args, loss=loss, training_callback=callback, group=group)
    finally:
        if callback is not None:
            callback.close()


def _adapter_file(path: str) -> Path:
    """The file of --resume-adapter-file, given as the file or its folder."""
    place = checkpoint_file(path) or user_path(path)
    file = place / ADAPTER_FILE if place.is_dir() else place
    if not file.is_file():
        found = f"the folder has no {ADAPTER_FILE}" if place.is_dir() else "no such file"
        raise ValueError(
            f"--resume-adapter-file {path}: {found}; "
            f"give an {ADAPTER_FILE}, a numbered one, or their folder"
        )
    return file


def _weights(file: Path) -> dict[str, Any]:
    from pyloss.io.safetensors import read_safetensors

    return {name: tensor.array() for name, tensor in read_safetensors(file).tensors.items()}


def print_loss(settings: SimpleNamespace, model: Any, dataset: Any, split: str) -> None:
    """Prints the loss and perplexity of a split, as `tuner.evaluate` computes them."""
    from pyloss.tuner.run.evaluation import evaluate as measure

    note_other_targets(settings)
    with precision.matmul_precision(settings.matmul_precision):
        try:
            limit, size = settings.test_batches, settings.batch_size
            count = -(-len(dataset) // (size * group_of().size()))
            with bar("test loss", count if limit < 0 else min(limit, count), "batch") as shown:
                loss = measure(
                    model,
                    dataset,
                    size,
                    limit,
                    settings.max_seq_length,
                    progress_callback=shown.step,
                )
        except NoTargets as error:
            raise NoTargets(f"the {split} data: {error}") from None
    perplexity = math.exp(loss) if loss < 700 else math.inf
    count = (
        len(dataset)
        if settings.test_batches == -1
        else min(len(dataset), settings.test_batches * size * group_of().size())
    )
    out(f"loss {loss:.4f}, perplexity {perplexity:.4f}, {counted(count, 'sample')}")


def note_other_targets(settings: SimpleNamespace) -> None:
    """Notes a loss that is not comparable with the losses of the adapter's run."""
    if settings.adapter_path is None:
        return
    saved = read_adapter_config(adapter_place(settings.adapter_path)[0])
    trained = saved.get("train_on") or ("last" if saved.get("mask_prompt") else "all")
    if "mask_prompt" in saved and trained != (measured := _trained_on(settings)):
        say(
            f"note: the adapter was trained on {trained!r} tokens, "
            f"and this loss is that of {measured!r} (--train-on {trained})"
        )
