"""Losses of two rows of logits, a student's and a teacher's, for distillation.

Q = softmax(z_q), `logits_q`: the student. P = softmax(z_p), `logits_p`: the teacher. The student
comes first. Both arguments have gradients; their types may differ.

    loss                                     here
    forward KL, KL(P || Q)                   kl_div_loss(q, p)
    reverse KL, KL(Q || P)                   kl_div_loss(q, p, direction="reverse")
    the same two                             js_div_loss(q, p, beta=0), js_div_loss(q, p, beta=1)
    generalized Jensen-Shannon divergence    js_div_loss(q, p, beta=b)
    skewed KL, KL(P || s P + (1 - s) Q)      skew_kl_div_loss(q, p, skew=s)
    skewed reverse KL                        skew_kl_div_loss(q, p, skew=s, direction="reverse")
    total variation distance                 tvd_loss(q, p)
    cosine distance of the logits            cosine_loss(q, p)

Arguments of every loss:

- `temperature` T > 0, `logit_scale` a > 0, `softcap` c > 0: z = a x / T of logits x, or with a cap
  z = c tanh(a x / c) / T. `logit_scale` and `softcap` are one number for both rows, or a pair
  (student's, teacher's); None is no cap. No loss is multiplied by T^2.
- `labels`: integers [...] in [0, V), or None. Rows whose label is `ignore_index` are not computed,
  give 0 and are not counted; the other labels have no effect.
- `weights`, `reduction`, `out`, masked classes and NaN: see `pyloss.losses.public`. "mean" is the
  sum over the classes, the mean over the counted rows. "batchmean" is the same with `labels` or
  `weights`, as in TRL and Liger; without them it divides by the first dimension of the logits, as
  `torch.nn.functional.kl_div` and TRL do. For logits [N, V] both are one number.

Each loss has a form under output heads, `linear_*`, which never has all logits at once: the
student's `hidden_q` [..., D] and `weight_q` [V, D], then the teacher's `hidden_p` [..., E] and
`weight_p` [V, E]. Arrays, weights and `gradient_filter` are as in `linear_cross_entropy`; all four
have gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss.checks.numbers import real
from pyloss.errors import choices
from pyloss.losses.head import fused, head, row_loss
from pyloss.losses.rows import (
    PairKernel,
    RowLoss,
    RowOptions,
    batch_divisor,
    counted_weight,
    pair_labels,
    pair_loss,
    row_weights,
)

DIRECTIONS = ("forward", "reverse")
#: The names of the divergences from a teacher P to a student Q, see `divergence`.
DIVERGENCES = ("forward-kl", "reverse-kl", "js", "skew-kl", "skew-reverse-kl")


def kl_div_loss(
    logits_q: Any,
    logits_p: Any,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    softcap: Any = None,
    logit_scale: Any = 1.0,
    labels: Any = None,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """KL(P || Q) = sum P (log P - log Q) along the last axis; P is the teacher, Q the student.

    `direction="reverse"` is KL(Q || P), bit for bit `kl_div_loss(logits_p, logits_q)`. A KL is
    infinite if its second distribution is 0 for a class that its first one has. The other arguments
    are those of every loss of `pyloss.losses.pairs`.
    """
    kernel = kl_kernel(direction, scaling(temperature, softcap, logit_scale))
    options = RowOptions(labels, ignore_index, weights, reduction, out)
    return pair_loss(kernel, logits_q, logits_p, options)


def js_div_loss(
    logits_q: Any,
    logits_p: Any,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: Any = None,
    logit_scale: Any = 1.0,
    labels: Any = None,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """Generalized Jensen-Shannon divergence: beta KL(P || M) + (1 - beta) KL(Q || M).

    M = beta P + (1 - beta) Q; P is the teacher, Q the student; `beta` in [0, 1]. At most log 2 for
    beta = 1/2, and finite for finite logits (Lin 1991; Agarwal et al., arXiv:2306.13649).

    At both ends of beta the formula is 0. There the loss is its limit after division by
    beta (1 - beta), as in GKD: `beta=0` is the forward KL(P || Q), bit for bit `kl_div_loss`;
    `beta=1` is the reverse KL(Q || P), bit for bit `kl_div_loss` with `direction="reverse"`.
    Between the ends nothing is divided, so the loss jumps there.

    TRL's `generalized_jsd_loss(student_logits, teacher_logits, beta=...)` takes its arguments in
    the same order and has the same beta; its default reduction is "batchmean". Liger's `beta` is
    the same too.
    """
    kernel = js_kernel(beta, scaling(temperature, softcap, logit_scale))
    options = RowOptions(labels, ignore_index, weights, reduction, out)
    return pair_loss(kernel, logits_q, logits_p, options)


def skew_kl_div_loss(
    logits_q: Any,
    logits_p: Any,
    *,
    skew: float = 0.1,
    direction: str = "forward",
    temperature: float = 1.0,
    softcap: Any = None,
    logit_scale: Any = 1.0,
    labels: Any = None,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """Skewed KL divergence of DistiLLM: KL(P || skew P + (1 - skew) Q).

    `direction="reverse"` is KL(Q || skew Q + (1 - skew) P). `skew` in [0, 1) is the paper's alpha
    (Ko et al., arXiv:2402.03898, which finds 0.1 best); the loss is at most -log(skew). `skew=0` is
    bit for bit `kl_div_loss`.
    """
    kernel = skew_kernel(skew, direction, scaling(temperature, softcap, logit_scale))
    options = RowOptions(labels, ignore_index, weights, reduction, out)
    return pair_loss(kernel, logits_q, logits_p, options)


def tvd_loss(
    logits_q: Any,
    logits_p: Any,
    *,
    temperature: float = 1.0,
    softcap: Any = None,
    logit_scale: Any = 1.0,
    labels: Any = None,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """Total variation distance sum |P - Q| / 2, in [0, 1] (Wen et al., arXiv:2307.15190).

    A class with P = Q has derivative 0.
    """
    kernel = PairKernel("tvd", False, (), scaling(temperature, softcap, logit_scale))
    options = RowOptions(labels, ignore_index, weights, reduction, out)
    return pair_loss(kernel, logits_q, logits_p, options)


def cosine_loss(
    logits_q: Any,
    logits_p: Any,
    *,
    softcap: Any = None,
    logit_scale: Any = 1.0,
    labels: Any = None,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """Cosine distance 1 - x y / (|x| |y|) along the last axis, in [0, 2].

    The arguments are any rows x and y [..., V], logits or hidden states: nothing is normalized. A
    class that is -inf in either row is left out. A row of zeros has distance 1 and gradient 0.
    `logit_scale` has an effect with a `softcap` only.
    """
    kernel = PairKernel("cosine", False, (), scaling(1.0, softcap, logit_scale))
    options = RowOptions(labels, ignore_index, weights, reduction, out)
    return pair_loss(kernel, logits_q, logits_p, options)


def linear_kl_div(
    hidden_q: Any,
    weight_q: Any,
    hidden_p: Any,
    weight_p: Any,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    softcap: Any = None,
    logit_scale: Any = 1.0,
    labels: Any = None,
    ignore_index: int = -100,
    weights: Any = None,
    gradient_filter: float = 0.0,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """`kl_div_loss(hidden_q @ weight_q.T, hidden_p @ weight_p.T)` without all logits at once.

    Student `hidden_q` [..., D] with `weight_q` [V, D], teacher `hidden_p` [..., E] with `weight_p`
    [V, E]; arrays and weights and `gradient_filter` as in `linear_cross_entropy`; all four
    arguments have gradients. Rows of weight 0, and rows whose label is `ignore_index`, are not
    computed.
    """
    kernel = kl_kernel(direction, scaling(temperature, softcap, logit_scale))
    heads = hidden_q, weight_q, hidden_p, weight_p
    options = RowOptions(labels, ignore_index, weights, reduction, out)
    return pair_of_heads(kernel, heads, options, gradient_filter)


def linear_js_div(
    hidden_q: Any,
    weight_q: Any,
    hidden_p: Any,
    weight_p: Any,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: Any = None,
    logit_scale: Any = 1.0,
    labels: Any = None,
    ignore_index: int = -100,
    weights: Any = None,
    gradient_filter: float = 0.0,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """`js_div_loss(hidden_q @ weight_q.T, hidden_p @ weight_p.T)` without all logits at once.

    Arguments as in `linear_kl_div`. `beta` in [0, 1] as in `js_div_loss`: 0 is the forward KL(P ||
    Q), 1 the reverse KL(Q || P).
    """
    kernel = js_kernel(beta, scaling(temperature, softcap, logit_scale))
    heads = hidden_q, weight_q, hidden_p, weight_p
    options = RowOptions(labels, ignore_index, weights, reduction, out)
    return pair_of_heads(kernel, heads, options, gradient_filter)


def linear_skew_kl_div(
    hidden_q: Any,
    weight_q: Any,
    hidden_p: Any,
    weight_p: Any,
    *,
    skew: float = 0.1,
    direction: str = "forward",
    temperature: float = 1.0,
    softcap: Any = None,
    logit_scale: Any = 1.0,
    labels: Any = None,
    ignore_index: int = -100,
    weights: Any = None,
    gradient_filter: float = 0.0,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """`skew_kl_div_loss(hidden_q @ weight_q.T, hidden_p @ weight_p.T)` without all logits at once.

    Arguments as in `linear_kl_div`; `skew` and `direction` as in `skew_kl_div_loss`.
    """
    kernel = skew_kernel(skew, direction, scaling(temperature, softcap, logit_scale))
    heads = hidden_q, weight_q, hidden_p, weight_p
    options = RowOptions(labels, ignore_index, weights, reduction, out)
    return pair_of_heads(kernel, heads, options, gradient_filter)


def linear_tvd(
    hidden_q: Any,
    weight_q: Any,
    hidden_p: Any,
    weight_p: Any,
    *,
    temperature: float = 1.0,
    softcap: Any = None,
    logit_scale: Any = 1.0,
    labels: Any = None,
    ignore_index: int = -100,
    weights: Any = None,
    gradient_filter: float = 0.0,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """`tvd_loss(hidden_q @ weight_q.T, hidden_p @ weight_p.T)` without all logits at once.

    Arguments as in `linear_kl_div`.
    """
    kernel = PairKernel("tvd", False, (), scaling(temperature, softcap, logit_scale))
    heads = hidden_q, weight_q, hidden_p, weight_p
    options = RowOptions(labels, ignore_index, weights, reduction, out)
    return pair_of_heads(kernel, heads, options, gradient_filter)


def linear_cosine(
    hidden_q: Any,
    weight_q: Any,
    hidden_p: Any,
    weight_p: Any,
    *,
    softcap: Any = None,
    logit_scale: Any = 1.0,
    labels: Any = None,
    ignore_index: int = -100,
    weights: Any = None,
    gradient_filter: float = 0.0,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """`cosine_loss(hidden_q @ weight_q.T, hidden_p @ weight_p.T)` without all logits at once.

    Arguments as in `linear_kl_div`.
    """
    kernel = PairKernel("cosine", False, (), scaling(1.0, softcap, logit_scale))
    heads = hidden_q, weight_q, hidden_p, weight_p
    options = RowOptions(labels, ignore_index, weights, reduction, out)
    return pair_of_heads(kernel, heads, options, gradient_filter)


# Kernels and their options ------------------------------------------------------------------------

Scaling = tuple[tuple[float, float], tuple[float, float]]


def scaling(temperature: float, softcap: Any, logit_scale: Any) -> Scaling:
    """`PairKernel.scaling` of these options.

    c tanh(a x / c) / T is a cap of c / T over logits times a / T.
    """
    t = real(temperature, "temperature", above=0)
    caps = [0.0 if c is None else real(c, "softcap", above=0) / t for c in both(softcap)]
    scales = [real(a, "logit_scale", above=0) / t for a in both(logit_scale)]
    return (scales[0], caps[0]), (scales[1], caps[1])


def both(value: Any) -> tuple[Any, Any]:
    """An option of the student's row and of the teacher's, given as a pair or as one for both."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    return pair if len(pair) == 2 else (value, value)


def _direction(direction: str) -> bool:
    """Whether the direction is the reverse one."""
    if direction not in DIRECTIONS:
        raise ValueError(
            f"direction must be one of {', '.join(map(repr, DIRECTIONS))}, not {direction!r}"
        )
    return direction == "reverse"


def kl_kernel(direction: str, given: Scaling) -> PairKernel:
    """The kernel of `kl_div_loss`."""
    return PairKernel("kl_div", _direction(direction), (), given)


def js_kernel(beta: float, given: Scaling) -> PairKernel:
    """The kernel of `js_div_loss`."""
    b = real(beta, "beta", 0, 1)
    if b in (0, 1):
        return PairKernel("kl_div", b == 1, (), given)
    return PairKernel("js_div", False, (b,), given)


def skew_kernel(skew: float, direction: str, given: Scaling) -> PairKernel:
    """The kernel of `skew_kl_div_loss`."""
    s = real(skew, "skew", 0, below=1)
    if s == 0:
        return kl_kernel(direction, given)
    return PairKernel("skew_kl_div", _direction(direction), (s,), given)


def divergence(
    kind: str,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    skew: float = 0.1,
    softcap: Any = None,
    logit_scale: Any = 1.0,
) -> PairKernel:
    """The divergence called `kind`, P and Q being the softmax of the logits over `temperature`.

    - "forward-kl": KL(P || Q) (Hinton et al., arXiv:1503.02531).
    - "reverse-kl": KL(Q || P) (Gu et al., arXiv:2306.08543).
    - "js": beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q (Agarwal et al.,
      arXiv:2306.13649); beta 0 and 1 are forward and reverse KL, as in `js_div_loss`.
    - "skew-kl": KL(P || skew P + (1 - skew) Q), skew in [0, 1) (Ko et al., arXiv:2402.03898);
      "skew-reverse-kl": KL(Q || skew Q + (1 - skew) P).

    Raises ValueError for another kind, and for options out of their range.
    """
    given = scaling(temperature, softcap, logit_scale)
    if kind == "js":
        return js_kernel(beta, given)
    if kind in ("forward-kl", "reverse-kl"):
        return kl_kernel(kind.removesuffix("-kl"), given)
    if kind in ("skew-kl", "skew-reverse-kl"):
        return skew_kernel(skew, "reverse" if "reverse" in kind else "forward", given)
    raise ValueError(f"kind is {kind!r:.60}; it must be {choices(DIVERGENCES)}")


# Under two heads ----------------------------------------------------------------------------------


def pair_of_heads(
    kernel: PairKernel,
    arguments: tuple[Any, Any, Any, Any],
    options: RowOptions,
    gradient_filter: float,
) -> Any:
    """A pair loss of the logits of (hidden_q, weight_q, hidden_p, weight_p)."""
    labels, ignore_index, weights, reduction, out = options
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
    index = pair_labels(labels, given, shape, q.vocabulary, ignore_index)
    used = np.full(len(q.rows), True) if index is None else index >= 0
    counted = None if index is None else np.flatnonzero(used).astype(np.int32)

    def run_kernel(part: slice, logits: Any, dloss: Any, loss: np.ndarray, slopes: Any) -> None:
        kernel.call(logits, None, dloss, loss, slopes, row_loss)

    run = fused((q, p), counted, real(gradient_filter, "gradient_filter", 0, below=1), run_kernel)
    inputs, dtype = (*q.inputs(), *p.inputs()), np.dtype(np.float32)
    total = counted_weight(given, used)
    loss = RowLoss(run, inputs, shape, dtype, given, total)
    loss.batch = batch_divisor(labels, given, total, shape)
    return loss.result(reduction, out)
