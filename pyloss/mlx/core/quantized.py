"""mx.quantize, mx.dequantize and mx.quantized_matmul: MLX's affine groups, by pyloss's `Weight`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import ops
from pyloss.mlx.core.arrays import array, cast, of, promoted, raw, result
from pyloss.mlx.core.dtypes import bfloat16, float16, float32, uint32
from pyloss.mlx.core.elementwise import constant
from pyloss.ops.projection import Projection
from pyloss.weights.formats import FORMATS
from pyloss.weights.groups import Groups
from pyloss.weights.weight import Weight

SCALES = {float32: "f32", float16: "f16", bfloat16: "bf16"}


def affine_settings(group_size: int | None, bits: int | None, mode: str) -> tuple[int, int]:
    """Group size and bits, MLX's 64 and 4 by default; ValueError for other than affine formats."""
    if mode != "affine":
        raise ValueError(f"mode is {mode!r}; pyloss quantizes in MLX's 'affine' mode")
    size, count = 64 if group_size is None else int(group_size), 4 if bits is None else int(bits)
    if f"affine{count}" not in FORMATS:
        known = sorted(n.removeprefix("affine") for n in FORMATS if n.startswith("affine"))
        raise ValueError(f"bits is {bits}; it must be one of {', '.join(known)}")
    return size, count


def quantize(
    w: Any,
    /,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    global_scale: Any = None,
    stream: Any = None,
) -> tuple[array, array, array]:
    """Codes (uint32), scales and biases of w's groups of `group_size` (64) elements of `bits` (4).

    As mlx.core.quantize rounds. It has no gradient.
    """
    size, count = affine_settings(group_size, bits, mode)
    if global_scale is not None:
        raise ValueError("global_scale belongs to modes other than 'affine'")
    (x,) = promoted(w, floats=True)
    x = np.asarray(constant(x, "quantize"))
    if x.ndim < 2 or x.shape[-1] % size:
        raise ValueError(
            f"w has shape {x.shape}; it needs two axes or more, and a last one that is a multiple "
            f"of group_size {size}"
        )
    scales = SCALES[x.dtype]
    weight = Weight.quantize(
        x.astype(np.float32, copy=False).reshape(-1, x.shape[-1]),
        f"affine{count}",
        group_size=size,
        scale_format=scales,
    )
    assert weight.groups is not None and weight.groups.offsets is not None
    parts = (weight.groups.scales, weight.groups.offsets)
    codes = np.ascontiguousarray(weight.raw).view(uint32).reshape(*x.shape[:-1], -1)
    return of(codes), *(of(part.view(x.dtype).reshape(*x.shape[:-1], -1)) for part in parts)  # type: ignore[return-value]


def weight_of(w: Any, scales: Any, biases: Any, group_size: int, bits: int) -> Weight:
    """The stored matrix of MLX's arrays, [rows, columns], without a copy where they allow it."""
    codes, scale, bias = (
        np.ascontiguousarray(constant(raw(x), "quantized_matmul")) for x in (w, scales, biases)
    )
    if codes.dtype != uint32 or codes.ndim != 2:
        raise ValueError(f"w must be uint32 [rows, words], not {codes.dtype} of {codes.shape}")
    columns = codes.shape[1] * 32 // bits
    wanted = (codes.shape[0], columns // group_size)
    if scale.shape != wanted or bias.shape != wanted or scale.dtype not in SCALES:
        raise ValueError(
            f"scales and biases must be floats of shape {wanted}, not {scale.dtype} of "
            f"{scale.shape} and {bias.shape}"
        )
    parts = (scale.reshape(-1).view(np.uint8), bias.astype(scale.dtype).reshape(-1).view(np.uint8))
    groups = Groups(group_size, parts[0], SCALES[scale.dtype], parts[1])
    return Weight(
        codes.reshape(-1).view(np.uint8), f"affine{bits}", (codes.shape[0], columns), groups=groups
    )


def _matrix(x: Any) -> Any:
    found = raw(x)
    return of(found).reshape(-1, found.shape[-1])


def dequantize(
    w: Any,
    /,
    scales: Any,
    biases: Any = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: Any = None,
    dtype: Any = None,
    *,
    stream: Any = None,
) -> array:
    """The values of what `quantize` gave, in the scales' type or `dtype`."""
    size, count = affine_settings(group_size, bits, mode)
    if biases is None:
        raise ValueError("biases is None; the 'affine' mode has them")
    weight = weight_of(_matrix(w), _matrix(scales), _matrix(biases), size, count)
    values = weight.dequantize().reshape(*raw(w).shape[:-1], -1)
    return of(cast(values, np.dtype(dtype or raw(scales).dtype)))


def quantized_matmul(
    x: Any,
    w: Any,
    /,
    scales: Any,
    biases: Any = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    stream: Any = None,
) -> array:
    """x times the matrix that `quantize` gave, transposed by default. x gets a gradient."""
    size, count = affine_settings(group_size, bits, mode)
    if biases is None:
        raise ValueError("biases is None; the 'affine' mode has them")
    (value,) = promoted(x, floats=True)
    if not transpose:
        return of(value) @ dequantize(w, scales, biases, size, count)
    return projected(value, weight_of(w, scales, biases, size, count))


def projected(x: Any, weight: Any, bias: Any = None) -> array:
    """x weight^T + bias in float32, of halves rounded back to their type."""
    kind = x.dtype
    found = ops.project(cast(x, float32) if kind.itemsize == 2 else x, Projection(weight, bias))
    return of(cast(found, kind)) if kind.itemsize == 2 else result(found)
