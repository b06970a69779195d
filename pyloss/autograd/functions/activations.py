"""pyloss.softmax and its kind, of arrays and Tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss.arithmetic import (
    GRADIENT_READS,
    logsumexp_grad,
    reduced,
    row_map,
    row_map_grad,
    unary,
    unary_grad,
)
from pyloss.autograd.functions.apply import apply, operand, value_of
from pyloss.autograd.tensor import Tensor
from pyloss.checks.arrays import as_integers
from pyloss.checks.numbers import whole


def _real(x: Any) -> Any:
    """A Tensor or an array of floats; whole numbers become float32."""
    x = operand(x)
    if not isinstance(x, Tensor):
        x = np.asarray(x) if not hasattr(x, "dtype") else x
        if x.dtype.kind in "iub" or (x.ndim == 0 and isinstance(x, float | int)):
            x = x.astype(np.float32)
    return x


def _below_peak(xd: Any, axis: Any) -> Any:
    peak = np.max(xd, axis=axis, keepdims=True, initial=-np.inf)
    return xd - np.where(np.isfinite(peak), peak, 0)


def _stable_softmax(xd: Any, axis: Any) -> Any:
    found = np.exp(_below_peak(xd, axis))
    with np.errstate(invalid="ignore", divide="ignore"):
        return found / np.sum(found, axis=axis, keepdims=True)


def _stable_log_softmax(xd: Any, axis: Any) -> Any:
    below = _below_peak(xd, axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        return below - np.log(np.sum(np.exp(below), axis=axis, keepdims=True))


def _rows(
    name: str, x: Any, axis: Any, value: Callable, gradient: Callable[[Any, Any], Any]
) -> Any:
    """A function of rows of float32 in the core; `gradient(dy, y)`."""
    source = _real(x)
    last = axis in (-1, (-1,), source.ndim - 1)

    def forward(xd: Any) -> Any:
        found = row_map(name, xd) if last and xd.dtype == np.float32 else None
        return value(xd) if found is None else found

    def backward(i: int, dy: Any, y: Any, xd: Any) -> Any:
        found = row_map_grad(name, dy, y) if last and y.dtype == np.float32 else None
        return gradient(dy, y) if found is None else found

    return apply(forward, (source,), backward, "y")


def softmax(x: Any, axis: int | tuple[int, ...] = -1) -> Any:
    """exp(x) / sum(exp(x)) along an axis or several."""
    return _rows(
        "softmax",
        x,
        axis,
        lambda xd: _stable_softmax(xd, axis),
        lambda dy, y: y * (dy - np.sum(dy * y, axis=axis, keepdims=True)),
    )


def log_softmax(x: Any, axis: int | tuple[int, ...] = -1) -> Any:
    """x - logsumexp(x) along an axis or several."""
    return _rows(
        "log_softmax",
        x,
        axis,
        lambda xd: _stable_log_softmax(xd, axis),
        lambda dy, y: dy - np.exp(y) * np.sum(dy, axis=axis, keepdims=True),
    )


def _logsumexp(xd: Any, axis: Any, keepdims: bool) -> Any:
    peak = np.max(xd, axis=axis, keepdims=True, initial=-np.inf)
    peak = np.where(np.isfinite(peak), peak, 0)
    with np.errstate(divide="ignore"):
        sums = np.log(np.sum(np.exp(xd - peak), axis=axis, keepdims=True)) + peak
    return sums if keepdims else np.squeeze(sums, axis if axis is not None else None)


def logsumexp(x: Any, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """log(sum(exp(x))) along an axis, several, or all."""
    source = _real(x)
    axes = tuple(range(source.ndim)) if axis is None else axis
    rows = axes in (-1, (-1,), source.ndim - 1)

    def gradient(i: int, dy: Any, y: Any, xd: Any) -> Any:
        found = logsumexp_grad(dy, xd, y) if rows else None
        if found is not None:
            return found
        return dy.reshape(np.sum(xd, axis=axes, keepdims=True).shape) * _stable_softmax(xd, axes)

    def value(xd: Any) -> Any:
        found = reduced("logsumexp", xd, axes, keepdims)
        return _logsumexp(xd, axes, keepdims) if found is None else found

    return apply(value, (source,), gradient, "0y")


def _sigmoid(xd: Any) -> Any:
    small = np.exp(-np.abs(xd))
    return np.where(xd >= 0, 1, small) / (1 + small)


def _in_core(
    name: str, x: Any, value: Callable[[Any], Any], gradient: Callable[[Any, Any], Any]
) -> Any:
    """A function of one array; float32 in the core. `gradient(dy, read)` of what the core reads."""
    reads = GRADIENT_READS[name]

    def forward(xd: Any) -> Any:
        found = unary(name, xd)
        return value(xd) if found is None else found

    def backward(i: int, dy: Any, y: Any, xd: Any) -> Any:
        read = y if reads == "y" else xd
        found = unary_grad(name, dy, read)
        return gradient(dy, read) if found is None else found

    return apply(forward, (_real(x),), backward, "y" if reads == "y" else "0")


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return _in_core("sigmoid", x, _sigmoid, lambda dy, y: dy * (y * (1 - y)))


def silu(x: Any) -> Any:
    """x sigmoid(x)."""

    def gradient(dy: Any, xd: Any) -> Any:
        gate = _sigmoid(xd)
        return dy * (gate * (1 + xd * (1 - gate)))

    return _in_core("silu", x, lambda xd: xd * _sigmoid(xd), gradient)


def relu(x: Any) -> Any:
    """max(x, 0), whose derivative at 0 is 0."""
    return _in_core(
        "relu", x, lambda xd: np.maximum(xd, 0), lambda dy, read: np.where(read > 0, dy, 0)
    )


def _erf(xd: Any) -> Any:
    values = np.frompyfunc(math.erf, 1, 1)(np.asarray(xd, np.float64))
    return np.asarray(values, np.float64)


def gelu(x: Any, approximate: str = "none") -> Any:
    """x P(X <= x) for a standard normal X (Hendrycks & Gimpel, arXiv:1606.08415).

    `approximate="tanh"` is the form with tanh.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', not {approximate!r}")
    inner = math.sqrt(2 / math.pi)

    def below(xd: Any) -> Any:
        if approximate == "tanh":
            return 0.5 * (1 + np.tanh(inner * (xd + 0.044715 * xd**3)))
        return (0.5 * (1 + _erf(xd / math.sqrt(2)))).astype(xd.dtype)

    def gradient(dy: Any, xd: Any) -> Any:
        share = below(xd)
        if approximate == "tanh":
            slope = 2 * share * (1 - share) * inner * (1 + 3 * 0.044715 * xd**2)
        else:
            slope = np.exp(-0.5 * xd * xd) / math.sqrt(2 * math.pi)
        return dy * (share + xd * slope)

    name = "gelu_tanh" if approximate == "tanh" else "gelu"
    return _in_core(name, x, lambda xd: xd * below(xd), gradient)


def one_hot(labels: Any, num_classes: int, dtype: Any = np.float32) -> np.ndarray:
    """labels [...], whole numbers in [0, num_classes) -> [..., num_classes], a constant.

    ValueError for a label outside.
    """
    ids = as_integers(value_of(operand(labels)), "labels")
    count = whole(num_classes, "num_classes", 1)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ValueError(
            f"labels must lie in [0, {count}), got values from {ids.min()} to {ids.max()}"
        )
    return (ids[..., None] == np.arange(count)).astype(dtype)
