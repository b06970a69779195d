"""The training loss on batches of token ids."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..losses import linear_cross_entropy


def target_weights(batch: Any, lengths: Any) -> np.ndarray:
    """The weight of every token as a target, float32 [B, T]; column 0 is 0, since nothing comes before it.

    `lengths` is integer [B, 2] = (first target token, number of tokens): tokens `first <= i < number` weigh 1; or it is float
    [B, T], the weights themselves. Raises ValueError for other shapes, and for weights that are negative or not finite.
    """
    batch, lengths = np.asarray(batch), np.asarray(lengths)
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
            f"lengths must be integers [B, 2] = ({rows}, 2), or float weights [B, T] = {batch.shape}; "
            f"got {lengths.dtype} of shape {lengths.shape}"
        )
    weights[:, :1] = 0
    return weights


def head_bytes(grad_checkpoint: bool) -> int | None:
    """Bytes of logits at once in training: more are faster, but who checkpoints wants little memory (None: the least)."""
    return None if grad_checkpoint else 100 << 20


def default_loss(model: Any, batch: Any, lengths: Any) -> tuple[Any, float]:
    """The mean cross entropy of the target tokens, weighted, and the sum of the weights.

    `batch` int32 [B, T] padded ids; `lengths` as in `target_weights`. Computed on the real tokens end to end: neither padding nor
    anything after a row's last target costs anything, and the head is computed for targets alone.
    """
    batch, weights = np.asarray(batch), target_weights(batch, lengths)
    if not (weights > 0).any():
        return np.float32(0), 0.0
    counts = weights.shape[1] - np.argmax(weights[:, ::-1] > 0, axis=1)  # up to the last target of each row
    counts[~(weights > 0).any(axis=1)] = 0
    used = np.maximum(counts - 1, 0)  # inputs: all but the last target
    total = float(weights.sum(dtype=np.float64))
    inside = np.arange(batch.shape[1] - 1) < used[:, None]
    tokens, targets = batch[:, :-1][inside], batch[:, 1:][inside]
    shares = (weights[:, 1:][inside] / total).astype(np.float32)
    offsets = np.concatenate(([0], np.cumsum(used[used > 0]))).astype(np.int32)
    vocabulary = model.head_layer.shape[0]
    wrong = (targets < 0) | (targets >= vocabulary)
    if (wrong & (shares > 0)).any():
        raise ValueError(f"target token id {targets[wrong & (shares > 0)][0]} is outside the vocabulary [0, {vocabulary})")
    labels = np.where(shares > 0, targets, -1).astype(np.int32)
    hidden = model.hidden(tokens, offsets)
    at_once = head_bytes(getattr(model, "grad_checkpoint", False))
    value = linear_cross_entropy(
        hidden, model.head_layer, labels, weights=shares, ignore_index=-1, reduction="sum", logits_bytes=at_once
    )
    return value, total


