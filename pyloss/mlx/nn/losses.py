"""mlx.nn.losses, with MLX's arguments and reductions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyloss.autograd.tensor import FUNCTIONS
from pyloss.losses.public import softmax_cross_entropy
from pyloss.mlx.core import linalg, reductions
from pyloss.mlx.core.arrays import array, cast, of, promoted, raw
from pyloss.mlx.core.elementwise import (
    abs,
    clip,
    constant,
    exp,
    log,
    logaddexp,
    maximum,
    minimum,
    power,
    square,
    where,
)
from pyloss.mlx.core.gradients import stop_gradient
from pyloss.mlx.core.reductions import logsumexp, mean, sum
from pyloss.mlx.core.refused import refusing
from pyloss.mlx.core.shaping import expand_dims, squeeze, take_along_axis

__getattr__ = refusing("losses")

#: "none", "mean" or "sum".
Reduction = str


def _reduce(loss: Any, reduction: Reduction = "none") -> array:
    if reduction == "mean":
        return mean(loss)
    if reduction == "sum":
        return sum(loss)
    if reduction != "none":
        raise ValueError(
            f"Invalid reduction {reduction!r}. Must be one of ('none', 'mean', 'sum')."
        )
    return loss


def _same_shape(name: str, a: Any, other: str, b: Any) -> None:
    if raw(a).shape != raw(b).shape:
        raise ValueError(
            f"{name} shape {raw(a).shape} does not match {other} shape {raw(b).shape}."
        )


def cross_entropy(
    logits: Any,
    targets: Any,
    weights: Any = None,
    axis: int = -1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "none",
) -> array:
    """The cross entropy of logits with classes (whole numbers) or with probabilities.

    Args:
        targets: classes, of the logits' shape without `axis`, or probabilities of their shape.
        weights: factors of the loss, of its shape.

    Unlike MLX, a class of -100 has the loss 0, and other classes outside raise ValueError.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"Label smoothing must be in [0, 1), got {label_smoothing}.")
    (x,) = promoted(logits, floats=True)
    labels = raw(targets)
    shape = list(x.shape)
    del shape[axis]
    of_classes = len(labels.shape) != len(x.shape)
    if tuple(labels.shape) != (tuple(shape) if of_classes else tuple(x.shape)):
        raise ValueError(f"Targets shape {labels.shape} does not match logits shape {x.shape}.")
    if of_classes:
        loss = _of_classes(x, labels, axis, label_smoothing)
    else:
        # As in MLX, less a constant: targets that do not sum to 1, and their gradient, see it.
        peak = reductions.max(of(x), axis=axis, keepdims=True)
        wide = of(x) - stop_gradient(peak)
        score = sum(wide * targets, axis=axis)
        loss = logsumexp(wide, axis) - (1 - label_smoothing) * score
        if label_smoothing > 0:
            loss = loss - label_smoothing * mean(wide, axis=axis)
    if weights is not None:
        if raw(weights).shape != loss.shape:
            raise ValueError(
                f"Weights with shape {raw(weights).shape} is not the same as output loss with "
                f"shape {loss.shape}."
            )
        loss = loss * weights
    return _reduce(loss, reduction)


def _of_classes(x: Any, labels: Any, axis: int, smoothing: float) -> array:
    """pyloss's loss of rows, in the logits' type."""
    kind = x.dtype
    rows = FUNCTIONS[np.moveaxis](x, axis, -1) if axis % len(x.shape) != len(x.shape) - 1 else x
    flat = FUNCTIONS[np.reshape](rows, (-1, rows.shape[-1]))
    classes = np.asarray(constant(labels, "cross_entropy of targets")).reshape(-1)
    loss = softmax_cross_entropy(flat, classes, label_smoothing=smoothing, reduction="none")
    return of(cast(FUNCTIONS[np.reshape](loss, labels.shape), kind))


def binary_cross_entropy(
    inputs: Any,
    targets: Any,
    weights: Any = None,
    with_logits: bool = True,
    reduction: Reduction = "mean",
) -> array:
    """-t log p - (1 - t) log(1 - p), of logits or with `with_logits=False` of probabilities."""
    _same_shape("Inputs", inputs, "targets", targets)
    if with_logits:
        loss = logaddexp(0.0, inputs) - inputs * targets
    else:
        yes, no = clip(log(inputs), -100, None), clip(log(1 - inputs), -100, None)
        loss = -(targets * yes + (1 - targets) * no)
    if weights is not None:
        if raw(weights).shape != loss.shape:
            raise ValueError(
                f"Weights with shape {raw(weights).shape} is not the same as output loss with "
                f"shape {loss.shape}."
            )
        loss = loss * weights
    return _reduce(loss, reduction)


def l1_loss(predictions: Any, targets: Any, reduction: Reduction = "mean") -> array:
    """|p - t|."""
    _same_shape("Predictions", predictions, "targets", targets)
    return _reduce(abs(predictions - targets), reduction)


def mse_loss(predictions: Any, targets: Any, reduction: Reduction = "mean") -> array:
    """(p - t)^2."""
    _same_shape("Predictions", predictions, "targets", targets)
    return _reduce(square(predictions - targets), reduction)


def nll_loss(inputs: Any, targets: Any, axis: int = -1, reduction: Reduction = "none") -> array:
    """The negative log-probabilities of the targets' classes."""
    chosen = take_along_axis(inputs, expand_dims(targets, axis), axis)
    return _reduce(-squeeze(chosen, axis), reduction)


def gaussian_nll_loss(
    inputs: Any,
    targets: Any,
    vars: Any,
    full: bool = False,
    eps: float = 1e-6,
    reduction: Reduction = "mean",
) -> array:
    """The negative log-likelihood of normal distributions with means `inputs`."""
    _same_shape("Inputs", inputs, "targets", targets)
    _same_shape("Inputs", inputs, "vars", vars)
    spread = maximum(vars, eps)
    loss = 0.5 * (log(spread) + square(targets - inputs) / spread)
    return _reduce(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)


def kl_div_loss(inputs: Any, targets: Any, axis: int = -1, reduction: Reduction = "none") -> array:
    """sum exp(targets) (targets - inputs), of log-probabilities."""
    return _reduce(sum(exp(targets) * (targets - inputs), axis), reduction)


def smooth_l1_loss(
    predictions: Any, targets: Any, beta: float = 1.0, reduction: Reduction = "mean"
) -> array:
    """|d| - beta / 2, below beta d^2 / (2 beta)."""
    _same_shape("Predictions", predictions, "targets", targets)
    d = abs(predictions - targets)
    return _reduce(where(d < beta, 0.5 * square(d) / beta, d - 0.5 * beta), reduction)


def triplet_loss(
    anchors: Any,
    positives: Any,
    negatives: Any,
    axis: int = -1,
    p: int = 2,
    margin: float = 1.0,
    eps: float = 1e-6,
    reduction: Reduction = "none",
) -> array:
    """max(|a - p| - |a - n| + margin, 0) by the norm of order p."""

    def distance(others: Any) -> array:
        return power(sum(power(abs(anchors - others), p), axis) + eps, 1.0 / p)

    return _reduce(maximum(distance(positives) - distance(negatives) + margin, 0), reduction)


def hinge_loss(inputs: Any, targets: Any, reduction: Reduction = "none") -> array:
    """max(0, 1 - y t) of targets -1 and 1."""
    return _reduce(maximum(1 - inputs * targets, 0), reduction)


def huber_loss(
    inputs: Any, targets: Any, delta: float = 1.0, reduction: Reduction = "none"
) -> array:
    """d^2 / 2, beyond delta delta (|d| - delta / 2)."""
    d = abs(inputs - targets)
    near = minimum(d, delta)
    return _reduce(0.5 * square(near) + delta * (d - near), reduction)


def log_cosh_loss(inputs: Any, targets: Any, reduction: Reduction = "none") -> array:
    """log(cosh(y - t))."""
    d = inputs - targets
    return _reduce(logaddexp(d, -d) - math.log(2), reduction)


def cosine_similarity_loss(
    x1: Any, x2: Any, axis: int = 1, eps: float = 1e-8, reduction: Reduction = "none"
) -> array:
    """The cosine of the angle between two vectors."""
    norms = linalg.norm(x1, axis=axis) * linalg.norm(x2, axis=axis)
    return _reduce(sum(x1 * x2, axis=axis) / maximum(norms, eps), reduction)


def margin_ranking_loss(
    inputs1: Any, inputs2: Any, targets: Any, margin: float = 0.0, reduction: Reduction = "none"
) -> array:
    """max(0, -t (x1 - x2) + margin) of targets -1 and 1."""
    _same_shape("inputs1", inputs1, "inputs2", inputs2)
    _same_shape("inputs1", inputs1, "targets", targets)
    return _reduce(maximum(0, -targets * (inputs1 - inputs2) + margin), reduction)
