"""mx.fast: norms, rotary positions, attention and cross entropy by pyloss's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import ops
from pyloss.autograd.tensor import FUNCTIONS
from pyloss.losses.public import softmax_cross_entropy
from pyloss.mlx.core import reductions
from pyloss.mlx.core.arrays import array, cast, of, promoted, raw, result
from pyloss.mlx.core.dtypes import float32
from pyloss.mlx.core.elementwise import constant, rsqrt, square
from pyloss.mlx.core.refused import refusing
from pyloss.ops.dot_product_attention import scaled_dot_product_attention as own_attention

__getattr__ = refusing("fast")


def _wide(x: Any) -> Any:
    """Halves as float32."""
    return cast(x, float32) if x.dtype.itemsize == 2 else x


def rms_norm(x: Any, weight: Any, eps: float, *, stream: Any = None) -> array:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis; a weight of None is 1."""
    (value,) = promoted(x, floats=True)
    wide = _wide(value)
    w = np.ones(value.shape[-1:], wide.dtype) if weight is None else cast(raw(weight), wide.dtype)
    return of(cast(ops.rms_norm(wide, w, eps), value.dtype))


def layer_norm(x: Any, weight: Any, bias: Any, eps: float, *, stream: Any = None) -> array:
    """(x - mean) / sqrt(variance + eps) * weight + bias along the last axis; None: 1 and 0."""
    (value,) = promoted(x, floats=True)
    wide = of(_wide(value))
    centered = wide - reductions.mean(wide, -1, keepdims=True)
    y = centered * rsqrt(reductions.mean(square(centered), -1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).astype(value.dtype)


def rope(
    a: Any,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: Any,
    freqs: Any = None,
    stream: Any = None,
) -> array:
    """Rotary positions of a [B, ..., T, D], in the first `dims` elements of D.

    Position t has the angles scale (offset + t) / base^(2 i / dims), or divided by `freqs[i]`.
    `offset` is a number, or one for each batch.
    """
    if (base is None) == (freqs is None):
        raise ValueError("exactly one of base and freqs must be None")
    (value,) = promoted(a, floats=True)
    if len(value.shape) < 3 or not 0 < dims <= value.shape[-1] or dims % 2:
        raise ValueError(
            f"a has shape {value.shape} and dims is {dims}; a must be [B, ..., T, D] and dims even "
            "and at most D"
        )
    rates = (
        float(base) ** (-np.arange(0, dims, 2) / dims)
        if base is not None
        else 1 / np.asarray(constant(raw(freqs), "fast.rope"), np.float64)
    )
    batch, tokens, size = value.shape[0], value.shape[-2], value.shape[-1]
    start = np.asarray(constant(raw(array(offset)), "fast.rope"), np.int64).reshape(-1, 1)
    places = np.broadcast_to(start + np.arange(tokens), (batch, tokens)).reshape(-1)
    angles = places[:, None] * scale * rates
    tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    inner = int(np.prod(value.shape[1:-2], dtype=int))
    numbers = np.broadcast_to(
        np.arange(batch * tokens, dtype=np.int32).reshape(batch, 1, tokens), (batch, inner, tokens)
    )
    rows = of(_wide(value)).reshape(-1, size)
    if traditional:
        pairs = np.r_[0:dims:2, 1:dims:2, dims:size]
        rows = rows[:, pairs]
    turned = result(
        ops.rope(raw(rows), np.ascontiguousarray(numbers.reshape(-1)), *tables, head_dim=size)
    )
    if traditional:
        turned = turned[:, np.argsort(pairs)]
    return turned.reshape(value.shape).astype(value.dtype)


def scaled_dot_product_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float,
    mask: Any = None,
    sinks: Any = None,
    force_fused: bool = False,
    stream: Any = None,
) -> array:
    """softmax(scale q k^T + mask) v of q [B, H, T, D], k and v [B, G, S, D]; heads share keys.

    `mask`: None, "causal" (the last query sees the last key), bool (True sees) or added floats.
    """
    if sinks is not None:
        raise ValueError("sinks are not supported: mx.softmax of scores with one more column")
    values = promoted(q, k, v, floats=True)
    kind = values[0].dtype
    query, key, value = (_wide(x) for x in values)
    given = mask
    if mask is not None and not isinstance(mask, str):
        given = raw(mask)
        given = given if given.dtype.kind == "b" else cast(given, query.dtype)
    return of(cast(own_attention(query, key, value, mask=given, scale=float(scale)), kind))


def cross_entropy(logits: Any, targets: Any, *, stream: Any = None) -> array:
    """logsumexp(logits) - logits[target] along the last axis, float32."""
    (x,) = promoted(logits, floats=True)
    labels = np.asarray(constant(raw(targets), "fast.cross_entropy"))
    flat = FUNCTIONS[np.reshape](x, (-1, x.shape[-1]))
    found = softmax_cross_entropy(flat, labels.reshape(-1), reduction="none")
    return result(FUNCTIONS[np.reshape](found, labels.shape))
