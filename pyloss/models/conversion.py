"""Quantizing or dequantizing the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from pyloss.io.bars import watched
from pyloss.models.saving import DTYPES, model_dtype, refuse_adapters
from pyloss.models.transformer import Model
from pyloss.nn import Embedding, Linear, SwitchLinear
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import FORMATS, Weight

#: Quantizations by their names for users.
QUANTIZATIONS = {
    f"q{layout.bits}": name for name, layout in FORMATS.items() if name.startswith("affine")
} | {"nf4": "nf4"}


def quantize_model(
    model: Model,
    quantization: str,
    group_size: int | None = None,
    dtype: str | None = None,
    double: bool = True,
    names: Collection[str] | None = None,
) -> dict[str, str]:
    """Quantizes the layers of `model` in place; returns the layers left out, with the reasons.

    Affine groups take every linear layer, expert and embedding; nf4 takes all linear layers but the
    head, as bitsandbytes does. Routers stay as they are, and so do layers whose rows do not divide
    into groups.

    Args:
        quantization: "q2" to "q8" (mlx's affine groups) or "nf4".
        group_size: 64 unless given.
        dtype: "float32", "float16" or "bfloat16": weights are first rounded to it, and the scales
            of affine groups have it. Default: the model's own type, or float16 if it is quantized.
        double: quantize nf4's scales too.
        names: only the layers of these names; None: all.

    Raises:
        ValueError: an unknown name, a group size that is no power of two from 32 on, unfused
            adapters, values that cannot be quantized, or no layer that can.
    """
    format = QUANTIZATIONS.get(quantization)
    if format is None:
        raise ValueError(
            f"quantize must be one of {', '.join(QUANTIZATIONS)}, not {quantization!r}"
        )
    size = 64 if group_size is None else group_size
    if size < 32 or size > 4096 or size & (size - 1):
        raise ValueError(f"group_size must be a power of two from 32 to 4096, not {size}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    refuse_adapters(model)
    quantized = any(not weight.is_float for weight in _matrices(model.stored()))
    floats = DTYPES[dtype or ("float16" if quantized else model_dtype(model))]
    options: dict[str, Any] = {"group_size": size, "scale_format": floats, "double": double}
    left, done = {}, 0
    layers = [layer for layer in _layers(model) if names is None or layer[0] in names]
    for name, module in watched(layers, f"quantizing to {quantization}", "layer"):
        reason = _left_out(name, module, format, size)
        if reason:
            left[name] = reason
            continue
        _replace(
            model,
            name,
            module,
            lambda matrix: _quantized(matrix, format, DTYPES[dtype] if dtype else None, options),
        )
        done += 1
    if not done:
        raise ValueError(f"nothing can be quantized to {quantization}: {left_text(left)}")
    return left


def left_text(left: Mapping[str, str]) -> str:
    """What `quantize_model` left out, as a list of reasons with their layers."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({reason})"
        for reason, names in by_reason.items()
    )


def dequantize_model(model: Model, dtype: str = "float32") -> None:
    """Stores the quantized layers of `model` in place as floats of the type `dtype`."""
    refuse_adapters(model)
    for name, module in watched(_layers(model), f"converting to {dtype}", "layer"):
        weight = module.weight
        if not isinstance(weight, np.ndarray) and not weight.is_float:
            _replace(
                model,
                name,
                module,
                lambda matrix: Weight.quantize(matrix.dequantize(), DTYPES[dtype]),
            )


def quantizable(model: Model) -> list[tuple[str, Any]]:
    """The layers of floats that affine groups can hold, with their names; routers stay floats."""
    return [
        (name, module)
        for name, module in _layers(model)
        if (isinstance(module.weight, np.ndarray) or all(m.is_float for m in _of(module.weight)))
        and not _left_out(name, module, "affine4", 32)
    ]


def _of(weight: Weight | WeightStack) -> list[Weight]:
    return list(weight.matrices) if isinstance(weight, WeightStack) else [weight]


def _layers(model: Model) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Linear | Embedding | SwitchLinear)
    ]


def _replace(model: Model, name: str, module: Any, store: Callable[[Any], Weight]) -> None:
    """Replace the layer `name` by one whose matrices are converted by `store`."""
    weight = module.weight
    stacked = (
        weight.matrices
        if isinstance(weight, WeightStack)
        else weight
        if len(weight.shape) == 3
        else None
    )
    stored = (
        store(weight) if stacked is None else WeightStack([store(matrix) for matrix in stacked])
    )
    bias = [module.bias] if getattr(module, "bias", None) is not None else []
    model.set_module(name, type(module).from_weight(stored, *bias).freeze())


def _matrices(stored: Mapping[str, Weight | WeightStack]) -> list[Weight]:
    found: list[Weight] = []
    for weight in stored.values():
        found += _of(weight)
    return found


def _left_out(name: str, module: Any, format: str, size: int) -> str:
    cols = module.weight.shape[-1]
    if name.endswith((".gate", ".shared_expert_gate", ".router.layer", ".router.proj")):
        return "a router"
    if format == "nf4":
        if isinstance(module, Embedding) or name == "lm_head":
            return "bitsandbytes keeps embeddings and heads as they are"
        if isinstance(module, SwitchLinear):
            return "bitsandbytes has no place for experts"
        size = 32
    return f"rows of {cols} values are no whole number of groups of {size}" if cols % size else ""


def _quantized(
    weight: np.ndarray | Weight, format: str, rounded: str | None, options: dict[str, Any]
) -> Weight:
    values = weight.dequantize() if isinstance(weight, Weight) else weight
    if rounded:
        values = Weight.quantize(values, rounded).dequantize()
    return Weight.quantize(values, format, **options)
