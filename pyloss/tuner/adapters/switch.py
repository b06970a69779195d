"""LoRA and DoRA over the linear layers of experts: each expert has its own factors."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from pyloss import _core, ops
from pyloss.autograd.tape import data
from pyloss.nn import Module, SwitchLinear
from pyloss.ops import arrays
from pyloss.ops.projection import Projection, quotient
from pyloss.runtime.device import DeviceArray, on_device_of
from pyloss.tuner.adapters.low_rank import LowRankAdapter
from pyloss.tuner.adapters.merging import Fused, merge_stored, share_kept, with_weight
from pyloss.tuner.dora import Magnitude
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight


class SwitchAdapter(LowRankAdapter):
    """Over a `SwitchLinear`: lora_a [E, r, in] and lora_b [E, out, r], as in mlx-lm."""

    base_name, base_type = "linear", SwitchLinear
    linear: SwitchLinear

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        num_experts: int,
        r: int = 8,
        dropout: float = 0.0,
        scale: float = 20.0,
        bias: bool = False,
    ):
        Module.__init__(self)
        self._attach(SwitchLinear(input_dims, output_dims, num_experts, bias), r, dropout, scale)

    @property
    def bias(self) -> np.ndarray | None:
        """The base's."""
        return self.linear.bias

    @classmethod
    def shapes(cls, layer: SwitchLinear, r: int) -> dict[str, tuple[int, ...]]:
        experts, output_dims, input_dims = layer.shape
        return {"lora_a": (experts, r, input_dims), "lora_b": (experts, output_dims, r)}

    def __call__(self, x: Any, offsets: np.ndarray) -> Any:
        p, seed = self._dropout()
        a, b = self.factors()
        adapted = Projection(
            self.linear.weight,
            self.linear.bias,
            a,
            b,
            self.scale,
            p,
            seed,
            *self._magnitudes(offsets),
        )
        return ops.expert_project(x, offsets, adapted)

    def _magnitudes(self, offsets: np.ndarray) -> tuple[Any, np.ndarray | None]:
        """DoRA's m and row norms, up to date for experts that have rows of x."""
        return None, None

    def merged_expert(self, expert: int, weight: np.ndarray) -> np.ndarray:
        """One expert's dense float32 `weight` [out, in] with the adapter in it, a new array."""
        a, b = map(data, self.factors())
        return weight + (self.scale * b[expert]) @ a[expert]

    def merged(self, weight: np.ndarray) -> np.ndarray:
        return np.stack(
            [self.merged_expert(expert, matrix) for expert, matrix in enumerate(weight)]
        )

    def _fused(self, dequantize: bool) -> Fused:
        """Merges stored experts one at a time, so that only one is dense."""
        base = self.linear.weight
        if not isinstance(base, WeightStack):
            return super()._fused(dequantize)
        matrices, change, error = [], 0.0, 0.0
        for expert, matrix in enumerate(base.matrices):
            stored, *sizes = merge_stored(matrix, partial(self.merged_expert, expert), dequantize)
            matrices.append(stored)
            change, error = change + sizes[0], error + sizes[1]
        return Fused(
            with_weight(self.linear, WeightStack(matrices)).freeze(), share_kept(change, error)
        )


class LoRASwitchLinear(SwitchAdapter):
    """y = base(x) + scale * lora_b[e] lora_a[e] dropout(x) for rows x of expert e."""

    recordable = True

    kind = "lora"

    def _delta(self) -> np.ndarray:
        a, b = map(data, self.factors())
        return np.matmul(self.scale * b, a)


class DoRASwitchLinear(Magnitude, SwitchAdapter):
    """LoRASwitchLinear with rows of adapted weights scaled to trained lengths m [E, out].

    See `DoRALinear`. Norms are computed only for experts that have rows of x. Those of a stored
    expert are kept until its factors change.
    """

    kind = "dora"

    def _initialize(self, shapes: dict[str, tuple[int, ...]]) -> None:
        # the weight and factors that an expert's norms were computed from
        self._known: dict[int, tuple[Any, ...]] = {}
        self._found = np.zeros(self.linear.shape[:2], np.float32)
        super()._initialize(shapes)

    def norms(self) -> np.ndarray:
        return self._norms_of(range(len(self._found)))

    def _norms_of(self, experts: Iterable[int]) -> np.ndarray:
        """`norms`, up to date for `experts`."""
        weight = self.linear.weight
        a, b = map(data, self.factors())
        if isinstance(a, DeviceArray):
            return self._norms_there(experts, a, b)
        for e in experts:
            matrix = weight.matrices[e] if isinstance(weight, WeightStack) else weight[e]
            key = (matrix, self.scale, a[e].tobytes(), b[e].tobytes())
            known = self._known.get(e)
            if known is None or known[0] is not matrix or known[1:] != key[1:]:
                kept = isinstance(matrix, Weight)  # an array may be written to
                squares = self.squares()[e] if kept else self._squares_of(matrix)
                self._found[e] = self._adapted_norms(matrix, a[e].T, b[e].T, squares)
                if kept:
                    self._known[e] = key
        return self._found

    def _norms_there(self, experts: Iterable[int], a: Any, b: Any) -> Any:
        """`_norms_of` on a device; experts without rows get m, which makes a factor of 1."""
        weight, squares, found = self.linear.weight, self.squares(), data(self.m).copy()
        for e in experts:
            one = weight.matrices[e] if isinstance(weight, WeightStack) else weight[e]
            found[e][...] = self._adapted_norms(
                one, arrays.transpose(a[e]), arrays.transpose(b[e]), squares[e]
            )
        return found

    def _row_squares(self, weight: Any) -> Any:
        found = on_device_of(
            arrays.first_array(arrays.core_weight(weight)), np.empty(weight.shape[:2])
        )
        for e, one in enumerate(weight.matrices if isinstance(weight, WeightStack) else weight):
            _core.row_squares(arrays.core_weight(one), found[e])
        return found

    def _squares_of(self, matrix: Any) -> np.ndarray:
        return super()._row_squares(matrix)

    def _magnitudes(self, offsets: np.ndarray) -> tuple[Any, np.ndarray | None]:
        # A copy: the backward pass must not see later norms.
        return self.m, self._norms_of(np.flatnonzero(np.diff(offsets)).tolist()).copy()

    def merged_expert(self, expert: int, weight: np.ndarray) -> np.ndarray:
        length = quotient(self.m[expert], self._norms_of([expert])[expert])
        return length[:, None] * super().merged_expert(expert, weight)

    def merged(self, weight: np.ndarray) -> np.ndarray:
        return SwitchAdapter.merged(self, weight)
