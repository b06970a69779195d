"""The loss of distillation under output heads: a divergence from a teacher, and the labels' part.

Neither the student's logits nor the teacher's exist for more than a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyloss import _core
from pyloss.checks.arrays import as_array
from pyloss.checks.numbers import real, whole
from pyloss.losses.head import Head, fused, head, row_loss
from pyloss.losses.pairs import DIVERGENCES, both, divergence
from pyloss.losses.rows import RowLoss, RowOptions, counted_weight, row_labels, row_weights
from pyloss.losses.sparse import sparse_kernel, sparse_teacher
from pyloss.ops.arrays import empty
from pyloss.runtime import device

KINDS = DIVERGENCES


def linear_distillation(
    hidden_q: Any,
    weight_q: Any,
    hidden_p: Any,
    weight_p: Any,
    labels: Any,
    *,
    kind: str = "forward-kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    skew: float = 0.1,
    alpha: Any = 0.0,
    softcap: Any = None,
    weights: Any = None,
    ignore_index: int = -100,
    logits_bytes: int | None = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """alpha CE(q, label) + (1 - alpha) T^2 D(p, q) of each row, with T = `temperature`.

    D is the `divergence` called `kind`, with its `beta` or `skew`. The factor T^2 keeps the size of
    its gradient (Hinton et al., arXiv:1503.02531, section 2); the cross entropy is at temperature
    1. Student `hidden_q` [..., D] with `weight_q` [V, D], teacher `hidden_p` [..., E] with
    `weight_p` [W, E]; arrays and weights are as in `linear_cross_entropy`. Where V and W differ,
    D is over the first min(V, W) classes, and the student's other classes count in the cross
    entropy only. The teacher's arguments get no gradient.

    `softcap` c > 0 replaces logits by c tanh(logits / c): one number, or a pair for the student's
    and the teacher's, None for no cap.

    `alpha` in [0, 1], one number or one for each row [...]. `labels` integers [...]; rows whose
    label is `ignore_index` and rows of weight 0 are not computed, and give 0.
    """
    pair = divergence(kind, temperature=temperature, beta=beta, skew=skew, softcap=softcap)
    q, p = head(hidden_q, weight_q, "_q"), head(hidden_p, weight_p, "_p")
    if q.shape[:-1] != p.shape[:-1]:
        raise ValueError(
            f"hidden_q and hidden_p must have the same leading shape, got {q.shape} and {p.shape}"
        )

    def of_logits(part: slice, logits: Any, dloss: Any, loss: Any, slopes: Any) -> None:
        pair.call(logits, None, dloss, loss, (slopes, None), row_loss)

    return _distilled(
        (q, p),
        p.vocabulary,
        of_logits,
        (temperature, both(softcap)[0]),
        alpha,
        RowOptions(labels, ignore_index, weights, reduction, out),
        logits_bytes,
    )


class Entries(NamedTuple):
    """A teacher that is known at K classes of each of M rows.

    Attributes:
        ids: int32 [M, K], different within a row; negative for no entry.
        logprobs: float32 [M, K], log P there.
        left: float32 [M], the probability of the other classes; None: 1 less those of `ids`.
        shares: float32 [M, K] for samples of the teacher, or None.
        rest: "bucket" or "renormalize", see `sparse_distillation_loss`.
        temperature: at which `logprobs` were taken.
        classes: of the teacher.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    left: np.ndarray | None
    shares: np.ndarray | None
    rest: str
    temperature: float
    classes: int


def linear_distillation_from_entries(
    hidden: Any,
    weight: Any,
    entries: Entries,
    labels: Any,
    *,
    kind: str = "forward-kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    skew: float = 0.1,
    alpha: Any = 0.0,
    softcap: float | None = None,
    weights: Any = None,
    ignore_index: int = -100,
    logits_bytes: int | None = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """`linear_distillation` from a teacher that is known at some classes of the counted rows.

    `entries` has a row for each row with a label, in their order. Its ids are below both numbers of
    classes. Raises ValueError for options that such entries cannot serve, see
    `sparse_distillation_loss`.
    """
    q = head(hidden, weight)
    kernel = sparse_kernel(
        kind, beta, skew, entries.rest, entries.shares, temperature, entries.temperature, softcap
    )
    rows = len(entries.ids)
    teacher = sparse_teacher(
        entries.ids,
        entries.logprobs,
        entries.left,
        entries.shares,
        (rows,),
        min(q.vocabulary, entries.classes),
        np.dtype(np.float32),
    )

    def of_logits(part: slice, logits: Any, dloss: Any, loss: Any, slopes: Any) -> None:
        inputs = kernel.call(logits[0], teacher.rows(part), None, dloss)
        row_loss(kernel.name, inputs, (loss, slopes))

    return _distilled(
        (q,),
        entries.classes,
        of_logits,
        (temperature, softcap),
        alpha,
        RowOptions(labels, ignore_index, weights, reduction, out),
        logits_bytes,
        rows,
    )


def _distilled(
    heads: tuple[Head, ...],
    classes: int,
    of_logits: Callable[..., None],
    given: tuple[float, float | None],
    alpha: Any,
    options: RowOptions,
    logits_bytes: int | None,
    rows: int | None = None,
) -> Any:
    """The loss under the heads (student, teacher) or (student,) of `linear_distillation`.

    Args:
        classes: of the teacher.
        of_logits: `of_logits(part, logits, dloss, loss, slopes)` computes D and its slopes.
        given: the temperature, and the cap of the student's logits.
        rows: how many rows must count.
    """
    temperature, softcap = given
    labels, ignore_index, weights, reduction, out = options
    at_once = None if logits_bytes is None else whole(logits_bytes, "logits_bytes", 1)
    q, shape = heads[0], heads[0].shape[:-1]
    weight = row_weights(weights, shape)
    index = row_labels(labels, weight, shape, q.vocabulary, ignore_index)
    counted = np.flatnonzero(index >= 0).astype(np.int32)
    if rows is not None and rows != len(counted):
        raise ValueError(f"entries has {rows} rows, and {len(counted)} rows have a label")
    factor = real(temperature, "temperature", above=0) ** 2
    shares = _shares(alpha, shape)[counted]
    step = _Step(q, classes, of_logits, (factor, softcap or 0.0), shares, index[counted])
    run = fused(
        heads, counted if len(counted) < len(index) else None, 0.0, step, at_once, step.columns
    )
    total, dtype = counted_weight(weight, index >= 0), np.dtype(np.float32)
    # Of all heads, only the student's arrays have gradients.
    teacher = (None,) * sum(len(h.inputs()) for h in heads[1:])
    return RowLoss(run, (*q.inputs(), *teacher), shape, dtype, weight, total).result(reduction, out)


def _shares(alpha: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`alpha` of each row, float32 [N]."""
    if not np.ndim(alpha):
        return np.full(math.prod(shape), real(alpha, "alpha", 0, 1), np.float32)
    shares = as_array(alpha, "alpha")
    if shares.shape != shape:
        raise ValueError(
            f"alpha has shape {shares.shape}; it must be a number or one for each row: {shape}"
        )
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError("alpha must be in [0, 1]")
    return shares.astype(np.float32).reshape(-1)


class _Step:
    """The loss and slopes of a part of the rows, from its logits: `fused`'s kernel.

    Attributes:
        columns: the columns of the buffers that a part needs beyond its logits.
    """

    def __init__(
        self,
        q: Head,
        classes: int,
        of_logits: Callable[..., None],
        factor_and_cap: tuple[float, float],
        alpha: np.ndarray,
        labels: np.ndarray,
    ):
        self.of_logits, self.alpha, self.labels = of_logits, alpha, labels
        self.factor, self.softcap = factor_and_cap
        self.shared, equal = min(q.vocabulary, classes), q.vocabulary == classes
        if not equal and device.is_device_array(q.rows):
            raise ValueError(
                f"the heads have {q.vocabulary} and {classes} classes; "
                "on a device both must have the same number"
            )
        mixed = bool((alpha > 0).any() and (alpha < 1).any())
        self.columns = q.vocabulary * (mixed + (not equal))

    def __call__(
        self,
        part: slice,
        logits: Sequence[np.ndarray],
        dloss: np.ndarray | None,
        loss: np.ndarray,
        slopes: Sequence[np.ndarray | None],
    ) -> None:
        alpha, labels, x, dx = self.alpha[part], self.labels[part], logits[0], slopes[0]
        own: np.ndarray | None = None
        own_dx: np.ndarray | None = None
        if alpha.any():
            # First, since the divergence's slopes may take the place of the logits.
            own, only = np.empty_like(loss), bool((alpha == 1).all())
            own_dx = dx if only or dx is None else empty(*x.shape, like=x)
            _cross_entropy(
                x, labels, self.softcap, None if dloss is None else dloss * alpha, own, own_dx
            )
            if only:
                loss[...] = own
                return
        factor = (1 - alpha) * np.float32(self.factor)
        self._divergence(part, logits, None if dloss is None else dloss * factor, loss, dx)
        # A share of 0 takes its part out, even where that is infinite.
        np.multiply(loss, factor, out=loss, where=factor != 0)
        loss[factor == 0] = 0
        if own is not None:
            loss += np.where(alpha > 0, alpha * own, np.float32(0))
        if own_dx is not None:
            _core.axpy(1.0, own_dx, dx)

    def _divergence(
        self,
        part: slice,
        logits: Sequence[np.ndarray],
        dloss: np.ndarray | None,
        loss: np.ndarray,
        dx: np.ndarray | None,
    ) -> None:
        shared = self.shared
        if all(x.shape[1] == shared for x in logits):
            self.of_logits(part, logits, dloss, loss, dx)
            return
        wider = dx is not None and dx.shape[1] > shared
        slope = empty(len(loss), shared, like=dx) if wider else dx
        self.of_logits(part, [x[:, :shared] for x in logits], dloss, loss, slope)
        if dx is not None and slope is not None and wider:
            dx[:, :shared] = slope
            dx[:, shared:] = 0


def _cross_entropy(
    logits: np.ndarray,
    labels: np.ndarray,
    softcap: float,
    dloss: np.ndarray | None,
    loss: np.ndarray,
    slopes: np.ndarray | None,
) -> None:
    inputs = logits, labels, 0.0, 0.0, softcap, None, dloss, None
    row_loss("softmax_cross_entropy", inputs, (loss, None, slopes))
