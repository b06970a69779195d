"""Initial values of low-rank adapters from the base: PiSSA and LoftQ.

PiSSA: Meng et al., arXiv:2404.02948. LoftQ: Li et al., arXiv:2310.08659. Both need the largest
singular values of a matrix. Randomized block Krylov iteration (Musco & Musco, arXiv:1504.05477)
finds them from products with a few vectors, which read the matrix in its stored format: no dense
copy is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyloss import _core, ops
from pyloss.nn import Linear
from pyloss.ops.arrays import core_weight, empty
from pyloss.tuner.adapters.merging import dense, with_weight
from pyloss.tuner.adapters.selection import inner_name
from pyloss.weights.weight import Weight

if TYPE_CHECKING:
    from pyloss.tuner.adapters.low_rank import LowRankAdapter

#: Vectors beyond the rank, and rounds. A round is a product with the matrix and one with its
#: transpose.
_EXTRA = 8
_ROUNDS = 6

Product = Callable[[np.ndarray], np.ndarray]


def pissa(adapters: Mapping[str, LowRankAdapter], seed: int = 0) -> None:
    """Begins adapters with the principal part of their bases' weights.

    scale lora_a lora_b is the best product of the rank. Fixed factors subtract this initial
    product (`LowRankAdapter.subtract_initial_product`), so the base stays as it is stored, the
    model computes what it did, and the saved adapter is a plain one of twice the rank over the
    original base. The result is a function of base, rank and `seed`.

    Raises ValueError for a scale that is not above 0, or a rank above the smaller dimension.
    """
    for name, adapter in adapters.items():
        _begin(
            name, adapter, [_products(matrix) for matrix in _matrices(adapter.base.weight)], seed
        )
        adapter.subtract_initial_product()
        adapter.reset_magnitude()


def loftq(
    adapters: Mapping[str, LowRankAdapter], originals: Mapping[str, Any], seed: int = 0
) -> None:
    """Begins adapters over quantized bases with the best product for original - stored.

    `originals` has the layers of the float model, by the adapters' names. This is the second half
    of a step of LoftQ: the base stays as it is stored. `loftq_quantize` is the first half, for a
    model that is being quantized.

    Raises ValueError for layers that the float model lacks or has in other shapes, and as `pissa`.
    """
    for name, adapter in adapters.items():
        other = originals.get(name)
        weight, stored = getattr(other, "weight", None), adapter.base.weight
        if weight is None or tuple(weight.shape) != tuple(stored.shape):
            found = "there is none there" if weight is None else f"{tuple(weight.shape)} there"
            raise ValueError(
                "loftq_model is not the float model of this one: "
                f"{name} is {tuple(stored.shape)} here, {found}"
            )
        pairs = zip(_matrices(weight), _matrices(stored), strict=True)
        _begin(name, adapter, [_difference(_products(w), _products(q)) for w, q in pairs], seed)
        adapter.reset_magnitude()


def loftq_quantize(
    model: Any, originals: Mapping[str, Any], rank: int, rounds: int, seed: int = 0
) -> None:
    """Quantizes the linear layers of decoder layers for LoftQ, leaving a product of `rank` out.

    The layers are quantized already and keep their formats. Each of the `rounds` subtracts from
    the original the best product for the quantization error, and quantizes the rest. `loftq` then
    begins adapters of that rank over the saved model.
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
                f"{name}: the rank must be at most {min(weight.shape)}, "
                f"the smaller dimension, not {rank}"
            )
        for _ in range(rounds):
            left, right = principal(
                *_difference(_products(weight), _products(stored)), weight.shape[1], rank, seed
            )
            stored = stored.requantize(weight - left @ right)
        model.set_module(name, with_weight(module, stored).freeze())


def _begin(
    name: str, adapter: LowRankAdapter, products: list[tuple[Product, Product]], seed: int
) -> None:
    """Sets an adapter's factors to the best products for its matrices, given by their products."""
    rows, columns = adapter.base.weight.shape[-2:]
    if adapter.rank > min(rows, columns):
        raise ValueError(
            f"{name}: init needs a rank of at most {min(rows, columns)}, the smaller dimension, "
            f"not {adapter.rank}"
        )
    if adapter.scale <= 0:
        raise ValueError(f"{name}: init needs a scale above 0, not {adapter.scale}")
    share = np.sqrt(adapter.scale)
    for i, (forward, backward) in enumerate(products):
        left, right = principal(forward, backward, columns, adapter.rank, seed)
        if not left.any():
            raise ValueError(
                f"{name}: nothing to begin with: "
                "the base's weight is zero, or equal to the float model's"
            )
        # A linear layer multiplies by the transpose of its weight; an embedding takes rows.
        a, b = (left, right) if adapter.base_name == "embedding" else (right.T, left.T)
        if adapter.lora_a.ndim == 2:
            adapter.lora_a[...], adapter.lora_b[...] = a / share, b / share
        else:
            adapter.lora_a[i], adapter.lora_b[i] = a.T / share, b.T / share


def principal(
    forward: Product, backward: Product, columns: int, rank: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The best product of rank `rank` for a matrix W [rows, columns].

    Returns left [rows, rank] and right [rank, columns], float32, each with the square roots of the
    singular values. `forward(x [k, columns])` gives x W^T, `backward(y [k, rows])` gives y W. The
    rank is at most the smaller dimension.
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
        for _ in range(2):  # once more, for rounding errors
            block = block - _product(_product(block, basis, True), basis)
            block = _orthonormal(block)[: columns - len(basis)]
        if not len(block):
            break
        basis = np.concatenate((basis, block))
    # W is nearly (W basis^T) basis, so the first factor has the singular values of W.
    image = forward(basis)
    squares, turns = np.linalg.eigh(_product(image, image, True).astype(np.float64))
    roots = np.maximum(squares[::-1][:rank], 0) ** 0.25
    turns = np.ascontiguousarray(turns.T[::-1][:rank], np.float32)
    inverse = np.divide(1, roots, where=roots > 0, out=np.zeros_like(roots))
    left, right = _product(turns, image).T * inverse, _product(turns, basis) * roots[:, None]
    return left.astype(np.float32), right.astype(np.float32)


def _product(a: np.ndarray, b: np.ndarray, transposed: bool = False) -> np.ndarray:
    """a b, or a b^T, by kernels whose bits do not depend on the number of threads."""
    out = empty(len(a), len(b) if transposed else b.shape[1])
    (_core.matmul_nt if transposed else _core.matmul_nn)(a, b, 1.0, 0, out)
    return out


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """Orthonormal rows of the same span, the longest direction first.

    There are fewer rows where the span has fewer dimensions.
    """
    for _ in range(2):  # once more, for rounding errors
        squares, turns = np.linalg.eigh(_product(rows, rows, True).astype(np.float64))
        kept = squares > 1e-10 * squares[-1:].clip(1e-30)
        whitened = (turns[:, kept] / np.sqrt(squares[kept])).T[::-1]
        rows = _product(np.ascontiguousarray(whitened, np.float32), rows)
    return rows


def _matrices(weight: Any) -> Iterable[Any]:
    """The matrix itself, or the matrices of a stack (an ndarray or a `WeightStack`)."""
    if len(weight.shape) == 2:
        return [weight]
    return weight if isinstance(weight, np.ndarray) else weight.matrices


def _products(weight: Any) -> tuple[Product, Product]:
    """`x W^T` and `y W` of a matrix W, by kernels that read its stored format."""

    def backward(y: np.ndarray) -> np.ndarray:
        out = empty(len(y), weight.shape[1])
        _core.linear_input_grad(
            np.ascontiguousarray(y), core_weight(weight), None, None, 0, None, out
        )
        orders = getattr(weight, "orders", None)
        return out if orders is None else out[:, orders[1]]

    return lambda x: ops.linear(np.ascontiguousarray(x), weight), backward


def _difference(
    one: tuple[Product, Product], other: tuple[Product, Product]
) -> tuple[Product, Product]:
    return lambda x: one[0](x) - other[0](x), lambda y: one[1](y) - other[1](y)
