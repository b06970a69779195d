"""A layer's product with its adapter's, and all gradients.

One arithmetic for layers, experts and fused heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import (
    Gradients,
    Tensor,
    current_tape,
    data,
    keep,
    lazy_output,
    record,
    recording,
)
from pyloss.ops.arrays import (
    Array,
    core_weight,
    empty,
    f32,
    first_array,
    gradient_buffer,
    multiply_rows,
    trainable,
    zeros,
)
from pyloss.ops.product_kernels import Dense, Kernels
from pyloss.runtime.device import DeviceArray, empty as device_empty, on_device_of
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

WHOLE = slice(None)
DENSE = Dense()
# A factor below this leaves too few digits of x W^T in y to divide it out.
SMALL_FACTOR = 2.0**-10


class Projection(NamedTuple):
    """The arrays of a layer and its adapter:

        y = m / norm * (x W^T + scale * dropout(x) A B) + bias        x [..., I], y [..., O]

    - x W^T: the base (`weight`), stored or float32. Its panels are expanded while they are packed.
    - dropout(x) A: the low-rank activations [N, R], kept for the gradients. A fused kernel computes
      them in the pass over x that computes y; with dropout they need a separate pass.
    - (...) B: continues the inner loop of x W^T, with B already multiplied by m / norm.
    - m / norm: DoRA's factor of each output, 1 without `m`. Rows whose norm is 0 give 0.

    Attributes:
        weight: W [O, I], a `Weight` or float32.
        bias: [O] or None.
        lora_a: A [I, R] or None (LoRA, Hu et al., arXiv:2106.09685).
        lora_b: B [R, O] or None.
        scale: the adapter's factor.
        dropout: the share in [0, 1) of the adapter's inputs that are zeroed.
        seed: determines the dropout mask.
        m: [O] or None: DoRA's magnitudes (Liu et al., arXiv:2402.09353). They multiply the whole
            sum, also under dropout, as in the paper and in mlx-lm; PEFT scales x W^T through the
            dropped x.
        norm: [O], the row norms of W + scale (A B)^T; constants to the gradient (section 4.3).
        known: m / norm and B times it, if they are already computed.

    `expert_project` takes the same arrays with an axis of E experts in front, and its own layout of
    A and B.
    """

    weight: Array | Weight | WeightStack
    bias: Array | None = None
    lora_a: Array | None = None
    lora_b: Array | None = None
    scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0
    m: Array | None = None
    norm: np.ndarray | None = None
    known: tuple[np.ndarray, np.ndarray] | None = None

    def inputs(self) -> tuple[Any, ...]:
        """The arrays of INPUTS, or None where an input gets no gradient."""
        return trainable(self.weight), self.bias, self.lora_a, self.lora_b, self.m

    @property
    def outputs(self) -> int:
        """The columns of y."""
        return int(self.weight.shape[-2])


INPUTS = 5


class Product:
    """A projection of float32 rows [N, I], all of them or one part at a time.

    Attributes:
        rows: x, or None while the tape keeps it.
        low_rank: dropout(x) A, [N, R].
        low_rank_known: whether a forward pass has filled `low_rank`.
        factor: m / norm, or None.
        scaled_b: B times the factor.
    """

    __slots__ = (
        "_dropped",
        "a",
        "adapted",
        "b",
        "bias",
        "factor",
        "kernels",
        "low_rank",
        "low_rank_known",
        "projection",
        "rows",
        "scaled_b",
        "weight",
    )

    def __init__(
        self,
        projection: Projection,
        count: int,
        rows: np.ndarray | None = None,
        kernels: Kernels = DENSE,
    ):
        """For `count` rows, which may be set later."""
        p = self.projection = projection
        self.kernels, self.rows, self.low_rank_known = kernels, rows, False
        self.weight = core_weight(p.weight)
        self.bias = None if p.bias is None else f32(p.bias, "bias")
        self.factor: np.ndarray | None = None
        self.adapted = p.lora_a is not None
        self._dropped: np.ndarray | None = None
        if self.adapted:
            self.a, self.b = f32(p.lora_a, "lora_a"), f32(p.lora_b, "lora_b")
            self.low_rank = empty(count, self.a.shape[1], like=self.a)
            self.scaled_b = self.b
            if p.known is not None:
                self.factor, self.scaled_b = p.known
            elif p.m is not None:
                assert p.norm is not None
                self.factor = quotient(f32(p.m, "m"), p.norm)
                self.scaled_b = kernels.scale_b(self.b, self.factor)

    def dropped(self) -> np.ndarray:
        """The adapter's input, dropout(x)."""
        assert self.rows is not None
        if not self.projection.dropout:
            return self.rows
        if self._dropped is None:
            self._dropped = empty(*self.rows.shape, like=self.rows)
            _core.dropout(self.rows, self.projection.seed, self.projection.dropout, self._dropped)
        return self._dropped

    def compute_low_rank(self) -> None:
        """Fills `low_rank` with the bits that `forward` gives, without y."""
        rows = self.dropped()
        if self.projection.dropout:
            self.kernels.down(rows, self.a, self.low_rank)
        else:
            # The kernel that `forward` calls, for a base with one output.
            weight, b = self.kernels.zero_weights(self.a, self.b)
            y = empty(len(rows), 1, like=rows)
            self.kernels.forward_adapted(
                rows, weight, None, self.a, b, self.projection.scale, None, self.low_rank, y
            )

    def release_rows(self) -> None:
        """Drops the reference to the rows, which the tape keeps or recomputes."""
        self.rows = self._dropped = None

    def forward(self, y: np.ndarray, part: slice = WHOLE) -> None:
        """Writes the outputs [n, O] of the rows of a part."""
        assert self.rows is not None
        p, kernels, x = self.projection, self.kernels, _of(self.rows, part)
        if not self.adapted:
            kernels.forward(x, self.weight, self.bias, None, None, 0.0, None, y)
            return
        low_rank = _of(self.low_rank, part)
        if p.dropout:
            kernels.down(_of(self.dropped(), part), self.a, low_rank)
            kernels.forward(
                x, self.weight, self.bias, low_rank, self.scaled_b, p.scale, self.factor, y
            )
        else:
            kernels.forward_adapted(
                x, self.weight, self.bias, self.a, self.scaled_b, p.scale, self.factor, low_rank, y
            )


class Backward:
    """The gradients of a product, summed over parts of its rows.

    Args:
        product: of the forward pass.
        wanted: whether the rows, then each of the projection's inputs, need a gradient.
        dx: [N, I], receives the rows' gradient, or None.
        accumulate: 1 adds to what `dx` holds.
        dw: [O, I], to which the weight's gradient is added, or None.
    """

    def __init__(
        self,
        product: Product,
        wanted: Sequence[bool],
        dx: np.ndarray | None,
        accumulate: int = 0,
        dw: np.ndarray | None = None,
    ):
        self.product, self.wanted, self.dx, self.accumulate = product, wanted, dx, accumulate
        by_x, _, _, by_a, _, _ = wanted
        self.d_low_rank = (
            empty(*product.low_rank.shape, like=product.low_rank)
            if product.adapted and (by_x or by_a)
            else None
        )
        self.dw, self.db = dw, None
        self.dbias: Any = None
        self.dm: Any = None

    def add(self, dy: np.ndarray, y: np.ndarray | None, part: slice = WHOLE) -> None:
        """Adds a part's terms, from dy [n, O]. The gradient by m needs the part's outputs y too."""
        product, kernels, p = self.product, self.product.kernels, self.product.projection
        _, by_weight, by_bias, _, by_b, by_m = self.wanted
        if by_m:  # first, while dy and y are still cached
            self.dm = _sum(self.dm, self._by_m(dy, y, part))
        self._add_to_rows(dy, part)
        if by_weight:
            assert product.rows is not None
            self.dw = kernels.weight_grad(dy, _of(product.rows, part), self.dw)
        if by_b:
            self.db = kernels.b_grad(_of(product.low_rank, part), dy, p.scale, self.db)
        if by_bias:
            self.dbias = _sum(self.dbias, kernels.row_sum(dy))

    def _add_to_rows(self, dy: np.ndarray, part: slice) -> None:
        """The rows' gradient, and that of the low-rank activations, which the one by A needs."""
        product, kernels, p = self.product, self.product.kernels, self.product.projection
        dx = None if self.dx is None else _of(self.dx, part)
        d_low_rank = None if self.d_low_rank is None else _of(self.d_low_rank, part)
        if dx is not None and d_low_rank is not None and not p.dropout:
            kernels.input_grad_adapted(
                dy,
                product.weight,
                product.a,
                product.scaled_b,
                p.scale,
                self.accumulate,
                product.factor,
                d_low_rank,
                dx,
            )
            return
        if d_low_rank is not None:
            kernels.up_grad(dy, product.scaled_b, p.scale, d_low_rank)
        if dx is not None:
            kernels.input_grad(dy, product.weight, self.accumulate, product.factor, dx)

    def _by_m(self, dy: np.ndarray, y: np.ndarray | None, part: slice) -> np.ndarray:
        """The gradient by m: sum of dy (y - bias) over the rows, over m; float64 on the host.

        (y - bias) / m is (x W^T + scale x A B) / norm. Where the factor is small, y has too few
        digits of that sum, so it is computed anew.
        """
        product, kernels, p = self.product, self.product.kernels, self.product.projection
        assert p.norm is not None and product.factor is not None
        dots = kernels.row_dot(dy, y, product.bias)
        on_device = isinstance(dots, DeviceArray)
        slope = quotient(dots if on_device else dots.astype(np.float64), f32(p.m, "m"))
        if not any_small(product.factor):
            return slope
        slope, norm = np.asarray(slope), np.asarray(p.norm)
        small = (np.abs(np.asarray(product.factor)) < SMALL_FACTOR) & (norm > 0)
        if small.any():
            assert product.rows is not None
            x, low_rank = _of(product.rows, part), _of(product.low_rank, part)
            sums = empty(*dy.shape, like=dy)
            kernels.forward(x, product.weight, None, low_rank, product.b, p.scale, None, sums)
            slope[small] = np.asarray(kernels.row_dot(dy, sums, None))[small] / norm[small]
        return on_device_of(dots, slope)

    def end(self) -> list[np.ndarray | None]:
        """The gradients, in the order of `wanted`."""
        product, kernels, p = self.product, self.product.kernels, self.product.projection
        _, by_weight, by_bias, by_a, by_b, by_m = self.wanted
        if p.dropout and product.adapted and self.dx is not None:
            branch = empty(*self.dx.shape, like=self.dx)
            kernels.down_grad(self.d_low_rank, product.a, branch)
            _core.dropout(branch, p.seed, p.dropout, branch)
            _core.axpy(1.0, branch, self.dx)
        da = kernels.a_grad(product.dropped(), self.d_low_rank) if by_a else None
        dw = self._or_zeros(self.dw, p.weight.shape) if by_weight else None
        db = self._or_zeros(self.db, product.b.shape) if by_b else None
        if product.factor is not None:
            dw = None if dw is None else multiply_rows(dw, product.factor)
            db = None if db is None else kernels.scale_b(db, product.factor)
        outputs = p.weight.shape[:-1]
        dbias = self._or_zeros(self.dbias, outputs) if by_bias else None
        dm = self._or_zeros(self.dm, outputs) if by_m else None
        return [self.dx, dw, dbias, da, db, dm]

    def _or_zeros(self, total: Any, shape: tuple[int, ...]) -> Any:
        """A sum over the parts in float32; zeros if there were no parts."""
        if total is None:
            return zeros(*shape, like=first_array(self.product.weight))
        return total.astype(np.float32, copy=False)


def _of(array: Any, part: slice) -> Any:
    """The rows of a part; the array itself for all rows."""
    return array if part is WHOLE else array[part]


def _sum(total: Any, term: Any) -> Any:
    """`total`, None at first, plus a term: in float64 on the host, in place on a device."""
    if not isinstance(term, DeviceArray):
        return term.astype(np.float64) if total is None else total + term
    if total is None:
        return term
    _core.axpy(1.0, term, total)
    return total


def quotient(a: Any, b: Any) -> Any:
    """a / b on the device of `a`, and 0 where b is 0."""
    if isinstance(a, DeviceArray):
        y = empty(*a.shape, like=a)
        _core.ratio(a, on_device_of(a, b), y)
        return y
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def any_small(factor: Any) -> bool:
    """Whether any factor is below SMALL_FACTOR. From a device, this copies one byte."""
    found = (
        device_empty((1,), np.uint8, factor)
        if isinstance(factor, DeviceArray)
        else np.empty(1, np.uint8)
    )
    _core.any_below(factor, SMALL_FACTOR, found)
    return bool(np.asarray(found)[0])


def project(x: Array, projection: Projection, kernels: Kernels = DENSE) -> Array:
    """The projection of x [..., I]: [..., O]."""
    source = x if isinstance(x, Tensor) else f32(x)
    shape = source.shape
    flat = shape if len(shape) == 2 else (math.prod(shape[:-1]), shape[-1])
    out_shape = (*shape[:-1], projection.outputs)
    product = Product(projection, flat[0], kernels=kernels)

    def rows() -> np.ndarray:
        xd = f32(source)
        return xd if shape is flat else xd.reshape(flat)

    def forward() -> np.ndarray:
        product.rows = rows()
        y = empty(*out_shape, like=product.rows)
        product.forward(y)
        product.low_rank_known = True
        product.release_rows()
        return y

    if current_tape() is None or not recording(*(inputs := (x, *projection.inputs()))):
        return forward()
    by_m = recording(projection.m)
    y = lazy_output(out_shape, forward)
    kept, output = keep(x), y if by_m else None

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        wanted = [grads.wanted(i) for i in range(1 + INPUTS)]
        _, by_weight, _, by_a, by_b, by_m = wanted
        flat_y = (flat[0], projection.outputs)
        made = None if output is None else data(output).reshape(flat_y)
        low_rank_missing = by_b and not product.low_rank_known
        if by_weight or by_a or by_m or low_rank_missing:
            product.rows = f32(kept()).reshape(flat)
        if low_rank_missing:
            product.compute_low_rank()
        dx, accumulate = gradient_buffer(grads, 0, shape, dy) if wanted[0] else (None, 0)
        backward = Backward(product, wanted, None if dx is None else dx.reshape(flat), accumulate)
        backward.add(dy.reshape(flat_y), made)
        _, *others = backward.end()
        for i, gradient in enumerate((dx, *others)):
            if gradient is not None:
                grads.put(i, gradient)

    return record(y, inputs, vjp, reads_output=by_m)


def linear(x: Array, weight: Array | Weight, bias: Array | None = None) -> Array:
    """x [..., I] with weight [O, I] and bias [O]: x weight^T + bias, [..., O]."""
    return project(x, Projection(weight, bias))


def lora_linear(
    x: Array,
    weight: Array | Weight,
    bias: Array | None,
    lora_a: Array,
    lora_b: Array,
    scale: float,
    dropout: float = 0.0,
    seed: int = 0,
) -> Array:
    """x W^T + bias + scale dropout(x) A B for x [..., I], A [I, R], B [R, O]; see `Projection`."""
    return project(x, Projection(weight, bias, lora_a, lora_b, scale, dropout, seed))
