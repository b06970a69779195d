"""The differentiable operations of models: a kernel call each, and one for the gradient.

Arrays are float32 unless said otherwise, with any leading axes in "[..., D]". With an array of
float64, most operations compute in float64, slower; see `wide.py`. Operations take
ndarrays or Tensors, and return a Tensor only while a gradient is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import (
    Gradients,
    data,
    keep,
    lazy_output,
    nodes_of,
    reads_output,
    record_on,
    record_several,
    remembered,
)
from pyloss.autograd.tensor import UFUNCS, Tensor
from pyloss.checks.numbers import real, whole
from pyloss.ops import wide
from pyloss.ops.arrays import (
    Array,
    check_matrix,
    empty,
    f32,
    f32_matrix,
    index,
    transpose,
    zeros,
)
from pyloss.ops.projection import (
    Projection,
    linear,
    lora_linear,
    project,
    project_all,
)
from pyloss.runtime.device import on_device_of


@wide.in_float64(wide.rms_norm, 2)
def rms_norm(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis. Recomputed, not kept.

    Zhang & Sennrich, arXiv:1910.07467.
    """
    xd, w, eps = f32(x), f32(weight, "weight"), real(eps, "eps", 0)
    if not xd.ndim or w.shape != xd.shape[-1:]:
        raise ValueError(
            f"a weight of shape {w.shape} does not fit rows of x, which has shape {xd.shape}"
        )
    y, rstd = empty(*xd.shape, like=xd), empty(math.prod(xd.shape[:-1]), like=xd)
    _core.rms_norm_forward(xd, w, eps, y, rstd)
    nodes = nodes_of(x, weight)
    if nodes is None:
        return y
    kept = keep(x)
    del xd

    def recompute() -> np.ndarray:
        source = f32(kept())
        out = empty(*source.shape, like=source)
        _core.rms_norm_forward(source, w, eps, out, empty(rstd.size, like=source))
        return out

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        source = f32(kept())
        dx, dw = (
            empty(*source.shape, like=source),
            empty(*w.shape, like=w) if grads.wanted(1) else None,
        )
        _core.rms_norm_grad(dy, source, w, rstd, dx, dw)
        grads.put(0, dx)
        if dw is not None:
            grads.put(1, dw)

    return record_on(nodes, y, vjp, recompute)


def rope(
    x: Array,
    positions: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    in_place: bool = False,
    head_dim: int | None = None,
) -> Array:
    """Rotates the halves of each head of x [N, heads * D] by its position's angles.

    Su et al., arXiv:2104.09864. `cos` and `sin` [P, R] are tables of positions 0 to P - 1,
    `positions` int32 [N]. D is 2 R, or a larger `head_dim`: then the first 2 R elements of each
    head are rotated, and the others stay. `in_place` overwrites x, which must be a fresh value
    without other readers; backward rotates it back if the operation that made x reads it.
    """
    return rope_all((x,), positions, cos, sin, in_place, head_dim)[0]


def rope_all(
    xs: Sequence[Array],
    positions: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    in_place: bool = False,
    head_dim: int | None = None,
) -> list[Array]:
    """`rope` of arrays with the same positions, as one operation on the tape."""
    if wide.is_wide(*xs):
        return wide.rope_all(xs, positions, cos, sin, in_place, head_dim)
    cos, sin = f32_matrix(cos, "cos"), f32_matrix(sin, "sin")
    rotary = 2 * cos.shape[1]
    head_dim = rotary if head_dim is None else whole(head_dim, "head_dim", rotary)
    sources = [check_matrix(x if isinstance(x, Tensor) else f32(x), "x") for x in xs]
    for source in sources:
        _check_heads(source, head_dim, "x")
    positions = index(positions, "positions", cos)

    def rotate(source: np.ndarray, inverse: int, out: np.ndarray) -> np.ndarray:
        heads = (source.shape[0], source.shape[1] // head_dim, head_dim)
        before = source.reshape(heads)
        after = before if out is source else out.reshape(heads)
        _core.rope(before, positions, cos, sin, inverse, after)
        return out

    def forward(source: Array) -> np.ndarray:
        xd = f32(source)
        return rotate(xd, 0, xd if in_place else empty(*xd.shape, like=xd))

    nodes = nodes_of(*xs)
    if nodes is None:
        return [forward(source) for source in sources]
    ys = [lazy_output(source.shape, partial(forward, source)) for source in sources]
    restored = [
        y if in_place and node is not None and node.reads_output else None
        for y, node in zip(ys, nodes, strict=True)
    ]

    def vjp(dys: list[Any], grads: Gradients) -> None:
        for i in range(len(ys) - 1, -1, -1):
            dy, dys[i] = dys[i], None
            if dy is None:
                continue
            dx = rotate(dy, 1, empty(*dy.shape, like=dy))
            if restored[i] is not None:
                y = data(restored[i])
                rotate(y, 1, y)
            grads.put(i, dx)

    return record_several(nodes, ys, vjp, (False,) * len(ys))


@wide.in_float64(wide.split_columns, 1)
def split_columns(x: Array, *parts: np.ndarray) -> list[Array]:
    """Columns `parts[i]`, int32, of x [N, D]: new arrays, as one operation on the tape.

    There are two or three parts, which together are all columns, each once.
    """
    source = check_matrix(x if isinstance(x, Tensor) else f32(x), "x")
    widths = [len(part) for part in parts]
    if len(parts) not in (2, 3) or sum(widths) != source.shape[1]:
        raise ValueError(
            f"x of shape {tuple(source.shape)} has no {len(parts)} parts of {widths} columns"
        )

    def chosen(part: np.ndarray) -> np.ndarray:
        xd = f32(x)
        y = empty(xd.shape[0], len(part), like=xd)
        _core.gather_columns(xd, index(part, "parts", xd), y)
        return y

    nodes = nodes_of(x)
    if nodes is None:
        return [chosen(part) for part in parts]
    rows = source.shape[0]
    del source
    ys = [lazy_output((rows, len(part)), partial(chosen, part)) for part in parts]

    def vjp(dys: list[Any], grads: Gradients) -> None:
        like = next(dy for dy in dys if dy is not None)
        given = [
            zeros(rows, n, like=like) if dy is None else dy
            for n, dy in zip(widths, dys, strict=True)
        ]
        dys.clear()
        dx = empty(rows, sum(widths), like=like)
        _core.concat_columns(given[0], given[1], given[2] if len(given) > 2 else None, dx)
        places = np.concatenate(parts)
        if (np.diff(places) != 1).any():
            back = np.argsort(places).astype(np.int32)
            side_by_side, dx = dx, empty(rows, sum(widths), like=like)
            _core.gather_columns(side_by_side, index(back, "parts", like), dx)
        grads.put(0, dx)

    return record_several(nodes, ys, vjp, (False,) * len(ys))


def _check_heads(x: Any, head_dim: int, name: str) -> None:
    if head_dim < 1 or x.shape[1] % head_dim:
        raise ValueError(
            f"{name} has {x.shape[1]} columns, which are no whole number of heads of {head_dim}"
        )


@wide.in_float64(wide.attention, 3)
def attention(
    q: Array,
    k: Array,
    v: Array,
    offsets: np.ndarray,
    head_dim: int,
    scale: float,
    k_offsets: np.ndarray | None = None,
    window: int = 0,
    ahead: int = 0,
    softcap: float = 0.0,
) -> Array:
    """Grouped-query attention over packed sequences, causal by default.

    q [N, H * D], k and v [M, G * D], H a multiple of G. int32 [S + 1] `offsets` bounds the
    sequences in q, and `k_offsets` those in k and v (by default the same). The last query of a
    sequence has the place of its last key. A query sees the keys up to its place, and `ahead` more.
    With a `window` above 0, it sees only the last `window` keys up to its place, and the cost grows
    with the window instead of the length. With a `softcap` above 0, scores s become
    softcap tanh(s / softcap), as in Gemma 2.
    """
    q, k, v = (
        check_matrix(t if isinstance(t, Tensor) else f32(t, n), n)
        for t, n in ((q, "q"), (k, "k"), (v, "v"))
    )
    head_dim, window, ahead, scale, softcap = (
        whole(head_dim, "head_dim", 1),
        whole(window, "window", 0),
        whole(ahead, "ahead", 0),
        real(scale, "scale"),
        real(softcap, "softcap", 0),
    )
    k_offsets = offsets if k_offsets is None else k_offsets
    for given, name in ((q, "q"), (k, "k"), (v, "v")):
        _check_heads(given, head_dim, name)
    grouped = 2 * k.shape[1] <= q.shape[1]  # small against q: checkpoints keep k and v too

    def heads(x: Array) -> np.ndarray:
        return f32(x).reshape(x.shape[0], x.shape[1] // head_dim, head_dim)

    def forward() -> tuple[np.ndarray | None, ...]:
        qd, kd, vd = heads(q), heads(k), heads(v)
        o, lse = empty(*qd.shape, like=qd), empty(*qd.shape[:2], like=qd)
        _core.attention_forward(
            qd, kd, vd, offsets, k_offsets, scale, softcap, window, ahead, o, lse
        )
        return (o, lse, kd, vd) if grouped else (o, lse, None, None)

    o, lse, kept_k, kept_v = remembered(forward)
    nodes = nodes_of(q, k, v)
    if nodes is None:
        return o.reshape(q.shape)

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        qd, kd, vd = (
            heads(q),
            heads(k) if kept_k is None else kept_k,
            heads(v) if kept_v is None else kept_v,
        )
        dq, dk, dv = (empty(*t.shape, like=t) for t in (qd, kd, vd))
        _core.attention_grad(
            dy.reshape(o.shape),
            qd,
            kd,
            vd,
            o,
            lse,
            offsets,
            k_offsets,
            scale,
            softcap,
            window,
            ahead,
            dq,
            dk,
            dv,
        )
        for i, d in enumerate((dq, dk, dv)):
            grads.put(i, d.reshape(d.shape[0], d.shape[1] * head_dim))

    return record_on(nodes, o.reshape(q.shape), vjp)


@wide.in_float64(wide.swiglu, 2)
def swiglu(gate: Array, up: Array, in_place: bool = False) -> Array:
    """silu(gate) * up (Shazeer, arXiv:2002.05202). Cheap: recomputed, not kept.

    With `in_place` the gradient overwrites gate and up: for fresh values without other readers.
    """
    return _gated(gate, up, in_place, _core.swiglu_forward, _core.swiglu_grad)


@wide.in_float64(wide.geglu, 2)
def geglu(gate: Array, up: Array, in_place: bool = False) -> Array:
    """gelu(gate) * up with GELU's tanh form (Shazeer, arXiv:2002.05202), otherwise as `swiglu`."""
    return _gated(gate, up, in_place, _core.geglu_forward, _core.geglu_grad)


@wide.in_float64(wide.glu, 2)
def glu(gate: Array, up: Array, in_place: bool = False) -> Array:
    """sigmoid(gate) * up (Dauphin et al., arXiv:1612.08083), otherwise as `swiglu`."""
    return _gated(gate, up, in_place, _core.glu_forward, _core.glu_grad)


def _gated(gate: Array, up: Array, in_place: bool, forward: Callable, grad: Callable) -> Array:
    g, u = f32(gate, "gate"), f32(up, "up")
    if g.shape != u.shape:
        raise ValueError(f"gate and up must have one shape, got {g.shape} and {u.shape}")
    # Kernels on devices cannot overwrite their inputs.
    over = [
        in_place and isinstance(d, np.ndarray) and not reads_output(x)
        for x, d in ((gate, g), (up, u))
    ]

    def recompute() -> np.ndarray:
        out = empty(*g.shape, like=g)
        forward(g, u, out)
        return out

    nodes = nodes_of(gate, up)
    if nodes is None:
        return recompute()

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dg, du = (
            x if may else empty(*x.shape, like=x) for x, may in zip((g, u), over, strict=True)
        )
        grad(dy, g, u, dg, du)
        grads.put(0, dg)
        grads.put(1, du)

    return record_on(nodes, lazy_output(g.shape, recompute), vjp, recompute)


@wide.in_float64(wide.add, 2)
def add(a: Array, b: Array) -> Array:
    """a + b of equal shapes."""
    shapes = [x.shape if hasattr(x, "shape") else np.shape(x) for x in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"a and b must have one shape, got {shapes[0]} and {shapes[1]}")

    def total() -> np.ndarray:
        ad, bd = f32(a), f32(b)
        y = empty(*ad.shape, like=ad)
        _core.add(ad, bd, y)
        return y

    nodes = nodes_of(a, b)
    if nodes is None:
        return total()

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        grads.put(0, dy, own=False)
        grads.put(1, dy, own=False)

    return record_on(nodes, lazy_output(shapes[0], total), vjp)


@wide.in_float64(wide.scale, 1)
def scale(x: Array, factor: float) -> Array:
    """factor * x."""
    xd, factor = f32(x), real(factor, "factor")
    y = empty(*xd.shape, like=xd)
    _core.scale(factor, xd, y)
    nodes = nodes_of(x)
    if nodes is None:
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx = empty(*dy.shape, like=dy)
        _core.scale(factor, dy, dx)
        grads.put(0, dx)

    return record_on(nodes, y, vjp)


@wide.in_float64(wide.scale_heads, 2)
def scale_heads(x: Array, factors: Array) -> Array:
    """x [N, H * E] with the E columns of each head multiplied by its factor [H]."""
    xd, f = f32_matrix(x), f32(factors, "factors")
    (rows, columns), heads = xd.shape, len(f)
    if f.ndim != 1 or not heads or columns % heads:
        raise ValueError(f"x has {columns} columns, which are not those of {f.shape} factors")

    def scaled(source: np.ndarray) -> np.ndarray:
        y = empty(rows, heads, columns // heads, like=source)
        _core.map_multiply(source.reshape(y.shape), f.reshape(1, heads, 1), y)
        return y.reshape(rows, columns)

    y = scaled(xd)
    nodes = nodes_of(x, factors)
    if nodes is None:
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        if grads.wanted(1):
            by_column = empty(columns, like=dy)
            _core.column_dot(dy, xd, None, by_column)
            by_head = empty(heads, 1, like=dy)
            _core.axis_sum(by_column.reshape(heads, columns // heads, 1), 1.0, by_head)
            grads.put(1, by_head.reshape(heads))
        grads.put(0, scaled(dy))

    return record_on(nodes, y, vjp)


def capped(x: Array, softcap: float) -> Array:
    """softcap tanh(x / softcap), as Gemma 2 caps logits; softcap > 0."""
    c = real(softcap, "softcap", above=0)
    return scale(UFUNCS[np.tanh](scale(x, 1 / c)), c)


@wide.in_float64(wide.sigmoid, 1)
def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) of x [...]."""
    xd = f32(x)
    y = empty(*xd.shape, like=xd)
    _core.map_sigmoid(xd, y)
    nodes = nodes_of(x)
    if nodes is None:
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx = empty(*y.shape, like=dy)
        _core.map_sigmoid_grad(dy, y, dx)
        grads.put(0, dx)

    return record_on(nodes, y, vjp)


@wide.in_float64(wide.gather_rows, 1)
def gather_rows(x: Array, rows: np.ndarray) -> Array:
    """Rows `rows` int32 [M] of x [N, D]."""
    xd = f32_matrix(x)
    rows = index(rows, "rows", xd)
    y = empty(*rows.shape, xd.shape[1], like=xd)
    _core.gather_rows(xd, rows, y)
    nodes = nodes_of(x)
    if nodes is None:
        return y
    shape = xd.shape
    del xd

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx = empty(*shape, like=dy)
        _core.scatter_add_rows(dy, rows, dx)
        grads.put(0, dx)

    return record_on(nodes, y, vjp)


@wide.in_float64(wide.transposed, 1)
def transposed(x: Array) -> Array:
    """x^T of a matrix."""
    y = transpose(f32_matrix(x))
    nodes = nodes_of(x)
    if nodes is None:
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        grads.put(0, transpose(f32(dy)))

    return record_on(nodes, y, vjp)


@wide.in_float64(wide.append, 1)
def append(x: Array, tail: np.ndarray, axis: int) -> Array:
    """x with the constant `tail` appended along an axis."""
    xd = f32(x)
    axis = whole(axis, "axis", -xd.ndim, xd.ndim - 1)
    y = on_device_of(xd, np.concatenate((np.asarray(xd), np.asarray(f32(tail, "tail"))), axis))
    nodes = nodes_of(x)
    if nodes is None:
        return y
    size = xd.shape[axis]
    del xd

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        grads.put(
            0, on_device_of(dy, np.ascontiguousarray(np.take(np.asarray(dy), range(size), axis)))
        )

    return record_on(nodes, y, vjp)


@wide.in_float64(wide.dropout, 1)
def dropout(x: Array, p: float, seed: int) -> Array:
    """Zeroes elements with probability p in [0, 1) and scales the others by 1 / (1 - p).

    `seed` determines the mask.
    """
    p, seed = real(p, "dropout", 0, below=1), whole(seed, "seed")
    xd = f32(x)
    y = empty(*xd.shape, like=xd)
    _core.dropout(xd, seed, p, y)
    nodes = nodes_of(x)
    if nodes is None:
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx = empty(*dy.shape, like=dy)
        _core.dropout(dy, seed, p, dx)
        grads.put(0, dx)

    return record_on(nodes, y, vjp)


__all__ = [
    "Projection",
    "Tensor",
    "add",
    "attention",
    "dropout",
    "gather_rows",
    "geglu",
    "append",
    "linear",
    "lora_linear",
    "project",
    "project_all",
    "rms_norm",
    "rope",
    "rope_all",
    "scale",
    "split_columns",
    "swiglu",
    "transposed",
]
