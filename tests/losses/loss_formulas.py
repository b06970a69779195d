"""The losses and the gradients of their logits, in float64 NumPy, straight from the definitions.

A formula has the name and arguments of pyloss's function and returns `(loss, gradients)`: the
weighted loss of every row, and the gradient of `(upstream * loss).sum()` for each logits argument.
`reduced` applies a `reduction`.

Formulas compute with logarithms, so that no exponential overflows. Logits of -inf are masked
vocabulary: their probability is 0, and 0 log 0 is 0.
"""

import inspect

import numpy as np

IGNORE = -100
# Definitions include infinite and undefined losses.
_quiet = np.errstate(divide="ignore", invalid="ignore")


def _f64(x):
    return np.asarray(x).astype(np.float64)


def _logsumexp(x):
    """log sum exp along the last axis, kept as size 1; -inf if everything is masked."""
    top = x.max(-1, keepdims=True, initial=-np.inf)
    return np.where(
        top == -np.inf,
        top,
        top + np.log(np.exp(x - np.where(top == -np.inf, 0, top)).sum(-1, keepdims=True)),
    )


@_quiet
def log_softmax(x):
    """Log probabilities; NaN in a row that is fully masked, or that holds NaN or +inf."""
    x = _f64(x)
    # Keeps more digits of small numbers.
    x = x - x.max(-1, keepdims=True, initial=np.finfo(np.float64).min)
    return x - _logsumexp(x)


def _times(weight, x):
    """weight * x, but 0 where the weight is 0."""
    return np.where(weight == 0, 0.0, weight * x)


def _rows(weights, upstream, shape, counted=True):
    """(loss weights, gradient weights) per row; a row that does not count has 0."""
    weight = np.where(counted, 1.0 if weights is None else _f64(weights), 0.0) * np.ones(shape)
    return weight, weight * (1.0 if upstream is None else _f64(upstream))


def _at(x, labels):
    return np.take_along_axis(x, labels[..., None], -1)[..., 0]


def _labels(labels, ignore_index):
    """(labels with 0 in place of ignored ones, whether a row counts)"""
    labels = np.asarray(labels)
    counted = labels != ignore_index
    return np.where(counted, labels, 0).astype(np.int64), counted


def _onehot(labels, v):
    return (np.arange(v) == labels[..., None]).astype(np.float64)


def _label_loss(log_s, labels):
    """-log of the label's share, given log s of each class.

    log(1 + others / own) keeps its digits when it is small.
    """
    own = _at(log_s, labels)
    others = np.where(_onehot(labels, log_s.shape[-1]) > 0, -np.inf, log_s - own[..., None])
    loss = np.logaddexp(0, _logsumexp(others)[..., 0])
    # A masked label has an infinite loss. If the rest of the row is masked too, its share is 0/0.
    bad = np.isnan(log_s).any(-1) | (log_s == np.inf).any(-1) | (log_s == -np.inf).all(-1)
    return np.where(bad, np.nan, np.where(own == -np.inf, np.inf, loss))


@_quiet
def softmax_cross_entropy(
    logits,
    labels,
    *,
    weights=None,
    ignore_index=IGNORE,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    upstream=None,
):
    x, (labels, counted) = _f64(logits), _labels(labels, ignore_index)
    masked = x == -np.inf
    inner = 1.0
    if softcap is not None:
        inner = np.where(masked, 0.0, 1 - np.tanh(x / softcap) ** 2)
        x = np.where(masked, -np.inf, softcap * np.tanh(x / softcap))
    log_p, lse = log_softmax(x), _logsumexp(x)[..., 0]
    # The label gets 1 - label_smoothing. The unmasked classes share label_smoothing evenly.
    smooth = label_smoothing * np.where(
        masked, 0.0, 1 / np.maximum((~masked).sum(-1, keepdims=True), 1)
    )
    loss = (1 - label_smoothing) * _label_loss(x, labels) + _times(smooth, -log_p).sum(-1)
    target = (1 - label_smoothing) * _onehot(labels, x.shape[-1]) + smooth
    p = np.exp(log_p)
    slope = p - target
    if z_loss:
        loss, slope = loss + z_loss * lse**2, slope + 2 * z_loss * lse[..., None] * p
    weight, scale = _rows(weights, upstream, loss.shape, counted)
    return _times(weight, loss), (_times(scale[..., None], slope * inner),)


@_quiet
def focal_loss(
    logits, labels, *, gamma=2.0, alpha=None, weights=None, ignore_index=IGNORE, upstream=None
):
    x, (labels, counted) = _f64(logits), _labels(labels, ignore_index)
    alpha = _f64(1 if alpha is None else alpha)
    alpha = alpha[labels] if alpha.ndim else alpha
    cost = _label_loss(x, labels)  # -log p
    p, rest = np.exp(-cost), -np.expm1(-cost)
    loss = alpha * rest**gamma * cost
    # d loss / d log p. The second term, p log p (1 - p)^(gamma - 1), goes to 0 with 1 - p, like (1
    # - p)^gamma.
    bend = np.where((rest == 0) | (p == 0), 0.0, gamma * p * cost * rest ** (gamma - 1))
    slope = -alpha * (rest**gamma + bend)
    weight, scale = _rows(weights, upstream, loss.shape, counted)
    inner = _onehot(labels, x.shape[-1]) - np.exp(log_softmax(x))
    return _times(weight, loss), (_times(scale[..., None], slope[..., None] * inner),)


def _log_s(x):
    """log of s(x) = x + 1 for x >= 0, 1 / (1 - x) below, and its derivative."""
    return np.sign(x) * np.log1p(np.abs(x)), 1 / (1 + np.abs(x))


@_quiet
def log_stablemax(x, *, upstream=None):
    log_s, slope = _log_s(_f64(x))
    out = log_softmax(log_s)
    dy = np.ones(out.shape) if upstream is None else _f64(upstream)
    return out, (slope * (dy - np.exp(out) * dy.sum(-1, keepdims=True)),)


@_quiet
def stablemax(x, *, upstream=None):
    log_s, slope = _log_s(_f64(x))
    y = np.exp(log_softmax(log_s))
    dy = np.ones(y.shape) if upstream is None else _f64(upstream)
    return y, (slope * y * (dy - (dy * y).sum(-1, keepdims=True)),)


@_quiet
def stablemax_cross_entropy(logits, labels, *, weights=None, ignore_index=IGNORE, upstream=None):
    x, (labels, counted) = _f64(logits), _labels(labels, ignore_index)
    log_s, slope = _log_s(x)
    loss = _label_loss(log_s, labels)
    weight, scale = _rows(weights, upstream, loss.shape, counted)
    inner = slope * (np.exp(log_softmax(log_s)) - _onehot(labels, x.shape[-1]))
    return _times(weight, loss), (_times(scale[..., None], inner),)


def _divergence(log_a, log_b):
    """log a - log b, the terms of KL(a, b) divided by a; 0 where a is 0."""
    return np.where(log_a == -np.inf, 0.0, log_a - log_b)


def _both(value):
    """An option of the student's row and of the teacher's."""
    return value if isinstance(value, tuple) else (value, value)


def _prepared(x, softcap, scale, temperature):
    """(the logits of the softmax, their derivative by x)"""
    x = _f64(x) * scale
    if softcap is None:
        return x / temperature, scale / temperature
    masked, t = x == -np.inf, np.tanh(x / softcap)
    slope = np.where(masked, 0.0, 1 - t**2)
    return np.where(masked, x, softcap * t) / temperature, slope * scale / temperature


def _log_pair(logits, softcap, logit_scale, temperature):
    """((log Q, log P), the derivatives of both softmaxes' logits by the logits)"""
    z, slopes = zip(
        *(
            _prepared(x, cap, scale, temperature)
            for x, cap, scale in zip(logits, _both(softcap), _both(logit_scale))
        )
    )
    return [log_softmax(x) for x in z], slopes


def _pair_result(loss, by_z, slopes, weights, upstream, labels, ignore_index):
    """`by_z`: the gradients by the softmaxes' logits."""
    counted = True if labels is None else np.asarray(labels) != ignore_index
    weight, scale = _rows(weights, upstream, loss.shape, counted)
    gradients = (_times(scale[..., None], d * slope) for d, slope in zip(by_z, slopes))
    return _times(weight, loss), tuple(gradients)


def _kl(log_a, log_b):
    """KL(a || b), and its gradients by the softmax logits of a and b."""
    a, ratio = np.exp(log_a), _divergence(log_a, log_b)
    loss = _times(a, ratio).sum(-1)
    return loss, np.where(a == 0, 0.0, a * (ratio - loss[..., None])), np.exp(log_b) - a


@_quiet
def kl_div_loss(
    logits_q,
    logits_p,
    *,
    direction="forward",
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    labels=None,
    ignore_index=IGNORE,
    weights=None,
    upstream=None,
):
    (log_q, log_p), slopes = _log_pair((logits_q, logits_p), softcap, logit_scale, temperature)
    if direction == "reverse":
        loss, dq, dp = _kl(log_q, log_p)
    else:
        loss, dp, dq = _kl(log_p, log_q)
    return _pair_result(loss, (dq, dp), slopes, weights, upstream, labels, ignore_index)


@_quiet
def js_div_loss(
    logits_q,
    logits_p,
    *,
    beta=0.5,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    labels=None,
    ignore_index=IGNORE,
    weights=None,
    upstream=None,
):
    """At the ends of beta what TRL's GKD computes there: 0 is KL(P || Q), 1 is KL(Q || P)."""
    (log_q, log_p), slopes = _log_pair((logits_q, logits_p), softcap, logit_scale, temperature)
    if beta == 0:
        loss, dp, dq = _kl(log_p, log_q)
    elif beta == 1:
        loss, dq, dp = _kl(log_q, log_p)
    else:
        q, p = np.exp(log_q), np.exp(log_p)
        log_m = np.logaddexp(np.log(beta) + log_p, np.log1p(-beta) + log_q)
        to_q, to_p = _divergence(log_q, log_m), _divergence(log_p, log_m)
        kl_q, kl_p = _times(q, to_q).sum(-1), _times(p, to_p).sum(-1)
        loss = beta * kl_p + (1 - beta) * kl_q
        # M's own gradient vanishes: sum (beta P + (1 - beta) Q) d log M = sum dM = 0.
        dq, dp = (1 - beta) * q * (to_q - kl_q[..., None]), beta * p * (to_p - kl_p[..., None])
    return _pair_result(loss, (dq, dp), slopes, weights, upstream, labels, ignore_index)


def _softmax_grad(p, by_p):
    """The gradient by the logits of the softmax p."""
    return np.where(p == 0, 0.0, p * (by_p - _times(p, by_p).sum(-1, keepdims=True)))


@_quiet
def skew_kl_div_loss(
    logits_q,
    logits_p,
    *,
    skew=0.1,
    direction="forward",
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    labels=None,
    ignore_index=IGNORE,
    weights=None,
    upstream=None,
):
    """KL(A || M), M = skew A + (1 - skew) B; forward: A is the teacher."""
    (log_q, log_p), slopes = _log_pair((logits_q, logits_p), softcap, logit_scale, temperature)
    log_a, log_b = (log_q, log_p) if direction == "reverse" else (log_p, log_q)
    a, b = np.exp(log_a), np.exp(log_b)
    log_m = np.logaddexp(np.log(skew) + log_a, np.log1p(-skew) + log_b)
    ratio = _divergence(log_a, log_m)
    loss = _times(a, ratio).sum(-1)
    share = np.where(log_a == -np.inf, 0.0, np.exp(log_a - log_m))  # a / m
    da = _softmax_grad(a, ratio + 1 - skew * share)
    db = _softmax_grad(b, -(1 - skew) * share)
    by_z = (da, db) if direction == "reverse" else (db, da)
    return _pair_result(loss, by_z, slopes, weights, upstream, labels, ignore_index)


@_quiet
def tvd_loss(
    logits_q,
    logits_p,
    *,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    labels=None,
    ignore_index=IGNORE,
    weights=None,
    upstream=None,
):
    (log_q, log_p), slopes = _log_pair((logits_q, logits_p), softcap, logit_scale, temperature)
    q, p = np.exp(log_q), np.exp(log_p)
    sign = np.sign(q - p) / 2
    by_z = _softmax_grad(q, sign), _softmax_grad(p, -sign)
    loss = (sign * (q - p)).sum(-1)
    return _pair_result(loss, by_z, slopes, weights, upstream, labels, ignore_index)


@_quiet
def cosine_loss(
    logits_q,
    logits_p,
    *,
    softcap=None,
    logit_scale=1.0,
    labels=None,
    ignore_index=IGNORE,
    weights=None,
    upstream=None,
):
    (x, slope_x), (y, slope_y) = (
        _prepared(z, cap, scale, 1.0)
        for z, cap, scale in zip((logits_q, logits_p), _both(softcap), _both(logit_scale))
    )
    masked = (x == -np.inf) | (y == -np.inf)
    x, y = np.where(masked, 0.0, x), np.where(masked, 0.0, y)
    xx, yy = ((z * z).sum(-1, keepdims=True) for z in (x, y))
    zero, norms = (xx == 0) | (yy == 0), np.sqrt(xx) * np.sqrt(yy)
    cosine = np.where(zero, 0.0, (x * y).sum(-1, keepdims=True) / norms)
    by_z = (
        np.where(zero, 0.0, cosine * a / aa - b / norms) for a, aa, b in ((x, xx, y), (y, yy, x))
    )
    slopes = slope_x, slope_y
    return _pair_result(1 - cosine[..., 0], by_z, slopes, weights, upstream, labels, ignore_index)


@_quiet
def binary_cross_entropy_with_logits(logits, targets, *, weights=None, upstream=None):
    x, t = _f64(logits), _f64(targets)
    loss = _times(t, np.logaddexp(0, -x)) + _times(1 - t, np.logaddexp(0, x))
    sigmoid = np.exp(-np.logaddexp(0, -x))
    weight, scale = _rows(weights, upstream, loss.shape)
    by_x = np.where(t == 1, -np.exp(-np.logaddexp(0, x)), sigmoid - t)
    return _times(weight, loss), (_times(scale, by_x), _times(scale, -x))  # also by the targets


def reduced(name, arguments, options, reduction="none", upstream=1.0):
    """(result, gradients) of the formula `name` under a reduction.

    `upstream` has the shape of the result. "mean" divides by the sum of the weights of the rows
    that count, and is 0 if none counts.
    """
    formula = globals()[name]
    if reduction == "none":
        return formula(*arguments, **options, upstream=upstream)
    loss, _ = formula(*arguments, **options)
    names, labels = inspect.signature(formula).parameters, options.get("labels")
    if "ignore_index" in names and "logits_p" not in names:
        labels = arguments[1]
    counted = True
    if labels is not None:
        counted = _labels(labels, options.get("ignore_index", IGNORE))[1]
    total, _ = _rows(options.get("weights"), None, loss.shape, counted)
    by = 1.0 if reduction == "sum" else max(total.sum(), np.finfo(np.float64).tiny)
    return loss.sum() / by, formula(
        *arguments, **options, upstream=np.full(loss.shape, upstream / by)
    )[1]
