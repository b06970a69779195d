"""A layer's product with its adapter's, and all gradients.

One arithmetic for layers, experts and fused heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pyloss import _core
from pyloss.autograd.scope import current_tape
from pyloss.autograd.tape import (
    Gradients,
    Nodes,
    data,
    keep,
    lazy_output,
    nodes_of,
    record_several,
    replaying,
)
from pyloss.autograd.tensor import Tensor
from pyloss.ops import wide
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
from pyloss.ops.reordering import reorder_columns, reorder_rows
from pyloss.runtime.device import DeviceArray, on_device_of
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

WHOLE = slice(None)
DENSE = Dense()


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
    """Projections of the same float32 rows [N, I], all of them or one part at a time.

    Lists have an item for each projection. The projections agree in `_alike`, so that
    an operation of the core runs for all of them in one call.

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
        "dropout",
        "factor",
        "kernels",
        "low_rank",
        "low_rank_known",
        "projections",
        "rows",
        "scale",
        "scaled_b",
        "weight",
    )

    def __init__(
        self,
        projections: Sequence[Projection],
        count: int,
        rows: np.ndarray | None = None,
        kernels: Kernels = DENSE,
    ):
        """For `count` rows, which may be set later."""
        self.projections, self.kernels, self.rows = projections, kernels, rows
        first = projections[0]
        self.weight = [core_weight(p.weight) for p in projections]
        self.bias = [None if p.bias is None else f32(p.bias, "bias") for p in projections]
        self.scale = [p.scale for p in projections]
        self.factor: list[Any] | None = None
        self.adapted, self.dropout = first.lora_a is not None, first.dropout
        self._dropped: np.ndarray | None = None
        self.low_rank_known = [False] * len(projections)
        if self.adapted:
            self.a = [f32(p.lora_a, "lora_a") for p in projections]
            self.b = self.scaled_b = [f32(p.lora_b, "lora_b") for p in projections]
            self.low_rank = [empty(count, a.shape[1], like=a) for a in self.a]
            if first.m is not None:
                pairs = [self._factor(p, b) for p, b in zip(projections, self.b, strict=True)]
                self.factor, self.scaled_b = [f for f, _ in pairs], [b for _, b in pairs]

    def _factor(self, p: Projection, b: Any) -> tuple[Any, Any]:
        """m / norm, and B times it."""
        if p.known is not None:
            return p.known
        assert p.norm is not None
        factor = quotient(f32(p.m, "m"), p.norm)
        return factor, self.kernels.scale_b(b, factor)

    def only(self, items: Sequence[int]) -> Product:
        """The product of some of the projections, with their arrays."""
        part = Product.__new__(Product)
        for name in Product.__slots__:
            value: Any = getattr(self, name, None)
            own = isinstance(value, list | tuple)
            setattr(part, name, [value[i] for i in items] if own else value)
        return part

    def dropped(self) -> np.ndarray:
        """The adapter's input, dropout(x)."""
        assert self.rows is not None
        if not self.dropout:
            return self.rows
        if self._dropped is None:
            (p,) = self.projections
            self._dropped = empty(*self.rows.shape, like=self.rows)
            _core.dropout(self.rows, p.seed, p.dropout, self._dropped)
        return self._dropped

    def compute_low_rank(self) -> None:
        """Fills `low_rank` where no forward pass has, with the bits that `forward` gives."""
        rows = self.dropped()
        for i in (i for i, known in enumerate(self.low_rank_known) if not known):
            if self.dropout:
                self.kernels.down(rows, self.a[i], self.low_rank[i])
            else:
                # The kernel that `forward` calls, for a base with one output.
                weight, b = self.kernels.zero_weights(self.a[i], self.b[i])
                y = empty(len(rows), 1, like=rows)
                self.kernels.forward_adapted(
                    rows, weight, None, self.a[i], b, self.scale[i], None, self.low_rank[i], y
                )

    def release_rows(self) -> None:
        """Drops the reference to the rows, which the tape keeps or recomputes."""
        self.rows = self._dropped = None

    def forward(self, y: list[Any], part: slice = WHOLE, items: slice = WHOLE) -> None:
        """Writes the outputs [n, O] of the rows of a part, of the projections `items`."""
        assert self.rows is not None
        kernels, x = self.kernels, _of(self.rows, part)
        weight, bias = self.weight[items], self.bias[items]
        if not self.adapted:
            kernels.forward(x, weight, bias, None, None, 0.0, None, y)
            return
        low_rank = _parts_of(self.low_rank[items], part)
        a, b, scale = self.a[items], self.scaled_b[items], self.scale[items]
        factor = None if self.factor is None else self.factor[items]
        if self.dropout:
            kernels.down(_of(self.dropped(), part), a, low_rank)
            kernels.forward(x, weight, bias, low_rank, b, scale, factor, y)
        else:
            kernels.forward_adapted(x, weight, bias, a, b, scale, factor, low_rank, y)


class Backward:
    """The gradients of a product, summed over parts of its rows.

    Args:
        product: of the forward pass.
        wanted: whether the rows, then each of a projection's inputs, need a gradient.
        dx: [N, I], receives the rows' gradient, or None.
        accumulate: 1 adds to what `dx` holds.
        dw: [O, I], to which the weight's gradient of a single projection is added, or None.
    """

    def __init__(
        self,
        product: Product,
        wanted: Sequence[bool],
        dx: np.ndarray | None,
        accumulate: int = 0,
        dw: np.ndarray | None = None,
    ):
        self.product, self.wanted, self.dx = product, wanted, dx
        count = len(product.projections)
        self.accumulate = [accumulate] + [1] * (count - 1)
        by_x, _, _, by_a, _, _ = wanted
        self.d_low_rank = (
            [empty(*x.shape, like=x) for x in product.low_rank]
            if product.adapted and (by_x or by_a)
            else None
        )
        self.dw: list[Any] = [dw] * count
        self.dbias: list[Any] = [None] * count
        self.dm: list[Any] = [None] * count
        self.db: list[Any] | None = None

    def add(self, dy: list[Any], y: list[Any] | None, part: slice = WHOLE) -> None:
        """Adds a part's terms, from dy [n, O]. The gradient by m needs the part's outputs y too."""
        product, kernels = self.product, self.product.kernels
        _, by_weight, by_bias, _, by_b, by_m = self.wanted
        if by_m:  # first, while dy and y are still cached
            assert y is not None
            for i, output in enumerate(y):
                self.dm[i] = _sum(self.dm[i], self._by_m(i, dy[i], output, part))
        self._add_to_rows(dy, part)
        if by_weight:
            assert product.rows is not None
            rows = _of(product.rows, part)
            pairs = zip(dy, self.dw, strict=True)
            self.dw = [kernels.weight_grad(d, rows, total) for d, total in pairs]
        if by_b:
            low_rank = _parts_of(product.low_rank, part)
            self.db = kernels.b_grad(low_rank, dy, product.scale, self.db)
        if by_bias:
            self.dbias = [
                _sum(*pair) for pair in zip(self.dbias, map(kernels.row_sum, dy), strict=True)
            ]

    def _add_to_rows(self, dy: list[Any], part: slice) -> None:
        """The rows' gradient, and that of the low-rank activations, which the one by A needs."""
        product, kernels = self.product, self.product.kernels
        dx = None if self.dx is None else _of(self.dx, part)
        d_low_rank = None if self.d_low_rank is None else _parts_of(self.d_low_rank, part)
        if dx is not None and d_low_rank is not None and not product.dropout:
            kernels.input_grad_adapted(
                dy,
                product.weight,
                product.a,
                product.scaled_b,
                product.scale,
                self.accumulate,
                product.factor,
                d_low_rank,
                dx,
            )
            return
        if d_low_rank is not None:
            kernels.up_grad(dy, product.scaled_b, product.scale, d_low_rank)
        if dx is not None:
            kernels.input_grad(dy, product.weight, self.accumulate, product.factor, dx)

    def _by_m(self, i: int, dy: np.ndarray, y: np.ndarray, part: slice) -> np.ndarray:
        """The gradient by m."""
        product, p = self.product, self.product.projections[i]
        assert product.rows is not None
        return product.kernels.magnitude_grad(
            dy, y, product.bias[i], f32(p.m, "m"), on_device_of(dy, p.norm),
            _of(product.rows, part), product.weight[i], _of(product.low_rank[i], part),
            product.b[i], p.scale,
        )  # fmt: skip

    def end(self) -> list[list[Any]]:
        """The gradients of each projection's inputs, in the order of `wanted`."""
        product, kernels = self.product, self.product.kernels
        _, by_weight, by_bias, by_a, by_b, by_m = self.wanted
        nothing: list[Any] = [None] * len(product.projections)
        if product.dropout and product.adapted and self.dx is not None:
            (p,) = product.projections
            assert self.d_low_rank is not None
            branch = empty(*self.dx.shape, like=self.dx)
            kernels.down_grad(self.d_low_rank[0], product.a[0], branch)
            _core.dropout(branch, p.seed, p.dropout, branch)
            _core.axpy(1.0, branch, self.dx)
        da = kernels.a_grad(product.dropped(), self.d_low_rank or []) if by_a else nothing
        dw = self._or_zeros(self.dw, WHOLE) if by_weight else nothing
        db = nothing
        if by_b:
            db = self.db or [zeros(*b.shape, like=b) for b in product.b]
        if product.factor is not None:
            if by_weight:
                dw = [multiply_rows(*pair) for pair in zip(dw, product.factor, strict=True)]
            if by_b:
                db = [kernels.scale_b(*pair) for pair in zip(db, product.factor, strict=True)]
        outputs = slice(-1)
        dbias = self._or_zeros(self.dbias, outputs) if by_bias else nothing
        dm = self._or_zeros(self.dm, outputs) if by_m else nothing
        return [list(gradients) for gradients in zip(dw, dbias, da, db, dm, strict=True)]

    def _or_zeros(self, totals: list[Any], axes: slice) -> list[Any]:
        """Sums over the parts in float32; zeros with these axes of the weight if no parts were."""
        return [
            zeros(*tuple(p.weight.shape)[axes], like=first_array(weight))
            if total is None
            else total.astype(np.float32, copy=False)
            for total, p, weight in zip(
                totals, self.product.projections, self.product.weight, strict=True
            )
        ]


def _of(array: Any, part: slice) -> Any:
    """The rows of a part; the array itself for all rows."""
    return array if part is WHOLE else array[part]


def _parts_of(arrays: list[Any], part: slice) -> list[Any]:
    return arrays if part is WHOLE else [array[part] for array in arrays]


def _sum(total: Any, term: Any) -> Any:
    """`total`, None at first, plus a term: in float64 on the host, in place on a device."""
    if total is None:
        return term
    if not isinstance(term, DeviceArray):
        return np.add(total, term, dtype=np.float64)
    _core.axpy(1.0, term, total)
    return total


def quotient(a: Any, b: Any) -> Any:
    """a / b, float32 on the device of `a`, and 0 where b is 0."""
    y = empty(*a.shape, like=a)
    _core.ratio(a, on_device_of(a, b), y)
    return y


def project(x: Array, projection: Projection, kernels: Kernels = DENSE) -> Array:
    """The projection of x [..., I]: [..., O]."""
    return project_all(x, (projection,), kernels)[0]


def project_all(
    x: Array, projections: Sequence[Projection], kernels: Kernels = DENSE
) -> list[Array]:
    """Projections of one x [..., I]: each [..., O]. They are one operation on the tape."""
    if kernels is DENSE and wide.wide_projections(x, projections):
        return wide.project_all(x, projections)
    if any(getattr(p.weight, "columns", None) is not None for p in projections):
        return _reordered(x, projections, kernels)
    return _project_all(x, projections, kernels)


def _reordered(x: Array, projections: Sequence[Projection], kernels: Kernels) -> list[Array]:
    """Projections whose matrices store their columns in another order.

    Rows of lora_a and columns of x are put into that order, the latter once for all matrices that
    share it.
    """
    kinds: dict[int, list[int]] = {}
    for i, p in enumerate(projections):
        kinds.setdefault(id(getattr(p.weight, "columns", None)), []).append(i)
    ys: list[Any] = [None] * len(projections)
    for some in kinds.values():
        chosen = [projections[i] for i in some]
        first: Any = chosen[0].weight
        orders = getattr(first, "orders", None)
        rows = x
        if orders is not None:
            rows = reorder_columns(x, *orders)
            chosen = [
                p if p.lora_a is None else p._replace(lora_a=reorder_rows(p.lora_a, *orders))
                for p in chosen
            ]
        for i, y in zip(some, _project_all(rows, chosen, kernels), strict=True):
            ys[i] = y
    return ys


def _project_all(x: Array, projections: Sequence[Projection], kernels: Kernels) -> list[Array]:
    source = x if isinstance(x, Tensor) else f32(x)
    shape = source.shape
    flat = shape if len(shape) == 2 else (math.prod(shape[:-1]), shape[-1])
    nodes = None
    if current_tape() is not None:
        inputs = itertools.chain.from_iterable([p.inputs() for p in projections])
        nodes = nodes_of(x, *inputs)
    groups = [
        _Group(Product(some, flat[0], kernels=kernels), end, wanted)
        for some, end, wanted in _alike(projections, nodes)
    ]

    def forward(group: _Group, items: slice) -> list[np.ndarray]:
        product, xd = group.product, f32(source)
        product.rows = xd if shape is flat else xd.reshape(flat)
        ys = [empty(*shape[:-1], p.outputs, like=xd) for p in product.projections[items]]
        product.forward(ys, items=items)
        product.low_rank_known[items] = [True] * len(ys)
        product.release_rows()
        return ys

    ys: list[Any] = []
    for group in groups:
        if nodes is not None and replaying():
            found = [
                lazy_output((*shape[:-1], p.outputs), partial(_only, forward, group, i))
                for i, p in enumerate(group.product.projections)
            ]
        else:
            found = list(forward(group, WHOLE))
        ys += reversed(found)
    if nodes is None:
        return ys
    # The gradient by m reads the outputs.
    by_m = [node is not None for node in nodes[INPUTS::INPUTS]]
    kept, read = keep(x), [y if reads else None for y, reads in zip(ys, by_m, strict=True)]

    def vjp(dys: list[Any], grads: Gradients) -> None:
        while groups:  # from the last one, so that later calls add to the rows' gradient
            product, end, wanted = groups.pop()
            some = range(end - 1, end - 1 - len(product.projections), -1)
            dy = [dys[i] for i in some]
            for i in some:
                dys[i] = None
            if any(gradient is None for gradient in dy):
                used = [k for k, gradient in enumerate(dy) if gradient is not None]
                if not used:
                    continue
                product, dy = product.only(used), [dy[k] for k in used]
                some = [some[k] for k in used]  # type: ignore[assignment]
            backward(product, some, wanted, dy, grads)

    def backward(
        product: Product,
        some: Sequence[int],
        wanted: Sequence[bool],
        dy: list[Any],
        grads: Gradients,
    ) -> None:
        """Puts the gradients of the projections `some`."""
        by_x, by_weight, _, by_a, by_b, by_m = wanted
        dy = [d.reshape(flat[0], d.shape[-1]) for d in dy]
        outputs = (
            [data(read[i]).reshape(d.shape) for i, d in zip(some, dy, strict=True)]
            if by_m
            else None
        )
        low_rank_missing = by_b and not all(product.low_rank_known)
        if by_weight or by_a or by_m or low_rank_missing:
            product.rows = f32(kept()).reshape(flat)
        if low_rank_missing:
            product.compute_low_rank()
        dx, accumulate = gradient_buffer(grads, 0, shape, dy[0]) if by_x else (None, 0)
        gradients = Backward(product, wanted, None if dx is None else dx.reshape(flat), accumulate)
        gradients.add(dy, outputs)
        found = gradients.end()
        product.release_rows()
        if dx is not None:
            grads.put(0, dx)
        for i, arrays in zip(some, found, strict=True):
            grads.put_all(1 + INPUTS * i, arrays)

    return record_several(nodes, ys, vjp, by_m)


class _Group(NamedTuple):
    """Projections that agree, from the last to the first.

    Attributes:
        end: the place of the first after them.
        wanted: as `Backward` takes it.
    """

    product: Product
    end: int
    wanted: Sequence[bool]


def _alike(
    projections: Sequence[Projection], nodes: Nodes | None
) -> list[tuple[list[Projection], int, Sequence[bool]]]:
    """Neighbors of one kind: the projections in reverse, the place after them, and `wanted`."""
    found: list[tuple[list[Projection], int, Sequence[bool]]] = []
    before: Any = None
    for i, p in enumerate(projections):
        wanted = (
            []
            if nodes is None
            else [
                node is not None
                for node in (nodes[0], *nodes[1 + INPUTS * i : 1 + INPUTS * (i + 1)])
            ]
        )
        # Each dropout has its own rows.
        kind = (p.lora_a is None, p.m is None, wanted, i if p.dropout else None)
        if kind == before:
            some, _, _ = found.pop()
            found.append(([p, *some], i + 1, wanted))
        else:
            found.append(([p], i + 1, wanted))
        before = kind
    return found


def _only(forward: Callable[..., list[np.ndarray]], group: _Group, i: int) -> np.ndarray:
    return forward(group, slice(i, i + 1))[0]


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
