"""What `train` is told, and what it gives back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingArgs:
    """The settings of `train`; the names and defaults of mlx-lm's, and further ones from `max_grad_norm` on."""

    batch_size: int = _option(4, "Samples in a batch.")
    iters: int = _option(100, "Batches to train on.")
    val_batches: int = _option(25, "Batches of a validation; -1 takes all validation data, 0 none.")
    steps_per_report: int = _option(10, "Iterations between reports of the training loss.")
    steps_per_eval: int = _option(200, "Iterations between validations.")
    steps_per_save: int = _option(100, "Iterations between saves.")
    max_seq_length: int = _option(2048, "Tokens of a sample that are used.")
    adapter_file: str | os.PathLike[str] | None = _option(
        "adapters.safetensors", "Where the adapter is saved, the other files beside it; None saves nothing."
    )
    grad_checkpoint: bool = _option(False, "Recompute activations in the backward pass: less memory, more time.")
    grad_accumulation_steps: int = _option(1, "Batches whose gradients are put together for one update.")
    clear_cache_threshold: int = _option(0, "Accepted for mlx-lm's sake; there is no such cache here.")
    max_grad_norm: float | None = _option(None, "Scale gradients down to this norm.")
    seed: int | None = _option(None, "Seed of batch order and dropout; None takes one from pyloss.random.")
    patience: int | None = _option(None, "Stop after so many validations in a row without a lower loss.")
    keep_best: bool = _option(True, "End with the adapter of the lowest validation loss rather than the last one.")
    resume: bool | str | os.PathLike[str] = _option(
        False,
        "Continue a stopped run: True for the one beside adapter_file, or the path of a trainer state or its folder.",
    )
    adapter_config: Mapping[str, Any] | None = _option(
        None, "What adapter_config.json says; None takes the model's `adapter_config`."
    )
    progress: bool = _option(True, "Print the plan, progress and reports.")

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "iters": 0, "val_batches": -1, "steps_per_report": 1, "steps_per_eval": 1}
        least |= {"steps_per_save": 1, "max_seq_length": 2, "grad_accumulation_steps": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {low}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience!r}; it must be at least 1, or None")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm!r}; it must be above 0, or None")


@dataclass
class TrainingResult:
    """How a run ended: `best_loss` and `best_iteration` are None without validation."""

    iterations: int
    updates: int
    trained_tokens: int
    best_loss: float | None
    best_iteration: int | None
    stopped_early: bool
