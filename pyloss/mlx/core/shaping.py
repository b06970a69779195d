"""MLX's functions that move, join, choose and place elements."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyloss.autograd.functions.apply import apply
from pyloss.autograd.tape import recording
from pyloss.autograd.tensor import FUNCTIONS, Tensor
from pyloss.mlx.core.arrays import (
    array,
    axes_of,
    call,
    cast,
    fitting,
    of,
    placed,
    promoted,
    raw,
    recorded,
    result,
    tree_raw,
)
from pyloss.mlx.core.creation import Shape, shape_of
from pyloss.mlx.core.elementwise import constant
from pyloss.mlx.core.reductions import Axis, sum


def reshape(a: Any, /, shape: Shape, *, stream: Any = None) -> array:
    """The same elements in another shape; one size may be -1."""
    return call(np.reshape, *promoted(a), shape_of(shape))


def flatten(a: Any, /, start_axis: int = 0, end_axis: int = -1, *, stream: Any = None) -> array:
    """The axes from `start_axis` to `end_axis` as one."""
    (x,) = promoted(a)
    n = len(x.shape)
    if not n:
        return reshape(x, (1,))
    first, last = start_axis % n, end_axis % n
    if last < first:
        raise ValueError(
            f"start_axis {start_axis} comes after end_axis {end_axis} of shape {x.shape}"
        )
    return reshape(x, (*x.shape[:first], -1, *x.shape[last + 1 :]))


def unflatten(a: Any, /, axis: int, shape: Sequence[int], *, stream: Any = None) -> array:
    """An axis as several."""
    (x,) = promoted(a)
    at = axis % len(x.shape)
    return reshape(x, (*x.shape[:at], *shape, *x.shape[at + 1 :]))


def squeeze(a: Any, /, axis: Axis = None, *, stream: Any = None) -> array:
    """Without axes of 1: all, or those named."""
    return call(np.squeeze, *promoted(a), axes_of(axis))


def expand_dims(a: Any, /, axis: int | Sequence[int], *, stream: Any = None) -> array:
    """With new axes of 1."""
    return call(np.expand_dims, *promoted(a), axes_of(axis))


def moveaxis(a: Any, /, source: int, destination: int, *, stream: Any = None) -> array:
    """An axis in another place."""
    return call(np.moveaxis, *promoted(a), source, destination)


def swapaxes(a: Any, /, axis1: int, axis2: int, *, stream: Any = None) -> array:
    """Two axes exchanged."""
    return call(np.swapaxes, *promoted(a), axis1, axis2)


def transpose(a: Any, /, axes: Sequence[int] | None = None, *, stream: Any = None) -> array:
    """The axes in another order; all reversed by default."""
    return call(np.transpose, *promoted(a), axes)


permute_dims = transpose


def matrix_transpose(a: Any, /, *, stream: Any = None) -> array:
    """The last two axes exchanged."""
    return swapaxes(a, -1, -2)


def flip(a: Any, /, axis: Axis = None, *, stream: Any = None) -> array:
    """The elements in reverse order, along all axes by default."""
    return call(np.flip, *promoted(a), axes_of(axis))


def roll(a: Any, shift: Any, axis: Axis = None, /, *, stream: Any = None) -> array:
    """Elements moved along axes; those that leave come back at the other end."""
    return call(np.roll, *promoted(a), tree_raw(shift), axes_of(axis))


def broadcast_to(a: Any, /, shape: Sequence[int], *, stream: Any = None) -> array:
    """In a larger shape, with repeated elements."""
    return call(np.broadcast_to, *promoted(a), tuple(shape))


def broadcast_arrays(*arrays: Any, stream: Any = None) -> list[array]:
    """Arrays in their common shape."""
    return [result(x) for x in FUNCTIONS[np.broadcast_arrays](*(promoted(a)[0] for a in arrays))]


def broadcast_shapes(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The common shape."""
    return np.broadcast_shapes(*map(tuple, shapes))


def concatenate(arrays: Sequence[Any], axis: int | None = 0, *, stream: Any = None) -> array:
    """Arrays one after the other along an axis."""
    if len(arrays) == 0:
        raise ValueError("concatenate needs at least one array")
    return call(np.concatenate, promoted(*arrays), axis)


concat = concatenate


def stack(arrays: Sequence[Any], axis: int | None = 0, *, stream: Any = None) -> array:
    """Arrays along a new axis."""
    if len(arrays) == 0:
        raise ValueError("stack needs at least one array")
    return call(np.stack, promoted(*arrays), axis or 0)


def unstack(x: Any, /, *, axis: int = 0, stream: Any = None) -> list[array]:
    """The parts along an axis, without it."""
    (value,) = promoted(x)
    along = (builtins.slice(None),) * (axis % len(value.shape))
    return [of(value)[along + (i,)] for i in range(value.shape[axis])]


def split(a: Any, /, indices_or_sections: Any, axis: int = 0, *, stream: Any = None) -> list[array]:
    """Parts along an axis: so many equal ones, or those that begin at the places."""
    return list(call(np.split, *promoted(a), tree_raw(indices_or_sections), axis))


def repeat(array: Any, repeats: int, axis: int | None = None, *, stream: Any = None) -> Any:
    """Each element so many times."""
    return call(np.repeat, *promoted(array), repeats, axis)


def tile(a: Any, reps: int | Sequence[int], /, *, stream: Any = None) -> array:
    """The whole so many times."""
    return call(np.tile, *promoted(a), reps)


def pad(
    a: Any, pad_width: Any, mode: str = "constant", constant_values: Any = 0, *, stream: Any = None
) -> array:
    """More elements before and after the axes: of a value, or of the edge's."""
    (x,) = promoted(a)
    width = list(pad_width) if np.iterable(pad_width) else pad_width
    more = {"constant_values": np.asarray(raw(constant_values))} if mode == "constant" else {}
    return call(np.pad, x, width, mode, **more)


def take(a: Any, /, indices: Any, axis: int | None = None, *, stream: Any = None) -> array:
    """The elements, or parts along an axis, with these numbers."""
    where = raw(indices)
    (x,) = promoted(a)
    if axis is None:
        x, axis = FUNCTIONS[np.ravel](x), 0
    along = (builtins.slice(None),) * (axis % len(x.shape))
    return of(x)[along + (where,)]


def take_along_axis(a: Any, /, indices: Any, axis: int | None = -1, *, stream: Any = None) -> array:
    """From each row along an axis, the elements with the numbers in the same row of `indices`."""
    (x,) = promoted(a)
    where = np.asarray(constant(raw(indices), "take_along_axis"))
    if axis is None:
        x, where, axis = FUNCTIONS[np.ravel](x), where.reshape(-1), 0
    return of(x)[_rows(where, axis, x.shape)]


def _rows(where: np.ndarray, axis: int, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The index of elements along an axis, as `take_along_axis` and `put_along_axis` name them."""
    axis %= len(shape)
    full = np.broadcast_shapes(where.shape, (*shape[:axis], where.shape[axis], *shape[axis + 1 :]))
    grid = list(np.ogrid[tuple(builtins.slice(n) for n in full)])
    grid[axis] = where.astype(np.int64)
    return tuple(grid)


def put_along_axis(
    a: Any, /, indices: Any, values: Any, axis: int | None = None, *, stream: Any = None
) -> array:
    """`a` with values at the places that `take_along_axis` reads."""
    (x,) = promoted(a)
    where = np.asarray(constant(raw(indices), "put_along_axis"))
    if axis is None:
        flat = FUNCTIONS[np.ravel](x)
        values = raw(values) if not hasattr(values, "shape") else raw(reshape(values, (-1,)))
        return reshape(placed(flat, where.reshape(-1), values), x.shape)
    return result(placed(x, _rows(where, axis, x.shape), values))


def tril(x: Any, k: int = 0, *, stream: Any = None) -> array:
    """0 above diagonal k."""
    return call(np.tril, *promoted(x), k)


def triu(x: Any, k: int = 0, *, stream: Any = None) -> array:
    """0 below diagonal k."""
    return call(np.triu, *promoted(x), k)


def diagonal(a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1, stream: Any = None) -> array:
    """The diagonal of two axes."""
    return call(np.diagonal, *promoted(a), offset, axis1, axis2)


def diag(a: Any, /, k: int = 0, *, stream: Any = None) -> array:
    """A matrix's diagonal, or the matrix with this diagonal."""
    return call(np.diag, *promoted(a), k)


def trace(
    a: Any, /, offset: int = 0, axis1: int = 0, axis2: int = 1, dtype: Any = None, *,
    stream: Any = None,
) -> array:  # fmt: skip
    """The sum of the diagonal."""
    found = sum(diagonal(a, offset, axis1, axis2), -1)
    return of(cast(raw(found), raw(a).dtype if dtype is None else np.dtype(dtype)))


def atleast_1d(*arys: Any, stream: Any = None) -> Any:
    """With one axis at least."""
    return result(FUNCTIONS[np.atleast_1d](*(promoted(a)[0] for a in arys)))


def atleast_2d(*arys: Any, stream: Any = None) -> Any:
    """With two axes at least."""
    return result(FUNCTIONS[np.atleast_2d](*(promoted(a)[0] for a in arys)))


def atleast_3d(*arys: Any, stream: Any = None) -> Any:
    """With three axes at least."""
    return result(FUNCTIONS[np.atleast_3d](*(promoted(a)[0] for a in arys)))


def diff(a: Any, /, n: int = 1, axis: int = -1, *, stream: Any = None) -> array:
    """The differences of neighbors."""
    return call(np.diff, *promoted(a), n, axis)


def contiguous(a: Any, /, allow_col_major: bool = False, *, stream: Any = None) -> array:
    """a: how elements lie in memory is not seen here."""
    return result(promoted(a)[0])


def as_strided(
    a: Any, /, shape: Sequence[int] | None = None, strides: Sequence[int] | None = None,
    offset: int = 0, *, stream: Any = None,
) -> array:  # fmt: skip
    """The elements offset + sum of index * stride of the flat array; strides count elements."""
    x = FUNCTIONS[np.ravel](promoted(a)[0])
    sizes = tuple(raw(a).shape if shape is None else shape)
    if strides is None:
        strides = [int(np.prod(sizes[i + 1 :])) for i in range(len(sizes))]
    where = np.full(sizes, offset)
    for axis, step in enumerate(strides):
        where = (
            where + np.arange(sizes[axis]).reshape((-1,) + (1,) * (len(sizes) - axis - 1)) * step
        )
    return of(x)[where]


def view(a: Any, dtype: Any, stream: Any = None) -> array:
    """The same bytes as another type."""
    x = constant(promoted(a)[0], "view")
    return of(np.ascontiguousarray(x).view(np.dtype(dtype)).copy())


def slice(
    a: Any, start_indices: Any, axes: Sequence[int], slice_size: Sequence[int], *,
    stream: Any = None,
) -> array:  # fmt: skip
    """A part of given size that begins at computed places."""
    (x,) = promoted(a)
    return of(x)[_window(x, start_indices, axes, slice_size)]


def slice_update(
    a: Any, update: Any, start_indices: Any, axes: Sequence[int], *, stream: Any = None
) -> array:
    """`a` with `update` in place of the part that begins at computed places."""
    (x,) = promoted(a)
    new = promoted(update)[0]
    at = _window(x, start_indices, range(len(x.shape)), new.shape, axes)
    return result(placed(x, at, new))


def _window(
    x: Any, starts: Any, axes: Sequence[int], sizes: Sequence[int], named: Any = None
) -> tuple[builtins.slice, ...]:
    begin = [0] * len(x.shape)
    flat = np.asarray(constant(raw(array(starts)), "slice")).reshape(-1)
    for axis, start in zip(axes if named is None else named, flat, strict=True):
        begin[axis] = int(start)
    ends = list(x.shape) if named is None else [b + n for b, n in zip(begin, sizes, strict=True)]
    if named is None and len(sizes) == len(x.shape):
        ends = [b + n for b, n in zip(begin, sizes, strict=True)]
    return tuple(builtins.slice(b, e) for b, e in zip(begin, ends, strict=True))


class ArrayAt:
    """`a.at[index].add(v)`: `a` with elements changed; a place that occurs twice changes twice."""

    def __init__(self, source: Any, index: Any = None):
        self._source, self._index, self._indexed = source, index, False

    def __getitem__(self, index: Any) -> ArrayAt:
        found = ArrayAt(self._source, tree_raw(index))
        found._indexed = True
        return found

    def _operands(self, value: Any) -> tuple[Any, Any]:
        if not self._indexed:
            raise ValueError("a.at needs an index: a.at[index].add(value)")
        x = recorded(raw(self._source))
        given = raw(value)
        given = cast(given if hasattr(given, "dtype") else np.asarray(given, x.dtype), x.dtype)
        return x, fitting(given, x, self._index)

    def add(self, value: Any) -> array:
        """a[index] + value."""
        x, v = self._operands(value)
        index = self._index

        def forward(xd: Any, vd: Any) -> Any:
            new = np.array(xd)
            np.add.at(new, index, vd)
            return new

        def gradient(i: int, dy: Any, y: Any, *unread: Any) -> Any:
            return dy if i == 0 else np.asarray(dy[index])

        return result(apply(forward, (x, v), gradient))

    def subtract(self, value: Any) -> array:
        """a[index] - value."""
        return self.add(call(np.negative, *promoted(value)))

    def _each(self, ufunc: np.ufunc, name: str, value: Any) -> array:
        x, v = self._operands(value)
        if not (isinstance(x, Tensor) or isinstance(v, Tensor)) or not recording(x, v):
            new = np.array(constant(x, name))
            ufunc.at(new, self._index, constant(v, name))
            return of(new)
        numbers = np.arange(int(np.prod(x.shape))).reshape(x.shape)[self._index]
        if len(np.unique(numbers)) < numbers.size:
            raise TypeError(
                f"a.at[index].{name} has a gradient only for places that occur once in the index"
            )
        return result(placed(x, self._index, call(ufunc, *promoted(of(x)[self._index], v))))

    def multiply(self, value: Any) -> array:
        """a[index] * value."""
        return self._each(np.multiply, "multiply", value)

    def divide(self, value: Any) -> array:
        """a[index] / value."""
        return self._each(np.divide, "divide", value)

    def maximum(self, value: Any) -> array:
        """The larger of a[index] and value."""
        return self._each(np.maximum, "maximum", value)

    def minimum(self, value: Any) -> array:
        """The smaller of a[index] and value."""
        return self._each(np.minimum, "minimum", value)
