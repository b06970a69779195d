"""Products of matrices in the last two axes, with batch axes that broadcast."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.arithmetic.arrays import empty, is_f32
from pyloss.runtime import device

Shape = tuple[int, ...]


def batched_product(
    a: Any,
    b: Any,
    out: Any = None,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    add: bool = False,
) -> Any:
    """alpha op(a) op(b) over the last two axes, plus `out` if `add`; None: use NumPy.

    Batch axes broadcast as `np.matmul`'s. op(x) transposes the last two axes.
    """
    if not (is_f32(a) and is_f32(b) and len(a.shape) > 1 and len(b.shape) > 1):
        return None
    if transpose_a and transpose_b:
        b, transpose_b = _swapped(b), False
    batch_a, batch_b = a.shape[:-2], b.shape[:-2]
    m, k = a.shape[-2:][::-1] if transpose_a else a.shape[-2:]
    depth, n = b.shape[-2:][::-1] if transpose_b else b.shape[-2:]
    plan = _plan(batch_a, batch_b)
    if depth != k or plan is None:
        return None
    batch, a_index, b_index = plan
    shape = (*batch, m, n)
    if out is None:
        if add:
            raise ValueError("add needs an out array to add to")
        out = empty(shape, a)
    elif not is_f32(out) or out.shape != shape:
        raise ValueError(f"out must be a contiguous float32 array of shape {shape}")
    if type(a) is not np.ndarray:
        a_index = a_index if a_index is None else device.on_device_of(a, a_index)
        b_index = b_index if b_index is None else device.on_device_of(a, b_index)
    call = (
        _core.batched_tn if transpose_a else _core.batched_nt if transpose_b else _core.batched_nn
    )
    call(_matrices(a), _matrices(b), a_index, b_index, alpha, int(add), _matrices(out))
    return out


def summed_product(
    a: Any,
    b: Any,
    batch: Shape,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> Any:
    """op(a) op(b), summed over the batch axes that `batch` lacks or has with size 1.

    The gradient of an operand that was broadcast to the other's batch axes; its own were `batch`.
    None: use NumPy.
    """
    if not (is_f32(a) and is_f32(b) and len(a.shape) > 1 and len(b.shape) > 1):
        return None
    if (
        transpose_a
        and not transpose_b
        and math.prod(batch) == 1
        and a.shape[:-1] == b.shape[:-1]
        and math.prod(a.shape[:-1]) > 0
    ):
        # The sum over a batch of products over rows is one product over all rows.
        out = empty((*batch, a.shape[-1], b.shape[-1]), a)
        _core.matmul_tn(
            a.reshape(-1, a.shape[-1]),
            b.reshape(-1, b.shape[-1]),
            1.0,
            0,
            out.reshape(out.shape[-2:]),
        )
        return out
    whole = batched_product(a, b, None, transpose_a, transpose_b)
    if whole is None or whole.shape[:-2] == batch:
        return whole
    return _summed(whole, batch)


def _summed(whole: Any, batch: Shape) -> Any:
    """Sums a batch of matrices over the axes that `batch` lacks or has with size 1."""
    axes, matrix = whole.shape[:-2], whole.shape[-2:]
    padded = (1,) * (len(axes) - len(batch)) + batch
    if len(padded) != len(axes) or not all(p in (1, s) for p, s in zip(padded, axes, strict=True)):
        return None
    first = next((i for i, p in enumerate(padded) if p != 1), len(padded))
    rows = math.prod(axes[:first])
    if padded[first:] == axes[first:] and rows > 0:
        out = empty((*batch, *matrix), whole)
        _core.column_sum(whole.reshape(rows, out.size), out.reshape(-1))
        return out
    if type(whole) is not np.ndarray:
        return None
    summed = tuple(i for i, (p, s) in enumerate(zip(padded, axes, strict=True)) if p != s)
    return whole.sum(axis=summed, keepdims=True).reshape(*batch, *matrix)


def _matrices(x: Any) -> Any:
    """x with all its batch axes as one."""
    shape = x.shape
    return x if len(shape) == 3 else x.reshape(math.prod(shape[:-2]), *shape[-2:])


def _swapped(x: Any) -> Any:
    """A contiguous copy of x with its last two axes exchanged."""
    if type(x) is np.ndarray:
        return np.ascontiguousarray(x.swapaxes(-1, -2))
    swapped = empty((*x.shape[:-2], x.shape[-1], x.shape[-2]), x)
    for i in range(math.prod(x.shape[:-2])):
        _core.transpose(_matrices(x)[i], _matrices(swapped)[i])
    return swapped


@lru_cache(maxsize=256)
def _plan(batch_a: Shape, batch_b: Shape) -> tuple[Shape, Any, Any] | None:
    """The batch axes of a product, and which matrix of each operand a product reads."""
    if batch_a == batch_b:
        return batch_a, None, None
    try:
        batch = np.broadcast_shapes(batch_a, batch_b)
    except ValueError:
        return None
    return batch, _index(batch_a, batch), _index(batch_b, batch)


def _index(own: Shape, batch: Shape) -> np.ndarray | None:
    """The matrix that each product reads; None if it is its number modulo their number."""
    first = next((i for i, n in enumerate(own) if n != 1), len(own))
    trimmed = own[first:]
    if trimmed == batch[len(batch) - len(trimmed) :]:
        return None
    numbers = np.arange(math.prod(own), dtype=np.int32).reshape(own)
    index = np.ascontiguousarray(np.broadcast_to(numbers, batch)).reshape(-1)
    index.flags.writeable = False
    return index
