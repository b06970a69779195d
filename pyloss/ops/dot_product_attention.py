"""Attention of every kind: bidirectional, causal, cross, with windows, masks, biases and caps.

Scores exist for a block of queries at a time, of about `BLOCK` numbers, in the forward and in the
backward pass. The queries of all heads that share a key head are the rows of one product.
`ops.layers.attention` is the kernel of language models: causal, packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from pyloss import _core, random
from pyloss.arithmetic import batched_product, binary, reduced, row_map, row_map_grad, scaled, unary
from pyloss.autograd.tape import Gradients, data, keep, nodes_of, record_on
from pyloss.autograd.tensor import Tensor
from pyloss.checks.numbers import real, shown, whole
from pyloss.ops.arrays import empty, i32
from pyloss.ops.layers import attention as kernel
from pyloss.ops.wide import is_wide
from pyloss.runtime.device import array, is_bfloat16, on_device_of

#: Numbers of a block of scores (4 MB): enough heads for all threads, and little beside the arrays.
BLOCK = 1 << 20

_Array = Any


def attention(
    q: _Array,
    k: _Array,
    v: _Array,
    causal: bool = False,
    *,
    window: int = 0,
    mask: Any = None,
    bias: Any = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout: float = 0.0,
    offsets: Any = None,
    k_offsets: Any = None,
) -> _Array:
    """softmax(scale q k^T + bias) v for each head: [B, T, H, D] of q, or [N, H, D] when packed.

    Queries, keys and scores that no mask lets through have probability 0, and a query without keys
    gets 0. float64 arrays are computed in float64, others in float32. (Vaswani et al.,
    arXiv:1706.03762.)

    Args:
        q: [B, T, H, D], or [N, H, D] with `offsets`.
        k, v: [B, S, G, D] and [B, S, G, E], or packed; H is a multiple of G, and each key head
            serves H / G query heads.
        causal: query t sees keys up to S - T + t, so that the last one sees all.
        window: with a number above 0, a query sees only the last `window` keys up to its own place;
            if it is not causal, also the next `window` - 1.
        mask: bool, broadcast to [B, H, T, S]: True lets a query see a key. No gradient.
        bias: added to the scores, broadcast to [B, H, T, S]; carries a gradient.
        softcap: scores become softcap tanh(scores / softcap) before mask and bias; 0 for none.
        scale: 1 / sqrt(D) by default.
        dropout: the share of the probabilities that is set to 0, the rest grows by 1 / (1 - it).
        offsets: int [sequences + 1]; packed sequences have the rows [offsets[i], offsets[i + 1]).
            Not with `mask` and `bias`.
        k_offsets: those of k and v, by default the same.

    Raises:
        ValueError: shapes that do not fit, or options outside of their ranges.
        TypeError: a mask that is not bool, or arrays that hold no real numbers.
    """
    if offsets is not None:
        if mask is not None or bias is not None:
            raise ValueError("packed sequences (offsets) take no mask and no bias")
        return _packed(q, k, v, causal, window, softcap, scale, dropout, offsets, k_offsets)
    if k_offsets is not None:
        raise ValueError("k_offsets needs offsets")
    q, k, v = (_operand(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        if len(x.shape) != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, size], got shape {x.shape}")
    if mask is None and bias is None and not dropout and _fits_kernel(q, k, v):
        b, t, heads, d = q.shape
        q, k, v = (np.reshape(x, (-1, *x.shape[2:])) for x in (q, k, v))
        ends = np.arange(b + 1, dtype=np.int32)
        y = _by_kernel(q, k, v, causal, window, softcap, scale, ends * t, ends * (len(k) // b))
        return np.reshape(y, (b, t, heads, d))
    added = None if bias is None else _operand(bias, "bias")
    kind = _checked(q, k, v, causal, window, mask, added, softcap, scale, dropout)
    return _apply(kind, q, k, v, added)


def scaled_dot_product_attention(
    query: _Array,
    key: _Array,
    value: _Array,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = True,
    *,
    mask: Any = None,
    window: int = 0,
    softcap: float = 0.0,
) -> _Array:
    """`attention` with torch's and MLX's names, of query [B, H, T, D], key and value [B, G, S, D].

    `attn_mask` (torch) or `mask` (MLX): bool, True lets a query see a key; floats are added to the
    scores; MLX's "causal" is `is_causal`. Unlike torch, `is_causal` aligns the last query with the
    last key, as MLX does, and heads may be grouped unless `enable_gqa` is False.
    """
    if mask is not None:
        if attn_mask is not None:
            raise ValueError("attn_mask and mask are two names of one argument: give one")
        attn_mask = mask
    if isinstance(attn_mask, str):
        if attn_mask != "causal":
            raise ValueError(f"mask is {attn_mask!r}; the only mask with a name is 'causal'")
        is_causal, attn_mask = True, None
    q, k, v = (_operand(x, n) for x, n in ((query, "query"), (key, "key"), (value, "value")))
    for x, name in ((q, "query"), (k, "key"), (v, "value")):
        if len(x.shape) != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, size], got shape {x.shape}")
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"query has {q.shape[1]} heads and key {k.shape[1]}; enable_gqa allows groups"
        )
    given = None if attn_mask is None else _operand(attn_mask, "attn_mask")
    additive = given is not None and given.dtype.kind != "b"
    q, k, v = (np.swapaxes(x, 1, 2) for x in (q, k, v))
    y = attention(
        q,
        k,
        v,
        is_causal,
        window=window,
        mask=None if additive else given,
        bias=given if additive else None,
        softcap=softcap,
        scale=scale,
        dropout=dropout_p,
    )
    return np.swapaxes(y, 1, 2)


class _Kind(NamedTuple):
    """The options of one call, checked.

    Attributes:
        sizes: B, T, S, heads, key heads, D, E.
        seen: float [T, S], 0 where a query sees a key and -inf elsewhere, or None.
        mask: float [1 or B, 1 or H, 1 or T, 1 or S] of the same numbers, or None.
        dtype: of the arithmetic.
    """

    sizes: tuple[int, int, int, int, int, int, int]
    seen: np.ndarray | None
    mask: np.ndarray | None
    softcap: float
    scale: float
    dropout: float
    seed: int
    dtype: np.dtype


def _operand(x: Any, name: str) -> Any:
    x = x if isinstance(x, Tensor) else array(x, name)
    if x.dtype.kind not in "fiub" and not is_bfloat16(x.dtype):
        raise TypeError(f"{name} must hold real numbers, not {x.dtype}")
    return x


def _checked(
    q: Any, k: Any, v: Any, causal: bool, window: int, mask: Any, bias: Any, softcap: float,
    scale: float | None, dropout: float,
) -> _Kind:  # fmt: skip
    (b, t, heads, d), (kb, s, groups, kd), (vb, vs, vg, e) = q.shape, k.shape, v.shape
    if kb != b or vb != b or kd != d or vs != s or vg != groups:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: they must "
            "be [B, T, H, D], [B, S, G, D] and [B, S, G, E]"
        )
    if not groups or heads % groups:
        raise ValueError(f"{heads} heads of q are no multiple of the {groups} heads of k and v")
    dtype = np.dtype(np.float64 if np.float64 in (q.dtype, k.dtype, v.dtype) else np.float32)
    window = whole(window, "window", 0)
    seen = None
    if causal or window:
        ago = np.arange(t)[:, None] + (s - t) - np.arange(s)
        allowed = ago >= 0 if causal else np.ones((t, s), bool)
        if window:
            allowed &= np.abs(ago) < window
        if not allowed.all():
            seen = np.where(allowed, 0, -np.inf).astype(dtype)
    for given, name in ((mask, "mask"), (bias, "bias")):
        if given is not None and not _broadcasts(_operand(given, name).shape, (b, heads, t, s)):
            raise ValueError(
                f"{name} has shape {_operand(given, name).shape}, which is not broadcast to "
                f"[batch, heads, queries, keys] = {(b, heads, t, s)}"
            )
    if mask is not None:
        if isinstance(mask, Tensor) or array(mask).dtype != np.bool_:
            raise TypeError("mask must hold bool: True lets a query see a key; numbers are a bias")
        flags = np.asarray(mask)
        mask = np.where(flags, 0, -np.inf).astype(dtype)
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    dropout = real(dropout, "dropout", 0, below=1)
    return _Kind(
        (b, t, s, heads, groups, d, e),
        seen,
        mask,
        real(softcap, "softcap", 0),
        1 / math.sqrt(max(d, 1)) if scale is None else real(scale, "scale"),
        dropout,
        random.next_seed() if dropout else 0,
        dtype,
    )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False)
    )


class _Block(NamedTuple):
    """The scores [n, rows, S] of some key heads of some sequences.

    Attributes:
        heads: of [B * G, ...] arrays.
        rows: of the R * T queries that a key head has: those of its first head, then of the next.
        batch: the sequence, or None if the block has several.
    """

    heads: slice
    rows: slice
    batch: int | None


def _blocks(kind: _Kind, one_sequence: bool) -> Iterator[_Block]:
    b, t, s, heads, groups, _, _ = kind.sizes
    rows = heads // groups * t
    if rows * s > BLOCK:
        step = max(BLOCK // max(s, 1), 16)
        for i in range(b * groups):
            for first in range(0, rows, step):
                yield _Block(slice(i, i + 1), slice(first, min(first + step, rows)), i // groups)
        return
    together = max(BLOCK // max(rows * s, 1), 1)
    if one_sequence:
        together = min(together, groups)
        for i in range(b):
            for first in range(0, groups, together):
                last = min(first + together, groups)
                yield _Block(slice(i * groups + first, i * groups + last), slice(0, rows), i)
        return
    for first in range(0, b * groups, together):
        yield _Block(slice(first, min(first + together, b * groups)), slice(0, rows), None)


def _apply(kind: _Kind, q: Any, k: Any, v: Any, bias: Any) -> Any:
    b, t, s, heads, groups, _, _ = kind.sizes
    inputs = (q, k, v, bias)
    nodes = nodes_of(*inputs)

    def split(x: Any) -> Any:
        """[B, L, heads, size] -> [B * G, heads of a key head * L, size], contiguous."""
        found = x.data if isinstance(x, Tensor) else x
        host = np.asarray(found)
        moved = host.reshape(
            *host.shape[:2], groups, host.shape[2] // groups, host.shape[3]
        ).transpose(0, 2, 3, 1, 4)
        moved = np.ascontiguousarray(moved, kind.dtype)
        return on_device_of(
            found, moved.reshape(b * groups, moved.shape[2] * moved.shape[3], host.shape[3])
        )

    def joined(x: Any, some: int, length: int, dtype: np.dtype) -> Any:
        """The reverse of `split`."""
        host = np.asarray(x)
        moved = host.reshape(b, groups, some // groups, length, host.shape[-1])
        moved = np.ascontiguousarray(moved.transpose(0, 3, 1, 2, 4), dtype)
        return on_device_of(x, moved.reshape(b, length, some, host.shape[-1]))

    walk = _Walk(kind, None if bias is None else _four_axes(bias, kind.dtype))
    y = joined(walk.forward(split(q), split(k), split(v)), heads, t, kind.dtype)
    if nodes is None:
        return y
    kept, types = [keep(x) for x in (q, k, v)], [x.dtype for x in (q, k, v)]

    def vjp(dy: Any, grads: Gradients) -> None:
        wanted = bias is not None and grads.wanted(3)
        qd, kd, vd = (split(get()) for get in kept)
        dq, dk, dv, dbias = walk.backward(split(dy), qd, kd, vd, wanted)
        grads.put(0, joined(dq, heads, t, types[0]))
        grads.put(1, joined(dk, groups, s, types[1]))
        grads.put(2, joined(dv, groups, s, types[2]))
        if dbias is not None:
            grads.put(3, np.asarray(dbias, bias.dtype).reshape(bias.shape))

    return record_on(nodes, y, vjp)


def _four_axes(x: Any, dtype: np.dtype) -> np.ndarray:
    host = np.asarray(x.data if isinstance(x, Tensor) else x, dtype)
    return host.reshape((1,) * (4 - host.ndim) + host.shape)


class _Walk:
    """Both passes over blocks of scores. Arrays are as `_apply` splits them.

    Attributes:
        bias: [1 or B, 1 or H, 1 or T, 1 or S] or None.
    """

    def __init__(self, kind: _Kind, bias: np.ndarray | None):
        self.kind, self.bias = kind, bias
        added = [x for x in (bias, kind.mask) if x is not None]
        self.one_sequence = any(x.shape[0] > 1 or x.shape[1] > 1 for x in added)

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        y = _empty((*q.shape[:2], v.shape[-1]), q)
        for seed, block in enumerate(_blocks(self.kind, self.one_sequence)):
            p = self._dropped(self._probabilities(block, q, k)[0], seed)
            _product(p, v[block.heads], out=_part(y, block))
        return y

    def backward(self, dy: Any, q: Any, k: Any, v: Any, by_bias: bool) -> tuple[Any, ...]:
        """The gradients by q, k, v and bias."""
        dq, dk, dv = (_empty(x.shape, x) for x in (q, k, v))
        dbias = np.zeros(self.bias.shape, np.float64) if by_bias and self.bias is not None else None
        begun: set[int] = set()  # heads whose dk and dv have something to add to
        for seed, block in enumerate(_blocks(self.kind, self.one_sequence)):
            again = block.heads.start in begun
            begun.add(block.heads.start)
            p, slope = self._probabilities(block, q, k)
            dropped, heads, dy_part = self._dropped(p, seed), block.heads, _part(dy, block)
            _product(dropped, dy_part, transpose_a=True, out=dv[heads], add=again)
            dp = self._dropped(_product(dy_part, v[heads], transpose_b=True), seed)
            ds = _or_numpy(row_map_grad("softmax", dp, p), _softmax_grad, dp, p)
            if dbias is not None:
                self._add_to(dbias, ds, block)
            if slope is not None:
                ds = _or_numpy(binary("multiply", ds, slope), np.multiply, ds, slope)
            scale = self.kind.scale
            _product(ds, k[heads], alpha=scale, out=_part(dq, block))
            q_part = _part(q, block)
            _product(ds, q_part, transpose_a=True, alpha=scale, out=dk[heads], add=again)
        for x in (dq, dk, dv):
            if not begun:
                x[...] = 0
        return dq, dk, dv, dbias

    def _probabilities(self, block: _Block, q: Any, k: Any) -> tuple[Any, Any]:
        """softmax of a block's scores [n, rows, S], and the slope of the cap or None."""
        scores = _product(_part(q, block), k[block.heads], transpose_b=True, alpha=self.kind.scale)
        slope, cap = None, self.kind.softcap
        if cap:
            bent = _or_numpy(scaled(scores, 1 / cap), np.multiply, scores, 1 / cap)
            bent = _or_numpy(unary("tanh", bent), np.tanh, bent)
            scores = _or_numpy(scaled(bent, cap), np.multiply, bent, cap)
            host = np.asarray(bent)
            slope = on_device_of(bent, 1 - host * host)
        added = self._added(block)
        if added is not None:
            there = on_device_of(scores, added)
            scores = _or_numpy(binary("add", scores, there), np.add, scores, there)
        p = _or_numpy(row_map("softmax", scores), _softmax, scores)
        if added is not None:
            peak = _or_numpy(reduced("max", scores, -1), lambda x: x.max(-1), scores)
            unseen = np.isneginf(np.asarray(peak))
            if unseen.any():
                host = np.asarray(p)
                host[unseen] = 0
                p = on_device_of(p, host)
        return p, slope

    def _added(self, block: _Block) -> Any:
        """What masks and bias add to a block's scores, [n or 1, rows or 1, S]; None for nothing."""
        _, t, s, heads, groups, _, _ = self.kind.sizes
        each = heads // groups
        total: Any = None
        for given in (self.kind.seen, self.kind.mask, self.bias):
            if given is None:
                continue
            x: Any = given.reshape((1,) * (4 - given.ndim) + given.shape)
            if x.shape[0] > 1:
                assert block.batch is not None
                x = x[block.batch : block.batch + 1]
            total = x if total is None else np.add(total, x)
        if total is None:
            return None
        if total.shape[1] == total.shape[2] == 1:
            return np.ascontiguousarray(np.broadcast_to(total[0], (1, 1, s)))
        if total.shape[1] == 1:
            # The same for all heads: for each query of each head of a key head.
            found = np.broadcast_to(np.squeeze(total, (0, 1)), (t, s))
            found = np.broadcast_to(found, (each, t, s)).reshape(1, each * t, s)
        else:
            first, last = (end % groups for end in (block.heads.start, block.heads.stop - 1))
            some = np.broadcast_to(total[0], (heads, t, s))[first * each : (last + 1) * each]
            found = some.reshape(last - first + 1, each * t, s)
        return np.ascontiguousarray(found[:, block.rows])

    def _add_to(self, dbias: np.ndarray, ds: Any, block: _Block) -> None:
        """Adds a block's gradient to that of the bias."""
        _, t, _, heads, groups, _, _ = self.kind.sizes
        each, host = heads // groups, np.asarray(ds)
        rows = np.arange(block.rows.start, block.rows.stop)
        for i, key_head in enumerate(range(block.heads.start, block.heads.stop)):
            batch, group = divmod(key_head, groups)
            for head in range(each):
                chosen = rows // t == head
                if not chosen.any():
                    continue
                places = (
                    min(batch, dbias.shape[0] - 1),
                    min(group * each + head, dbias.shape[1] - 1),
                )
                found, onto = host[i, chosen], dbias[places]
                if onto.shape[1] == 1:
                    found = found.sum(-1, keepdims=True, dtype=np.float64)
                if onto.shape[0] == 1:
                    onto += found.sum(0, keepdims=True, dtype=np.float64)
                else:
                    onto[rows[chosen] % t] += found

    def _dropped(self, p: Any, block: int) -> Any:
        kind = self.kind
        if not kind.dropout:
            return p
        if p.dtype == np.float32:
            out = _empty(p.shape, p)
            _core.dropout(p, kind.seed + block, kind.dropout, out)
            return out
        mask = np.empty(p.shape, np.float32)
        _core.dropout(np.ones(p.shape, np.float32), kind.seed + block, kind.dropout, mask)
        return p * (mask > 0) / (1 - kind.dropout)


def _part(x: Any, block: _Block) -> Any:
    """The rows of a block, a view."""
    some = x[block.heads]
    if block.rows == slice(0, x.shape[1]):
        return some
    return some[0][block.rows].reshape(1, block.rows.stop - block.rows.start, x.shape[2])


def _empty(shape: tuple[int, ...], like: Any) -> Any:
    return empty(*shape, like=like) if like.dtype == np.float32 else np.empty(shape, like.dtype)


def _or_numpy(found: Any, function: Callable[..., Any], *args: Any) -> Any:
    """What the core has found, or a function's result."""
    return function(*args) if found is None else found


def _product(
    a: Any,
    b: Any,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    out: Any = None,
    add: bool = False,
) -> Any:
    if 0 not in a.shape and 0 not in b.shape:
        found = batched_product(a, b, out, transpose_a, transpose_b, alpha, add)
        if found is not None:
            return found
    a, b = (
        np.swapaxes(x, 1, 2) if turned else x for x, turned in ((a, transpose_a), (b, transpose_b))
    )
    y = np.asarray(alpha * np.matmul(a, b), a.dtype)
    if out is None:
        return y
    out[...] = out + y if add else y
    return out


def _softmax(scores: np.ndarray) -> np.ndarray:
    peak = scores.max(-1, keepdims=True, initial=-np.inf)
    found = np.exp(scores - np.where(np.isfinite(peak), peak, 0))
    total = found.sum(-1, keepdims=True)
    return np.divide(found, total, out=np.zeros_like(found), where=total > 0)


def _softmax_grad(dp: np.ndarray, p: np.ndarray) -> np.ndarray:
    return p * (dp - (p * dp).sum(-1, keepdims=True))


def _packed(
    q: Any, k: Any, v: Any, causal: bool, window: int, softcap: float, scale: float | None,
    dropout: float, offsets: Any, k_offsets: Any,
) -> Any:  # fmt: skip
    q, k, v = (_operand(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        if len(x.shape) != 3:
            raise ValueError(f"packed {name} must be [tokens, heads, size], got {tuple(x.shape)}")
    ends = _offsets(offsets, len(q), "offsets")
    k_ends = ends if k_offsets is None else _offsets(k_offsets, len(k), "k_offsets")
    if len(ends) != len(k_ends) or len(k) != len(v) or (k_offsets is None and len(k) != len(q)):
        raise ValueError(
            f"{len(ends) - 1} sequences of {len(q)} queries do not fit {len(k_ends) - 1} sequences "
            f"of {len(k)} keys and {len(v)} values"
        )
    if not dropout and _fits_kernel(q, k, v):
        return _by_kernel(q, k, v, causal, window, softcap, scale, ends, k_ends)
    parts = [
        attention(
            qs[None],
            ks[None],
            vs[None],
            causal,
            window=window,
            softcap=softcap,
            scale=scale,
            dropout=dropout,
        )[0]
        for qs, ks, vs in zip(
            np.split(q, ends[1:-1]),
            np.split(k, k_ends[1:-1]),
            np.split(v, k_ends[1:-1]),
            strict=True,
        )
    ]
    return np.concatenate(parts)


def _fits_kernel(q: Any, k: Any, v: Any) -> bool:
    """Whether shapes and types are those of `ops.layers.attention`."""
    heads, groups = q.shape[-2], k.shape[-2]
    return (
        k.shape == v.shape
        and q.shape[-1] == k.shape[-1]
        and len(q.shape) == len(k.shape)
        and q.shape[:-3] == k.shape[:-3]
        and 0 not in (*q.shape, *k.shape)
        and not heads % groups
        and not is_wide(q, k, v)
    )


def _by_kernel(
    q: Any, k: Any, v: Any, causal: bool, window: int, softcap: float, scale: float | None,
    ends: Any, k_ends: Any,
) -> Any:  # fmt: skip
    """Packed [N, H, D] arrays without mask, bias and dropout."""
    window = whole(window, "window", 0)
    ahead = 0 if causal else window - 1 if window else np.iinfo(np.int32).max
    d, place = q.shape[-1], data(q)
    y = kernel(
        *(np.reshape(x, (x.shape[0], -1)) for x in (q, k, v)),
        on_device_of(place, ends),
        d,
        d**-0.5 if scale is None else scale,
        on_device_of(place, k_ends),
        window,
        ahead,
        softcap,
    )
    return np.reshape(y, q.shape)


def _offsets(given: Any, count: int, name: str) -> np.ndarray:
    ends = np.asarray(i32(given, name))
    if ends.ndim != 1 or len(ends) < 2 or ends[0] or ends[-1] != count or (np.diff(ends) < 0).any():
        raise ValueError(
            f"{name} must ascend from 0 to the {count} rows, got {shown(ends.tolist())}"
        )
    return ends
