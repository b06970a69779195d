"""The settings of `train` and its result."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pyloss.checks.durations import duration, every, iterations
from pyloss.checks.numbers import real, whole
from pyloss.nn.display import html_table
from pyloss.runtime.precision import check_precision


@dataclass
class TrainingArgs:
    """The settings of `train`.

    Up to `clear_cache_threshold` they have mlx-lm's names, order and defaults.

    Attributes:
        batch_size: samples per batch.
        iters: batches to train on.
        val_batches: batches per validation; -1: all validation data, 0: no validation.
        steps_per_report: iterations between reports of the training loss.
        steps_per_eval: iterations between validations; 0: only at the start and at the end.
        steps_per_save: iterations between saves.
        max_seq_length: tokens used per sample, at most.
        adapter_file: file for the adapter; the run's other files go into its folder. None: save
            nothing.
        grad_checkpoint: recompute activations in the backward pass: less memory, more time.
        grad_accumulation_steps: batches whose gradients are accumulated for one update.
        clear_cache_threshold: accepted for compatibility with mlx-lm; pyloss has no such cache.
        matmul_precision: precision of the layers' matrix products during the run, "float32",
            "bfloat16" or "mixed" (see `pyloss.set_matmul_precision`); None: unchanged.
        max_grad_norm: gradients are scaled down to at most this norm; None: no clipping.
        loraplus_lr_ratio: learning rate of `lora_b` as a multiple of the other parameters' (LoRA+,
            arXiv:2402.12354).
        seed: seed of batch order and dropout; None: one from pyloss.random.
        patience: stop after this many validations in a row without a lower loss; None: never.
        keep_best: end with the adapter of the lowest validation loss rather than the last one.
        resume: continue a stopped run. True: the run in adapter_file's folder; a path: a trainer
            state or a folder with one.
        adapter_config: contents of adapter_config.json; None: the model's `adapter_config`.
        progress: print plan, progress and reports.
        overwrite: remove the files of an earlier run in the folder; otherwise they move to a
            subfolder `previous-N`.
        max_time: stop after this time, as if the iterations were done: seconds, or text such as
            "2h" or "1h30m"; None: never. A resumed run has it anew.
        epochs: passes over the training data, instead of `iters`; a part of one is possible.
        val_every: what is between validations, instead of `steps_per_eval`: text such as "0.1ep",
            a part of an epoch, or a number of iterations.
        shard_optimizer: of several ranks (`pyloss.distributed`), each keeps the optimizer's state
            for its part of the parameters, and updates these; the bits are the same.
    """

    batch_size: int = 4
    iters: int = 100
    val_batches: int = 25
    steps_per_report: int = 10
    steps_per_eval: int = 200
    steps_per_save: int = 100
    max_seq_length: int = 2048
    adapter_file: str | os.PathLike[str] | None = "adapters.safetensors"
    grad_checkpoint: bool = False
    grad_accumulation_steps: int = 1
    clear_cache_threshold: int = 0
    matmul_precision: str | None = None
    max_grad_norm: float | None = None
    loraplus_lr_ratio: float = 1.0
    seed: int | None = None
    patience: int | None = None
    keep_best: bool = True
    resume: bool | str | os.PathLike[str] = False
    adapter_config: Mapping[str, Any] | None = None
    progress: bool = True
    overwrite: bool = False
    max_time: float | str | None = None
    epochs: float | None = None
    val_every: int | str | None = None
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        least = {
            "batch_size": 1,
            "iters": 0,
            "val_batches": -1,
            "steps_per_report": 1,
            "steps_per_eval": 0,
        }
        least |= {"steps_per_save": 1, "max_seq_length": 2, "grad_accumulation_steps": 1}
        for name, low in least.items():
            setattr(self, name, whole(getattr(self, name), name, low))
        for name, low in (("patience", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                setattr(self, name, whole(getattr(self, name), name, low))
        if self.max_time is not None:
            self.max_time = duration(self.max_time, "max_time")
        if self.epochs is not None:
            self.epochs = real(self.epochs, "epochs", above=0)
        if self.val_every is not None:
            self.val_every = every(self.val_every, "val_every")
        if self.matmul_precision is not None:
            check_precision(self.matmul_precision)
        if self.max_grad_norm is not None:
            self.max_grad_norm = real(self.max_grad_norm, "max_grad_norm", above=0)
        self.loraplus_lr_ratio = real(self.loraplus_lr_ratio, "loraplus_lr_ratio", above=0)

    def in_iterations(self, batches: Any) -> TrainingArgs:
        """These settings with `iters` and `steps_per_eval` for the epochs of `batches`.

        Raises ValueError if epochs are given and the iterator does not say how many batches one
        has (`batches_per_epoch`).
        """
        given = [self.val_every] if isinstance(self.val_every, str) else []
        if self.epochs is None and self.val_every is None:
            return self
        epoch: int = getattr(batches, "batches_per_epoch", 0)
        if not epoch and (given or self.epochs is not None):
            name = "epochs" if self.epochs is not None else "val_every"
            raise ValueError(
                f"{name} is given in epochs, and the iterator of the batches does not say how many "
                "an epoch has (batches_per_epoch): give iters and steps_per_eval"
            )
        found = replace(self)
        if self.epochs is not None:
            found.iters = max(math.ceil(self.epochs * epoch - 1e-9), 1)
        if self.val_every is not None:
            found.steps_per_eval = iterations(self.val_every, epoch)
        return found


@dataclass
class TrainingResult:
    """How a run ended.

    Attributes:
        iterations: iterations done.
        updates: updates of the parameters.
        trained_tokens: target tokens trained on.
        best_loss: lowest validation loss; None without validation.
        best_iteration: iteration of `best_loss`; None without validation.
        stopped_early: whether `patience` or `max_time` stopped the run.
        history: the reports as columns: `iteration`, `train_loss`, `learning_rate` and the others
            of `TrainingCallback.on_train_loss_report`, and of the validations `val_iteration`,
            `val_loss` and `val_time`. A resumed run has those since it was resumed.
    """

    iterations: int
    updates: int
    trained_tokens: int
    best_loss: float | None
    best_iteration: int | None
    stopped_early: bool
    history: dict[str, list[Any]] = field(default_factory=dict, repr=False, compare=False)

    def plot(self, ax: Any = None) -> Any:
        """Draws training and validation loss over the iterations; returns matplotlib's axes.

        `ax`: the axes to draw in; None: new ones. ImportError if matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
            _, ax = pyplot.subplots()
        for name, at, label in (
            ("train_loss", "iteration", "training"),
            ("val_loss", "val_iteration", "validation"),
        ):
            if self.history.get(name):
                ax.plot(self.history[at], self.history[name], marker=".", label=label)
        ax.set_xlabel("iteration")
        ax.set_ylabel("loss")
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
        return ax

    def _repr_html_(self) -> str:
        rows = [
            ["iterations", f"{self.iterations:,}{' (stopped early)' * self.stopped_early}"],
            ["updates", f"{self.updates:,}"],
            ["trained tokens", f"{self.trained_tokens:,}"],
        ]
        losses = self.history.get("train_loss")
        if losses:
            rows.append(["train loss, first and last report", f"{losses[0]:.4f}, {losses[-1]:.4f}"])
        if self.best_loss is not None:
            best = f"{self.best_loss:.4f} at iteration {self.best_iteration:,}"
            rows.append(["lowest validation loss", best])
        return html_table(["", ""], rows)
