"""MLX's products of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss.autograd.functions import products
from pyloss.autograd.tape import recording
from pyloss.autograd.tensor import Tensor
from pyloss.mlx.core.arrays import array, call, cast, of, promoted, raw, result
from pyloss.mlx.core.dtypes import bfloat16, float32
from pyloss.mlx.core.elementwise import add, multiply


def matmul(a: Any, b: Any, /, *, stream: Any = None) -> array:
    """The product of matrices, in the last two axes."""
    return call(np.matmul, *promoted(a, b, floats=True))


def addmm(
    c: Any, a: Any, b: Any, /, alpha: float = 1.0, beta: float = 1.0, *, stream: Any = None
) -> array:
    """beta * c + alpha * (a @ b)."""
    product = matmul(a, b)
    if alpha != 1.0:
        product = multiply(product, alpha)
    return add(product, c if beta == 1.0 else multiply(c, beta))


def inner(a: Any, b: Any, /, *, stream: Any = None) -> array:
    """The sums of products along both last axes."""
    return call(np.inner, *promoted(a, b))


def outer(a: Any, b: Any, /, *, stream: Any = None) -> array:
    """All products of elements."""
    return call(np.outer, *promoted(a, b))


def kron(a: Any, b: Any, *, stream: Any = None) -> array:
    """Kronecker's product."""
    return call(np.kron, *promoted(a, b))


def tensordot(a: Any, b: Any, /, axes: Any = 2, *, stream: Any = None) -> array:
    """The sums of products along several axes."""
    x, y = promoted(a, b)
    return of(cast(raw(call(np.tensordot, *_widened(x, y), axes)), x.dtype))


def vecdot(a: Any, b: Any, /, *, axis: int = -1, stream: Any = None) -> array:
    """The sums of products along an axis."""
    x, y = promoted(a, b)
    return result(products.vecdot(x, y, axis))


def einsum(subscripts: str, *operands: Any, stream: Any = None) -> array:
    """The sum of products that the subscripts describe."""
    given = promoted(*operands)
    kind, values = given[0].dtype, _widened(*given)
    if not recording(*values):  # a letter may occur twice in one operand
        arrays = [x.data if isinstance(x, Tensor) else x for x in values]
        return result(np.asarray(np.einsum(subscripts, *arrays, optimize=True)).astype(kind))
    return of(cast(raw(call(np.einsum, subscripts, *values)), kind))


def _widened(*values: Any) -> list[Any]:
    """Values of bfloat16, which NumPy's einsum does not take, in float32."""
    return [cast(x, float32) if x.dtype == bfloat16 else x for x in values]
