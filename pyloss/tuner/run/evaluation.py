"""Evaluates the mean loss over a dataset; holds batch and loss helpers shared with training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pyloss.autograd.scope import no_grad
from pyloss.distributed import Group, group_of
from pyloss.tuner.data.batching import NoTargets, iterate_batches
from pyloss.tuner.data.dataset_classes import CacheDataset
from pyloss.tuner.losses import default_loss


def _number(value: Any) -> float:
    return float(value.item() if hasattr(value, "item") else value)


def loss_and_weight(value: Any) -> tuple[float, float]:
    """Split a loss function's result, `(loss, ntoks)` or a loss alone, which has weight 1."""
    if isinstance(value, (tuple, list)):
        return _number(value[0]), _number(value[1])
    return _number(value), 1.0


def has_rows(batch: Any) -> bool:
    """Whether a batch has a row for this rank; see `BatchIterator`."""
    shape = getattr(batch[0], "shape", ()) if len(batch) else ()
    return not shape or shape[0] > 0


def batches_of(
    make: Callable[..., Any], model: Any, dataset: Any, group: Group, **options: Any
) -> Iterator[Any]:
    """Return the batch iterator of `make`; a user's gets the mlx-lm keywords that it accepts.

    `batch_size` is that of all ranks together. Raises ValueError if a user's iterator does not
    accept the group of several ranks.
    """
    options["comm_group"] = group if group.size() > 1 else None
    if make is iterate_batches:
        vocabulary = getattr(model, "vocab_size", None)
        return iter(make(dataset=dataset, vocab_size=vocabulary, **options))
    loop = options.get("loop", False)
    offered = {"dataset": dataset, **options, "loop": loop, "train": loop}
    parameters = inspect.signature(make).parameters
    wanted = {name: value for name, value in offered.items() if name in parameters}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        mlx = ("dataset", "batch_size", "max_seq_length", "loop", "comm_group")
        wanted = {
            name: value for name, value in offered.items() if name in mlx or name in parameters
        }
    if group.size() > 1 and "comm_group" not in wanted:
        raise ValueError(
            f"iterate_batches has no argument comm_group, so that each of the {group.size()} ranks "
            "would train on all samples: take comm_group (rank(), size()), and yield this rank's "
            "rows of every batch"
        )
    return iter(make(**wanted))


def own_data(dataset: Any, make: Callable[..., Any]) -> Any:
    """Wrap the dataset in a cache, which tokenizes it once; a user's iterator gets it unchanged."""
    return (
        CacheDataset(dataset)
        if make is iterate_batches and not isinstance(dataset, CacheDataset)
        else dataset
    )


@no_grad()
def evaluate(
    model: Any,
    dataset: Any,
    batch_size: int,
    num_batches: int = -1,
    max_seq_length: int = 2048,
    loss: Callable[..., Any] = default_loss,
    iterate_batches: Callable[..., Any] = iterate_batches,
    clear_cache_threshold: int = 0,
    progress_callback: Callable[[], Any] | None = None,
    group: Group | None = None,
) -> float:
    """Return the mean loss over the target tokens of `num_batches` batches of `dataset` (-1: all).

    The model is in evaluation mode during the call. The ranks of a `group` (None: that of all
    processes) share the samples of each batch, `batch_size` for each rank, and all return the same
    number.

    Raises:
        ValueError: `num_batches` is not allowed, or the dataset is empty.
        NoTargets: the dataset has no target token (a subclass of ValueError).
    """
    if num_batches == 0 or num_batches < -1:
        raise ValueError(f"num_batches is {num_batches}; it must be at least 1, or -1 for all")
    group = group_of(group)
    was_training = getattr(model, "training", False)
    model.eval()
    total, weights = 0.0, 0.0
    try:
        options = {"batch_size": batch_size * group.size(), "max_seq_length": max_seq_length}
        batches = batches_of(iterate_batches, model, dataset, group, **options)
        for index, batch in enumerate(batches):
            if index == num_batches:
                break
            if has_rows(batch):
                value, weight = loss_and_weight(loss(model, *batch))
                if weight:
                    total, weights = total + value * weight, weights + weight
            if progress_callback is not None:
                progress_callback()
    finally:
        model.train(was_training)
    if group.size() > 1:
        total, weights = group.all_sum(np.array([total, weights])).tolist()
    if not weights:
        raise NoTargets("nothing to evaluate: the dataset has no batch with a target token")
    return total / weights
