"""Losses of a student's logits and a teacher that is known at K classes of each row.

A stored teacher keeps the K most likely classes of each position, or classes drawn from its
distribution. `ids` and `logprobs` [..., K] are those classes and the teacher's log-probabilities.
A negative id is no entry, so rows may have fewer than K.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pyloss.checks.arrays import as_array, as_integers
from pyloss.checks.numbers import real, whole
from pyloss.losses.head import fused, head, row_loss
from pyloss.losses.pairs import DIVERGENCES, divergence
from pyloss.losses.rows import (
    RowLoss,
    accumulator,
    batch_divisor,
    core_rows,
    counted_weight,
    flat,
    logit_rows,
    new_like,
    pair_labels,
    row_weights,
)
from pyloss.runtime import device

KINDS = (*DIVERGENCES, "tvd", "cross-entropy")
RESTS = ("bucket", "renormalize")


def sparse_distillation_loss(
    logits: Any,
    ids: Any,
    logprobs: Any,
    *,
    kind: str = "forward-kl",
    beta: float = 0.5,
    skew: float = 0.1,
    rest: str = "bucket",
    left: Any = None,
    shares: Any = None,
    temperature: float = 1.0,
    stored_temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    labels: Any = None,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """A divergence of the student Q = softmax(`logits` / T) [..., V] from a teacher P at K classes.

    `ids` integers [..., K] in [0, V), different within a row; a negative id is no entry. `logprobs`
    [..., K] are log P there. Only `logits` has a gradient, in its type.

    `kind`, with the definitions of `pyloss.losses.pairs`:

        "forward-kl"         KL(P || Q)
        "reverse-kl"         KL(Q || P)
        "js"                 generalized Jensen-Shannon; `beta` in [0, 1]
        "skew-kl"            KL(P || skew P + (1 - skew) Q); `skew` in [0, 1)
        "skew-reverse-kl"    KL(Q || skew Q + (1 - skew) P)
        "tvd"                total variation distance
        "cross-entropy"      -sum P log Q: the forward KL and P's entropy

    `rest` says where the classes without an entry are:

    - "bucket": they are one more class, with the probability `left` [...] of the teacher (default:
      1 - sum P, at least 0). The loss is at most that of the whole distributions.
    - "renormalize": P is 0 there, and its entries are divided by their sum. A reverse KL would be
      infinite and is refused.

    `shares` [..., K] makes the entries samples of the teacher (sparse logit sampling, Anshumann et
    al., arXiv:2503.16870), for the kinds "forward-kl" and "cross-entropy". An entry's share is the
    number of times that its class was drawn, over the number of draws, times P over the probability
    of drawing it. The loss is sum shares (log P - log Q), or without log P. Its expectation over
    the draws is the loss of the whole distributions, and so is its gradient's. `rest` is not used.

    `temperature` T divides the logits, as `logit_scale` and `softcap` do in `pyloss.losses.pairs`.
    `logprobs` were taken at `stored_temperature`. Renormalized entries are brought to T; a bucket
    and samples cannot be, so both temperatures must be equal there.

    Rows whose label is `ignore_index`, and rows without an entry, are not computed, give 0 and are
    not counted. `weights`, `reduction` and `out`: see `pyloss.losses.public`.
    """
    kernel = sparse_kernel(
        kind, beta, skew, rest, shares, temperature, stored_temperature, softcap, logit_scale
    )
    array = logit_rows(logits, "logits")
    shape, vocabulary, dtype = array.shape[:-1], array.shape[-1], accumulator(array)
    teacher = sparse_teacher(ids, logprobs, left, shares, shape, vocabulary, dtype)
    weights = row_weights(weights, shape)
    index = teacher.counted(pair_labels(labels, weights, shape, vocabulary, ignore_index))
    rows = core_rows(array)

    def run(dloss: Any, wanted: Any, loss: Any) -> list[Any]:
        dx = new_like(array) if any(wanted) else None
        inputs, outputs = kernel.call(rows, teacher, index, flat(dloss)), (flat(loss), dx)
        device.call(kernel.name, inputs, outputs)
        return [dx]

    total = counted_weight(weights, index >= 0)
    loss = RowLoss(run, (logits,), shape, dtype, weights, total, like=array)
    loss.batch = batch_divisor(labels, weights, total, shape)
    return loss.result(reduction, out)


def linear_sparse_distillation(
    hidden: Any,
    weight: Any,
    ids: Any,
    logprobs: Any,
    *,
    kind: str = "forward-kl",
    beta: float = 0.5,
    skew: float = 0.1,
    rest: str = "bucket",
    left: Any = None,
    shares: Any = None,
    temperature: float = 1.0,
    stored_temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    labels: Any = None,
    ignore_index: int = -100,
    weights: Any = None,
    gradient_filter: float = 0.0,
    logits_bytes: int | None = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """`sparse_distillation_loss(hidden @ weight.T, ids, logprobs)` without all logits at once.

    `hidden`, `weight`, `gradient_filter` and `logits_bytes` as in `linear_cross_entropy`, the other
    arguments as in `sparse_distillation_loss`. Rows that do not count are not computed.
    """
    kernel = sparse_kernel(
        kind, beta, skew, rest, shares, temperature, stored_temperature, softcap, logit_scale
    )
    at_once = None if logits_bytes is None else whole(logits_bytes, "logits_bytes", 1)
    least = real(gradient_filter, "gradient_filter", 0, below=1)
    top, dtype = head(hidden, weight), np.dtype(np.float32)
    shape = top.shape[:-1]
    teacher = sparse_teacher(ids, logprobs, left, shares, shape, top.vocabulary, dtype)
    given = row_weights(weights, shape)
    index = teacher.counted(pair_labels(labels, given, shape, top.vocabulary, ignore_index))
    counted = np.flatnonzero(index >= 0).astype(np.int32)
    some = len(counted) < len(index)
    used = teacher.rows(counted) if some else teacher

    def run_kernel(part: slice, logits: Any, dloss: Any, loss: np.ndarray, slopes: Any) -> None:
        inputs = kernel.call(logits[0], used.rows(part), None, dloss)
        row_loss(kernel.name, inputs, (loss, slopes[0]))

    run = fused((top,), counted if some else None, least, run_kernel, at_once)
    total = counted_weight(given, index >= 0)
    loss = RowLoss(run, top.inputs(), shape, dtype, given, total)
    loss.batch = batch_divisor(labels, given, total, shape)
    return loss.result(reduction, out)


class _Teacher(NamedTuple):
    """A teacher's entries for the kernels.

    Attributes:
        ids: int32 [N, K], -1 for no entry.
        logprobs: [N, K] in the type of the losses.
        shares: the same, or None.
        left: [N], or None.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    shares: np.ndarray | None
    left: np.ndarray | None

    def counted(self, index: np.ndarray | None) -> np.ndarray:
        """`index` with -1 for rows without an entry."""
        empty = (self.ids < 0).all(axis=-1)
        return np.where(empty, np.int32(-1), np.int32(0) if index is None else index)

    def rows(self, some: Any) -> _Teacher:
        """The entries of some rows."""
        shares = None if self.shares is None else self.shares[some]
        left = None if self.left is None else self.left[some]
        return _Teacher(self.ids[some], self.logprobs[some], shares, left)


class _Kernel(NamedTuple):
    """A sparse kernel and its arguments after the teacher's; `options` are those of the loss."""

    name: str
    scaling: tuple[float, float, float]  # scale and softcap of the logits, scale of logprobs
    flags: tuple[int, int, int]  # renormalize, cross entropy, reverse
    options: tuple[float, ...]

    def call(self, logits: Any, teacher: _Teacher, index: Any, dloss: Any) -> tuple[Any, ...]:
        """The inputs of the operation."""
        entries = (teacher.ids, teacher.logprobs, teacher.shares, teacher.left)
        return (logits, *entries, index, *self.scaling, *self.flags, *self.options, dloss)


def sparse_kernel(
    kind: str,
    beta: float,
    skew: float,
    rest: str,
    shares: Any,
    temperature: float,
    stored_temperature: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> _Kernel:
    for name, value, allowed in (("kind", kind, KINDS), ("rest", rest, RESTS)):
        if value not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}"
            )
    t = real(temperature, "temperature", above=0)
    stored = real(stored_temperature, "stored_temperature", above=0)
    real(beta, "beta", 0, 1), real(skew, "skew", 0, below=1)  # also where the kind has none
    cross, tvd = kind == "cross-entropy", kind == "tvd"
    pair = divergence(
        "forward-kl" if cross or tvd else kind,
        temperature=t,
        beta=beta,
        skew=skew,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    renormalize = rest == "renormalize" and shares is None
    if renormalize and pair.name == "kl_div" and pair.swapped:
        raise ValueError(
            "the reverse KL to a teacher that is 0 outside its ids is infinite: "
            "rest must be 'bucket', not 'renormalize'"
        )
    if shares is not None and (tvd or pair.name != "kl_div" or pair.swapped):
        raise ValueError(f"shares are for the kinds 'forward-kl' and 'cross-entropy', not {kind!r}")
    if not renormalize and t != stored:
        which = "samples" if shares is not None else "rest='bucket'"
        raise ValueError(
            f"{which} need a teacher stored at the loss's temperature; temperature is {t:g} and "
            f"stored_temperature {stored:g}"
        )
    scale, cap = pair.scaling[0]
    return _Kernel(
        "sparse_tvd" if tvd else f"sparse_{pair.name}",
        (scale, cap, stored / t if renormalize else 1.0),
        (int(renormalize), int(cross), int(pair.swapped)),
        pair.options,
    )


def sparse_teacher(
    ids: Any,
    logprobs: Any,
    left: Any,
    shares: Any,
    shape: tuple[int, ...],
    vocabulary: int,
    dtype: np.dtype,
) -> _Teacher:
    """Checks a teacher's entries for rows of `shape`; errors name the argument and the position."""
    classes = as_integers(ids, "ids")
    if classes.ndim != len(shape) + 1 or classes.shape[:-1] != shape or not classes.shape[-1]:
        raise ValueError(f"ids must be [..., K] for rows {shape}, got shape {classes.shape}")
    if (classes >= vocabulary).any():
        where = tuple(int(i) for i in np.argwhere(classes >= vocabulary)[0])
        raise ValueError(
            f"id {int(classes[where])} at position {where} is outside the vocabulary "
            f"[0, {vocabulary})"
        )
    known = np.where(classes < 0, -1, classes).astype(np.int32).reshape(-1, classes.shape[-1])
    ordered = np.sort(known, axis=-1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row, place = (int(i) for i in np.argwhere(twice)[0])
        where = tuple(int(i) for i in np.unravel_index(row, shape)) if shape else ()
        raise ValueError(
            f"id {int(ordered[row, place])} occurs twice in the row at position {where}; "
            "ids of a row must differ"
        )

    def numbers(values: Any, name: str, wanted: tuple[int, ...]) -> np.ndarray | None:
        if values is None:
            return None
        array = as_array(values, name)
        if array.dtype.kind not in "fiu" and not device.is_bfloat16(array.dtype):
            raise TypeError(f"{name} must hold real numbers, not {array.dtype}")
        if array.shape != wanted:
            raise ValueError(f"{name} has shape {array.shape}, expected {wanted}")
        return np.ascontiguousarray(array, dtype)

    entries = known.shape
    logp = numbers(logprobs, "logprobs", classes.shape)
    given = numbers(shares, "shares", classes.shape)
    if given is not None and not (given >= 0).all():
        raise ValueError("shares must not be negative or NaN")
    if logp is None:
        raise TypeError("logprobs must be an array, not None")
    remaining = numbers(left, "left", shape)
    return _Teacher(
        known,
        logp.reshape(entries),
        None if given is None else given.reshape(entries),
        None if remaining is None else remaining.reshape(-1),
    )
