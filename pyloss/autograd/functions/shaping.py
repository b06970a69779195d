"""NumPy's views, copies, joins and choices of elements.

Most of them only choose elements, some several times. The gradient adds up what each element was
chosen for: `_chosen` finds out by choosing among the elements' numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyloss.autograd.functions.apply import (
    apply,
    apply_several,
    implements,
    operand,
    settled,
    value_of,
)
from pyloss.autograd.tape import reads_output, record, recording
from pyloss.autograd.tensor import LazyTensor, Tensor


def _moved(x: Any, function: Callable[[Any], Any], back: Callable[[Any], Any]) -> Any:
    """A function that only moves elements, whose inverse is `back`."""
    return apply(function, (x,), lambda i, dy, y, xd: back(dy))


def _chosen(x: Any, choose: Callable[..., Any], *arguments: Any) -> Any:
    """`choose(x, *arguments)`, which chooses elements, possibly several times."""
    x, fixed = operand(x), settled(arguments)
    shape, size = x.shape, x.size

    def gradient(i: int, dy: Any, y: Any, xd: Any) -> Any:
        numbers = choose(np.arange(size).reshape(shape), *fixed)
        total = np.bincount(numbers.reshape(-1), dy.reshape(-1), minlength=size)
        return total.reshape(shape)

    return apply(lambda xd: choose(xd, *fixed), (x,), gradient)


@implements(np.reshape)
def reshape(a: Any, shape: Any = None, order: str = "C", *, newshape: Any = None) -> Any:
    x, wanted = operand(a), shape if shape is not None else newshape
    if order != "C":
        raise TypeError(f"numpy.reshape(order={order!r}) has no gradient; order='C' has one")
    before = x.shape
    after = np.broadcast_to(np.empty((), np.bool_), before).reshape(wanted).shape
    if isinstance(x, LazyTensor):
        out: Any = LazyTensor(after, x.dtype, lambda: x.data.reshape(after))
    else:
        out = (x.data if isinstance(x, Tensor) else x).reshape(after)
    if not recording(x):
        return out.data if isinstance(out, Tensor) else out
    # A view, on a device too: an operation that overwrites the result overwrites x.
    return record(
        out,
        (x,),
        lambda dy, grads: grads.put(0, dy.reshape(before), own=grads.passes),
        reads_output=reads_output(x),
    )


@implements(np.ravel)
def ravel(a: Any, order: str = "C") -> Any:
    return reshape(a, (-1,), order)


@implements(np.transpose)
def transpose(a: Any, axes: Any = None) -> Any:
    x = operand(a)
    inverse = None if axes is None else np.argsort([axis % x.ndim for axis in axes])
    return _moved(x, lambda xd: np.transpose(xd, axes), lambda dy: np.transpose(dy, inverse))


if hasattr(np, "matrix_transpose"):  # from NumPy 2 on
    implements(np.matrix_transpose)(lambda x, /: np.swapaxes(x, -1, -2))


@implements(np.swapaxes)
def swapaxes(a: Any, axis1: int, axis2: int) -> Any:
    return _moved(
        operand(a),
        lambda xd: np.swapaxes(xd, axis1, axis2),
        lambda dy: np.swapaxes(dy, axis1, axis2),
    )


@implements(np.moveaxis)
def moveaxis(a: Any, source: Any, destination: Any) -> Any:
    source, destination = settled((source, destination))
    return _moved(
        operand(a),
        lambda xd: np.moveaxis(xd, source, destination),
        lambda dy: np.moveaxis(dy, destination, source),
    )


def _reshaping(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that only adds or drops axes of 1."""

    def computed(a: Any, *args: Any, **kwargs: Any) -> Any:
        x = operand(a)
        probe = np.broadcast_to(np.empty((), np.bool_), x.shape)
        return reshape(x, function(probe, *args, **kwargs).shape)

    return computed


implements(np.expand_dims)(_reshaping(np.expand_dims))
implements(np.squeeze)(_reshaping(np.squeeze))


def _at_least(function: Callable[..., Any]) -> Callable[..., Any]:
    def computed(*arrays: Any) -> Any:
        found = [_reshaping(function)(array) for array in arrays]
        return found[0] if len(found) == 1 else tuple(found)

    return computed


for _at_least_so_many in (np.atleast_1d, np.atleast_2d, np.atleast_3d):
    implements(_at_least_so_many)(_at_least(_at_least_so_many))


@implements(np.broadcast_to)
def broadcast_to(array: Any, shape: Any, subok: bool = False) -> Any:
    # A copy: a broadcast view would be read-only.
    return apply(
        lambda xd: np.array(np.broadcast_to(xd, shape)),
        (operand(array),),
        lambda i, dy, y, xd: dy,
    )


@implements(np.broadcast_arrays)
def broadcast_arrays(*args: Any, subok: bool = False) -> tuple[Any, ...]:
    shape = np.broadcast_shapes(*(operand(a).shape for a in args))
    return tuple(broadcast_to(a, shape) for a in args)


@implements(np.concatenate)
def concatenate(arrays: Sequence[Any], /, axis: int | None = 0, *, dtype: Any = None) -> Any:
    parts = [operand(a) for a in arrays]
    if axis is None:
        parts, axis = [ravel(part) for part in parts], 0
    along = axis
    ends = np.cumsum([part.shape[along] for part in parts]).tolist() if parts[0].ndim else []

    def gradient(i: int, dy: Any, y: Any, *unread: Any) -> Any:
        index = [slice(None)] * dy.ndim
        index[along] = slice(ends[i - 1] if i else 0, ends[i])
        return dy[tuple(index)]

    return apply(
        lambda *found: np.concatenate(found, along, dtype=dtype, casting="same_kind"),
        parts,
        gradient,
    )


@implements(np.stack)
def stack(arrays: Sequence[Any], axis: int = 0, *, dtype: Any = None) -> Any:
    return concatenate([np.expand_dims(operand(a), axis) for a in arrays], axis, dtype=dtype)


@implements(np.vstack)
def vstack(tup: Sequence[Any]) -> Any:
    return concatenate([np.atleast_2d(operand(a)) for a in tup], 0)


@implements(np.hstack)
def hstack(tup: Sequence[Any]) -> Any:
    parts = [np.atleast_1d(operand(a)) for a in tup]
    return concatenate(parts, 0 if parts[0].ndim == 1 else 1)


@implements(np.dstack)
def dstack(tup: Sequence[Any]) -> Any:
    return concatenate([np.atleast_3d(operand(a)) for a in tup], 2)


@implements(np.column_stack)
def column_stack(tup: Sequence[Any]) -> Any:
    parts = [operand(a) for a in tup]
    return concatenate([p[:, None] if p.ndim == 1 else np.atleast_2d(p) for p in parts], 1)


def _splitting(function: Callable[..., Any]) -> Callable[..., Any]:
    def computed(ary: Any, indices_or_sections: Any, *more: int, **kwargs: int) -> list[Any]:
        x, where = operand(ary), settled(indices_or_sections)
        shape = x.shape

        def views(array: Any) -> list[Any]:
            return function(array, where, *more, **kwargs)

        def gradient(dys: list[Any]) -> Any:
            dx = np.zeros(shape, dys[0].dtype if dys else None)
            for part, dy in zip(views(dx), dys, strict=True):
                part += dy  # parts may overlap
            return dx

        return apply_several(lambda xd: [part.copy() for part in views(xd)], x, gradient)

    return computed


for _function in (np.split, np.array_split, np.vsplit, np.hsplit, np.dsplit):
    implements(_function)(_splitting(_function))


def unstack(x: Any, /, *, axis: int = 0) -> tuple[Any, ...]:
    """The parts of x along an axis, without that axis."""
    return tuple(
        apply_several(
            lambda xd: [np.take(xd, i, axis) for i in range(xd.shape[axis])],
            operand(x),
            lambda dys: np.stack(dys, axis),
        )
    )


if hasattr(np, "unstack"):  # from NumPy 2.1 on
    implements(np.unstack)(unstack)


def _pad_widths(given: Any, ndim: int) -> Any:
    """What is added before and after each axis."""
    if isinstance(given, dict):
        pairs = np.zeros((ndim, 2), int)
        for axis, width in given.items():
            pairs[axis] = width
        return pairs
    return np.broadcast_to(np.asarray(given), (ndim, 2))


@implements(np.pad)
def pad(array: Any, pad_width: Any, mode: Any = "constant", **kwargs: Any) -> Any:
    x = operand(array)
    if mode == "constant":
        inside = tuple(
            slice(int(before), int(before) + n)
            for (before, _), n in zip(_pad_widths(pad_width, x.ndim), x.shape, strict=True)
        )
        return _moved(x, lambda xd: np.pad(xd, pad_width, **kwargs), lambda dy: dy[inside])
    if mode in ("edge", "reflect", "symmetric", "wrap") and kwargs.get("reflect_type") != "odd":
        return _chosen(x, lambda xd, width: np.pad(xd, width, mode, **kwargs), pad_width)
    raise TypeError(
        f"numpy.pad(mode={mode!r}) has no gradient; constant, edge, reflect, symmetric and wrap "
        "have one"
    )


@implements(np.roll)
def roll(a: Any, shift: Any, axis: Any = None) -> Any:
    axis = settled(axis)
    opposite = np.negative(shift).tolist()
    return _moved(
        operand(a), lambda xd: np.roll(xd, shift, axis), lambda dy: np.roll(dy, opposite, axis)
    )


@implements(np.flip)
def flip(m: Any, axis: Any = None) -> Any:
    axis = settled(axis)
    return _moved(operand(m), lambda xd: np.flip(xd, axis), lambda dy: np.flip(dy, axis))


implements(np.flipud)(lambda m: flip(m, 0))
implements(np.fliplr)(lambda m: flip(m, 1))


@implements(np.rot90)
def rot90(m: Any, k: int = 1, axes: tuple[int, int] = (0, 1)) -> Any:
    axes = settled(axes)
    return _moved(operand(m), lambda xd: np.rot90(xd, k, axes), lambda dy: np.rot90(dy, -k, axes))


@implements(np.tile)
def tile(A: Any, reps: Any) -> Any:
    return _chosen(A, np.tile, reps)


@implements(np.repeat)
def repeat(a: Any, repeats: Any, axis: int | None = None) -> Any:
    return _chosen(a, np.repeat, repeats, axis)


@implements(np.diagonal)
def diagonal(a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    return _chosen(a, lambda xd: np.diagonal(xd, offset, axis1, axis2).copy())


@implements(np.trace)
def trace(a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    return np.sum(diagonal(a, offset, axis1, axis2), -1)


if hasattr(np.linalg, "matrix_transpose"):  # from NumPy 2 on
    implements(np.linalg.matrix_transpose)(lambda x, /: np.swapaxes(x, -1, -2))
    implements(np.linalg.diagonal)(lambda x, /, *, offset=0: diagonal(x, offset, -2, -1))
    implements(np.linalg.trace)(lambda x, /, *, offset=0: trace(x, offset, -2, -1))


@implements(np.diag)
def diag(v: Any, k: int = 0) -> Any:
    x = operand(v)
    if x.ndim == 2:
        return diagonal(x, k)
    return _moved(x, lambda xd: np.diag(xd, k), lambda dy: np.diagonal(dy, k))


@implements(np.tril)
def tril(m: Any, k: int = 0) -> Any:
    return _moved(operand(m), lambda xd: np.tril(xd, k), lambda dy: np.tril(dy, k))


@implements(np.triu)
def triu(m: Any, k: int = 0) -> Any:
    return _moved(operand(m), lambda xd: np.triu(xd, k), lambda dy: np.triu(dy, k))


@implements(np.take)
def take(a: Any, indices: Any, axis: int | None = None, *, mode: Any = "raise") -> Any:
    if mode == "raise":
        x, where = operand(a) if axis is not None else ravel(a), value_of(operand(indices))
        return x[(slice(None),) * ((axis or 0) % max(x.ndim, 1)) + (where,)]
    return _chosen(a, lambda xd, where: np.take(xd, where, axis, mode=mode), indices)


@implements(np.take_along_axis)
def take_along_axis(arr: Any, indices: Any, axis: int | None = -1) -> Any:
    return _chosen(arr, np.take_along_axis, indices, axis)


@implements(np.sort)
def sort(
    a: Any, axis: int = -1, kind: Any = None, order: Any = None, *, stable: bool | None = None
) -> Any:
    """Always stable."""
    if order is not None:
        raise TypeError(f"numpy.sort(order={order!r}) is for arrays of fields, not for numbers")
    x = operand(a)
    return take_along_axis(x, np.argsort(value_of(x), axis, kind="stable"), axis)


implements(np.compress)(
    lambda condition, a, axis=None: _chosen(
        a, lambda xd, mask: np.compress(mask, xd, axis), condition
    )
)
implements(np.delete)(lambda arr, obj, axis=None: _chosen(arr, np.delete, obj, axis))


@implements(Tensor.__getitem__)
def getitem(x: Tensor, index: Any) -> Any:
    where = settled(index)
    shape, kind = x.shape, x.dtype
    basic = all(
        isinstance(i, slice | int | np.integer | type(None) | type(...)) and not isinstance(i, bool)
        for i in (where if isinstance(where, tuple) else (where,))
    )

    def gradient(i: int, dy: Any, y: Any, xd: Any) -> Any:
        dx = np.zeros(shape, kind)
        if basic or _is_mask(where):
            dx[where] = dy
        else:
            np.add.at(dx, where, dy)
        return dx

    # A copy: a change of the result must not change x.
    return apply(lambda xd: np.array(xd[where]), (x,), gradient)


def _is_mask(index: Any) -> bool:
    return isinstance(index, np.ndarray) and index.dtype == np.bool_
