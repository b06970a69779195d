"""The training loss on batches of token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pyloss.autograd.checkpointing import sum_in_parts
from pyloss.autograd.scope import current_tape
from pyloss.checks.arrays import as_array, as_integers
from pyloss.losses.pairs import js_div_loss, kl_div_loss
from pyloss.losses.public import linear_cross_entropy
from pyloss.runtime.precision import keeps_bfloat16

__all__ = [
    "ModelAndLoss",
    "PackedTargets",
    "default_loss",
    "head_bytes",
    "js_div_loss",
    "kl_div_loss",
    "loss_in_parts",
    "parts_of_rows",
    "target_weights",
]

# Tokens per part. A batch runs forward and backward in parts, so that memory holds one part's
# activations. Matrix products with fewer rows are slower, with more rows hardly faster.
PART_TOKENS = 512
# Factor for parts without gradients. Memory then holds only one layer's activations, and larger
# parts pack each weight less often.
PARTS_TOGETHER = 2


def target_weights(batch: Any, lengths: Any) -> np.ndarray:
    """Return each token's weight as a target, float32 [B, T]. Column 0 is 0: it has no input.

    `lengths` is integer [B, 2] = (first target token, number of tokens): tokens
    `first <= i < number` get weight 1. Or `lengths` is float [B, T], the weights themselves.

    Raises ValueError for other shapes, and for weights that are negative or not finite.
    """
    batch, lengths = as_array(batch, "batch"), as_array(lengths, "lengths")
    if batch.ndim != 2:
        raise ValueError(f"batch must be [B, T] token ids, got shape {batch.shape}")
    rows, columns = batch.shape
    if lengths.dtype.kind in "iu" and lengths.shape == (rows, 2):
        steps = np.arange(columns)
        weights = ((steps >= lengths[:, :1]) & (steps < lengths[:, 1:])).astype(np.float32)
    elif lengths.dtype.kind == "f" and lengths.shape == batch.shape:
        weights = lengths.astype(np.float32)
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError("loss weights must be finite and not negative")
    else:
        raise ValueError(
            f"lengths must be integers [B, 2] = ({rows}, 2) "
            f"or float weights [B, T] = {batch.shape}; "
            f"got {lengths.dtype} of shape {lengths.shape}"
        )
    weights[:, :1] = 0
    return weights


def head_bytes(grad_checkpoint: bool) -> int:
    """Bytes of logits computed at once: more is faster, fewer save memory where it is wanted."""
    return (60 if grad_checkpoint or keeps_bfloat16() else 100) << 20


class PackedTargets(NamedTuple):
    """A part of a batch without its padding: N tokens of S rows, and what each should predict.

    Attributes:
        tokens: int32 [N], the inputs of the model.
        offsets: int32 [S + 1], the first token of each row, and N.
        rows: int [S], the rows' places in the batch.
        labels: int32 [N], the next token of each, or -1 where it is no target.
        weights: float32 [N], the weight of each target over the weights of the whole batch.
        logits_bytes: for the fused losses, see `linear_cross_entropy`.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    logits_bytes: int


def default_loss(model: Any, batch: Any, lengths: Any) -> tuple[Any, float]:
    """Return the weighted mean cross entropy of the target tokens, and the sum of their weights.

    Arguments and errors are those of `loss_in_parts`.
    """

    def cross_entropy(part: PackedTargets) -> Any:
        return linear_cross_entropy(
            model.hidden(part.tokens, part.offsets),
            model.head_layer,
            part.labels,
            softcap=getattr(model, "softcap", None),
            weights=part.weights,
            ignore_index=-1,
            reduction="sum",
            logits_bytes=part.logits_bytes,
        )

    return loss_in_parts(model, batch, lengths, cross_entropy)


class ModelAndLoss:
    """The trainable parameters of a model and of its loss, for `nn.value_and_grad` and optimizers.

    A loss with `loss_parameters()`, a flat dict of float32 arrays, has them trained with the model;
    they are no part of it.
    """

    def __init__(self, model: Any, loss: Any) -> None:
        self.model = model
        own = getattr(loss, "loss_parameters", None)
        self.of_loss: dict[str, np.ndarray] = {} if own is None else own()

    def trainable_parameters(self) -> dict[str, np.ndarray]:
        """The parameters of both, by name."""
        parameters: dict[str, np.ndarray] = self.model.trainable_parameters()
        return parameters | self.of_loss if self.of_loss else parameters

    def trained_attributes(self) -> list[tuple[dict[str, Any], str]]:
        """See `Module.trained_attributes`; those of the loss stay arrays."""
        found = getattr(self.model, "trained_attributes", list)
        return list(found())


def loss_in_parts(
    model: Any, batch: Any, lengths: Any, loss: Callable[[PackedTargets], Any]
) -> tuple[Any, float]:
    """Return the sum of `loss` over the parts of a batch, and the sum of the targets' weights.

    `batch` is int32 [B, T], padded token ids; `lengths` is as in `target_weights`. Rows are packed:
    padding and tokens after a row's last target cost nothing. `loss` returns the sum of a part's
    losses times its `weights`, so that the sum over all parts is the batch's weighted mean. Without
    targets the result is (0, 0), and `loss` is not called.

    Raises ValueError as `target_weights` does, and for token ids outside the vocabulary.
    """
    batch, weights = as_integers(batch, "batch"), target_weights(batch, lengths)
    if not (weights > 0).any():
        return np.float32(0), 0.0
    # Tokens up to and including each row's last target.
    counts = weights.shape[1] - np.argmax(weights[:, ::-1] > 0, axis=1)
    counts[~(weights > 0).any(axis=1)] = 0
    used = np.maximum(counts - 1, 0)  # inputs: all but the last target
    total = float(weights.sum(dtype=np.float64))
    inside = np.arange(batch.shape[1] - 1) < used[:, None]
    targets, shares = batch[:, 1:], (weights[:, 1:] / total).astype(np.float32)
    vocabulary = model.head_layer.shape[0]
    wrong = inside & (shares > 0) & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        row, column = map(int, np.argwhere(wrong)[0])
        token = f"target token id {targets[row, column]} at position ({row}, {column + 1})"
        raise ValueError(f"{token} is outside the vocabulary [0, {vocabulary})")
    at_once = head_bytes(getattr(model, "grad_checkpoint", False))

    def loss_of(rows: np.ndarray) -> Any:
        real, factors = inside[rows], shares[rows][inside[rows]]
        offsets = np.concatenate(([0], np.cumsum(used[rows]))).astype(np.int32)
        labels = np.where(factors > 0, targets[rows][real].astype(np.int32), np.int32(-1))
        tokens = batch[rows, :-1][real]
        return loss(PackedTargets(tokens, offsets, rows, labels, factors, at_once))

    parts = parts_of_rows(used, PARTS_TOGETHER if current_tape() is None else 1)
    return loss_of(parts[0]) if len(parts) == 1 else sum_in_parts(loss_of, parts), total


def parts_of_rows(lengths: Any, together: int = 1) -> list[np.ndarray]:
    """Divide the nonempty rows of a batch, given their `lengths`, into parts of similar size.

    A part has about `together` * PART_TOKENS tokens, or as many as the longest row if that is more.
    The sizes are similar because the largest part determines the memory, and small parts are slow.
    """
    lengths = np.asarray(lengths)
    count = int(lengths.sum() / max(together * PART_TOKENS, lengths.max(initial=0)) + 0.5)
    parts: list[list[int]] = [[] for _ in range(max(count, 1))]
    loads = [0] * len(parts)
    for row in np.argsort(-lengths, kind="stable"):
        if lengths[row]:
            least = loads.index(min(loads))
            parts[least].append(int(row))
            loads[least] += int(lengths[row])
    return [np.array(sorted(part)) for part in parts]
