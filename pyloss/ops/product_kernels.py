"""The core's calls for a projection: for one matrix (`Dense`), or for E experts' (`Experts`).

Both classes have the same methods, so `projection.py` writes the arithmetic once. Methods that only
call the core take an array, or a list with an item for each of several projections. Rows are
x [N, I], outputs y [N, O], low-rank activations x lora_a [N, R]. Everything is float32.

| array         | `Dense` | `Experts`; rows sorted by expert |
|---------------|---------|----------------------------------|
| weight        | [O, I]  | [E, O, I]                        |
| bias, m, norm | [O]     | [E, O]                           |
| lora_a        | [I, R]  | [E, R, I]                        |
| lora_b        | [R, O]  | [E, O, R]                        |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.ops.arrays import column_sum, empty, multiply_columns, multiply_rows, transpose, zeros
from pyloss.runtime.device import DeviceArray


class Dense:
    """Products with one matrix."""

    def forward(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        low_rank: Any,
        b: Any,
        scale: Any,
        factor: Any,
        y: Any,
    ) -> None:
        """y = factor (x weight^T + scale low_rank b) + bias."""
        _core.linear_forward(x, weight, bias, low_rank, b, scale, factor, y)

    def forward_adapted(
        self, x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: Any, factor: Any,
        low_rank: Any, y: Any,
    ) -> None:  # fmt: skip
        """`forward`, and low_rank = x a in the same pass over x."""
        _core.lora_forward(x, weight, bias, a, b, scale, factor, low_rank, y)

    def down(self, x: Any, a: Any, low_rank: Any) -> None:
        """low_rank = x a."""
        _core.matmul_nn(x, a, 1.0, 0, low_rank)

    def zero_weights(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Zeros for a weight with one output and for its lora_b."""
        return zeros(1, a.shape[0], like=a), zeros(b.shape[0], 1, like=a)

    def input_grad(self, dy: Any, weight: Any, accumulate: Any, factor: Any, dx: Any) -> None:
        """dx (+)= (factor dy) weight."""
        _core.linear_input_grad(dy, weight, None, None, accumulate, factor, dx)

    def input_grad_adapted(
        self, dy: Any, weight: Any, a: Any, b: Any, scale: Any, accumulate: Any, factor: Any,
        d_low_rank: Any, dx: Any,
    ) -> None:  # fmt: skip
        """d_low_rank = scale dy b^T, and dx (+)= (factor dy) weight + d_low_rank a^T."""
        _core.lora_input_grad(dy, weight, a, b, scale, accumulate, factor, d_low_rank, dx)

    def up_grad(self, dy: Any, b: Any, scale: Any, d_low_rank: Any) -> None:
        """d_low_rank = scale dy b^T."""
        _core.matmul_nt(dy, b, scale, 0, d_low_rank)

    def down_grad(self, d_low_rank: Any, a: Any, dx: Any) -> None:
        """dx = d_low_rank a^T."""
        _core.matmul_nt(d_low_rank, a, 1.0, 0, dx)

    def weight_grad(self, dy: Any, x: Any, total: Any) -> Any:
        """dy^T x, added to `total` if there is one."""
        dw = empty(dy.shape[1], x.shape[1], like=dy) if total is None else total
        _core.linear_weight_grad(dy, x, int(total is not None), dw)
        return dw

    def a_grad(self, x: Any, d_low_rank: list[Any]) -> list[Any]:
        """x^T d_low_rank."""
        da = [empty(x.shape[1], d.shape[1], like=d) for d in d_low_rank]
        if isinstance(x, DeviceArray):
            _core.matmul_tn(x, d_low_rank, 1.0, 0, da)
            return da
        # As [R, I], because the R rows of d_low_rank^T stay in registers while x streams by.
        transposed = [empty(*d.shape[::-1]) for d in da]
        _core.matmul_tn(d_low_rank, x, 1.0, 0, transposed)
        _core.transpose(transposed, da)
        return da

    def b_grad(
        self, low_rank: list[Any], dy: list[Any], scale: list[float], total: list[Any] | None
    ) -> list[Any]:
        """scale low_rank^T dy, added to `total` if there is one."""
        db = total or [
            empty(x.shape[1], d.shape[1], like=d) for x, d in zip(low_rank, dy, strict=True)
        ]
        _core.matmul_tn(low_rank, dy, scale, int(total is not None), db)
        return db

    def row_sum(self, dy: Any) -> Any:
        """The sum over the rows."""
        return column_sum(dy)

    def magnitude_grad(
        self, dy: Any, y: Any, bias: Any, m: Any, norm: Any, x: Any, weight: Any, low_rank: Any,
        b: Any, scale: float,
    ) -> Any:  # fmt: skip
        """The gradient by m of y = m / norm (x weight^T + scale low_rank b) + bias."""
        dots, dm = empty(dy.shape[-1], like=dy), empty(dy.shape[-1], like=dy)
        _core.column_dot(dy, y, bias, dots)
        _core.magnitude_grad(dots, m, norm, dy, x, weight, low_rank, b, scale, dm)
        return dm

    def scale_b(self, b: Any, factor: Any) -> Any:
        """lora_b, or its gradient, with the factor of each output."""
        return multiply_columns(b, factor)


class Experts:
    """Products of rows with the matrices of their experts.

    Args:
        offsets: int32 [E + 1]; the rows [offsets[e], offsets[e + 1]) belong to expert e.
    """

    def __init__(self, offsets: Any):
        self.offsets = offsets

    def forward(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        low_rank: Any,
        b: Any,
        scale: Any,
        factor: Any,
        y: Any,
    ) -> None:
        _core.experts_forward(x, weight, bias, self.offsets, low_rank, b, scale, factor, y)

    def forward_adapted(
        self, x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: Any, factor: Any,
        low_rank: Any, y: Any,
    ) -> None:  # fmt: skip
        _core.experts_lora_forward(x, weight, bias, self.offsets, a, b, scale, factor, low_rank, y)

    def down(self, x: Any, a: Any, low_rank: Any) -> None:
        _core.experts_forward(x, a, None, self.offsets, None, None, 0.0, None, low_rank)

    def zero_weights(self, a: Any, b: Any) -> tuple[Any, Any]:
        return zeros(a.shape[0], 1, a.shape[2], like=a), zeros(b.shape[0], 1, b.shape[2], like=a)

    def input_grad(self, dy: Any, weight: Any, accumulate: Any, factor: Any, dx: Any) -> None:
        _core.experts_input_grad(dy, weight, self.offsets, None, None, accumulate, factor, dx)

    def input_grad_adapted(
        self, dy: Any, weight: Any, a: Any, b: Any, scale: Any, accumulate: Any, factor: Any,
        d_low_rank: Any, dx: Any,
    ) -> None:  # fmt: skip
        _core.experts_lora_input_grad(
            dy, weight, self.offsets, a, b, scale, accumulate, factor, d_low_rank, dx
        )

    def up_grad(self, dy: Any, b: Any, scale: Any, d_low_rank: Any) -> None:
        _core.experts_input_grad(dy, b, self.offsets, None, None, 0, None, d_low_rank)
        _core.scale(scale, d_low_rank, d_low_rank)

    def down_grad(self, d_low_rank: Any, a: Any, dx: Any) -> None:
        _core.experts_input_grad(d_low_rank, a, self.offsets, None, None, 0, None, dx)

    def weight_grad(self, dy: Any, x: Any, total: Any) -> Any:
        return self._products(dy, x, 1.0, total)

    def a_grad(self, x: Any, d_low_rank: list[Any]) -> list[Any]:
        return [self._products(d, x) for d in d_low_rank]

    def b_grad(
        self, low_rank: list[Any], dy: list[Any], scale: list[float], total: list[Any] | None
    ) -> list[Any]:
        return [self._b_grad(*given, total) for given in zip(low_rank, dy, scale, strict=True)]

    def _b_grad(self, low_rank: Any, dy: Any, scale: float, total: Any) -> Any:
        if isinstance(dy, DeviceArray):
            return self._products(dy, low_rank, scale, total)
        # As [E, R, O], because the R rows of low_rank^T stay in registers while dy streams by.
        return transpose(self._products(low_rank, dy, scale, total))

    def row_sum(self, dy: Any) -> Any:
        sums = zeros(len(self.offsets) - 1, dy.shape[1], like=dy)
        for expert, rows in self._rows():
            _core.column_sum(dy[rows], sums[expert])
        return sums

    def magnitude_grad(
        self, dy: Any, y: Any, bias: Any, m: Any, norm: Any, x: Any, weight: Any, low_rank: Any,
        b: Any, scale: float,
    ) -> Any:  # fmt: skip
        dots, dm = zeros(*m.shape, like=dy), zeros(*m.shape, like=dy)
        for e, rows in self._rows():
            own_bias = None if bias is None else bias[e]
            _core.column_dot(dy[rows], y[rows], own_bias, dots[e])
            _core.magnitude_grad(
                dots[e], m[e], norm[e], dy[rows], x[rows], weight[e], low_rank[rows],
                transpose(b[e]), scale, dm[e],
            )  # fmt: skip
        return dm

    def scale_b(self, b: Any, factor: Any) -> Any:
        return multiply_rows(b, factor)

    def _products(self, y: Any, x: Any, scale: float = 1.0, total: Any = None) -> Any:
        """scale y^T x over the rows of each expert: [E, O, I] of y [M, O] and x [M, I]."""
        assert total is None, "the rows of experts are not split into parts"
        found = empty(len(self.offsets) - 1, y.shape[1], x.shape[1], like=y)
        _core.experts_weight_grad(y, x, self.offsets, scale, found)
        return found

    def _rows(self) -> Iterator[tuple[int, slice]]:
        """The experts that have rows, and these rows."""
        bounds = np.asarray(self.offsets).tolist()
        for expert, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if end > begin:
                yield expert, slice(begin, end)


Kernels = Dense | Experts
