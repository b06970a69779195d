"""MLX's layers of vectors and tokens: projections, embeddings, quantized ones, sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss import nn as own, ops
from pyloss.autograd.tensor import Tensor
from pyloss.mlx.core import random
from pyloss.mlx.core.arrays import array, cast, of, promoted, raw
from pyloss.mlx.core.dtypes import float32
from pyloss.mlx.core.elementwise import constant
from pyloss.mlx.core.products import einsum
from pyloss.mlx.core.quantized import (
    SCALES,
    affine_settings,
    projected,
    quantize as quantized,
    weight_of,
)
from pyloss.mlx.nn.methods import Standing, with_mlx_methods
from pyloss.mlx.nn.module import Module
from pyloss.mlx.utils import tree_map_with_path
from pyloss.ops.projection import Projection
from pyloss.weights.weight import Weight


class Identity(Module):
    """Its input; arguments are ignored."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __call__(self, x: Any) -> Any:
        return x


class Sequential(Module):
    """Modules or functions, one after the other."""

    def __init__(self, *modules: Callable[[Any], Any]):
        super().__init__()
        self.layers = list(modules)

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def _raw(module: own.Module, name: str) -> Any:
    """A module's array as pyloss computes with it."""
    value = vars(module).get(name)
    return raw(value) if isinstance(value, np.ndarray | Tensor) else value


class Linear(Module, own.Linear, metaclass=Standing):
    """x weight^T + bias. pyloss's adapters take it as one of theirs."""

    _stands_for, _but_not = own.Linear, (own.QuantizedLinear,)

    weight: Any
    bias: Any

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True):
        Module.__init__(self)
        scale = math.sqrt(1.0 / input_dims)
        self.weight = random.uniform(-scale, scale, (output_dims, input_dims))
        self.bias = random.uniform(-scale, scale, (output_dims,)) if bias else None

    def projection(self) -> Projection:
        return Projection(_raw(self, "weight"), _raw(self, "bias"))

    def __call__(self, x: Any) -> array:
        weight, bias = _raw(self, "weight"), _raw(self, "bias")
        value, weight, *more = promoted(x, weight, *([] if bias is None else [bias]), floats=True)
        if weight.dtype.itemsize == 2:
            weight, more = cast(weight, float32), [cast(b, float32) for b in more]
        return projected(value, weight, *more)

    def _extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"input_dims={columns}, output_dims={rows}, bias={'bias' in self}"

    __repr__ = Module.__repr__

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
    ) -> QuantizedLinear:
        """This layer with a quantized weight."""
        _refuse_quantized_input(quantize_input)
        return QuantizedLinear.from_linear(self, group_size, bits, mode)


class Bilinear(Module):
    """y_i = x2^T W_i x1 + b_i."""

    def __init__(self, input1_dims: int, input2_dims: int, output_dims: int, bias: bool = True):
        super().__init__()
        scale = math.sqrt(1.0 / input1_dims)
        self.weight = random.uniform(-scale, scale, (output_dims, input2_dims, input1_dims))
        if bias:
            self.bias = random.uniform(-scale, scale, (output_dims,))

    def __call__(self, x1: Any, x2: Any) -> array:
        y = einsum("...i,oji,...j->...o", x1, self.weight, x2)
        return y + self.bias if "bias" in self else y


class Embedding(Module, own.Embedding, metaclass=Standing):
    """Rows of a table by their numbers; `as_linear` multiplies by the table."""

    _stands_for, _but_not = own.Embedding, (own.QuantizedEmbedding,)

    weight: Any

    def __init__(self, num_embeddings: int, dims: int):
        Module.__init__(self)
        self.weight = random.normal((num_embeddings, dims), scale=math.sqrt(1 / dims))

    def __call__(self, x: Any) -> array:
        table, ids = _raw(self, "weight"), np.asarray(constant(raw(x), "nn.Embedding"))
        kind = table.dtype
        found = ops.embedding(ids, cast(table, float32) if kind.itemsize == 2 else table)
        return of(cast(found, kind))

    def projection(self) -> Projection:
        return Projection(_raw(self, "weight"))

    def as_linear(self, x: Any) -> array:
        """x times the transposed table."""
        value, table = promoted(x, _raw(self, "weight"), floats=True)
        return projected(value, cast(table, float32) if table.dtype.itemsize == 2 else table)

    def _extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{rows}, {columns}"

    __repr__ = Module.__repr__

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
    ) -> QuantizedEmbedding:
        """This table, quantized."""
        _refuse_quantized_input(quantize_input)
        return QuantizedEmbedding.from_embedding(self, group_size, bits, mode)


class _Quantized(Module):
    """A layer over a matrix in MLX's affine groups: `weight` (uint32), `scales` and `biases`.

    The three are never trained, also after `unfreeze`.
    """

    _fixed = ("weight", "scales", "biases")

    def _set(self, matrix: Any, group_size: int | None, bits: int | None, mode: str) -> None:
        self.group_size, self.bits = affine_settings(group_size, bits, mode)
        self.mode = mode
        self.weight, self.scales, self.biases = quantized(matrix, self.group_size, self.bits)
        self.freeze(keys=list(self._fixed), recurse=False)

    def unfreeze(self, *args: Any, **kwargs: Any) -> own.Module:  # type: ignore[override]
        super().unfreeze(*args, **kwargs)
        return self.freeze(keys=list(self._fixed), recurse=False)

    def stored_weight(self) -> Weight:
        """The matrix as pyloss computes with it."""
        parts = [vars(self)[name] for name in self._fixed]
        known = vars(self).get("_stored")
        if known is None or any(a is not b for a, b in zip(known[0], parts, strict=True)):
            codes, scales, biases = parts
            known = parts, weight_of(codes, scales, biases, self.group_size, self.bits)
            object.__setattr__(self, "_stored", known)
        return known[1]

    @property
    def _settings(self) -> str:
        return f"group_size={self.group_size}, bits={self.bits}, mode={self.mode}"


class QuantizedLinear(_Quantized, metaclass=Standing):
    """A `Linear` whose weight is quantized as `mx.quantize` does."""

    _stands_for = own.QuantizedLinear

    bias: Any

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        bias: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
    ):
        super().__init__()
        scale = math.sqrt(1 / input_dims)
        self._set(random.uniform(-scale, scale, (output_dims, input_dims)), group_size, bits, mode)
        if bias:
            self.bias = np.zeros(output_dims, np.float32)
        self.freeze()

    def __call__(self, x: Any) -> array:
        y = projected(promoted(x, floats=True)[0], self.stored_weight())
        return y + self.bias if "bias" in self else y

    def projection(self) -> Projection:
        """The layer's arrays, for pyloss's adapters."""
        return Projection(self.stored_weight(), _raw(self, "bias"))

    def _extra_repr(self) -> str:
        rows, columns = self.stored_weight().shape
        return f"input_dims={columns}, output_dims={rows}, bias={'bias' in self}, {self._settings}"

    @classmethod
    def from_linear(
        cls,
        linear_layer: own.Module,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
    ) -> QuantizedLinear:
        """The quantized layer of a `Linear`."""
        layer = cls.__new__(cls)
        Module.__init__(layer)
        layer._set(_raw(linear_layer, "weight"), group_size, bits, mode)
        if _raw(linear_layer, "bias") is not None:
            layer.bias = of(_raw(linear_layer, "bias"))
        return layer


class QuantizedEmbedding(_Quantized, metaclass=Standing):
    """An `Embedding` whose table is quantized as `mx.quantize` does."""

    _stands_for = own.QuantizedEmbedding

    def __init__(
        self,
        num_embeddings: int,
        dims: int,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
    ):
        super().__init__()
        table = random.normal((num_embeddings, dims), scale=math.sqrt(1 / dims))
        self._set(table, group_size, bits, mode)
        self.num_embeddings, self.dims = num_embeddings, dims

    def __call__(self, x: Any) -> array:
        ids = np.asarray(constant(raw(x), "nn.QuantizedEmbedding"))
        found = ops.embedding(ids, self.stored_weight())
        return of(cast(found, vars(self)["scales"].dtype))

    def as_linear(self, x: Any) -> array:
        """x times the transposed table."""
        return projected(promoted(x, floats=True)[0], self.stored_weight())

    def _extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.dims}, {self._settings}"

    @classmethod
    def from_embedding(
        cls,
        embedding_layer: own.Module,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
    ) -> QuantizedEmbedding:
        """The quantized layer of an `Embedding`."""
        layer = cls.__new__(cls)
        Module.__init__(layer)
        table = _raw(embedding_layer, "weight")
        layer._set(table, group_size, bits, mode)
        layer.num_embeddings, layer.dims = table.shape
        return layer


def quantized_like(
    layer: own.Linear | own.Embedding,
    group_size: int | None,
    bits: int | None,
    mode: str,
    quantize_input: bool,
) -> own.Module:
    """A layer of pyloss over its quantized weight, with scales in the type of the floats."""
    _refuse_quantized_input(quantize_input)
    size, count = affine_settings(group_size, bits, mode)
    weight = vars(layer)["weight"]
    floats = weight.format if isinstance(weight, Weight) else SCALES[weight.dtype]
    values = weight.dequantize() if isinstance(weight, Weight) else weight
    stored = Weight.quantize(values, f"affine{count}", group_size=size, scale_format=floats)
    if isinstance(layer, own.Linear):
        return with_mlx_methods(own.Linear.from_weight(stored, vars(layer)["bias"]).freeze())
    return with_mlx_methods(own.Embedding.from_weight(stored).freeze())


def _refuse_quantized_input(quantize_input: bool) -> None:
    if quantize_input:
        raise ValueError("quantize_input=True is not supported: pyloss quantizes weights")


def quantize(
    model: own.Module,
    group_size: int | None = None,
    bits: int | None = None,
    *,
    mode: str = "affine",
    quantize_input: bool = False,
    class_predicate: Callable[[str, Any], bool | dict] | None = None,
) -> None:
    """Quantizes the layers of a model where they are: linear ones and embeddings.

    `class_predicate(path, layer)` says whether a layer is quantized, by True or a dict of
    `to_quantized`'s arguments. Layers of pyloss become pyloss's quantized ones.
    """
    _refuse_quantized_input(quantize_input)
    size, count = affine_settings(group_size, bits, mode)

    def changed(path: str, layer: Any) -> Any:
        takes = hasattr(layer, "to_quantized")
        wanted = takes if class_predicate is None else class_predicate(path, layer)
        if not wanted:
            return layer
        if not isinstance(wanted, bool | dict):
            raise ValueError(
                "``class_predicate`` must return a bool or a dict of parameters to pass to "
                "``to_quantized``"
            )
        settings: dict[str, Any] = {"group_size": size, "bits": count, "mode": mode}
        settings = settings if isinstance(wanted, bool) else wanted
        if not takes:
            raise ValueError(f"Unable to quantize model of type {type(layer)}")
        return layer.to_quantized(**settings)

    tree: Any = with_mlx_methods(model)
    leaves = tree_map_with_path(
        changed, tree.leaf_modules(), is_leaf=lambda x: isinstance(x, own.Module)
    )
    tree.update_modules(leaves)
