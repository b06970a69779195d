"""The public loss functions of one row of logits; `pairs` and `sparse` compare two rows.

Logits are [..., V], float64, float32, float16 or bfloat16 (ml_dtypes), in any memory layout.
float64 is computed in float64; the others in float32, with sums in float64. Results [...] are
float64 for float64 logits, else float32. Gradients are exact, for every logits argument, and have
its type.

- `weights` [...] multiplies the loss of each row. Rows of weight 0 are left out, even if their loss
  is not finite.
- `reduction` is "none", "sum", or "mean": the sum over the counted rows' weights. Losses of two
  rows also have "batchmean".
- `out` receives the result.
- Logits of -inf are masked classes, with probability 0, unless a function says otherwise.
- A row with a NaN gives NaN and changes no other row.
- TypeError and ValueError name the argument, its value and the allowed ones; for a label its
  position too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyloss.checks.arrays import as_array
from pyloss.checks.numbers import real, whole
from pyloss.losses.classes import (
    ClassLoss,
    Returned,
    RowDetails,
    class_loss,
    class_weights,
    with_class_weights,
)
from pyloss.losses.head import fused, head, row_loss
from pyloss.losses.rows import (
    core_rows,
    counted_weight,
    element_loss,
    logit_rows,
    row_labels,
    row_map,
    row_weights,
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
    class_weight: Any = None,
    return_lse: bool = False,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """-log softmax(logits)[label] along the last axis.

    `labels` integers [...] in [0, V); rows whose label is `ignore_index` give 0 and are not
    counted. `label_smoothing` e in [0, 1] gives (1 - e) of the weight to the label and e to all
    classes evenly, those that are not masked (Szegedy et al., arXiv:1512.00567). `z_loss` >= 0 adds
    z_loss * log(sum exp)^2 (Chowdhery et al., arXiv:2204.02311). `softcap` c > 0 replaces logits by
    c tanh(logits / c) (Gemma Team, arXiv:2408.00118); masked classes stay masked.

    `class_weight` w [V], finite and not negative, is `weight` of `torch.nn.functional.
    cross_entropy`, with its values also where labels are smoothed: (1 - e) w[label] (-log p[label])
    + e mean over the classes of w (-log p). A "mean" divides by the sum of w[label] over the
    counted rows. It does not multiply `z_loss`. It gets no gradient.

    With any of the following the result is a named tuple, of `loss` and those asked for, in this
    order (Liger's and cut-cross-entropy's names):

    - `return_lse`: `lse` [...], log(sum exp) of each row, of capped logits; 0 for rows that are not
      counted. It has a gradient.
    - `return_z_loss`: `z_loss`, the part of the loss that comes from it, reduced like the loss.
    - `return_token_accuracy`: `token_accuracy`, 1 where the label is the first largest logit, else
      0, [...]; with a reduction, the share of the counted rows. It has no gradient.
    """
    options = _softmax_options(label_smoothing, z_loss, softcap)
    return class_loss(
        "softmax_cross_entropy",
        logits,
        labels,
        options,
        weights=weights,
        ignore_index=ignore_index,
        class_weight=class_weight,
        z_loss=options[1],
        returned=Returned(return_lse, return_z_loss, return_token_accuracy),
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


def binary_cross_entropy_with_logits(
    logits: Any, targets: Any, *, weights: Any = None, reduction: str = "none", out: Any = None
) -> Any:
    """-t log sigmoid(x) - (1 - t) log(1 - sigmoid(x)) of each element: [...] and [...] to [...].

    Both arguments have gradients; `weights` has one number per element.
    """
    return element_loss(
        "binary_cross_entropy",
        ("logits", "targets"),
        (logits, targets),
        (),
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
    bias: Any = None,
    shift: int = 0,
    weights: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Any = None,
    return_lse: bool = False,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
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
    An `lse` that enters further arithmetic of a recorded function costs a second pass.

    `bias` [V] is added to the logits of an array or a stored `Weight`, and gets a gradient; a layer
    brings its own. With `shift` s (True is 1), position t predicts label t + s, as in
    cut-cross-entropy: `labels` and `weights` are [..., T] like the hidden states, and results of
    each row [..., T - s], like `labels[..., s:]`.

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
    top = head(hidden, weight, bias=bias)
    width = top.shape[-2] if len(top.shape) > 1 else 1
    moved = whole(int(shift) if isinstance(shift, bool) else shift, "shift", 0)
    if moved and moved >= width:
        raise ValueError(f"shift is {moved}; it must be below the {width} positions of a row")
    shape = (*top.shape[:-2], width - moved) if moved else top.shape[:-1]
    given = row_weights(weights, top.shape[:-1])
    index = row_labels(labels, given, top.shape[:-1], top.vocabulary, ignore_index)
    if moved:
        index = index.reshape(-1, width)[:, moved:].reshape(-1)
        given = None if given is None else given[..., moved:]
    of_class = class_weights(class_weight, top.vocabulary, np.dtype(np.float32))
    counted = np.flatnonzero(index >= 0).astype(np.int32)
    # Their places among all positions.
    places = counted if not moved else counted + counted // (width - moved) * np.int32(moved)
    targets, some = index[counted], len(counted) < len(top.rows)
    least = real(gradient_filter, "gradient_filter", 0, below=1)

    def run(dloss: Any, wanted: Sequence[bool], loss: Any, details: RowDetails) -> Sequence[Any]:
        of_counted = details.of(counted)

        def kernel(part: slice, logits: Any, dloss: Any, loss: np.ndarray, slopes: Any) -> None:
            rows = of_counted.of(part)
            if rows.best is not None:
                row_loss("argmax", (logits[0],), (rows.best,))
            inputs = logits[0], targets[part], *options, of_class, dloss, rows.dlse
            row_loss("softmax_cross_entropy", inputs, (loss, rows.lse, slopes[0]))

        call = fused((top,), places if some else None, least, kernel, at_once)
        found = call(_moved(dloss, moved), wanted, full := _moved(loss, moved))
        if moved:
            loss[...] = full[..., :-moved]
        details.put(counted, of_counted)
        return found

    total = counted_weight(with_class_weights(given, of_class, index), index >= 0)
    result = ClassLoss(
        run,
        top.inputs(),
        shape,
        np.dtype(np.float32),
        given,
        total,
        index=index,
        z_loss=options[1],
        returned=Returned(return_lse, return_z_loss, return_token_accuracy),
    )
    return result.result(reduction, out)


def _moved(rows: Any, shift: int) -> Any:
    """Numbers [..., T - shift] with zeros appended to [..., T]."""
    if not shift or rows is None:
        return rows
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, shift)])
