"""The public loss functions.

Logits are [..., V], float64, float32, float16 or bfloat16 (ml_dtypes), in any memory layout.
float64 is computed in float64; the others in float32, with sums in float64. Results [...] are
float64 for float64 logits, else float32. Gradients are exact, for every logits argument, and have
its type.

- `weights` [...] multiplies the loss of each row. Rows of weight 0 are left out, even if their loss
  is not finite.
- `reduction` is "none", "sum", or "mean": the sum over the counted rows' weights.
- `out` receives the result.
- Logits of -inf are masked classes, with probability 0, unless a function says otherwise.
- A row with a NaN gives NaN and changes no other row.
- TypeError and ValueError name the argument, its value and the allowed ones; for a label its
  position too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss.checks.arrays import as_array
from pyloss.checks.numbers import real, whole
from pyloss.losses.head import fused, head, row_loss
from pyloss.losses.rows import (
    RowLoss,
    class_loss,
    core_rows,
    counted_weight,
    logit_rows,
    row_labels,
    row_map,
    row_weights,
    two_arrays,
)
from pyloss.runtime import device


def softmax_cross_entropy(
    logits: Any,
    labels: Any,
    *,
    weights: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """-log softmax(logits)[label] along the last axis.

    `labels` integers [...] in [0, V); rows whose label is `ignore_index` give 0 and are not
    counted. `label_smoothing` e in [0, 1] gives (1 - e) of the weight to the label and e to all
    classes evenly, those that are not masked (Szegedy et al., arXiv:1512.00567). `z_loss` >= 0 adds
    z_loss * log(sum exp)^2 (Chowdhery et al., arXiv:2204.02311). `softcap` c > 0 replaces logits by
    c tanh(logits / c) (Gemma Team, arXiv:2408.00118); masked classes stay masked.
    """
    options = _softmax_options(label_smoothing, z_loss, softcap)
    return class_loss(
        "softmax_cross_entropy",
        logits,
        labels,
        options,
        weights=weights,
        ignore_index=ignore_index,
        reduction=reduction,
        out=out,
    )


def _softmax_options(
    label_smoothing: float, z_loss: float, softcap: float | None
) -> tuple[float, ...]:
    return (
        real(label_smoothing, "label_smoothing", 0, 1),
        real(z_loss, "z_loss", 0),
        0.0 if softcap is None else real(softcap, "softcap", above=0),
    )


def focal_loss(
    logits: Any,
    labels: Any,
    *,
    gamma: float = 2.0,
    alpha: Any = None,
    weights: Any = None,
    ignore_index: int = -100,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """-alpha (1 - p)^gamma log p, p the label's softmax probability (Lin et al., arXiv:1708.02002).

    `gamma` >= 0. `alpha` is a number, or one per class [V]; it multiplies the loss and does not
    count in a mean.
    """

    def by_class(vocabulary: int) -> np.ndarray:
        values = as_array(alpha, "alpha")
        if values.dtype.kind not in "fiu":
            raise TypeError(f"alpha must be a number or one per class, not {values.dtype}")
        if values.shape not in ((), (vocabulary,)):
            raise ValueError(
                f"alpha must be a number or one per class, ({vocabulary},), "
                f"got shape {values.shape}"
            )
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError("alpha must be finite and not negative")
        return np.broadcast_to(values, (vocabulary,))

    return class_loss(
        "focal_loss",
        logits,
        labels,
        (real(gamma, "gamma", 0),),
        weights=weights,
        ignore_index=ignore_index,
        by_class=None if alpha is None else by_class,
        reduction=reduction,
        out=out,
    )


def stablemax_cross_entropy(
    logits: Any,
    labels: Any,
    *,
    weights: Any = None,
    ignore_index: int = -100,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """-log stablemax(logits)[label] along the last axis (Prieto et al., arXiv:2501.04697).

    Arguments as in `softmax_cross_entropy`.
    """
    return class_loss(
        "stablemax_cross_entropy",
        logits,
        labels,
        (),
        weights=weights,
        ignore_index=ignore_index,
        reduction=reduction,
        out=out,
    )


def stablemax(x: Any, *, out: Any = None) -> Any:
    """s(x) / sum s(x) along the last axis; s(x) = x + 1 for x >= 0, and 1 / (1 - x) below.

    Prieto et al., arXiv:2501.04697. [..., V] to [..., V] of the same type.
    """
    return row_map("stablemax", x, out)


def log_stablemax(x: Any, *, out: Any = None) -> Any:
    """log stablemax(x), exact also where stablemax is small.

    log s(x) = sign(x) log(1 + |x|).
    """
    return row_map("log_stablemax", x, out)


def kl_div_loss(
    logits_q: Any,
    logits_p: Any,
    *,
    temperature: float = 1.0,
    weights: Any = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """KL(P || Q) = sum P (log P - log Q) along the last axis, P = softmax(p/T), Q = softmax(q/T).

    `logits_q` (the student) and `logits_p` (the teacher) are [..., V]; their types may differ, and
    both have gradients. The loss is not multiplied by T^2. It is infinite if Q is 0 for a class
    that P has.
    """
    options = (real(temperature, "temperature", above=0),)
    names = ("logits_q", "logits_p")
    return two_arrays(
        "kl_div",
        names,
        (logits_q, logits_p),
        options,
        elementwise=False,
        weights=weights,
        reduction=reduction,
        out=out,
    )


def js_div_loss(
    logits_q: Any,
    logits_p: Any,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    weights: Any = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """Generalized Jensen-Shannon divergence: beta KL(P || M) + (1 - beta) KL(Q || M).

    M = beta P + (1 - beta) Q; P (the teacher) and Q (the student) as in `kl_div_loss`; `beta` in
    [0, 1]. At most log 2 for beta = 1/2, and finite for finite logits (Lin 1991; Agarwal et al.,
    arXiv:2306.13649).

    At both ends of beta the formula is 0. There the loss is its limit after division by
    beta (1 - beta), as in GKD and as TRL's `beta` means it: `beta=0` is the forward KL(P || Q),
    `kl_div_loss(logits_q, logits_p)`; `beta=1` is the reverse KL(Q || P),
    `kl_div_loss(logits_p, logits_q)`.
    """
    kernel, order, options = _js_kernel(temperature, beta)
    names, logits = ("logits_q", "logits_p"), (logits_q, logits_p)
    first, second = order
    return two_arrays(
        kernel,
        (names[first], names[second]),
        (logits[first], logits[second]),
        options,
        elementwise=False,
        weights=weights,
        reduction=reduction,
        out=out,
    )


def _js_kernel(temperature: float, beta: float) -> tuple[str, tuple[int, int], tuple[float, ...]]:
    """The kernel of `js_div_loss`, the order in which it takes (q, p), and its options."""
    t, b = real(temperature, "temperature", above=0), real(beta, "beta", 0, 1)
    if 0 < b < 1:
        return "js_div", (0, 1), (t, b)
    return "kl_div", (1, 0) if b else (0, 1), (t,)


def binary_cross_entropy_with_logits(
    logits: Any, targets: Any, *, weights: Any = None, reduction: str = "none", out: Any = None
) -> Any:
    """-t log sigmoid(x) - (1 - t) log(1 - sigmoid(x)) of each element: [...] and [...] to [...].

    Both arguments have gradients; `weights` has one number per element.
    """
    return two_arrays(
        "binary_cross_entropy",
        ("logits", "targets"),
        (logits, targets),
        (),
        elementwise=True,
        weights=weights,
        reduction=reduction,
        out=out,
    )


def compute_accuracy(
    logits: Any, labels: Any, *, ignore_index: int = -100
) -> tuple[np.ndarray, np.ndarray]:
    """(token accuracy, sequence accuracy) of logits [..., T, V] and labels [..., T].

    Both are float64 [...]: the share of labels that are the first largest logit of their row, and
    whether all of a sequence are (1.0 or 0.0). Rows with `ignore_index` do not count. A sequence
    without labels gives NaN for both.
    """
    array = logit_rows(logits, "logits")
    if array.ndim < 2:
        raise ValueError(f"logits must be [..., T, V], got shape {array.shape}")
    index = row_labels(labels, None, array.shape[:-1], array.shape[-1], ignore_index)
    best = np.empty(len(index), np.int32)
    device.call("argmax", (core_rows(array),), (best,))
    shape = array.shape[:-1]
    counted = (index >= 0).reshape(shape).sum(axis=-1)
    correct = ((best == index) & (index >= 0)).reshape(shape).sum(axis=-1)
    known = counted > 0
    tokens = np.where(known, correct / np.maximum(counted, 1), np.nan)
    return tokens, np.where(known, correct == counted, np.nan)


def linear_cross_entropy(
    hidden: Any,
    weight: Any,
    labels: Any,
    *,
    weights: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    gradient_filter: float = 0.0,
    logits_bytes: int | None = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """`softmax_cross_entropy(hidden @ weight.T, labels)` without all logits at once.

    `hidden` is [..., D], `labels` integers [...]. `weight` [V, D] is an array (float16 and bfloat16
    are read as they are), a stored `Weight`, which gets no gradient, or a layer: `nn.Linear`,
    `nn.Embedding` as a tied head, or an adapter over one, with everything that makes its logits.

    Computed in float32; a gradient has the type of its argument. Rows without a label or with
    weight 0 are not computed, and may hold anything. One pass over the logits, a part of the rows
    at a time, gives loss and gradients. Other arguments and errors as in `softmax_cross_entropy`.

    `logits_bytes` (40 MB by default) bounds the logits that exist at once; up to 100 MB are a
    little faster.

    `gradient_filter` in [0, 1) leaves classes out of the gradient's products: classes for which no
    row of a part has a gradient (of its loss by the logit) above it, if they are more than half
    (after Wijmans et al., arXiv:2411.09009, section 4.3, with 2**-12). The loss stays exact. With
    SmolLM2-135M on 1024 tokens of chats or documentation (`make bench-losses` prints this):

        filter    classes kept    speed           error of the gradient    cosine
        2**-12    9-11 %          1.7-1.9 times   4-5 %                    0.999
        2**-14    18-23 %         1.5-1.7         2 %                      0.9998
        2**-16    33-51 %         1.2-1.5         0.5-0.7 %                0.99997

    A single row whose label was nearly certain may be off by more. An untrained model loses too
    much: with random weights, all of the softmax is below 2**-12. So the filter is for trained
    models, and off by default. A layer with a bias or an adapter is always exact.
    """
    at_once = None if logits_bytes is None else whole(logits_bytes, "logits_bytes", 1)
    options = _softmax_options(label_smoothing, z_loss, softcap)
    top = head(hidden, weight)
    shape = top.shape[:-1]
    given = row_weights(weights, shape)
    index = row_labels(labels, given, shape, top.vocabulary, ignore_index)
    counted = np.flatnonzero(index >= 0).astype(np.int32)
    targets, some = index[counted], len(counted) < len(index)

    def kernel(part: slice, logits: Any, dloss: Any, loss: np.ndarray, slopes: Any) -> None:
        row_loss(
            "softmax_cross_entropy", (logits[0], targets[part], *options, dloss), (loss, slopes[0])
        )

    run = fused((top,), counted if some else None, _filter(gradient_filter), kernel, at_once)
    total, dtype = counted_weight(given, index >= 0), np.dtype(np.float32)
    return RowLoss(run, top.inputs(), shape, dtype, given, total).result(reduction, out)


def linear_kl_div(
    hidden_q: Any,
    weight_q: Any,
    hidden_p: Any,
    weight_p: Any,
    *,
    temperature: float = 1.0,
    weights: Any = None,
    gradient_filter: float = 0.0,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """`kl_div_loss(hidden_q @ weight_q.T, hidden_p @ weight_p.T)` without all logits at once.

    Student `hidden_q` [..., D] with `weight_q` [V, D], teacher `hidden_p` [..., E] with `weight_p`
    [V, E]; arrays and weights and `gradient_filter` as in `linear_cross_entropy`; all four
    arguments have gradients. Rows of weight 0 are not computed.
    """
    kernel = "kl_div", (0, 1), (real(temperature, "temperature", above=0),)
    return _pair_of_heads(
        kernel, (hidden_q, weight_q, hidden_p, weight_p), weights, gradient_filter, reduction, out
    )


def linear_js_div(
    hidden_q: Any,
    weight_q: Any,
    hidden_p: Any,
    weight_p: Any,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    weights: Any = None,
    gradient_filter: float = 0.0,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """`js_div_loss(hidden_q @ weight_q.T, hidden_p @ weight_p.T)` without all logits at once.

    Arguments as in `linear_kl_div`. `beta` in [0, 1] as in `js_div_loss`: 0 is the forward KL(P ||
    Q), 1 the reverse KL(Q || P).
    """
    kernel = _js_kernel(temperature, beta)
    return _pair_of_heads(
        kernel, (hidden_q, weight_q, hidden_p, weight_p), weights, gradient_filter, reduction, out
    )


def _filter(gradient_filter: float) -> float:
    return real(gradient_filter, "gradient_filter", 0, below=1)


def _pair_of_heads(
    loss: tuple[str, tuple[int, int], tuple[float, ...]],
    arguments: Any,
    weights: Any,
    gradient_filter: float,
    reduction: str,
    out: Any,
) -> Any:
    """A pair loss of two heads.

    `loss` is its kernel, the order in which that takes (q, p), and its options.
    """
    name, (first, second), options = loss
    hidden_q, weight_q, hidden_p, weight_p = arguments
    q, p = head(hidden_q, weight_q, "_q"), head(hidden_p, weight_p, "_p")
    if q.shape[:-1] != p.shape[:-1]:
        raise ValueError(
            f"hidden_q and hidden_p must have the same leading shape, got {q.shape} and {p.shape}"
        )
    if q.vocabulary != p.vocabulary:
        raise ValueError(
            "weight_q and weight_p must have the same vocabulary, "
            f"got {q.vocabulary} and {p.vocabulary}"
        )
    shape = q.shape[:-1]
    given = row_weights(weights, shape)
    used = np.full(len(q.rows), True) if given is None else (given != 0).reshape(-1)
    counted = None if used.all() else np.flatnonzero(used).astype(np.int32)

    def kernel(part: slice, logits: Any, dloss: Any, loss: np.ndarray, slopes: Any) -> None:
        row_loss(
            name,
            (logits[first], logits[second], *options, dloss),
            (loss, slopes[first], slopes[second]),
        )

    run, total = (
        fused((q, p), counted, _filter(gradient_filter), kernel),
        counted_weight(given, used),
    )
    inputs, dtype = (*q.inputs(), *p.inputs()), np.dtype(np.float32)
    return RowLoss(run, inputs, shape, dtype, given, total).result(reduction, out)
