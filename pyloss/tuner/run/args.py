"""What `train` is told, and what it gives back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyloss.checks.numbers import real, whole
from pyloss.runtime.precision import check_precision


@dataclass
class TrainingArgs:
    """The settings of `train`; names, order and defaults of mlx-lm's, and further ones from
    `matmul_precision` on.
    """

    #: Samples in a batch.
    batch_size: int = 4
    #: Batches to train on.
    iters: int = 100
    #: Batches of a validation; -1 takes all validation data, 0 none.
    val_batches: int = 25
    #: Iterations between reports of the training loss.
    steps_per_report: int = 10
    #: Iterations between validations; 0 validates at the start and at the end alone.
    steps_per_eval: int = 200
    #: Iterations between saves.
    steps_per_save: int = 100
    #: Tokens of a sample that are used.
    max_seq_length: int = 2048
    #: Where the adapter is saved, the other files beside it; None saves nothing.
    adapter_file: str | os.PathLike[str] | None = "adapters.safetensors"
    #: Recompute activations in the backward pass: less memory, more time.
    grad_checkpoint: bool = False
    #: Batches whose gradients are put together for one update.
    grad_accumulation_steps: int = 1
    #: Accepted for mlx-lm's sake; there is no such cache here.
    clear_cache_threshold: int = 0
    #: How layers multiply during the run, "float32" or "bfloat16" (see
    #: `pyloss.set_matmul_precision`); None leaves it as it is.
    matmul_precision: str | None = None
    #: Scale gradients down to this norm.
    max_grad_norm: float | None = None
    #: Learning rate of `lora_b` as a multiple of the other parameters' (LoRA+, arXiv:2402.12354).
    loraplus_lr_ratio: float = 1.0
    #: Seed of batch order and dropout; None takes one from pyloss.random.
    seed: int | None = None
    #: Stop after so many validations in a row without a lower loss.
    patience: int | None = None
    #: End with the adapter of the lowest validation loss rather than the last one.
    keep_best: bool = True
    #: Continue a stopped run: True for the one beside adapter_file, or the path of a trainer state
    #: or its folder.
    resume: bool | str | os.PathLike[str] = False
    #: What adapter_config.json says; None takes the model's `adapter_config`.
    adapter_config: Mapping[str, Any] | None = None
    #: Print the plan, progress and reports.
    progress: bool = True

    #: Remove the files of an earlier run in the folder; otherwise they are kept in a folder
    #: `previous-N` there.
    overwrite: bool = False

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
        if self.matmul_precision is not None:
            check_precision(self.matmul_precision)
        if self.max_grad_norm is not None:
            self.max_grad_norm = real(self.max_grad_norm, "max_grad_norm", above=0)
        self.loraplus_lr_ratio = real(self.loraplus_lr_ratio, "loraplus_lr_ratio", above=0)


@dataclass
class TrainingResult:
    """How a run ended: `best_loss` and `best_iteration` are None without validation."""

    iterations: int
    updates: int
    trained_tokens: int
    best_loss: float | None
    best_iteration: int | None
    stopped_early: bool
