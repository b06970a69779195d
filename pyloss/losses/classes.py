"""Losses of rows of logits with one label per row, and what they return beside the loss.

`class_loss` is their way through `rows.py`. A `ClassLoss` also gives log sums of exponentials,
z-losses and accuracies: the core finds them in the walk that gives the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pyloss.autograd.functions import reductions
from pyloss.autograd.tape import Gradients, nodes_of, record_several
from pyloss.autograd.tensor import LazyTensor
from pyloss.checks.arrays import as_array
from pyloss.losses.rows import (
    RowLoss,
    accumulator,
    core_rows,
    counted_weight,
    flat,
    logit_rows,
    new_like,
    row_labels,
    row_weights,
)
from pyloss.runtime import device


class RowDetails(NamedTuple):
    """What a class loss has of each row beside its loss; None: not there, or not wanted.

    Attributes:
        dlse: [N], the gradient of the log sums, in addition to that of the losses.
        lse: [N], filled with the log of the sum of the row's weights; 0 for an ignored row.
        best: int32 [N], filled with the first largest logit of each row.
    """

    dlse: Any = None
    lse: Any = None
    best: Any = None

    def of(self, rows: Any) -> RowDetails:
        """Those of some rows: views for a slice, else copies."""
        return RowDetails(*(None if part is None else part[rows] for part in self))

    def put(self, rows: np.ndarray, some: RowDetails) -> None:
        """Sets the results of some rows; those of others become 0."""
        for part, given in ((self.lse, some.lse), (self.best, some.best)):
            if part is not None:
                part[...] = 0
                part[rows] = given


NO_DETAILS = RowDetails()

#: `rows.Run` with the details to fill, and the gradient of the log sums.
DetailedRun = Callable[[Any, Sequence[bool], Any, RowDetails], Sequence[Any]]


class Returned(NamedTuple):
    """What a class loss returns beside the loss, see `public.softmax_cross_entropy`."""

    lse: bool = False
    z_loss: bool = False
    token_accuracy: bool = False


NOTHING = Returned()


@cache
def _result(names: tuple[str, ...]) -> Callable:
    """The named tuple of a loss and the details of these names."""
    fields = [(name, Any) for name in ("loss", *names)]
    made: Any = NamedTuple("CrossEntropyOutput", fields)  # type: ignore[misc]
    return made  # type: ignore[no-any-return]


class ClassLoss(RowLoss):
    """A `RowLoss` with one label per row, whose core also gives details.

    Args:
        run: calls the core.
        index: int32 [N], the labels, -1 for an ignored row.
        z_loss: the factor of the squared log sum in the loss.
        returned: what `result` returns beside the loss.
    """

    def __init__(
        self,
        run: DetailedRun,
        inputs: Sequence[Any],
        shape: tuple[int, ...],
        dtype: np.dtype,
        weights: np.ndarray | None,
        total: float,
        like: Any = None,
        *,
        index: np.ndarray,
        z_loss: float = 0.0,
        returned: Returned = NOTHING,
    ):
        super().__init__(run, inputs, shape, dtype, weights, total, like)
        self.index, self.z_loss, self.returned = index, z_loss, returned
        self.details = NO_DETAILS
        self.dlse: Any = None

    def run(self, dloss: Any, wanted: Sequence[bool], loss: Any) -> Sequence[Any]:
        """Calls the core, and keeps the details that were asked for."""
        names = self.returned
        found = RowDetails(
            dlse=flat(self.dlse),
            lse=flat(self._empty()) if names.lse or names.z_loss else None,
            best=np.empty(len(self.index), np.int32) if names.token_accuracy else None,
        )
        gradients = self.core(dloss, wanted, loss, found)
        self.details = found
        return gradients

    def result(self, reduction: str, out: Any) -> Any:
        """The loss alone, or a named tuple of it and the details that were asked for."""
        names = tuple(name for name in Returned._fields if getattr(self.returned, name))
        if not names:
            return super().result(reduction, out)
        traced = self._checked(reduction, out)
        rows: list[Any] = [self.losses, *(getattr(self, f"_{name}") for name in names)]
        if traced:
            rows = self._recorded_details(rows, names)
        else:
            rows = [compute() for compute in rows]
        found = [self._finished(rows[0], reduction, out)]
        for name, row in zip(names, rows[1:], strict=True):
            if name == "lse":
                found.append(row)
            elif name == "token_accuracy" and reduction != "none":
                share = 1 / max(int(np.count_nonzero(self.index >= 0)), 1)
                found.append(reductions.sum(row) * self.dtype.type(share))
            else:
                found.append(self._finished(row, reduction, None))
        return _result(names)(*found)

    def _recorded_details(self, rows: list[Callable], names: tuple[str, ...]) -> list[Any]:
        def vjp(dys: list[Any], grads: Gradients) -> None:
            dloss, *others = dys
            dlse: Any = None
            for name, dy in zip(names, others, strict=True):
                if dy is None or name == "token_accuracy":
                    continue
                if name == "z_loss":
                    slope = self._weighted(
                        2 * self.dtype.type(self.z_loss) * np.asarray(self._lse())
                    )
                    dy = np.asarray(dy, self.dtype) * slope
                dlse = dy if dlse is None else dlse + dy
            if dlse is not None:
                self.dlse = np.asarray(dlse, self.dtype, order="C")
            if dloss is None:
                dloss = np.zeros(self.shape, self.dtype)
            wanted = [grads.wanted(i) for i in range(len(self.inputs))]
            for i, gradient in enumerate(self.gradients(dloss, wanted)):
                if gradient is not None:
                    grads.put(i, gradient)

        nodes = nodes_of(*self.inputs) or (None,) * len(self.inputs)
        lazy = [LazyTensor(self.shape, self.dtype, compute) for compute in rows]
        return list(record_several(nodes, lazy, vjp, (False,) * len(lazy)))

    def _lse(self) -> Any:
        self.losses()
        return self.details.lse.reshape(self.shape)

    def _z_loss(self) -> Any:
        lse = np.asarray(self._lse())
        found = self._weighted(np.asarray(self.dtype.type(self.z_loss) * lse * lse))
        return found if self.like is None else device.on_device_of(self.like, found)

    def _token_accuracy(self) -> Any:
        self.losses()
        right = (self.details.best == self.index) & (self.index >= 0)
        return right.reshape(self.shape).astype(self.dtype)


def class_loss(
    kernel: str,
    logits: Any,
    labels: Any,
    options: Sequence[float],
    *,
    weights: Any,
    ignore_index: int,
    by_class: Callable[[int], np.ndarray] | None = None,
    class_weight: Any = None,
    z_loss: float = 0.0,
    returned: Returned = NOTHING,
    reduction: str,
    out: Any,
) -> Any:
    """A loss of logits [..., V] with one label per row.

    `by_class(V)` returns numbers [V]; each multiplies the losses of its label. Those of
    `class_weight` [V] multiply the terms of all classes, and count in a mean.
    """
    array = logit_rows(logits, "logits")
    shape, vocabulary = array.shape[:-1], array.shape[-1]
    weights = row_weights(weights, shape)
    index = row_labels(labels, weights, shape, vocabulary, ignore_index)
    of_class = class_weights(class_weight, vocabulary, accumulator(array))
    total = counted_weight(with_class_weights(weights, of_class, index), index >= 0)
    if by_class is not None:
        factors = by_class(vocabulary)[np.maximum(index, 0)].reshape(shape)
        weights = factors if weights is None else factors * weights
    rows = core_rows(array)

    def run(dloss: Any, wanted: Sequence[bool], loss: Any, details: RowDetails) -> list[Any]:
        dx = new_like(array) if any(wanted) else None
        inputs = rows, index, *options, of_class, flat(dloss), details.dlse
        device.call(kernel, inputs, (flat(loss), details.lse, dx))
        if details.best is not None:
            device.call("argmax", (rows,), (details.best,))
        return [dx]

    loss = ClassLoss(
        run,
        (logits,),
        shape,
        accumulator(array),
        weights,
        total,
        array,
        index=index,
        z_loss=z_loss,
        returned=returned,
    )
    return loss.result(reduction, out)


def class_weights(class_weight: Any, vocabulary: int, dtype: np.dtype) -> np.ndarray | None:
    """One weight per class, [V]. Raises TypeError or ValueError. Weights get no gradient."""
    if class_weight is None:
        return None
    array = as_array(class_weight, "class_weight")
    if array.dtype.kind not in "fiub" and not device.is_bfloat16(array.dtype):
        raise TypeError(f"class_weight must hold real numbers, not {array.dtype}")
    if array.shape != (vocabulary,):
        raise ValueError(
            f"class_weight has shape {array.shape}, expected one per class: ({vocabulary},)"
        )
    array = np.ascontiguousarray(array, dtype)
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError("class_weight must be finite and not negative")
    return array


def with_class_weights(
    weights: np.ndarray | None, of_class: np.ndarray | None, index: np.ndarray
) -> np.ndarray | None:
    """The rows' weights times those of their labels, for the divisor of a mean."""
    if of_class is None:
        return weights
    of_label = of_class[np.maximum(index, 0)].astype(np.float64)
    return of_label if weights is None else of_label * np.asarray(weights, np.float64).reshape(-1)
