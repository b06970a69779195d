"""How a function of arrays becomes an operation of the tape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pyloss.arithmetic import summed_to
from pyloss.autograd.tape import Gradients, keep, nodes_of, record_on, record_several
from pyloss.autograd.tensor import FUNCTIONS, UFUNCS, LazyTensor, Tensor, stripped
from pyloss.autograd.trees import tree_map
from pyloss.runtime import device


def implements(*functions: Callable) -> Callable:
    """A decorator: what computes these functions of NumPy, or methods of Tensor."""

    def register(function: Callable) -> Callable:
        for one in functions:
            table: dict[Any, Callable] = UFUNCS if isinstance(one, np.ufunc) else FUNCTIONS  # type: ignore[assignment]
            table[one] = function
        return function

    return register


def constant(*functions: Callable) -> None:
    """Registers functions whose results have no gradient: plain arrays."""
    for one in functions:
        implements(one)(_plain(one))


def _plain(function: Callable) -> Callable:
    def computed(*args: Any, **kwargs: Any) -> Any:
        return function(*_hosted(stripped(args)), **stripped(kwargs))

    return computed


def _hosted(args: Sequence[Any]) -> list[Any]:
    return [a.numpy() if isinstance(a, device.DeviceArray) else a for a in args]


def operand(x: Any) -> Any:
    """An argument: a Tensor, an array, or a Python number, which leaves float32 as it is."""
    if isinstance(x, np.ma.MaskedArray | np.matrix):
        raise TypeError(
            f"a {type(x).__name__} has operations of its own: use numpy.asarray(x), and "
            "numpy.where for a mask"
        )
    if isinstance(x, np.generic) and x.dtype.kind in "biuf":  # np.float64 is a float, too
        return x.item()
    if isinstance(x, Tensor | np.ndarray | int | float | complex | device.DeviceArray):
        return x
    return device.array(x)


def value_of(x: Any) -> Any:
    """The array of an operand on the host, or the number."""
    x = x.data if isinstance(x, Tensor) else x
    return x.numpy() if isinstance(x, device.DeviceArray) else x


def _place(values: Sequence[Any]) -> Any:
    """An array on the device where a result belongs, or None for the host."""
    for x in values:
        found = x.data if isinstance(x, Tensor) and not isinstance(x, LazyTensor) else x
        if isinstance(found, device.DeviceArray):
            return found
    return None


def unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums a gradient over the axes along which an input of `shape` was broadcast."""
    found = summed_to(grad, shape)
    if found is not None:
        return found
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape)))) if grad.ndim > len(shape) else grad
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1)
    return grad.sum(axis=axes, keepdims=True) if axes else grad


#: `gradient(i, dy, y, *arrays)` is the gradient of input i, of its shape or broadcast.
Gradient = Callable[..., Any]


def unchanging(x: Any) -> Any:
    """A constant that a gradient reads: a copy of an array that may be written to before."""
    if isinstance(x, np.ndarray) and (x.flags.writeable or x.base is not None):
        return x.copy(order="K")
    return x


def settled(argument: Any) -> Any:
    """An index or another argument as it is now, without Tensors: a gradient reads it later."""

    def copied(x: Any) -> Any:
        x = value_of(x)
        return x.copy() if isinstance(x, np.ndarray) else x

    return tree_map(copied, argument)


def _same(x: Any) -> Any:
    return x


def apply(
    forward: Callable[..., Any],
    inputs: Sequence[Any],
    gradient: Gradient,
    reads: str | Sequence[str] = "",
    lazy: Callable[[], tuple[tuple[int, ...], np.dtype]] | None = None,
) -> Any:
    """`forward(*arrays)` as an operation.

    Args:
        inputs: what `operand` gives.
        gradient: see `Gradient`. It gets the arrays that it reads, None for others.
        reads: "y" if the gradient reads the result, and the numbers of the inputs that it reads;
            one string, or one for the gradient of each input.
        lazy: the shape and type of the result, for a result that is computed when it is read. Used
            where an input is not computed yet.
    """
    place = _place(inputs)
    nodes = nodes_of(*inputs)
    late = lazy is not None and any(isinstance(x, LazyTensor) for x in inputs)
    if late:
        inputs = [x if isinstance(x, Tensor) else unchanging(x) for x in inputs]

    def compute() -> Any:
        return device.on_device_of(place, np.asarray(forward(*map(value_of, inputs))))

    if nodes is None:
        return compute()
    shapes = [(np.shape(x) if not isinstance(x, Tensor) else x.shape) for x in inputs]
    types = [getattr(x, "dtype", None) for x in inputs]
    each = [reads] * len(inputs) if isinstance(reads, str) else reads
    read = "".join(some for some, node in zip(each, nodes, strict=True) if node is not None)
    kept = [
        (keep(x) if isinstance(x, Tensor) else partial(_same, unchanging(x)))
        if str(i) in read
        else None
        for i, x in enumerate(inputs)
    ]
    if late:
        assert lazy is not None
        y: Any = LazyTensor(*lazy(), compute)
    else:
        y = compute()
        if y.dtype.kind == "c":
            raise TypeError(
                "complex numbers have no gradient: compute with real and imaginary parts"
            )
    out = y if "y" in read else None

    def vjp(dy: Any, grads: Gradients) -> None:
        dy = value_of(dy)
        for i, shape in enumerate(shapes):
            if not grads.wanted(i):
                continue
            given = [
                value_of(get()) if get is not None and str(j) in each[i] else None
                for j, get in enumerate(kept)
            ]
            result = value_of(out) if "y" in each[i] else None
            found = unbroadcast(np.asarray(gradient(i, dy, result, *given)), shape)
            if found.shape != shape:
                found = np.broadcast_to(found, shape)
            found = np.asarray(found, types[i], order="C")
            own = found.flags.writeable and not np.may_share_memory(found, dy)
            grads.put(i, device.on_device_of(place, found), own)

    return record_on(nodes, y, vjp)


def apply_several(
    forward: Callable[[Any], Sequence[Any]], x: Any, gradient: Callable[[list[Any]], Any]
) -> list[Any]:
    """Several results of one input, as one operation.

    `gradient(dys)` gets a gradient for each result, zeros for one that took no part.
    """
    place, nodes = _place((x,)), nodes_of(x)
    ys = [device.on_device_of(place, np.asarray(y)) for y in forward(value_of(x))]
    if nodes is None:
        return ys
    shapes, kind = [y.shape for y in ys], x.dtype

    def vjp(dys: list[Any], grads: Gradients) -> None:
        whole = [
            np.zeros(shape, kind) if dy is None else value_of(dy)
            for dy, shape in zip(dys, shapes, strict=True)
        ]
        found = np.asarray(gradient(whole), kind, order="C")
        grads.put(0, device.on_device_of(place, found), not _shared(found, whole))

    return list(record_several(nodes, ys, vjp, (False,) * len(ys)))


def _shared(found: np.ndarray, others: Sequence[np.ndarray]) -> bool:
    return any(np.may_share_memory(found, other) for other in others)
