"""mx.linalg: what training scripts use of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss.autograd.tape import recording
from pyloss.autograd.tensor import Tensor
from pyloss.mlx.core.arrays import array, axes_of, call, cast, of, promoted, raw, result
from pyloss.mlx.core.elementwise import constant
from pyloss.mlx.core.refused import refusing

__getattr__ = refusing("linalg")


def norm(
    a: Any, /, ord: Any = None, axis: Any = None, keepdims: bool = False, *, stream: Any = None
) -> array:
    """The norm of vectors or matrices; with a gradient for 1, 2, inf, p > 0 and "fro"."""
    (x,) = promoted(a, floats=True)
    if not recording(x):
        values = np.asarray(x.data if isinstance(x, Tensor) else x)
        found = np.linalg.norm(values, ord, axes_of(axis), keepdims)
        return of(np.asarray(found).astype(np.float32 if x.dtype.kind == "c" else x.dtype))
    found = call(np.linalg.norm, x, ord, axes_of(axis), keepdims)
    return of(cast(raw(found), x.dtype))


def _constants(name: str, *xs: Any) -> list[np.ndarray]:
    return [np.asarray(constant(x, f"linalg.{name}")) for x in promoted(*xs, floats=True)]


def inv(a: Any, *, stream: Any = None) -> array:
    """The inverse; it has no gradient here."""
    (x,) = _constants("inv", a)
    return of(np.linalg.inv(x))


def pinv(a: Any, *, stream: Any = None) -> array:
    """The pseudoinverse; it has no gradient here."""
    (x,) = _constants("pinv", a)
    return of(np.linalg.pinv(x))


def svd(a: Any, compute_uv: bool = True, *, stream: Any = None) -> Any:
    """U, the singular values, and V^T, both square; it has no gradient here."""
    (x,) = _constants("svd", a)
    return result(np.linalg.svd(x)[:3]) if compute_uv else of(np.linalg.svd(x, compute_uv=False))


def qr(a: Any, *, stream: Any = None) -> Any:
    """Q and R; it has no gradient here."""
    (x,) = _constants("qr", a)
    return result(tuple(np.linalg.qr(x)))


def eigh(a: Any, UPLO: str = "L", *, stream: Any = None) -> Any:
    """Eigenvalues and eigenvectors of a symmetric matrix; it has no gradient here."""
    (x,) = _constants("eigh", a)
    return result(tuple(np.linalg.eigh(x, UPLO)))  # type: ignore[call-overload]


def eigvalsh(a: Any, UPLO: str = "L", *, stream: Any = None) -> array:
    """Eigenvalues of a symmetric matrix; it has no gradient here."""
    (x,) = _constants("eigvalsh", a)
    return of(np.linalg.eigvalsh(x, UPLO))  # type: ignore[call-overload]


def cholesky(a: Any, upper: bool = False, *, stream: Any = None) -> array:
    """The triangular root of a positive matrix; it has no gradient here."""
    (x,) = _constants("cholesky", a)
    found = np.linalg.cholesky(x)
    return of(np.swapaxes(found, -1, -2).copy() if upper else found)


def solve(a: Any, b: Any, *, stream: Any = None) -> array:
    """x with a x = b; it has no gradient here."""
    x, y = _constants("solve", a, b)
    return of(np.linalg.solve(x, y))


def det(a: Any, *, stream: Any = None) -> array:
    """The determinant; it has no gradient here."""
    (x,) = _constants("det", a)
    return result(np.asarray(np.linalg.det(x)))


def slogdet(a: Any, *, stream: Any = None) -> Any:
    """The determinant's sign, and the logarithm of its absolute value; without a gradient."""
    (x,) = _constants("slogdet", a)
    return result(tuple(np.asarray(part) for part in np.linalg.slogdet(x)))
