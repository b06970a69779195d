"""Losses of rows of logits, from the public functions' arguments to their result.

Each loss goes one way through this file:

1. Prepare: arrays of the kernels' types, place and shape; labels as int32 [N]; weights.
2. Record: one node on the tape; nothing is computed yet.
3. Call: one call of the core gives the loss, the gradients, or both.
4. Finish: weights, reduction, `out`.

`pair_loss`, `element_loss` and `row_map` are kinds of losses; `classes.py` has `class_loss`.
`head.py` uses `RowLoss` too, with its own step 3. The formulas are in `csrc/losses/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyloss import _core
from pyloss.autograd.functions import reductions
from pyloss.autograd.tape import Gradients, data, record, recording
from pyloss.autograd.tensor import LazyTensor, Tensor
from pyloss.checks.arrays import as_array, as_integers
from pyloss.checks.numbers import SMALLEST, shown, whole
from pyloss.runtime import device

REDUCTIONS = ("none", "sum", "mean")
LARGEST_UINT64 = (1 << 64) - 1  # of labels

#: Divides by the first dimension, or by the counted rows; pair losses have it.
BATCH_MEAN = "batchmean"

#: `run(factors, wanted, loss)`: fills `loss`, and returns the gradients of the wanted inputs (None
#: for others), each row's multiplied by its factor (None: 1)
Run = Callable[[Any, Sequence[bool], Any], Sequence[Any]]


# The kinds of losses ------------------------------------------------------------------------------


class PairKernel(NamedTuple):
    """A kernel of two rows, and how it is called for a student's q and a teacher's p.

    Attributes:
        name: of the operation.
        swapped: whether its first rows are p, its second q.
        options: of the loss.
        scaling: `((scale, softcap) of q, the same of p)`: logits x enter as scale x, capped with
            softcap tanh(scale x / softcap) if softcap > 0.
    """

    name: str
    swapped: bool
    options: tuple[float, ...]
    scaling: tuple[tuple[float, float], tuple[float, float]]

    @property
    def order(self) -> tuple[int, int]:
        """Which of (q, p) the kernel takes first and second."""
        return (1, 0) if self.swapped else (0, 1)

    def call(
        self,
        rows: Sequence[Any],
        labels: Any,
        dloss: Any,
        loss: Any,
        gradients: Sequence[Any],
        by: Callable[[str, Sequence[Any], Sequence[Any]], None] = device.call,
    ) -> None:
        """Calls the kernel for the rows (q, p), which have the gradients (q's, p's)."""
        i, j = self.order
        inputs = (rows[i], rows[j], labels, *self.scaling[i], *self.scaling[j], *self.options)
        by(self.name, (*inputs, dloss), (loss, gradients[i], gradients[j]))


class RowOptions(NamedTuple):
    """The arguments of a loss that say which rows count, and what becomes of their losses."""

    labels: Any
    ignore_index: int
    weights: Any
    reduction: str
    out: Any


def pair_loss(kernel: PairKernel, logits_q: Any, logits_p: Any, options: RowOptions) -> Any:
    """A loss of two arrays of logits [..., V]: one value per row."""
    labels, ignore_index, weights, reduction, out = options
    inputs = logits_q, logits_p
    q, p = two_like(("logits_q", "logits_p"), inputs)
    shape = q.shape[:-1]
    weights = row_weights(weights, shape)
    index = pair_labels(labels, weights, shape, q.shape[-1], ignore_index)
    rows = core_rows(q), core_rows(p)

    def run(dloss: Any, wanted: Sequence[bool], loss: Any) -> list[Any]:
        wanted = wanted or (False, False)
        found = [new_like(x) if want else None for x, want in zip((q, p), wanted, strict=True)]
        kernel.call(rows, index, flat(dloss), flat(loss), found)
        return found

    total = counted_weight(
        weights, np.full(math.prod(shape), True) if index is None else index >= 0
    )
    loss = RowLoss(run, inputs, shape, accumulator(q, p), weights, total, like=q)
    loss.batch = batch_divisor(labels, weights, total, shape)
    return loss.result(reduction, out)


def element_loss(
    kernel: str,
    names: tuple[str, str],
    inputs: tuple[Any, Any],
    options: Sequence[float],
    *,
    weights: Any,
    reduction: str,
    out: Any,
) -> Any:
    """A loss of two arrays of one shape: one value per element."""
    a, b = two_like(names, inputs, elementwise=True)
    weights = row_weights(weights, a.shape)
    counted = np.full(math.prod(a.shape), True) if weights is None else (weights != 0).reshape(-1)
    rows = core_rows(a), core_rows(b)

    def run(dloss: Any, wanted: Sequence[bool], loss: Any) -> list[Any]:
        wanted = wanted or (False, False)
        found = [new_like(x) if want else None for x, want in zip((a, b), wanted, strict=True)]
        device.call(kernel, (*rows, *options, dloss), (loss, *found))
        return found

    total = counted_weight(weights, counted)
    loss = RowLoss(run, inputs, a.shape, accumulator(a, b), weights, total, like=a)
    return loss.result(reduction, out)


def two_like(
    names: tuple[str, str], inputs: tuple[Any, Any], elementwise: bool = False
) -> tuple[Any, Any]:
    """Two arrays for the kernels, in one place and of one shape."""
    a, b = (logit_rows(x, name, elementwise) for x, name in zip(inputs, names, strict=True))
    device.same_place(names, (a, b))
    if a.shape != b.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same shape, got {a.shape} and {b.shape}"
        )
    return a, b


def row_map(kernel: str, x: Any, out: Any) -> Any:
    """A differentiable map of rows [..., V] to rows of the same shape and type."""
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


# 1. Prepare ---------------------------------------------------------------------------------------


def logit_rows(x: Any, name: str, elementwise: bool = False) -> Any:
    """Logits [..., V] in a type of the kernels, with contiguous rows; copied only if necessary.

    The types are float64, float32, float16 and bfloat16; other real numbers become float32. Arrays
    on a device stay there. V is at least 1, or 0 if `elementwise`. TypeError and ValueError name
    the argument.
    """
    array = data(x, name)
    if isinstance(array, device.DeviceArray):
        if array.kind not in ("f64", "f32", "f16", "bf16"):
            raise TypeError(
                f"{name} on a device must be float64, float32, float16 or bfloat16, "
                f"not {array.dtype}"
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
    """Joins leading axes, since the core takes at most two of them; may copy."""
    return array if array.ndim <= 3 else array.reshape(-1, *array.shape[-2:])


def accumulator(*arrays: Any) -> np.dtype:
    """The type of the losses: float64 if any of the logits are, else float32."""
    return np.dtype(np.float64 if any(a.dtype == np.float64 for a in arrays) else np.float32)


def row_weights(weights: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """One weight per row of `shape`. Weights get no gradient."""
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
    """Labels for the kernels: int32 [N] in [0, V), or -1 for an ignored row.

    A row of weight 0 is ignored too, so that a loss that is not finite stays out. An `ignore_index`
    that the labels' type cannot hold ignores no row.
    """
    sentinel = whole(ignore_index, "ignore_index", SMALLEST, LARGEST_UINT64)
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
    # int32 first, since the labels' own type may be unsigned.
    index = np.where(ignored, 0, array).astype(np.int32)
    return np.where(ignored, np.int32(-1), index).reshape(-1)


def pair_labels(
    labels: Any,
    weights: np.ndarray | None,
    shape: tuple[int, ...],
    vocabulary: int,
    ignore_index: int,
) -> np.ndarray | None:
    """Labels of which only the ignored ones matter: int32 [N], -1 for a row that is left out.

    None if all rows count.
    """
    if labels is not None:
        index = row_labels(labels, weights, shape, vocabulary, ignore_index)
    elif weights is not None:
        index = np.where(weights == 0, np.int32(-1), np.int32(0)).reshape(-1)
    else:
        return None
    return index if (index < 0).any() else None


def counted_weight(weights: np.ndarray | None, counted: np.ndarray) -> float:
    """The divisor of a mean: the sum of the counted rows' weights, or their number."""
    if weights is None:
        return float(np.count_nonzero(counted))
    return float(np.asarray(weights, np.float64).reshape(-1)[counted].sum())


def batch_divisor(
    labels: Any, weights: np.ndarray | None, total: float, shape: tuple[int, ...]
) -> float | None:
    """The divisor of "batchmean"; None for one row, which has no batch."""
    if labels is not None or weights is not None:
        return total
    return float(shape[0]) if shape else None


def flat(array: Any) -> Any:
    """Per-row numbers [...] as [N]; None stays None."""
    return None if array is None else array.reshape(-1)


def new_like(array: Any) -> Any:
    """An uninitialized contiguous array like `array`, on its device, over a reused buffer."""
    if isinstance(array, device.DeviceArray):
        return device.empty(array.shape, array.dtype, array)
    kind = {"f8": "f64", "f4": "f32", "f2": "f16"}.get(array.dtype.str[1:], "u16")
    out = _core.empty(array.shape, kind)
    return out.view(array.dtype) if kind == "u16" else out


# 2. Record, 3. call, 4. finish --------------------------------------------------------------------


class RowLoss:
    """One loss over prepared arrays. The first read of values or gradients calls the core.

    Args:
        run: calls the core, see `Run`.
        inputs: the arguments that may get a gradient, as they were given.
        shape: of the losses.
        dtype: of the losses.
        weights: multiply the losses, or None.
        total: the divisor of a mean.
        like: an array on a device has the losses there.

    Attributes:
        batch: the divisor of "batchmean"; None: there is no such reduction.
    """

    batch: float | None = None

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        inputs: Sequence[Any],
        shape: tuple[int, ...],
        dtype: np.dtype,
        weights: np.ndarray | None,
        total: float,
        like: Any = None,
    ):
        self.core, self.inputs, self.shape, self.dtype = run, inputs, shape, dtype
        self.weights = None if weights is None else np.asarray(weights, dtype, order="C")
        self.total = total
        self.like = like if isinstance(like, device.DeviceArray) else None
        self.values: Any = None  # the weighted losses, once they are known

    def run(self, dloss: Any, wanted: Sequence[bool], loss: Any) -> Sequence[Any]:
        """Calls the core, see `Run`."""
        return self.core(dloss, wanted, loss)

    def result(self, reduction: str, out: Any) -> Any:
        """The losses [...] or their sum or mean, on the tape while a gradient is recorded."""
        if self._checked(reduction, out):
            result: Any = self._recorded()
        else:
            result = self.losses(out if reduction == "none" else None)
        return self._finished(result, reduction, out)

    def _checked(self, reduction: str, out: Any) -> bool:
        """Whether a gradient is recorded. Raises TypeError or ValueError for wrong arguments."""
        allowed = REDUCTIONS if self.batch is None else (*REDUCTIONS, BATCH_MEAN)
        if reduction not in allowed:
            raise ValueError(
                f"reduction must be one of {', '.join(map(repr, allowed))}, not {reduction!r}"
            )
        traced, each_row = recording(*self.inputs), reduction == "none"
        if out is not None:
            check_out(
                out, self.shape if each_row else (), self.dtype, self.like if each_row else None
            )
            if traced:
                raise ValueError("out cannot be used while a gradient is recorded")
        return traced

    def _recorded(self) -> Tensor:
        def vjp(dy: np.ndarray, grads: Gradients) -> None:
            wanted = [grads.wanted(i) for i in range(len(self.inputs))]
            for i, gradient in enumerate(self.gradients(dy, wanted)):
                if gradient is not None:
                    grads.put(i, gradient)

        return record(LazyTensor(self.shape, self.dtype, self.losses), self.inputs, vjp)

    def losses(self, out: Any = None) -> Any:
        """The weighted losses, computed once; in `out` if the core can write to it."""
        if self.values is None:
            direct = isinstance(out, device.DeviceArray) or (
                out is not None and out.flags.c_contiguous
            )
            loss = out if direct else self._empty()
            self.run(None, (), loss)
            self.values = self._weighted(loss)
        return self.values

    def gradients(self, dy: np.ndarray, wanted: Sequence[bool]) -> Sequence[np.ndarray | None]:
        """The gradients of the wanted inputs, from the gradient `dy` of the losses."""
        factors = np.asarray(dy, self.dtype, order="C")
        if self.weights is not None:
            factors = np.where(self.weights == 0, 0, factors * self.weights)
        loss = self._empty()
        found = self.run(np.asarray(factors, order="C"), wanted, loss)
        if self.values is None:
            self.values = self._weighted(loss)
        return found

    def _empty(self) -> Any:
        if self.like is not None:
            return device.empty(self.shape, self.dtype, self.like)
        return _core.empty(self.shape, "f64" if self.dtype == np.float64 else "f32")

    def _weighted(self, loss: Any) -> Any:
        """`loss` times the weights, in place. Weight 0 gives 0, even for NaN and infinities."""
        if isinstance(loss, device.DeviceArray):
            if self.weights is not None:
                loss.write(self._weighted(loss.numpy()))
        elif self.weights is not None:
            np.multiply(loss, self.weights, out=loss, where=self.weights != 0)
            loss[self.weights == 0] = 0
        return loss

    def _finished(self, result: Any, reduction: str, out: Any) -> Any:
        """The losses reduced, and written to `out`."""
        if reduction != "none":
            if isinstance(result, device.DeviceArray):
                result = result.sum(dtype=np.float64).astype(self.dtype)
            else:  # with the same bits inside and outside of a recording
                result = reductions.sum(result)
                result = result if isinstance(result, Tensor) else result[()]
        divisor = {"mean": self.total, BATCH_MEAN: self.batch}.get(reduction)
        if divisor is not None:
            result = result * self.dtype.type(1 / divisor if divisor else 0)
        if out is None or result is out:
            return result
        out[...] = result
        return out


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype, like: Any = None) -> None:
    """TypeError or ValueError unless a result like this, computed from `like`, fits `out`."""
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
