"""The differentiable operations of models: each a kernel call and the kernel call of its gradient.

Arrays are float32 unless said otherwise; leading axes are free ("[..., D]"). Operations take ndarrays or Tensors, and return a
Tensor only while a gradient is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import _core, device
from .autograd import Gradients, Tensor, data, keep, record, recording
from .weight_stack import WeightStack
from .weights import Weight

Array = Any  # numpy.ndarray or Tensor

def empty(*shape: int) -> np.ndarray:
    """An uninitialised float32 array over a reused buffer."""
    return _core.empty(shape)


def f32(x: Array, name: str = "x") -> np.ndarray:
    """The contiguous float32 ndarray of an argument; other real dtypes are converted."""
    array = device.on_host(data(x), name)
    if array.dtype == np.float32 and array.flags.carray:
        return array
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must hold real numbers, not {array.dtype}")
    return np.require(array, np.float32, ["C", "A"])


def i32(x: Any, name: str = "ids") -> np.ndarray:
    """The contiguous int32 ndarray of an integer argument."""
    array = np.asarray(x)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must hold integers, not {array.dtype}")
    if array.dtype.itemsize > 4 and array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
        raise ValueError(f"{name} must lie within the 32-bit integers, got values from {array.min()} to {array.max()}")
    return np.require(array, np.int32, ["C", "A"])


def matrix(weight: Array | Weight | WeightStack) -> Any:
    """A weight as the core takes it: the handle of what is stored, or a float32 ndarray."""
    return weight.handle if isinstance(weight, Weight | WeightStack) else f32(weight, "weight")


def _out_features(weight: Array | Weight) -> int:
    return weight.shape[0]


def frozen(weight: Array | Weight | WeightStack) -> Array:
    """What the tape sees of a weight: stored matrices are never trained."""
    return None if isinstance(weight, Weight | WeightStack) else weight


def _weight_grad(dy: np.ndarray, x: np.ndarray, grads: Gradients, i: int) -> None:
    """dW [O, I] = dy^T x."""
    dw = empty(dy.shape[-1], x.shape[-1])
    _core.matmul_tn(dy, x, 1.0, 0, dw)
    grads.put(i, dw)


def _column_sum(dy: np.ndarray) -> np.ndarray:
    out = empty(dy.shape[-1])
    _core.column_sum(dy, out)
    return out


def linear(x: Array, weight: Array | Weight, bias: Array | None = None) -> Array:
    """x [..., I] with weight [O, I] and bias [O]: x weight^T + bias, [..., O]."""
    xd, w, b = f32(x), matrix(weight), None if bias is None else f32(bias, "bias")
    y = empty(*xd.shape[:-1], _out_features(weight))
    _core.linear_forward(xd, w, b, None, None, 0.0, None, y)
    inputs = (x, frozen(weight), bias)
    if not recording(*(v for v in inputs if v is not None)):
        return y
    kept, shape = keep(x), xd.shape

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        if grads.wanted(0):
            dx, accumulate = _into(grads, 0, shape)
            _core.linear_input_grad(dy, w, None, None, accumulate, None, dx)
            grads.put(0, dx)
        if grads.wanted(1):
            _weight_grad(dy, f32(kept()), grads, 1)
        if grads.wanted(2):
            grads.put(2, _column_sum(dy))

    del xd
    return record(y, inputs, vjp)


def _into(grads: Gradients, i: int, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Where the gradient of input i goes: into what is there (1), or a new buffer (0)."""
    partial = grads.partial(i)
    if partial is not None and partial.dtype == np.float32 and partial.flags.c_contiguous:
        return partial, 1
    return empty(*shape), 0


def lora_linear(
    x: Array,
    weight: Array | Weight,
    bias: Array | None,
    lora_a: Array,
    lora_b: Array,
    scale: float,
    dropout: float = 0.0,
    seed: int = 0,
) -> Array:
    """x W^T + bias + scale dropout(x) A B for x [..., I], A [I, r], B [r, O] (Hu et al., arXiv:2106.09685).

    `dropout` in [0, 1) acts on the adapter's input alone; its mask is a function of `seed`.
    """
    xd, w, b = f32(x), matrix(weight), None if bias is None else f32(bias, "bias")
    ad, bd = f32(lora_a, "lora_a"), f32(lora_b, "lora_b")
    rows = xd.size // max(xd.shape[-1], 1)
    h, y = empty(rows, ad.shape[1]), empty(*xd.shape[:-1], _out_features(weight))
    if dropout:
        dropped = empty(*xd.shape)
        _core.dropout(xd, seed, dropout, dropped)
        _core.matmul_nn(dropped, ad, 1.0, 0, h)
        _core.linear_forward(xd, w, b, h, bd, scale, None, y)
        del dropped
    else:
        _core.lora_forward(xd, w, b, ad, bd, scale, None, h, y)
    inputs = (x, frozen(weight), bias, lora_a, lora_b)
    if not recording(*(v for v in inputs if v is not None)):
        return y
    kept, shape = keep(x), xd.shape

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dh = empty(*h.shape)
        if dropout or not grads.wanted(0):
            _core.matmul_nt(dy, bd, scale, 0, dh)
        if grads.wanted(0):
            dx, accumulate = _into(grads, 0, shape)
            if dropout:
                branch = empty(*shape)
                _core.matmul_nt(dh, ad, 1.0, 0, branch)
                _core.dropout(branch, seed, dropout, branch)
                _core.linear_input_grad(dy, w, None, None, accumulate, None, dx)
                _core.axpy(1.0, branch, dx)
                del branch
            else:
                _core.lora_input_grad(dy, w, ad, bd, scale, accumulate, None, dh, dx)
            grads.put(0, dx)
        if grads.wanted(3) or grads.wanted(1):
            inner = f32(kept())
            if grads.wanted(1):
                _weight_grad(dy, inner, grads, 1)
            if grads.wanted(3):
                if dropout:
                    again = empty(*shape)
                    _core.dropout(inner, seed, dropout, again)
                    inner = again
                # As [r, I]: the few rows of dh^T stay in registers while x streams by.
                da = empty(h.shape[1], shape[-1])
                _core.matmul_tn(dh, inner, 1.0, 0, da)
                grads.put(3, np.ascontiguousarray(da.T))
        if grads.wanted(2):
            grads.put(2, _column_sum(dy))
        if grads.wanted(4):
            db = empty(*bd.shape)
            _core.matmul_tn(h, dy, scale, 0, db)
            grads.put(4, db)

    del xd
    return record(y, inputs, vjp)


def embedding(ids: Any, weight: Array | Weight) -> Array:
    """Rows `ids` [...] (integers in [0, V)) of weight [V, D]: [..., D]."""
    index, w = i32(ids), matrix(weight)
    y = empty(*index.shape, weight.shape[1])
    _core.embedding_forward(index, w, y)
    if not recording(frozen(weight)):
        return y
    shape = weight.shape

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dw = np.zeros(shape, np.float32)
        _core.embedding_grad(dy, index, dw)
        grads.put(0, dw)

    return record(y, (weight,), vjp)


def rms_norm(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis (Zhang & Sennrich, arXiv:1910.07467). Recomputed, not kept."""
    xd, w = f32(x), f32(weight, "weight")
    y, rstd = empty(*xd.shape), empty(xd.size // max(xd.shape[-1], 1))
    _core.rms_norm_forward(xd, w, eps, y, rstd)
    if not recording(x, weight):
        return y
    kept = keep(x)
    del xd

    def again() -> np.ndarray:
        source = f32(kept())
        out = empty(*source.shape)
        _core.rms_norm_forward(source, w, eps, out, empty(rstd.size))
        return out

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        source = f32(kept())
        dx, dw = empty(*source.shape), empty(*w.shape) if grads.wanted(1) else None
        _core.rms_norm_grad(dy, source, w, rstd, dx, dw)
        grads.put(0, dx)
        if dw is not None:
            grads.put(1, dw)

    return record(y, (x, weight), vjp, again)


def rope(x: Array, positions: np.ndarray, cos: np.ndarray, sin: np.ndarray, in_place: bool = False) -> Array:
    """Rotates the halves of each head of x [N, heads * D] by the angles of its position (Su et al., arXiv:2104.09864).

    `cos`, `sin` [P, D/2] are the tables of positions 0..P-1, `positions` int32 [N]. `in_place` overwrites x: for fresh values
    that nobody else reads.
    """
    xd, head_dim = f32(x), 2 * cos.shape[1]
    y = xd if in_place else empty(*xd.shape)

    def rotate(source: np.ndarray, inverse: int, out: np.ndarray) -> None:
        heads = (source.shape[0], source.shape[1] // head_dim, head_dim)
        _core.rope(source.reshape(heads), positions, cos, sin, inverse, out.reshape(heads))

    rotate(xd, 0, y)
    if not recording(x):
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx = empty(*dy.shape)
        rotate(dy, 1, dx)
        grads.put(0, dx)

    return record(y, (x,), vjp)


def attention(
    q: Array,
    k: Array,
    v: Array,
    offsets: np.ndarray,
    head_dim: int,
    scale: float,
    k_offsets: np.ndarray | None = None,
    window: int = 0,
) -> Array:
    """Causal grouped-query attention over packed sequences: q [N, H * D], k and v [M, G * D], H a multiple of G.

    `offsets` int32 [S + 1] bounds the sequences in q, and `k_offsets` in k and v (the same where absent). The last query of a
    sequence sees all its keys. With a `window` above 0 a query sees the last `window` keys up to its own alone, and the cost
    grows with the window instead of the length. No gradient with `k_offsets`.
    """
    qd, kd, vd = (f32(t).reshape(t.shape[0], t.shape[1] // head_dim, head_dim) for t in (q, k, v))
    o, lse = empty(*qd.shape), empty(*qd.shape[:2])
    _core.attention_forward(qd, kd, vd, offsets, offsets if k_offsets is None else k_offsets, scale, window, o, lse)
    flat = (qd.shape[0], qd.shape[1] * head_dim)
    if not recording(q, k, v):
        return o.reshape(flat)
    if k_offsets is not None:
        raise ValueError("attention over a cache has no gradient")

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dq, dk, dv = (empty(*t.shape) for t in (qd, kd, vd))
        _core.attention_grad(dy.reshape(o.shape), qd, kd, vd, o, lse, offsets, scale, window, dq, dk, dv)
        for i, d in enumerate((dq, dk, dv)):
            grads.put(i, d.reshape(d.shape[0], d.shape[1] * head_dim))

    return record(o.reshape(flat), (q, k, v), vjp)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up (Shazeer, arXiv:2002.05202). Cheap: recomputed, not kept."""
    return _gated(gate, up, _core.swiglu_forward, _core.swiglu_grad)


def geglu(gate: Array, up: Array) -> Array:
    """gelu(gate) * up with GELU's tanh form (Shazeer, arXiv:2002.05202). Cheap: recomputed, not kept."""
    return _gated(gate, up, _core.geglu_forward, _core.geglu_grad)


def _gated(gate: Array, up: Array, forward: Callable, grad: Callable) -> Array:
    g, u = f32(gate), f32(up)
    y = empty(*g.shape)
    forward(g, u, y)
    if not recording(gate, up):
        return y

    def again() -> np.ndarray:
        out = empty(*g.shape)
        forward(g, u, out)
        return out

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dg, du = empty(*g.shape), empty(*g.shape)
        grad(dy, g, u, dg, du)
        grads.put(0, dg)
        grads.put(1, du)

    return record(y, (gate, up), vjp, again)


def add(a: Array, b: Array) -> Array:
    """a + b of equal shapes."""
    ad, bd = f32(a), f32(b)
    y = empty(*ad.shape)
    _core.add(ad, bd, y)
    if not recording(a, b):
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        grads.put(0, dy, own=False)
        grads.put(1, dy, own=False)

    return record(y, (a, b), vjp)


def gather_rows(x: Array, rows: np.ndarray) -> Array:
    """Rows `rows` int32 [M] of x [N, D]."""
    xd = f32(x)
    y = empty(len(rows), xd.shape[1])
    _core.gather_rows(xd, rows, y)
    if not recording(x):
        return y
    shape = xd.shape
    del xd

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx = empty(*shape)
        _core.scatter_add_rows(dy, rows, dx)
        grads.put(0, dx)

    return record(y, (x,), vjp)


def lengthen(x: Array, tail: np.ndarray, axis: int) -> Array:
    """x with the constant `tail` behind it along an axis."""
    xd = f32(x)
    y = np.concatenate((xd, tail), axis)
    if not recording(x):
        return y
    size = xd.shape[axis]
    del xd

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        grads.put(0, np.ascontiguousarray(np.take(dy, range(size), axis)))

    return record(y, (x,), vjp)


def dropout(x: Array, p: float, seed: int) -> Array:
    """Zeroes each element with probability p in [0, 1) and scales the others by 1/(1 - p); the mask is a function of `seed`."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout must be in [0, 1), not {p}")
    xd = f32(x)
    y = empty(*xd.shape)
    _core.dropout(xd, seed, p, y)
    if not recording(x):
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx = empty(*dy.shape)
        _core.dropout(dy, seed, p, dx)
        grads.put(0, dx)

    return record(y, (x,), vjp)


__all__ = [
    "Tensor",
    "add",
    "attention",
    "dropout",
    "embedding",
    "gather_rows",
    "geglu",
    "lengthen",
    "linear",
    "lora_linear",
    "rms_norm",
    "rope",
    "swiglu",
]
