"""mlx_lm.tuner.trainer: its loss, batches and schedule of a run, by pyloss's training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss.mlx_lm.arrays import array, mx
from pyloss.mlx_lm.names import absent
from pyloss.mlx_lm.tuner.callbacks import TrainingCallback
from pyloss.mlx_lm.tuner.datasets import CacheDataset
from pyloss.mlx_lm.tuner.running import MlxRun, settings_of
from pyloss.tuner import trainer as ours
from pyloss.tuner.losses import default_loss as packed_loss
from pyloss.tuner.run.evaluation import evaluate as measure

__all__ = [
    "TrainingArgs",
    "default_loss",
    "evaluate",
    "grad_checkpoint",
    "iterate_batches",
    "train",
]

__getattr__ = absent(__name__)

log = logging.getLogger("pyloss")

#: batches are padded to one more than a multiple of this
_PAD_TO = 32


@dataclass
class TrainingArgs:
    """The settings of `train`; `pyloss.tuner.TrainingArgs` explains them."""

    batch_size: int = 4
    iters: int = 100
    val_batches: int = 25
    steps_per_report: int = 10
    steps_per_eval: int = 200
    steps_per_save: int = 100
    max_seq_length: int = 2048
    adapter_file: str = "adapters.safetensors"
    grad_checkpoint: bool = False
    grad_accumulation_steps: int = 1
    clear_cache_threshold: int = 0


def grad_checkpoint(layer: Any) -> None:
    """Make the model of this decoder layer recompute its layers in the backward pass.

    Raises TypeError for what is no decoder layer.
    """
    ours.grad_checkpoint(layer)


def default_loss(model: Any, batch: Any, lengths: Any) -> tuple[Any, Any]:
    """The mean cross entropy of the target tokens of `batch` [B, T], and their number.

    `lengths` [B, 2] has the first target of each row and its number of tokens. As in mlx-lm, the
    token after a row's last one, which is padding, is a target too.
    """
    ends = np.array(lengths, np.int32)
    ends[:, 1] += 1
    loss, count = packed_loss(model, np.asarray(batch), ends)
    return array(loss), mx.array(round(count))


def iterate_batches(
    dataset: Any,
    batch_size: int,
    max_seq_length: int,
    loop: bool = False,
    seed: int | None = None,
    comm_group: Any = None,
) -> Iterator[tuple[Any, Any]]:
    """Yield `(batch, lengths)`: int32 [B, T], padded with 0, and [B, 2] as in `default_loss`.

    The samples are sorted by `dataset.itemlen`, or by their tokens; those that fill no batch are
    left out. NumPy's global random state, which `seed` sets, shuffles the batches.

    Raises ValueError for fewer samples than `batch_size`, or a batch size that the workers of
    `comm_group` (`rank()`, `size()`) cannot share.
    """
    if isinstance(dataset, CacheDataset):
        order = sorted(range(len(dataset)), key=dataset.itemlen)
    else:
        order = sorted(range(len(dataset)), key=lambda i: len(dataset[i][0]))
    check_size(dataset, batch_size)
    rank, size = (0, 1) if comm_group is None else (comm_group.rank(), comm_group.size())
    if batch_size % size:
        raise ValueError("The batch size must be divisible by the number of workers")
    batches = [
        order[i + rank : i + rank + batch_size : size]
        for i in range(0, len(order) - batch_size + 1, batch_size)
    ]
    if seed is not None:
        np.random.seed(seed)
    while True:
        for place in np.random.permutation(len(batches)):
            samples = [dataset[i] for i in batches[place]]
            yield _collated(samples, max_seq_length)
        if not loop:
            return


def check_size(dataset: Any, batch_size: int, name: str = "") -> None:
    """Raises ValueError, which begins with `name`, for a dataset that fills no batch."""
    if len(dataset) < batch_size:
        raise ValueError(
            f"{name}Dataset must have at least batch_size={batch_size} "
            f"examples but only has {len(dataset)}."
        )


def _collated(samples: list[Any], max_seq_length: int) -> tuple[Any, Any]:
    """A batch of `(tokens, offset)`, or of tokens alone, which are then targets from the first."""
    if len(samples[0]) == 2:
        rows, offsets = zip(*samples, strict=True)
    else:
        rows, offsets = tuple(samples), (0,) * len(samples)
    longest = max(map(len, rows))
    if longest > max_seq_length:
        log.warning(
            "Some sequences are longer than %s tokens: the longest one, of %s, is cut",
            max_seq_length,
            longest,
        )
    width = min(1 + _PAD_TO * -(-longest // _PAD_TO), max_seq_length)
    batch = np.zeros((len(rows), width), np.int32)
    lengths = []
    for to, row in zip(batch, rows, strict=True):
        kept = min(len(row), max_seq_length)
        to[:kept] = row[:kept]
        lengths.append(kept)
    return array(batch), array(np.array(list(zip(offsets, lengths, strict=True)), np.int32))


def evaluate(
    model: Any,
    dataset: Any,
    batch_size: int,
    num_batches: int,
    max_seq_length: int = 2048,
    loss: Callable[..., Any] = default_loss,
    iterate_batches: Callable[..., Any] = iterate_batches,
    clear_cache_threshold: int = 0,
    progress_callback: Callable[[], Any] | None = None,
) -> float:
    """The mean loss over the target tokens of `num_batches` batches (-1: all).

    Raises ValueError for 0 batches, and for data without a target token.
    """
    return measure(
        model,
        dataset,
        batch_size,
        num_batches,
        max_seq_length,
        loss,
        iterate_batches,
        clear_cache_threshold,
        progress_callback,
    )


_own_batches = iterate_batches  # the arguments below have its name


def train(
    model: Any,
    optimizer: Any,
    train_dataset: Any,
    val_dataset: Any = None,
    args: TrainingArgs = TrainingArgs(),  # noqa: B008 - mlx-lm's default
    loss: Callable[..., Any] = default_loss,
    iterate_batches: Callable[..., Any] = iterate_batches,
    training_callback: TrainingCallback | None = None,
) -> Any:
    """Train the model's trainable parameters and save them to `args.adapter_file`.

    The last weights are the result. Batches of an update count equally, and those after the last
    update are dropped. Validations come before iterations 1, each `steps_per_eval`, and the last.
    An adapter that another run left in the folder moves to `previous-N` beside it, and an
    adapter_config.json that is there stays as it is. Errors are those of `pyloss.tuner.train`.
    """
    return run_training(
        model,
        optimizer,
        train_dataset,
        val_dataset,
        args,
        loss,
        iterate_batches,
        training_callback,
    )


def run_training(
    model: Any,
    optimizer: Any,
    train_dataset: Any,
    val_dataset: Any,
    args: TrainingArgs,
    loss: Callable[..., Any],
    iterate_batches: Callable[..., Any] = iterate_batches,
    training_callback: TrainingCallback | None = None,
    adapter_config: dict[str, Any] | None = None,
) -> Any:
    """`train`, which writes `adapter_config` to adapter_config.json if it is given."""
    settings = settings_of(args, adapter_config)
    run = MlxRun(model, optimizer, train_dataset, val_dataset, settings, loss, iterate_batches)
    if iterate_batches is _own_batches:
        # Before the run moves an earlier adapter away; a batch is made later.
        size = settings.batch_size * run.group.size()
        check_size(train_dataset, size, "the training data: ")
        if run.val_data is not None:
            check_size(val_dataset, size, "the validation data: ")
    return run.run(training_callback)
