"""What the row losses share: arrays as the core takes them, the one call for loss and gradient, weights, reductions, `out=`.

The public functions with their checks and formulas are in `losses.py`; the mathematics is in `csrc/losses/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import Gradients, LazyTensor, Tensor, data, record, recording
from pyloss.checks.arrays import as_array, as_integers
from pyloss.checks.numbers import SMALLEST, shown, whole
from pyloss.runtime import device

REDUCTIONS = ("none", "sum", "mean")
MOST_UNSIGNED = (1 << 64) - 1  # of labels


def new_like(array: Any) -> Any:
    """An uninitialised contiguous array of the shape and type of `array`, where it is, over a reused buffer."""
    if isinstance(array, device.DeviceArray):
        return device.empty(array.shape, array.dtype, array)
    kind = {"f8": "f64", "f4": "f32", "f2": "f16"}.get(array.dtype.str[1:], "u16")
    out = _core.empty(array.shape, kind)
    return out.view(array.dtype) if kind == "u16" else out


def logit_rows(x: Any, name: str, elementwise: bool = False) -> Any:
    """[..., V] as float64, float32, float16 or bfloat16 with V >= 1 contiguous values a row; copied only if it has to be.

    V may be 0 if `elementwise`. Other real numbers become float32. Arrays on a device stay there. Raises TypeError and ValueError
    naming the argument.
    """
    array = data(x, name)
    if isinstance(array, device.DeviceArray):
        if array.kind not in ("f64", "f32", "f16", "bf16"):
            raise TypeError(
                f"{name} on a device must be float64, float32, float16 or bfloat16, not {array.dtype}"
            )
    elif array.dtype.kind == "f" or device.is_bfloat16(array.dtype):
        if array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        elif not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
    elif array.dtype.kind in "iu":
        array = array.astype(np.float32)
    else:
        raise TypeError(f"{name} must hold real numbers, not {array.dtype}")
    if array.ndim < 1 or (array.shape[-1] < 1 and not elementwise):
        raise ValueError(f"{name} must be [..., V] with V at least 1, got shape {array.shape}")
    if isinstance(array, device.DeviceArray):
        return array
    if not array.flags.aligned or (array.shape[-1] > 1 and array.strides[-1] != array.itemsize):
        array = np.require(array, requirements=["C", "A"])
    return array


def core_rows(array: Any) -> Any:
    """`logit_rows`' result for the core, which takes at most two leading axes: others are joined, by a copy if need be."""
    return array if array.ndim <= 3 else array.reshape(-1, *array.shape[-2:])


def accumulator(*arrays: Any) -> np.dtype:
    """The type of losses: float64 if any of the logits is, else float32."""
    return np.dtype(np.float64 if any(a.dtype == np.float64 for a in arrays) else np.float32)


def row_weights(weights: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Weights, one per row of `shape`; they get no gradient."""
    if weights is None:
        return None
    array = as_array(weights, "weights")
    if array.dtype.kind not in "fiub" and not device.is_bfloat16(array.dtype):
        raise TypeError(f"weights must hold real numbers, not {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"weights have shape {array.shape}, expected one per row: {shape}")
    return array


def row_labels(
    labels: Any,
    weights: np.ndarray | None,
    shape: tuple[int, ...],
    vocabulary: int,
    ignore_index: int,
) -> np.ndarray:
    """Labels as the kernels take them: int32 [N] in [0, V), -1 where ignored.

    A row of weight 0 is ignored as well: it stays out even when its loss is not finite. An `ignore_index` that the labels' own
    type cannot hold ignores none.
    """
    sentinel = whole(ignore_index, "ignore_index", SMALLEST, MOST_UNSIGNED)
    array = as_integers(labels, "labels")
    if array.shape != shape:
        raise ValueError(
            f"labels have shape {array.shape}, expected one per row of logits: {shape}"
        )
    ignored = array == sentinel
    outside = ((array < 0) | (array >= vocabulary)) & ~ignored
    if outside.any():
        where = tuple(int(i) for i in np.argwhere(outside)[0])
        label = (
            f"label {shown(int(array[where]))} at position {where[0] if len(where) == 1 else where}"
        )
        raise ValueError(f"{label} is outside [0, {vocabulary}) and not ignore_index {sentinel}")
    if weights is not None:
        ignored = ignored | (weights == 0)
    # In the kernels' type before the sentinel: the labels' own may have no -1.
    index = np.where(ignored, 0, array).astype(np.int32)
    return np.where(ignored, np.int32(-1), index).reshape(-1)


class Call:
    """One loss over some arrays: the kernel runs when its values or its gradients are first asked for, for both if it can.

    `run(factors, wanted, loss)` fills `loss` and returns the gradients of the inputs that `wanted` marks (None for others),
    each row's scaled by `factors` (None: 1). With `like`, an array on a device, the loss is there too.
    """

    def __init__(
        self,
        run: Callable,
        shape: tuple[int, ...],
        dtype: np.dtype,
        weights: np.ndarray | None,
        out: Any,
        like: Any,
    ):
        self.like = like if isinstance(like, device.DeviceArray) else None
        self.run, self.shape, self.dtype = run, shape, dtype
        self.weights = None if weights is None else np.asarray(weights, dtype, order="C")
        self.out = out
        self.values: Any = None

    def _new(self) -> Any:
        if self.like is not None:
            return device.empty(self.shape, self.dtype, self.like)
        return _core.empty(self.shape, "f64" if self.dtype == np.float64 else "f32")

    def _weighted(self, loss: Any) -> Any:
        """A row of weight 0 gives 0 whatever its loss is."""
        if isinstance(loss, device.DeviceArray):
            if self.weights is not None:
                loss.write(self._weighted(loss.numpy()))
        elif self.weights is not None:
            np.multiply(loss, self.weights, out=loss, where=self.weights != 0)
            loss[self.weights == 0] = 0
        return loss

    def loss(self) -> Any:
        """The losses of the rows, weighted; computed once."""
        if self.values is None:
            direct = isinstance(self.out, device.DeviceArray) or (
                self.out is not None and self.out.flags.c_contiguous
            )
            loss = self.out if direct and self.out is not None else self._new()
            self.run(None, (), loss)
            self.values = self._weighted(loss)
        return self.values

    def gradients(self, dy: np.ndarray, wanted: Sequence[bool]) -> Sequence[np.ndarray | None]:
        """Those of the `wanted` arrays for the gradient `dy` of the losses."""
        factors = np.asarray(dy, self.dtype, order="C")
        if self.weights is not None:
            factors = np.where(self.weights == 0, 0, factors * self.weights)
        loss = self._new()
        found = self.run(np.asarray(factors, order="C"), wanted, loss)
        if self.values is None:
            self.values = self._weighted(loss)
        return found


def finish(
    run: Callable,
    inputs: Sequence[Any],
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    weights: np.ndarray | None,
    total: float,
    reduction: str,
    out: Any,
    like: Any = None,
) -> Any:
    """The result of a loss: per row [...] or reduced, recorded for the gradients of `inputs`, written to `out` where given.

    `run` is `Call`'s, and "mean" divides by `total`.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, not {reduction!r}"
        )
    traced = recording(*inputs)
    if out is not None:
        check_out(
            out, shape if reduction == "none" else (), dtype, like if reduction == "none" else None
        )
        if traced:
            raise ValueError("out cannot be used while a gradient is recorded")
    call = Call(run, shape, dtype, weights, out if reduction == "none" else None, like)
    result: Any
    if traced:

        def vjp(dy: np.ndarray, grads: Gradients) -> None:
            wanted = [grads.wanted(i) for i in range(len(inputs))]
            for i, gradient in enumerate(call.gradients(dy, wanted)):
                if gradient is not None:
                    grads.put(i, gradient)

        result = record(LazyTensor(shape, dtype, call.loss), inputs, vjp)
    else:
        result = call.loss()
    if reduction != "none":
        result = (
            result.sum(dtype=np.float64).astype(dtype)
            if not isinstance(result, Tensor)
            else result.sum()
        )
    if reduction == "mean":
        result = result * dtype.type(1 / total if total else 0)
    if out is None or result is out:
        return result
    out[...] = result
    return out


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype, like: Any = None) -> None:
    """Whether a result of this shape and type, made of `like`, can be written to `out`; TypeError or ValueError otherwise."""
    on_device = isinstance(like, device.DeviceArray)
    if not isinstance(out, device.DeviceArray if on_device else np.ndarray):
        wanted = "pyloss.DeviceArray, as the logits are" if on_device else "numpy.ndarray"
        raise TypeError(f"out must be a {wanted}, not {type(out).__name__}")
    if on_device:
        device.same_place(("the logits", "out"), (like, out))
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}, expected {shape}")
    if out.dtype != dtype:
        raise ValueError(f"out has dtype {out.dtype}, expected {dtype}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only")


def counted_weight(weights: np.ndarray | None, counted: np.ndarray) -> float:
    """What a mean divides by: the weights of the rows that count (bool [N]), or their number."""
    if weights is None:
        return float(np.count_nonzero(counted))
    return float(np.asarray(weights, np.float64).reshape(-1)[counted].sum())


def flat(array: Any) -> Any:
    """Per-row numbers [...] as the core takes them, [N]; None stays None."""
    return None if array is None else array.reshape(-1)


def class_loss(
    kernel: str,
    logits: Any,
    labels: Any,
    options: Sequence[float],
    *,
    weights: Any,
    ignore_index: int,
    by_class: Callable[[int], np.ndarray] | None = None,
    reduction: str,
    out: Any,
) -> Any:
    """A loss of logits [..., V] with one label per row. `by_class(V)`: numbers [V] that multiply the loss of their label."""
    array = logit_rows(logits, "logits")
    shape, dtype, rows = array.shape[:-1], accumulator(array), core_rows(array)
    weights = row_weights(weights, shape)
    index = row_labels(labels, weights, shape, array.shape[-1], ignore_index)
    total = counted_weight(weights, index >= 0)
    if by_class is not None:
        factors = by_class(array.shape[-1])[np.maximum(index, 0)].reshape(shape)
        weights = factors if weights is None else factors * weights

    def run(
        dloss: np.ndarray | None, wanted: Sequence[bool], loss: np.ndarray
    ) -> list[np.ndarray | None]:
        dx = new_like(array) if any(wanted) else None
        device.call(kernel, (rows, index, *options, flat(dloss)), (flat(loss), dx))
        return [dx]

    return finish(
        run,
        (logits,),
        shape,
        dtype,
        weights=weights,
        total=total,
        reduction=reduction,
        out=out,
        like=array,
    )


def two_arrays(
    kernel: str,
    names: tuple[str, str],
    inputs: tuple[Any, Any],
    options: Sequence[float],
    *,
    elementwise: bool,
    weights: Any,
    reduction: str,
    out: Any,
) -> Any:
    """A loss of two arrays [..., V]: one value per row, or per element."""
    a, b = (logit_rows(x, name, elementwise) for x, name in zip(inputs, names, strict=True))
    device.same_place(names, (a, b))
    if a.shape != b.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same shape, got {a.shape} and {b.shape}"
        )
    shape, dtype = a.shape if elementwise else a.shape[:-1], accumulator(a, b)
    weights = row_weights(weights, shape)
    counted = np.full(math.prod(shape), True) if weights is None else (weights != 0).reshape(-1)
    rows = core_rows(a), core_rows(b)

    def run(
        dloss: np.ndarray | None, wanted: Sequence[bool], loss: np.ndarray
    ) -> list[np.ndarray | None]:
        found = [
            new_like(x) if want else None
            for x, want in zip((a, b), wanted or (False, False), strict=True)
        ]
        if not elementwise:
            dloss, loss = flat(dloss), flat(loss)
        device.call(kernel, (*rows, *options, dloss), (loss, *found))
        return found

    total = counted_weight(weights, counted)
    return finish(
        run,
        inputs,
        shape,
        dtype,
        weights=weights,
        total=total,
        reduction=reduction,
        out=out,
        like=a,
    )


def row_map(kernel: str, x: Any, out: Any) -> Any:
    """A map of rows [..., V] to rows of the same type, with its gradient."""
    array = logit_rows(x, "x")
    rows = core_rows(array)
    if out is not None:
        check_out(out, array.shape, array.dtype, array)
        if recording(x):
            raise ValueError("out cannot be used while a gradient is recorded")
    direct = isinstance(out, device.DeviceArray) or (
        out is not None and out.flags.c_contiguous and not np.shares_memory(out, array)
    )
    y = out if direct else new_like(array)
    device.call(kernel, (rows, None), (y, None))
    if out is not None:
        if not direct:
            out[...] = y
        return out
    if not recording(x):
        return y

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        dx = new_like(array)
        device.call(kernel, (rows, core_rows(logit_rows(dy, "dy"))), (None, dx))
        grads.put(0, dx)

    return record(y, (x,), vjp)
