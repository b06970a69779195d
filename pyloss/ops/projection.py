"""Products of rows with the weight of a layer and its adapter: one arithmetic for layers and for fused heads."""

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
    column_sum,
    core_weight,
    empty,
    f32,
    first_array,
    gradient_buffer,
    trainable,
    zeros,
)
from pyloss.runtime.device import DeviceArray, empty as device_empty, on_device_of
from pyloss.weights.weight import Weight

WHOLE = slice(None)
# a factor below this leaves too little of y in y's digits to take it out again
SMALL_FACTOR = 2.0**-10


class Projection(NamedTuple):
    """What a layer makes of rows x [..., I]: factor * (x weight^T + scale dropout(x) lora_a lora_b) + bias, [..., O].

    `weight` [O, I] is stored or float32; `bias` [O], `lora_a` [I, R] and `lora_b` [R, O] may be absent (Hu et al.,
    arXiv:2106.09685). `dropout` in [0, 1) acts on the adapter's input alone, its mask is a function of `seed`.

    The factor is m / norm, both [O]: DoRA (Liu et al., arXiv:2402.09353), where `norm` are the row norms of weight +
    scale (lora_a lora_b)^T, constants to the gradient (section 4.3). It multiplies the whole sum, also where dropout acts, as in
    the paper and in mlx-lm (PEFT scales x weight^T through the dropped x). Rows whose norm is 0 are 0. Without m it is 1.
    `known` are the factor and lora_b times it, where they are known already.
    """

    weight: Array | Weight
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
        """What the tape sees, INPUTS of them."""
        return trainable(self.weight), self.bias, self.lora_a, self.lora_b, self.m


INPUTS = 5


class Product:
    """A projection of float32 rows [N, I], all or a part of them at a time."""

    __slots__ = (
        "_dropped",
        "a",
        "adapted",
        "b",
        "bias",
        "factor",
        "h",
        "known_h",
        "projection",
        "rows",
        "scaled_b",
        "weight",
    )

    def __init__(self, projection: Projection, count: int, rows: np.ndarray | None = None):
        """Of `count` rows, which may be given later."""
        p = self.projection = projection
        self.rows = rows
        self.known_h = False
        self.weight = core_weight(p.weight)
        self.bias = None if p.bias is None else f32(p.bias, "bias")
        self.factor: np.ndarray | None = None
        self.adapted = p.lora_a is not None
        self._dropped: np.ndarray | None = None
        if self.adapted:
            self.a, self.b = f32(p.lora_a, "lora_a"), f32(p.lora_b, "lora_b")
            self.h = empty(count, self.a.shape[1], like=self.a)  # dropout(x) lora_a
            self.scaled_b = self.b
            if p.known is not None:
                self.factor, self.scaled_b = p.known
            elif p.m is not None:
                assert p.norm is not None
                self.factor = quotient(f32(p.m, "m"), p.norm)
                self.scaled_b = times(self.b, self.factor)

    def dropped(self) -> np.ndarray:
        """The rows as the adapter sees them."""
        assert self.rows is not None
        if not self.projection.dropout:
            return self.rows
        if self._dropped is None:
            self._dropped = empty(*self.rows.shape, like=self.rows)
            _core.dropout(self.rows, self.projection.seed, self.projection.dropout, self._dropped)
        return self._dropped

    def find_h(self) -> None:
        """Computes h alone, to the bit as `forward` does."""
        p, rows = self.projection, self.dropped()
        if p.dropout:
            _core.matmul_nn(rows, self.a, 1.0, 0, self.h)
        else:
            column, b = zeros(1, rows.shape[1], like=rows), zeros(len(self.b), 1, like=rows)
            _core.lora_forward(
                rows, column, None, self.a, b, p.scale, None, self.h, empty(len(rows), 1, like=rows)
            )

    def forget_rows(self) -> None:
        """Between forward and backward, where they are kept elsewhere or made again."""
        self.rows = self._dropped = None

    def forward(self, y: np.ndarray, part: slice = WHOLE) -> None:
        """Writes the outputs [n, O] of the rows."""
        assert self.rows is not None
        p, x = self.projection, self.rows if part is WHOLE else self.rows[part]
        if not self.adapted:
            _core.linear_forward(x, self.weight, self.bias, None, None, 0.0, None, y)
        elif p.dropout:
            h = self.h[part]
            _core.matmul_nn(self.dropped()[part], self.a, 1.0, 0, h)
            _core.linear_forward(
                x, self.weight, self.bias, h, self.scaled_b, p.scale, self.factor, y
            )
        else:
            _core.lora_forward(
                x,
                self.weight,
                self.bias,
                self.a,
                self.scaled_b,
                p.scale,
                self.factor,
                self.h[part],
                y,
            )


class Backward:
    """The gradients of a product by its rows and its projection's inputs, gathered over parts of the rows.

    `wanted` has one entry for the rows and one for each of the inputs. `dx` [N, I] is where the rows' goes, if anywhere, with
    `accumulate` added to what is there; with `zeroed` the others begin at 0 and may be added to from outside.
    """

    def __init__(
        self,
        product: Product,
        wanted: Sequence[bool],
        dx: np.ndarray | None,
        accumulate: int = 0,
        zeroed: bool = False,
    ):
        self.product, self.wanted, self.dx, self.accumulate = product, wanted, dx, accumulate
        by_x, by_weight, _, by_a, by_b, _ = wanted
        shape = product.projection.weight.shape
        self.dw = empty(*shape, like=first_array(product.weight)) if by_weight else None
        self.db = empty(*product.b.shape, like=product.b) if by_b else None
        self.dh = (
            empty(*product.h.shape, like=product.h) if product.adapted and (by_x or by_a) else None
        )
        self.dbias: Any = None
        self.dm: Any = None
        self.begun = False
        if zeroed:
            self._begin()

    def _begin(self) -> None:
        """Without rows, or for those who add to the gradients."""
        self.begun = True
        for gradient in (self.dw, self.db):
            if gradient is not None:
                gradient[...] = 0

    def add(self, dy: np.ndarray, y: np.ndarray | None, part: slice = WHOLE) -> None:
        """Takes in dy [n, O] of the rows; a gradient by m needs their outputs y."""
        product, p = self.product, self.product.projection
        by_x, by_weight, by_bias, _, by_b, by_m = self.wanted
        if by_m:  # first, while what was just made of dy and y is near
            self.dm = _gathered(self.dm, self._by_m(dy, y, part))
        dh = None if self.dh is None else self.dh[part]
        fused = by_x and product.adapted and not p.dropout
        if dh is not None and not fused:
            _core.matmul_nt(dy, product.scaled_b, p.scale, 0, dh)
        if self.dx is not None:
            dx = self.dx[part]
            if fused:
                a, b = product.a, product.scaled_b
                _core.lora_input_grad(
                    dy, product.weight, a, b, p.scale, self.accumulate, product.factor, dh, dx
                )
            else:
                _core.linear_input_grad(
                    dy, product.weight, None, None, self.accumulate, product.factor, dx
                )
        if by_weight:
            assert product.rows is not None
            _core.matmul_tn(dy, product.rows[part], 1.0, int(self.begun), self.dw)
        if by_b:
            _core.matmul_tn(product.h[part], dy, p.scale, int(self.begun), self.db)
        if by_bias:
            self.dbias = _gathered(self.dbias, column_sum(dy))
        self.begun = True

    def _by_m(self, dy: np.ndarray, y: np.ndarray | None, part: slice) -> np.ndarray:
        """[O]: the sums over the rows of dy times what the factor multiplies, over the norm; float64 on the host."""
        product, p, column = self.product, self.product.projection, empty(dy.shape[-1], like=dy)
        assert p.norm is not None and product.factor is not None
        _core.column_dot(dy, y, product.bias, column)
        there = isinstance(column, DeviceArray)
        slope = quotient(column if there else column.astype(np.float64), f32(p.m, "m"))
        if not any_small(product.factor):
            return slope
        slope, norm = np.asarray(slope), np.asarray(p.norm)
        few = (np.abs(np.asarray(product.factor)) < SMALL_FACTOR) & (norm > 0)
        if few.any():
            assert product.rows is not None
            sums = empty(*dy.shape, like=dy)
            _core.linear_forward(
                product.rows[part],
                product.weight,
                None,
                product.h[part],
                product.b,
                p.scale,
                None,
                sums,
            )
            _core.column_dot(dy, sums, None, column)
            slope[few] = np.asarray(column)[few] / norm[few]
        return on_device_of(column, slope)

    def end(self) -> list[np.ndarray | None]:
        """The gradients, in the order of `wanted`."""
        product, p = self.product, self.product.projection
        _, _, by_bias, by_a, _, by_m = self.wanted
        if not self.begun:
            self._begin()
        if p.dropout and product.adapted and self.dx is not None:
            branch = empty(*self.dx.shape, like=self.dx)
            _core.matmul_nt(self.dh, product.a, 1.0, 0, branch)
            _core.dropout(branch, p.seed, p.dropout, branch)
            _core.axpy(1.0, branch, self.dx)
        da = None
        if by_a and isinstance(self.dh, DeviceArray):
            da = empty(*product.a.shape, like=self.dh)
            _core.matmul_tn(product.dropped(), self.dh, 1.0, 0, da)
        elif by_a:
            # As [R, I]: the few rows of dh^T stay in registers while x streams by.
            turned = empty(product.a.shape[1], product.a.shape[0])
            _core.matmul_tn(self.dh, product.dropped(), 1.0, 0, turned)
            da = np.ascontiguousarray(turned.T)
        if product.factor is not None:
            if self.dw is not None:
                self.dw = times(self.dw, product.factor, rows=True)
            if self.db is not None:
                self.db = times(self.db, product.factor)
        dbias, dm = (
            self._finished(total) if by else None
            for total, by in ((self.dbias, by_bias), (self.dm, by_m))
        )
        return [self.dx, self.dw, dbias, da, self.db, dm]

    def _finished(self, total: Any) -> Any:
        """What `_gathered` made of the parts, in float32; zeros if there were none."""
        if total is None:
            return zeros(
                self.product.projection.weight.shape[0], like=first_array(self.product.weight)
            )
        return total.astype(np.float32, copy=False)


def _gathered(total: Any, part: Any) -> Any:
    """The sum so far, None at first, with one more part: in float64 on the host, in place on a device."""
    if not isinstance(part, DeviceArray):
        return part.astype(np.float64) if total is None else total + part
    if total is None:
        return part
    _core.axpy(1.0, part, total)
    return total


def quotient(a: Any, b: Any) -> Any:
    """a / b, and 0 where b is, where a is."""
    if isinstance(a, DeviceArray):
        y = empty(*a.shape, like=a)
        _core.ratio(a, on_device_of(a, b), y)
        return y
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def times(matrix: Any, factor: Any, rows: bool = False) -> Any:
    """A matrix whose columns are multiplied by a factor each, or with `rows` the rows of one or several; where it is."""
    scaled = empty(*matrix.shape, like=matrix)
    if rows:
        flat = (factor.size, matrix.shape[-1])
        _core.scale_rows(matrix.reshape(flat), factor.reshape(-1), scaled.reshape(flat))
    else:
        _core.scale_columns(matrix, factor, scaled)
    return scaled


def any_small(factor: Any) -> bool:
    """Whether a factor is below SMALL_FACTOR: of a factor on a device this one byte is copied back."""
    found = (
        device_empty((1,), np.uint8, factor)
        if isinstance(factor, DeviceArray)
        else np.empty(1, np.uint8)
    )
    _core.any_below(factor, SMALL_FACTOR, found)
    return bool(np.asarray(found)[0])


def project(x: Array, projection: Projection) -> Array:
    """What `projection` makes of x [..., I]: [..., O]."""
    source = x if isinstance(x, Tensor) else f32(x)
    shape = source.shape
    flat = shape if len(shape) == 2 else (math.prod(shape[:-1]), shape[-1])
    product = Product(projection, flat[0])

    def rows() -> np.ndarray:
        xd = f32(source)
        return xd if shape is flat else xd.reshape(flat)

    def forward() -> np.ndarray:
        product.rows = rows()
        y = empty(*shape[:-1], projection.weight.shape[0], like=product.rows)
        product.forward(y)
        product.known_h = True
        product.forget_rows()
        return y

    if current_tape() is None or not recording(*(inputs := (x, *projection.inputs()))):
        return forward()
    by_m = recording(projection.m)
    y = lazy_output((*shape[:-1], projection.weight.shape[0]), forward)
    kept, output = keep(x), y if by_m else None

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        wanted = [grads.wanted(i) for i in range(1 + INPUTS)]
        made = None if output is None else data(output)
        if any(wanted[i] for i in (1, 3, 5)) or (wanted[4] and not product.known_h):
            product.rows = f32(kept()).reshape(flat)
        if wanted[4] and not product.known_h:
            product.find_h()
        dx, accumulate = gradient_buffer(grads, 0, shape, dy) if wanted[0] else (None, 0)
        backward = Backward(product, wanted, None if dx is None else dx.reshape(flat), accumulate)
        backward.add(dy, made)
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
