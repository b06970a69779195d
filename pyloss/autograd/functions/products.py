"""NumPy's products of matrices and sums of products."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyloss.arithmetic import batched_product, summed_product
from pyloss.autograd.functions.apply import apply, implements, operand


@implements(np.matmul)
def matmul(a: Any, b: Any) -> Any:
    x, y = operand(a), operand(b)
    if not getattr(x, "ndim", 0) or not getattr(y, "ndim", 0):
        raise ValueError("matmul takes arrays with at least one axis, not numbers: use *")
    if x.ndim == 1 or y.ndim == 1:
        left = x if x.ndim > 1 else np.expand_dims(x, 0)
        right = y if y.ndim > 1 else np.expand_dims(y, 1)
        out = matmul(left, right)
        if x.ndim == 1:
            out = np.squeeze(out, -2)
        return np.squeeze(out, -1) if y.ndim == 1 else out

    def gradient(i: int, dy: Any, out: Any, ad: Any, bd: Any) -> Any:
        if not dy.size or not x.size or not y.size:
            return np.zeros((x if i == 0 else y).shape, dy.dtype)
        if i == 0:
            found = summed_product(dy, bd, x.shape[:-2], transpose_b=True)
            return dy @ np.swapaxes(bd, -1, -2) if found is None else found
        found = summed_product(ad, dy, y.shape[:-2], transpose_a=True)
        return np.swapaxes(ad, -1, -2) @ dy if found is None else found

    return apply(_product, (x, y), gradient, ("1", "0"))


def _product(ad: Any, bd: Any) -> Any:
    found = batched_product(ad, bd) if ad.size and bd.size else None
    return np.matmul(ad, bd) if found is None else found


@implements(np.dot)
def dot(a: Any, b: Any) -> Any:
    x, y = operand(a), operand(b)
    if not getattr(x, "ndim", 0) or not getattr(y, "ndim", 0):
        return x * y
    if x.ndim <= 2 and y.ndim <= 2:
        return matmul(x, y)
    return np.tensordot(x, y, (-1, -2 if y.ndim > 1 else -1))


@implements(np.vdot)
def vdot(a: Any, b: Any) -> Any:
    return matmul(np.ravel(operand(a)), np.ravel(operand(b)))


@implements(np.inner)
def inner(a: Any, b: Any) -> Any:
    x, y = operand(a), operand(b)
    return np.tensordot(x, y, (-1, -1)) if np.ndim(x) and np.ndim(y) else x * y


@implements(np.outer)
def outer(a: Any, b: Any) -> Any:
    return np.ravel(operand(a))[:, None] * np.ravel(operand(b))[None, :]


@implements(np.kron)
def kron(a: Any, b: Any) -> Any:
    x, y = operand(a), operand(b)
    n = max(np.ndim(x), np.ndim(y))
    x, y = (np.reshape(part, (1,) * (n - np.ndim(part)) + np.shape(part)) for part in (x, y))
    spread = np.reshape(x, tuple(v for size in x.shape for v in (size, 1)))
    product = spread * np.reshape(y, tuple(v for size in y.shape for v in (1, size)))
    return np.reshape(product, tuple(x.shape[i] * y.shape[i] for i in range(n)))


@implements(np.tensordot)
def tensordot(a: Any, b: Any, axes: Any = 2) -> Any:
    x, y = operand(a), operand(b)
    if isinstance(axes, int | np.integer):
        left, right = list(range(x.ndim - axes, x.ndim)), list(range(axes))
    else:
        left, right = (list(part) if np.iterable(part) else [part] for part in axes)
    letters = string.ascii_letters
    of_x = list(letters[: x.ndim])
    of_y = list(letters[x.ndim : x.ndim + y.ndim])
    for i, j in zip(left, right, strict=True):
        if x.shape[i] != y.shape[j]:  # einsum would broadcast a size of 1
            raise ValueError(
                f"a product of shapes {x.shape} and {y.shape} sums axis {i} of the first and axis "
                f"{j} of the second, which differ in size"
            )
        of_y[j] = of_x[i]
    summed = {of_x[i] for i in left}
    out = [letter for letter in of_x + of_y if letter not in summed]
    return np.einsum(f"{''.join(of_x)},{''.join(of_y)}->{''.join(out)}", x, y)


def vecdot(a: Any, b: Any, axis: int = -1) -> Any:
    """The sum of a * b along an axis."""
    x, y = (np.moveaxis(x, axis, -1) if np.ndim(x) else x for x in (operand(a), operand(b)))
    if not np.ndim(x) or not np.ndim(y) or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"vecdot takes arrays of one size along axis {axis}, not of shapes {np.shape(x)} and "
            f"{np.shape(y)}"
        )
    return np.sum(x * y, -1)


if hasattr(np, "vecdot"):  # from NumPy 2 on
    implements(np.vecdot)(vecdot)
    implements(np.linalg.vecdot)(lambda x1, x2, /, *, axis=-1: vecdot(x1, x2, axis))
    implements(np.linalg.matmul)(lambda x1, x2, /: matmul(x1, x2))
    implements(np.linalg.outer)(lambda x1, x2, /: outer(x1, x2))
    implements(np.linalg.tensordot)(lambda x1, x2, /, *, axes=2: tensordot(x1, x2, axes))
if hasattr(np, "matvec"):  # from NumPy 2.2 on
    implements(np.matvec)(lambda x1, x2: np.squeeze(matmul(x1, np.expand_dims(x2, -1)), -1))
    implements(np.vecmat)(lambda x1, x2: np.squeeze(matmul(np.expand_dims(x1, -2), x2), -2))


def _subscripts(subscripts: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, with "..." written out."""
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if len(parts) != len(ranks):
        raise ValueError(
            f"einsum's {subscripts!r} names {len(parts)} operands, and {len(ranks)} were given"
        )
    free = [c for c in string.ascii_letters if c not in subscripts]
    hidden = [rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True)]
    most = max((n for part, n in zip(parts, hidden, strict=True) if "..." in part), default=0)
    if not arrow:
        letters = sorted(c for c in set(inputs) if c.isalpha() and inputs.count(c) == 1)
        output = ("..." if "..." in inputs else "") + "".join(letters)
    names = "".join(free[:most])
    written = [
        part.replace("...", names[most - n :] if n else "")
        for part, n in zip(parts, hidden, strict=True)
    ]
    return written, output.replace("...", names)


@implements(np.einsum)
def einsum(subscripts: Any, *operands: Any, optimize: Any = True) -> Any:
    """Any sum of products without a letter twice in one operand."""
    if not isinstance(subscripts, str):
        raise TypeError("numpy.einsum of Tensors takes its subscripts as a string")
    given = [operand(x) for x in operands]
    letters, output = _subscripts(subscripts, [x.ndim for x in given])
    for part in letters:
        if len(set(part)) < len(part):
            raise TypeError(
                f"numpy.einsum has no gradient for an operand with a letter twice ({part!r}): "
                "use np.diagonal"
            )
    sizes: dict[str, int] = {}
    for part, x in zip(letters, given, strict=True):
        for letter, size in zip(part, x.shape, strict=False):
            sizes[letter] = max(sizes.get(letter, 1), size)
    plan = f"{','.join(letters)}->{output}"

    def gradient(i: int, dy: Any, y: Any, *arrays: Any) -> Any:
        others = [(letters[j], array) for j, array in enumerate(arrays) if j != i]
        sources = [output, *(part for part, _ in others)]
        # Letters of this operand alone: every element of the axis gets the same gradient.
        alone = [c for c in letters[i] if not any(c in part for part in sources)]
        ones = [np.ones(sizes[c], dy.dtype) for c in alone]
        back = f"{','.join([*sources, *alone])}->{letters[i]}"
        return np.einsum(back, dy, *(array for _, array in others), *ones, optimize=True)

    places = range(len(given))
    reads = ["".join(str(j) for j in places if j != i) for i in places]
    return apply(lambda *xs: np.einsum(plan, *xs, optimize=optimize), given, gradient, reads)
