"""The operations of models in float64, from NumPy's functions.

An operation whose arrays include one of float64 computes in float64, so that finite differences can
check a model's gradients. Nothing here is fast. Arguments are those of the float32 operations.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.functions import sigmoid as sigmoid_of, silu, softmax
from pyloss.autograd.tape import nodes_of
from pyloss.autograd.tensor import Tensor
from pyloss.ops.arrays import i32
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

#: Added to the sum that `route_sigmoid` divides by.
SIGMOID_EPS = 1e-6

_FLOAT64 = np.dtype(np.float64)


def is_wide(*arrays: Any) -> bool:
    """Whether any of these is an array or Tensor of float64 on the host."""
    for x in arrays:
        if isinstance(x, np.ndarray | Tensor) and x.dtype == _FLOAT64:
            return True
    return False


def in_float64(wide: Callable, count: int) -> Callable:
    """A decorator: `wide` computes if one of the first `count` arguments is of float64."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            given = args[:count] if len(args) >= count else (*args, *kwargs.values())
            return (wide if is_wide(*given) else function)(*args, **kwargs)

        return chosen

    return decorate


def _value(x: Any) -> Any:
    """A Tensor where a gradient is recorded, else a float64 array."""
    if x is None or isinstance(x, Tensor):
        return x
    if isinstance(x, Weight):
        return x.dequantize().astype(np.float64)
    if isinstance(x, WeightStack):
        return np.stack([_value(matrix) for matrix in x.matrices])
    nodes = nodes_of(x)
    return np.asarray(x, np.float64) if nodes is None else Tensor(x, nodes[0])


def _rows(x: Any, rows: Any, name: str) -> Any:
    chosen = i32(rows, name)
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < x.shape[0]:
        raise ValueError(
            f"{name} must lie in [0, {x.shape[0]}), got values from {chosen.min()} to "
            f"{chosen.max()}"
        )
    return _value(x)[chosen]


def embedding(ids: Any, weight: Any) -> Any:
    return _rows(weight, ids, "ids")


def rms_norm(x: Any, weight: Any, eps: float = 1e-5) -> Any:
    x, w = _value(x), _value(weight)
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * w


def rope_all(
    xs: Any,
    positions: Any,
    cos: Any,
    sin: Any,
    in_place: bool = False,
    head_dim: int | None = None,
) -> list[Any]:
    c, s = (np.asarray(t, np.float64)[np.asarray(positions)][:, None] for t in (cos, sin))
    half, found = c.shape[-1], []
    for x in map(_value, xs):
        heads = np.reshape(x, (x.shape[0], -1, 2 * half if head_dim is None else head_dim))
        a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        turned = np.concatenate([a * c - b * s, b * c + a * s, rest], -1)
        found.append(np.reshape(turned, x.shape))
    return found


def split_columns(x: Any, *parts: Any) -> list[Any]:
    value = _value(x)
    return [value[:, part] for part in parts]


def attention(
    q: Any,
    k: Any,
    v: Any,
    offsets: Any,
    head_dim: int,
    scale: float,
    k_offsets: Any = None,
    window: int = 0,
    ahead: int = 0,
    softcap: float = 0.0,
) -> Any:
    q, k, v = (np.reshape(_value(t), (t.shape[0], -1, head_dim)) for t in (q, k, v))
    shared, parts = q.shape[1] // k.shape[1], []
    k_offsets = offsets if k_offsets is None else k_offsets
    for i in range(len(offsets) - 1):
        rows, keys = (slice(o[i], o[i + 1]) for o in (offsets, k_offsets))
        qs, ks, vs = q[rows], np.repeat(k[keys], shared, 1), np.repeat(v[keys], shared, 1)
        ago = np.arange(len(qs))[:, None] + len(ks) - len(qs) - np.arange(len(ks))
        seen = (ago >= -ahead) & ((ago < window) if window else True)
        scores = np.einsum("qhd,khd->hqk", qs, ks) * scale
        if softcap:
            scores = np.tanh(scores / softcap) * softcap
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - np.max(scores, -1, keepdims=True))
        weights = weights / np.sum(weights, -1, keepdims=True)
        parts.append(np.einsum("hqk,khd->qhd", weights, vs))
    return np.reshape(np.concatenate(parts), (q.shape[0], -1))


def short_conv(x: Any, weight: Any, bias: Any, offsets: Any) -> Any:
    x, w, bias = _value(x), _value(weight), _value(bias)
    d = w.shape[0]
    return _convolved(x[:, :d] * x[:, 2 * d :], w, bias, offsets) * x[:, d : 2 * d]


def conv_silu(x: Any, weight: Any, bias: Any, offsets: Any) -> Any:
    return silu(_convolved(_value(x), _value(weight), _value(bias), offsets))


def _convolved(inner: Any, w: Any, bias: Any, offsets: Any) -> Any:
    d, taps = w.shape[0], w.shape[2]
    parts = []
    for i in range(len(offsets) - 1):
        rows, n = inner[offsets[i] : offsets[i + 1]], int(offsets[i + 1] - offsets[i])
        padded = np.concatenate([np.zeros((taps - 1, d)), rows])
        total = padded[:n] * w[:, 0, 0]
        for t in range(1, taps):
            total = total + padded[t : t + n] * w[:, 0, t]
        parts.append(total if bias is None else total + bias)
    return np.concatenate(parts)


def delta_rule(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    offsets: Any,
    key_dim: int,
    scale: float,
    eps: float = 1e-6,
) -> Any:
    q, k = (_by_heads(_value(x), key_dim, g.shape[1], eps) for x in (q, k))
    return _recurrence(q * scale, k, v, g, beta, offsets, True)


def state_scan(x: Any, dt: Any, g: Any, b: Any, c: Any, offsets: Any, state_dim: int) -> Any:
    c, b = (_by_heads(_value(one), state_dim, g.shape[1], None) for one in (c, b))
    return _recurrence(c, b, x, g, dt, offsets, False)


def _by_heads(x: Any, dim: int, heads: int, eps: float | None) -> Any:
    """Queries or keys of all heads of values; without `eps` they have any length."""
    groups = x.shape[1] // dim
    x = np.reshape(x, (x.shape[0], groups, dim))
    if eps is not None:
        x = x / np.sqrt(np.sum(x * x, -1, keepdims=True) + eps)
    return np.repeat(x, heads // groups, 1)


def _recurrence(q: Any, k: Any, v: Any, g: Any, beta: Any, offsets: Any, delta: bool) -> Any:
    gate, rate, (n, heads) = np.exp(_value(g)), _value(beta), g.shape
    v = np.reshape(_value(v), (n, heads, v.shape[1] // heads))
    found = []
    for i in range(len(offsets) - 1):
        state: Any = np.zeros((heads, k.shape[2], v.shape[2]))
        for t in range(int(offsets[i]), int(offsets[i + 1])):
            state = state * gate[t][:, None, None]
            error = v[t] - np.sum(k[t][:, :, None] * state, 1) if delta else v[t]
            update = rate[t][:, None] * error
            state = state + k[t][:, :, None] * update[:, None, :]
            found.append(np.reshape(np.sum(q[t][:, :, None] * state, 1), (1, -1)))
    return np.concatenate(found) if found else np.reshape(v, (0, heads * v.shape[2]))


def delta_gates(a: Any, b: Any, a_log: Any, dt_bias: Any) -> list[Any]:
    x, b = _value(a) + _value(dt_bias), _value(b)
    softplus = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    return [-np.exp(_value(a_log)) * softplus, 1 / (1 + np.exp(-b))]


def scan_gates(x: Any, a_log: Any, dt_bias: Any, limits: tuple[float, float]) -> list[Any]:
    x = _value(x) + _value(dt_bias)
    softplus = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    dt = np.minimum(np.maximum(softplus, limits[0]), limits[1])
    return [dt, -np.exp(_value(a_log)) * dt]


def scale_heads(x: Any, factors: Any) -> Any:
    x, factors = _value(x), _value(factors)
    shape = x.shape
    by_head = np.reshape(x, (shape[0], len(factors), shape[1] // len(factors)))
    return np.reshape(by_head * factors[:, None], shape)


def swiglu(gate: Any, up: Any, in_place: bool = False) -> Any:
    return silu(_value(gate)) * _value(up)


def glu(gate: Any, up: Any, in_place: bool = False) -> Any:
    return _value(up) / (1 + np.exp(-_value(gate)))


def geglu(gate: Any, up: Any, in_place: bool = False) -> Any:
    g = _value(gate)
    inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    return 0.5 * g * (1 + np.tanh(inner)) * _value(up)


def add(a: Any, b: Any) -> Any:
    return _value(a) + _value(b)


def scale(x: Any, factor: float) -> Any:
    return _value(x) * factor


def scale_rows(x: Any, factor: Any) -> Any:
    return _value(x) * _value(factor)[:, None]


def visit_weights(logits: Any, experts: np.ndarray, visits: np.ndarray, normalize: bool) -> Any:
    """Of tokens' chosen `experts` and the rows of their `visits` [N, k]: [M]."""
    shares = np.take_along_axis(softmax(_value(logits)), experts, 1)
    if normalize:
        shares = shares / np.sum(shares, 1, keepdims=True)
    return np.reshape(shares, -1)[np.argsort(visits.reshape(-1))]


def sigmoid_weights(
    logits: Any, experts: np.ndarray, visits: np.ndarray, normalize: bool, factor: float
) -> Any:
    shares = np.take_along_axis(sigmoid(logits), experts, 1)
    if normalize:
        shares = shares / (np.sum(shares, 1, keepdims=True) + SIGMOID_EPS)
    return np.reshape(shares * factor, -1)[np.argsort(visits.reshape(-1))]


def dispatch(x: Any, routing: Any) -> Any:
    return _value(x)[routing.tokens]


def combine(x: Any, routing: Any) -> Any:
    return np.sum(_value(x)[routing.visits], 1)


def sigmoid(x: Any) -> Any:
    return sigmoid_of(_value(x))


def gather_rows(x: Any, rows: Any) -> Any:
    return _rows(x, rows, "rows")


def transposed(x: Any) -> Any:
    return np.transpose(_value(x))


def append(x: Any, tail: Any, axis: int) -> Any:
    return np.concatenate([_value(x), np.asarray(tail, np.float64)], axis)


def dropout(x: Any, p: float, seed: int) -> Any:
    """The mask of the float32 operation."""
    mask = np.empty(x.shape, np.float32)
    _core.dropout(np.ones(x.shape, np.float32), seed, p, mask)
    return _value(x) * (mask > 0) / (1 - p)


def project_all(x: Any, projections: Sequence[Any]) -> list[Any]:
    """y = m / norm * (x W^T + scale * dropout(x) A B) + bias for each projection."""
    return [_project(_value(x), _dropped(x, p), p) for p in projections]


def expert_project(x: Any, offsets: np.ndarray, projection: Any) -> Any:
    x, dropped = _value(x), _dropped(x, projection)
    arrays = ("weight", "bias", "lora_a", "lora_b", "m", "norm")
    stacks = {name: _value(getattr(projection, name)) for name in arrays}
    parts = []
    for e, (begin, end) in enumerate(itertools.pairwise(offsets)):
        own = {name: None if stack is None else stack[e] for name, stack in stacks.items()}
        for name in ("lora_a", "lora_b"):
            own[name] = None if stacks[name] is None else np.swapaxes(stacks[name][e], 0, 1)
        parts.append(_project(x[begin:end], dropped[begin:end], projection._replace(**own)))
    return np.concatenate(parts)


def _dropped(x: Any, p: Any) -> Any:
    """What the adapter of a projection reads."""
    return dropout(x, p.dropout, p.seed) if p.dropout and p.lora_a is not None else _value(x)


def _project(x: Any, dropped: Any, p: Any) -> Any:
    y = x @ np.swapaxes(_value(p.weight), -1, -2)
    if p.lora_a is not None:
        y = y + p.scale * ((dropped @ _value(p.lora_a)) @ _value(p.lora_b))
    if p.m is not None:
        norm = np.asarray(p.norm, np.float64)
        y = y * (_value(p.m) * np.divide(1, norm, out=np.zeros_like(norm), where=norm != 0))
    return y if p.bias is None else y + _value(p.bias)


def wide_projections(x: Any, projections: Sequence[Any]) -> bool:
    """Whether x or an array of the projections is of float64."""
    return is_wide(x) or any(
        is_wide(p.weight, p.bias, p.lora_a, p.lora_b, p.m) for p in projections
    )
