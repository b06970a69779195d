"""Training: mlx-lm's `tuner.trainer`. `run/training_run.py` has the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyloss.distributed import Group, group_of
from pyloss.runtime.precision import matmul_precision
from pyloss.tuner.callbacks import TrainingCallback
from pyloss.tuner.data.batching import iterate_batches
from pyloss.tuner.losses import default_loss
from pyloss.tuner.run.args import TrainingArgs, TrainingResult
from pyloss.tuner.run.evaluation import evaluate
from pyloss.tuner.run.training_run import TrainingRun

__all__ = [
    "TrainingArgs",
    "TrainingCallback",
    "TrainingResult",
    "default_loss",
    "evaluate",
    "grad_checkpoint",
    "iterate_batches",
    "train",
]


def grad_checkpoint(layer: Any) -> None:
    """Make the model of this decoder layer recompute its layers in the backward pass, as in mlx-lm.

    The model then keeps fewer activations. `TrainingArgs(grad_checkpoint=True)` and
    `model.set_grad_checkpoint()` do the same.

    Raises:
        TypeError: `layer` is not a decoder layer.
    """
    if not hasattr(layer, "recomputed"):
        raise TypeError(
            f"grad_checkpoint takes a decoder layer, such as model.layers[0], not a "
            f"{type(layer).__name__}"
        )
    layer.recomputed = True


def train(
    model: Any,
    optimizer: Any,
    train_dataset: Any,
    val_dataset: Any = None,
    args: TrainingArgs | None = None,
    loss: Callable[..., Any] = default_loss,
    iterate_batches: Callable[..., Any] = iterate_batches,
    training_callback: TrainingCallback | None = None,
    group: Group | None = None,
) -> TrainingResult:
    """Train the model's trainable parameters and save them; `run/checkpoints.py` lists the files.

    The folder of `args.adapter_file` is locked during the run. A new run first moves the files of
    an earlier run to a subfolder `previous-N`, or removes them with `args.overwrite`. A resumed run
    continues with them. With 0 iterations and no resume, nothing is written.

    Validation runs at the start, every `steps_per_eval` iterations (0: only at start and end) and
    at the end. With `keep_best` the model and `adapters.safetensors` end with the adapter of the
    lowest validation loss; a resumed run still continues from the last one.

    Args:
        loss: `loss(model, batch, lengths)` returns `(loss, ntoks)` or a scalar. Arrays of its own
            (see `tuner.losses.ModelAndLoss`) are trained too. Only the run's state keeps them.
        iterate_batches: called with mlx-lm's keywords; yields the arguments of `loss` after the
            model.
        group: the ranks that train together (`pyloss.distributed`); None: all processes that MPI's
            launcher started. `batch_size` is that of each rank, gradients are summed over them, and
            rank 0 prints, saves and calls `training_callback`.

    Raises:
        KeyboardInterrupt: after Ctrl-C; a run with a folder is saved, the message says where.
        FloatingPointError: the loss or gradient is not finite; the parameters are not updated.
        ValueError: unusable data or arguments, or the state to resume belongs to another run or
            another base model.
        FormatError: the state to resume is damaged.
        OSError: a file cannot be written.
        BlockingIOError: another process trains in the folder; the message names it.
    """
    args = args or TrainingArgs()
    with matmul_precision(args.matmul_precision):
        return TrainingRun(
            model,
            optimizer,
            train_dataset,
            val_dataset,
            args,
            loss,
            iterate_batches,
            group_of(group),
        ).run(training_callback)
