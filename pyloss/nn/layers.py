"""The plain layers, and layers over stored weights."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np

from pyloss import ops, random
from pyloss.autograd.tape import data
from pyloss.checks.numbers import real, whole
from pyloss.nn.module import Module
from pyloss.ops.projection import Projection
from pyloss.runtime.device import on_device_of
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import FORMATS, Weight

M = TypeVar("M", bound=Module)


def uniform(shape: tuple[int, ...], bound: float) -> np.ndarray:
    """float32 in [-bound, bound), from the library's random state."""
    return random.generator().uniform(-bound, bound, shape).astype(np.float32)


def _over(
    plain: type[M], quantized: type[M], weight: np.ndarray | Weight | WeightStack, **more: Any
) -> M:
    """A layer over `weight` and the attributes `more`, without a copy.

    It is a `plain` one, or a `quantized` one over a quantized weight.
    """
    cls = quantized if isinstance(weight, Weight | WeightStack) and not weight.is_float else plain
    layer = cls.__new__(cls)
    Module.__init__(layer)
    for name, value in {"weight": weight, **more}.items():
        setattr(layer, name, value)
    return layer


class Projecting(Module):
    """A layer that is one projection of its input, by the arrays of `projection()`."""

    def projection(self) -> ops.Projection:
        """The layer's arrays, for callers that compute several projections or losses at once."""
        raise NotImplementedError

    def __call__(self, x: Any) -> Any:
        return ops.project(x, self.projection())


def _projects(kind: type[Module]) -> bool:
    """Whether a layer's computation is its projection, also where another one calls that."""
    call = kind.__call__
    return getattr(call, "__wrapped__", call) is Projecting.__call__


def project_each(x: Any, *layers: Module) -> list[Any]:
    """The results of layers for one x; in one operation where all are plain projections."""
    if all(_projects(type(layer)) for layer in layers):
        return ops.project_all(x, [layer.projection() for layer in layers])  # type: ignore[attr-defined]
    return [layer(x) for layer in layers]


class Linear(Projecting):
    """x [..., in] -> x weight^T + bias, [..., out].

    `weight` [out, in] is an ndarray (trained unless frozen) or a stored float `Weight` (never
    trained).
    """

    recordable = True

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True):
        super().__init__()
        input_dims, output_dims = (
            whole(input_dims, "input_dims", 1),
            whole(output_dims, "output_dims", 1),
        )
        bound = 1 / math.sqrt(input_dims)
        self.weight: np.ndarray | Weight = uniform((output_dims, input_dims), bound)
        self.bias: np.ndarray | None = uniform((output_dims,), bound) if bias else None

    @staticmethod
    def from_weight(weight: np.ndarray | Weight, bias: np.ndarray | None = None) -> Linear:
        """A layer over existing arrays, without a copy.

        A quantized weight makes a `QuantizedLinear`.
        """
        return _over(Linear, QuantizedLinear, weight, bias=bias)

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)"""
        return (self.weight.shape[0], self.weight.shape[1])

    def projection(self) -> ops.Projection:
        return ops.Projection(self.weight, self.bias)

    def __repr__(self) -> str:
        kind = self.weight.format if isinstance(self.weight, Weight) else "float32"
        return (
            f"{type(self).__name__}(in={self.shape[1]}, out={self.shape[0]}, "
            f"bias={self.bias is not None}, {kind})"
        )


def _affine(values: Any, group_size: int, bits: int) -> Weight:
    """A matrix in mlx's affine format with so many bits. ValueError for unsupported sizes."""
    count = whole(bits, "bits")
    if f"affine{count}" not in FORMATS:
        known = ", ".join(
            name.removeprefix("affine") for name in FORMATS if name.startswith("affine")
        )
        raise ValueError(f"bits is {bits}; it must be one of {known}")
    return Weight.quantize(values, f"affine{count}", group_size=whole(group_size, "group_size", 1))


class QuantizedLinear(Linear):
    """A `Linear` over a group-quantized weight, which is never trained.

    `QuantizedLinear(in, out)` begins with random values, stored as by mlx.nn's layer of this name:
    affine, in groups of `group_size` along each row, `bits` per value. `Linear.from_weight`
    makes one over a `Weight` of any quantized format.

    ValueError for sizes that the format does not have: `input_dims` must be a multiple of
    `group_size`.
    """

    recordable = True
    weight: Weight

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        bias: bool = True,
        group_size: int = 64,
        bits: int = 4,
    ):
        super().__init__(input_dims, output_dims, bias)
        self.weight = _affine(self.weight, group_size, bits)


class SwitchLinear(Module):
    """The linear layers of E experts: x [M, in], rows sorted by expert, to [M, out].

    `weight` [E, out, in] is an ndarray (trained unless frozen) or a `WeightStack` of floats (never
    trained), `bias` [E, out].
    """

    recordable = True

    def __init__(self, input_dims: int, output_dims: int, num_experts: int, bias: bool = True):
        super().__init__()
        input_dims, output_dims = (
            whole(input_dims, "input_dims", 1),
            whole(output_dims, "output_dims", 1),
        )
        num_experts = whole(num_experts, "num_experts", 1)
        self.weight: np.ndarray | WeightStack = uniform(
            (num_experts, output_dims, input_dims), 1 / math.sqrt(input_dims)
        )
        self.bias: np.ndarray | None = (
            np.zeros((num_experts, output_dims), np.float32) if bias else None
        )

    @staticmethod
    def from_weight(
        weight: np.ndarray | WeightStack, bias: np.ndarray | None = None
    ) -> SwitchLinear:
        """A layer over existing arrays, without a copy.

        Quantized weights make a `QuantizedSwitchLinear`.
        """
        return _over(SwitchLinear, QuantizedSwitchLinear, weight, bias=bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out features, in features)"""
        return (self.weight.shape[0], self.weight.shape[1], self.weight.shape[2])

    def __call__(self, x: Any, offsets: np.ndarray) -> Any:
        """Expert e has the rows [offsets[e], offsets[e + 1]) of x.

        `offsets` int32 [E + 1], see `ops.route`.
        """
        return ops.expert_project(x, offsets, Projection(self.weight, self.bias))

    def __repr__(self) -> str:
        experts, rows, cols = self.shape
        kind = self.weight.format if isinstance(self.weight, WeightStack) else "float32"
        return (
            f"{type(self).__name__}(in={cols}, out={rows}, experts={experts}, "
            f"bias={self.bias is not None}, {kind})"
        )


class QuantizedSwitchLinear(SwitchLinear):
    """A `SwitchLinear` over group-quantized weights, which are never trained.

    Arguments and errors as for `QuantizedLinear`. `SwitchLinear.from_weight` makes one over a
    `WeightStack`.
    """

    recordable = True

    weight: WeightStack

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        num_experts: int,
        bias: bool = True,
        group_size: int = 64,
        bits: int = 4,
    ):
        super().__init__(input_dims, output_dims, num_experts, bias)
        drawn: Any = self.weight  # [E, out, in]
        self.weight = WeightStack([_affine(matrix, group_size, bits) for matrix in drawn])


class Embedding(Module):
    """Token ids [...] -> rows of weight [V, D], [..., D]."""

    def __init__(self, num_embeddings: int, dims: int):
        super().__init__()
        num_embeddings, dims = whole(num_embeddings, "num_embeddings", 1), whole(dims, "dims", 1)
        values = random.generator().standard_normal((num_embeddings, dims)) / math.sqrt(dims)
        self.weight: np.ndarray | Weight = values.astype(np.float32)

    @staticmethod
    def from_weight(weight: np.ndarray | Weight) -> Embedding:
        """A layer over an existing table, without a copy.

        A quantized table makes a `QuantizedEmbedding`.
        """
        return _over(Embedding, QuantizedEmbedding, weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows of the table, dimensions)"""
        return (self.weight.shape[0], self.weight.shape[1])

    def __call__(self, ids: Any) -> Any:
        return ops.embedding(ids, self.weight)

    def projection(self) -> ops.Projection:
        """The arrays of `as_linear`."""
        return ops.Projection(self.weight)

    def as_linear(self, x: Any) -> Any:
        """x [..., D] against the table as a tied head: [..., V]."""
        return ops.project(x, self.projection())

    def __repr__(self) -> str:
        kind = self.weight.format if isinstance(self.weight, Weight) else "float32"
        return f"{type(self).__name__}(rows={self.shape[0]}, dims={self.shape[1]}, {kind})"


class QuantizedEmbedding(Embedding):
    """An `Embedding` over a group-quantized table, which is never trained.

    `group_size`, `bits` and errors as for `QuantizedLinear`. `Embedding.from_weight` makes one over
    a `Weight`.
    """

    weight: Weight

    def __init__(self, num_embeddings: int, dims: int, group_size: int = 64, bits: int = 4):
        super().__init__(num_embeddings, dims)
        self.weight = _affine(self.weight, group_size, bits)


class RMSNorm(Module):
    """x / rms(x) * (weight + offset) along the last axis; `affine=False` has no weight."""

    recordable = True

    def __init__(self, dims: int, eps: float = 1e-5, offset: float = 0.0, affine: bool = True):
        super().__init__()
        dims, offset = whole(dims, "dims", 1), real(offset, "offset")
        if offset and not affine:
            raise ValueError("an offset needs a weight")
        self.weight: Any = np.full(dims, 1 - offset, np.float32) if affine else None
        self.eps = real(eps, "eps", 0)
        self._offset = np.full(dims, offset, np.float32) if offset else None
        self._ones = None if affine else np.ones(dims, np.float32)

    def __call__(self, x: Any) -> Any:
        weight = on_device_of(data(x), self._ones) if self.weight is None else self.weight
        if self._offset is not None:
            weight = ops.add(weight, self._offset)
        return ops.rms_norm(x, weight, self.eps)
