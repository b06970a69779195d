"""How adapters begin from the base: PiSSA (Meng et al., arXiv:2404.02948) and LoftQ (Li et al., arXiv:2310.08659).

Both need the largest singular values of a matrix. It is only ever multiplied, in the format that it is stored in, by a few
vectors (randomised block Krylov iteration: Musco & Musco, arXiv:1504.05477), so that no dense copy of it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pyloss import _core, ops
from pyloss.nn import Linear
from pyloss.ops.arrays import empty, matrix
from pyloss.tuner.adapters.adapter import Adapter, dense, with_weight
from pyloss.tuner.adapters.selection import inner_name
from pyloss.weights.weight import Weight

#: vectors beyond the rank, and rounds, each a product with the matrix and one with its transpose
_EXTRA = 8
_ROUNDS = 6

Product = Callable[[np.ndarray], np.ndarray]


def pissa(adapters: dict[str, Adapter], seed: int = 0) -> None:
    """Begins adapters with the principal part of their bases' weights: scale lora_a lora_b is the best product of the rank.

    What it was at the beginning is taken off again by fixed factors (`Adapter.take_off_start`) in the place of a base without it:
    the base stays as it is stored, the model begins as it was, and the saved adapter is a plain one, of twice the rank, over the
    original base. Deterministic: a function of base, rank and `seed`.
    Raises ValueError for a scale that is not above 0, or a rank above the smaller dimension.
    """
    for name, adapter in adapters.items():
        _begin(
            name, adapter, [_products(matrix) for matrix in _matrices(adapter.base.weight)], seed
        )
        adapter.take_off_start()
        adapter.begin_magnitude()


def loftq(adapters: dict[str, Adapter], originals: dict[str, Any], seed: int = 0) -> None:
    """Begins adapters over quantised bases with the best product of the rank for what quantising lost: original - stored.

    `originals` has the layers of the float model, by the adapters' names. This is the last half of a step of LoftQ; the base,
    which is a file's, stays as it is stored; `quantise_beside` is the first half, for files that are yet to be written.
    Raises ValueError for layers that the float model lacks or has in other shapes, and as `pissa`.
    """
    for name, adapter in adapters.items():
        other = originals.get(name)
        weight, stored = getattr(other, "weight", None), adapter.base.weight
        if weight is None or tuple(weight.shape) != tuple(stored.shape):
            found = "there is none there" if weight is None else f"{tuple(weight.shape)} there"
            raise ValueError(
                f"loftq_model is not the float model of this one: {name} is {tuple(stored.shape)} here, {found}"
            )
        pairs = zip(_matrices(weight), _matrices(stored), strict=True)
        _begin(name, adapter, [_difference(_products(w), _products(q)) for w, q in pairs], seed)
        adapter.begin_magnitude()


def quantise_beside(
    model: Any, originals: dict[str, Any], rank: int, rounds: int, seed: int = 0
) -> None:
    """Quantises the linear layers of `model`'s decoder layers anew, leaving out what a product of the rank can say: LoftQ.

    The layers are stored as quantised ones already, and stay in their formats. Each of the `rounds` takes the best product for
    what quantising lost off the original and quantises the rest; `loftq` then begins adapters of that rank over the saved model.
    """
    for name, module in list(model.named_modules()):
        stored, inside = getattr(module, "weight", None), inner_name(name)[0]
        if (
            not (inside and isinstance(module, Linear) and isinstance(stored, Weight))
            or stored.is_float
        ):
            continue
        weight = dense(originals[name].weight)
        if rank > min(weight.shape):
            raise ValueError(
                f"{name}: the rank must be at most {min(weight.shape)}, the smaller dimension, not {rank}"
            )
        for _ in range(rounds):
            left, right = principal(
                *_difference(_products(weight), _products(stored)), weight.shape[1], rank, seed
            )
            stored = stored.requantize(weight - left @ right)
        model.set_module(name, with_weight(module, stored).freeze())


def _begin(name: str, adapter: Adapter, products: list[tuple[Product, Product]], seed: int) -> None:
    rows, columns = adapter.base.weight.shape[-2:]
    if adapter.rank > min(rows, columns):
        raise ValueError(
            f"{name}: init needs a rank of at most {min(rows, columns)}, the smaller dimension, not {adapter.rank}"
        )
    if adapter.scale <= 0:
        raise ValueError(f"{name}: init needs a scale above 0, not {adapter.scale}")
    share = np.sqrt(adapter.scale)
    for i, (forward, backward) in enumerate(products):
        left, right = principal(forward, backward, columns, adapter.rank, seed)
        if not left.any():
            raise ValueError(
                f"{name}: nothing to begin with: the base's weight is the float model's own, or zero"
            )
        # A linear layer multiplies by its weight's transpose; of a table it takes rows.
        a, b = (left, right) if adapter.base_name == "embedding" else (right.T, left.T)
        if adapter.lora_a.ndim == 2:
            adapter.lora_a[...], adapter.lora_b[...] = a / share, b / share
        else:
            adapter.lora_a[i], adapter.lora_b[i] = a.T / share, b.T / share


def principal(
    forward: Product, backward: Product, columns: int, rank: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The best product of rank `rank` for a matrix W [rows, columns]: left [rows, rank] and right [rank, columns], float32.

    `forward(x [k, columns])` gives x W^T, `backward(y [k, rows])` gives y W. The singular values are shared out evenly: both
    sides have their roots. The rank is at most the smaller dimension.
    """
    count = min(rank + _EXTRA, columns)
    x = (
        np.random.Generator(np.random.PCG64(seed))
        .standard_normal((count, columns))
        .astype(np.float32)
    )
    basis = block = _orthonormal(x)
    for _ in range(_ROUNDS):
        block = backward(forward(block))
        for _ in range(2):  # the second time for what rounding left
            block = block - _product(_product(block, basis, True), basis)
            block = _orthonormal(block)[: columns - len(basis)]
        if not len(block):
            break
        basis = np.concatenate((basis, block))
    # W is nearly (W basis^T) basis: the singular values of the first factor are its own.
    image = forward(basis)
    squares, turns = np.linalg.eigh(_product(image, image, True).astype(np.float64))
    roots = np.maximum(squares[::-1][:rank], 0) ** 0.25
    turns = np.ascontiguousarray(turns.T[::-1][:rank], np.float32)
    inverse = np.divide(1, roots, where=roots > 0, out=np.zeros_like(roots))
    left, right = _product(turns, image).T * inverse, _product(turns, basis) * roots[:, None]
    return left.astype(np.float32), right.astype(np.float32)


def _product(a: np.ndarray, b: np.ndarray, transposed: bool = False) -> np.ndarray:
    """a b, or a b^T: by the library's kernels, whose bits do not depend on the number of threads."""
    out = empty(len(a), len(b) if transposed else b.shape[1])
    (_core.matmul_nt if transposed else _core.matmul_nn)(a, b, 1.0, 0, out)
    return out


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """Orthonormal rows that span the same space, the longest direction first; fewer, where that has fewer dimensions."""
    for _ in range(2):  # the second time for what rounding left
        squares, turns = np.linalg.eigh(_product(rows, rows, True).astype(np.float64))
        kept = squares > 1e-10 * squares[-1:].clip(1e-30)
        whitened = (turns[:, kept] / np.sqrt(squares[kept])).T[::-1]
        rows = _product(np.ascontiguousarray(whitened, np.float32), rows)
    return rows


def _matrices(weight: Any) -> Iterable[Any]:
    """The matrix, or those of a stack of them (an ndarray or a stored one)."""
    if len(weight.shape) == 2:
        return [weight]
    return weight if isinstance(weight, np.ndarray) else weight.matrices


def _products(weight: Any) -> tuple[Product, Product]:
    """`x W^T` and `y W` of a matrix W, by the kernels that read it as it is stored."""

    def backward(y: np.ndarray) -> np.ndarray:
        out = empty(len(y), weight.shape[1])
        _core.linear_input_grad(np.ascontiguousarray(y), matrix(weight), None, None, 0, None, out)
        return out

    return lambda x: ops.linear(np.ascontiguousarray(x), weight), backward


def _difference(
    one: tuple[Product, Product], other: tuple[Product, Product]
) -> tuple[Product, Product]:
    return lambda x: one[0](x) - other[0](x), lambda y: one[1](y) - other[1](y)
