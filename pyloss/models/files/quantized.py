"""Quantized layers in Hugging Face folders, of the methods that pyloss reads.

mlx: tensors `weight` (codes in uint32 words), `scales` and `biases`; bits and group size are in
config.json under `quantization`, with entries for layers that differ.

bitsandbytes: tensors `weight` (two codes per byte), `weight.absmax`, `weight.quant_map`, with
double quantization `weight.nested_absmax` and `weight.nested_quant_map`; the rest is JSON in the
bytes of `weight.quant_state.bitsandbytes__nf4`.

GPTQ and AWQ: see `packed.py`. Here their layers become affine groups. fp8: see `float8.py`; layers
become floats.

A layer without these tensors is not quantized.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.files import read_json
from pyloss.io.tensor_file import StoredTensor, TensorFile
from pyloss.models.files.float8 import Float8
from pyloss.models.files.packed import Packed
from pyloss.weights.formats import FORMATS
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Groups, Weight

AFFINE_BITS = sorted(layout.bits for name, layout in FORMATS.items() if name.startswith("affine"))
_READS = "pyloss reads mlx's affine groups, bitsandbytes' NF4, GPTQ, AWQ and fp8"
# Files that older programs wrote their settings into.
_BESIDE = {"gptq": "quantize_config.json", "awq": "quant_config.json"}
_STATE = "weight.quant_state.bitsandbytes__nf4"


class Quantization:
    """The settings of quantized layers in the config.json at `path`.

    Without `values`, matrices that would be repacked or expanded have memory that is not written.

    Attributes:
        method: "mlx", "bitsandbytes", "gptq", "awq", "fp8", or "" if the file has no settings.

    Raises:
        ValueError: a method that pyloss does not read.
        FormatError: damaged settings.
    """

    def __init__(
        self, path: str | os.PathLike[str], content: Mapping[str, Any], values: bool = True
    ) -> None:
        self.path = path
        key = "quantization" if content.get("quantization") is not None else "quantization_config"
        settings = content.get(key)
        self.settings: dict[str, Any] = {} if settings is None else settings
        if not isinstance(self.settings, dict):
            raise FormatError(path, key, f"expected an object, got {shown(settings)}")
        self.method = self.settings.get("quant_method", "mlx") if settings is not None else ""
        self.packed: Packed | None = None
        self.float8: Float8 | None = None
        if self.method == "mlx":
            self.of("")
        elif self.method in ("gptq", "awq"):
            self.packed = Packed(path, self.settings, values)
        elif self.method == "fp8":
            dtype = content.get("dtype", content.get("torch_dtype"))
            format = "f32" if dtype == "float32" else "bf16"
            self.float8 = Float8(path, self.settings, format, values)
        elif self.method == "bitsandbytes":
            if not (self.settings.get("load_in_4bit") or self.settings.get("_load_in_4bit")):
                raise ValueError(f"{path}: quantized by bitsandbytes in 8 bits; {_READS}")
            kind = self.settings.get("bnb_4bit_quant_type", "nf4")
            if kind != "nf4":
                raise ValueError(f"{path}: quantized by bitsandbytes as {shown(kind)}; {_READS}")
        elif self.method:
            raise ValueError(f"{path}: quantized by {shown(self.method)}; {_READS}")

    @classmethod
    def read(cls, config: Path, values: bool = True) -> Quantization:
        """The settings in a config.json, or in the file beside it where GPTQ and AWQ once were."""
        content = read_json(config)
        if content.get("quantization") is None and content.get("quantization_config") is None:
            for method, name in _BESIDE.items():
                if (config.parent / name).exists():
                    own = {**read_json(config.parent / name), "quant_method": method}
                    return cls(
                        config.parent / name, {**content, "quantization_config": own}, values
                    )
        return cls(config, content, values)

    def of(self, layer: str) -> tuple[int, int]:
        """The bits and the group size of mlx's layer `layer`."""
        found = self.settings.get(layer)
        settings = found if isinstance(found, dict) else self.settings
        bits, size, mode = (
            settings.get("bits"),
            settings.get("group_size"),
            settings.get("mode", "affine"),
        )
        where = f"quantization of {layer}" if layer else "quantization"
        if mode != "affine":
            raise ValueError(f"{self.path}: {where} in mode {shown(mode)}; {_READS}")
        if type(bits) is not int or bits not in AFFINE_BITS:
            raise FormatError(
                self.path,
                where,
                f"bits must be one of {', '.join(map(str, AFFINE_BITS))}, got {shown(bits)}",
            )
        if type(size) is not int or size < 32 or size & (size - 1):
            raise FormatError(
                self.path,
                where,
                f"group_size must be a power of two of at least 32, got {shown(size)}",
            )
        return bits, size

    def bits(self) -> int:
        """The usual number of bits of layers in affine groups, 0 for other methods."""
        if self.packed is not None:
            return int(self.packed.bits)
        return self.of("")[0] if self.method == "mlx" else 0

    def weight(self, file: TensorFile, layer: str, *shape: int) -> Weight | None:
        """The quantized matrix of `layer`, or None if the layer is not quantized.

        `shape` is [rows, cols], or [count, rows, cols] of experts, whose rows are one matrix.
        """
        if self.float8 is not None and len(shape) == 2:
            return self.float8.weight(file, layer, *shape)
        if f"{layer}.qweight" in file:
            if self.packed is None:
                reason = "a quantized layer, and config.json has no quantization_config of its"
                raise FormatError(file.path, f"{layer}.qweight", reason)
            *leading, cols = shape
            return self.packed.weight(file, layer, math.prod(leading), cols)
        if f"{layer}.scales" in file:
            if self.method != "mlx":
                raise FormatError(
                    file.path,
                    f"{layer}.scales",
                    "a quantized layer, and config.json has no quantization of mlx's",
                )
            return self._affine(file, layer, shape)
        if f"{layer}.{_STATE}" in file or f"{layer}.weight.absmax" in file:
            if self.method != "bitsandbytes":
                reason = (
                    "a quantized layer, and config.json has no quantization_config of bitsandbytes'"
                )
                raise FormatError(file.path, f"{layer}.weight", reason)
            return _nf4(file, layer, shape)
        return None

    def _affine(self, file: TensorFile, layer: str, shape: tuple[int, ...]) -> Weight:
        bits, size = self.of(layer)
        *leading, cols = shape
        scales = file.tensor(f"{layer}.scales")
        if cols % size:
            reason = f"rows of {cols} values, which are no multiple of the group size {size}"
            raise FormatError(file.path, f"{layer}.weight", reason)
        if scales.dtype not in ("F32", "F16", "BF16"):
            raise FormatError(
                scales.path, scales.name, f"stored as {scales.dtype}, expected F32, F16 or BF16"
            )
        what = f"{bits}-bit rows of {cols} in groups of {size}"
        codes = _bytes(file.tensor(f"{layer}.weight"), "U32", (*leading, cols * bits // 32), what)
        parts = (
            _bytes(file.tensor(f"{layer}.{name}"), scales.dtype, (*leading, cols // size), what)
            for name in ("scales", "biases")
        )
        groups = Groups(size, next(parts), scales.dtype.lower(), next(parts))
        return Weight(codes, f"affine{bits}", (math.prod(leading), cols), groups=groups)


def _bytes(tensor: StoredTensor, dtype: str, shape: tuple[int, ...], what: str) -> np.ndarray:
    if tensor.dtype != dtype or tensor.shape != shape or tensor.data is None:
        reason = f"{tensor.dtype} of shape {tensor.shape}, expected {dtype} of {shape} for {what}"
        raise FormatError(tensor.path, tensor.name, reason)
    return tensor.data


def _nf4(file: TensorFile, layer: str, shape: tuple[int, ...]) -> Weight:
    *leading, cols = shape
    state = _state(file.tensor(f"{layer}.{_STATE}"))
    tensor = file.tensor(f"{layer}.weight")
    if tuple(state["shape"]) != shape:
        reason = (
            f"its quant_state says shape {state['shape']}, where the configuration gives {shape}"
        )
        raise FormatError(tensor.path, tensor.name, reason)
    count, size = math.prod(shape), state["blocksize"]
    # Codes may be kept in words of another type (bnb_4bit_quant_storage).
    if tensor.data is None or tensor.data.size * 2 != count:
        reason = f"{tensor.dtype} of shape {tensor.shape} does not hold {count} codes of 4 bits"
        raise FormatError(tensor.path, tensor.name, reason)
    blocks, what = -(-count // size), f"{count} values in blocks of {size}"

    def part(name: str, dtype: str, *lengths: int) -> np.ndarray:
        return _bytes(file.tensor(f"{layer}.weight.{name}"), dtype, lengths, what)

    table = part("quant_map", "F32", 16)
    try:
        if f"{layer}.weight.nested_absmax" not in file:
            groups = Groups(size, part("absmax", "F32", blocks), table=table)
        elif "nested_blocksize" not in state:
            reason = (
                "it says no nested_blocksize, and the scales of this layer are quantized themselves"
            )
            raise FormatError(file.path, f"{layer}.{_STATE}", reason)
        else:
            inner = state["nested_blocksize"]
            groups = Groups(
                size,
                part("absmax", "U8", blocks),
                table=table,
                map=part("nested_quant_map", "F32", 256),
                nested=part("nested_absmax", "F32", -(-blocks // inner)),
                nested_size=inner,
                nested_offset=float(state["nested_offset"]),
            )
        return Weight(tensor.data, "nf4", (math.prod(leading), cols), groups=groups)
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(tensor.path, tensor.name, str(error)) from None


def _state(tensor: StoredTensor) -> dict[str, Any]:
    try:
        if tensor.data is None:
            raise ValueError("no bytes")
        state = json.loads(tensor.data.tobytes())
        numbers = [state["blocksize"], *state["shape"]]
        if "nested_blocksize" in state:
            numbers.append(state["nested_blocksize"])
            if not math.isfinite(state["nested_offset"]):
                raise ValueError(f"nested_offset {shown(state['nested_offset'])}")
        if state["quant_type"] != "nf4" or not all(
            type(n) is int and 0 < n < 1 << 62 for n in numbers
        ):
            raise ValueError(f"quant_type {shown(state['quant_type'])} with sizes {numbers}")
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise FormatError(
            tensor.path, tensor.name, f"not bitsandbytes' state of an nf4 tensor: {error}"
        ) from None
    return state


def stays_quantized(weight: Weight | WeightStack) -> bool:
    """Whether a Hugging Face folder holds the matrix as it is, not as floats."""
    return bool(FORMATS[weight.format].bits) and getattr(weight, "columns", None) is None


def layer_tensors(layer: str, weight: Weight | WeightStack, dtype: str) -> dict[str, np.ndarray]:
    """The tensors of a quantized layer, as `Quantization.weight` reads them.

    `dtype` is the type that bitsandbytes computes in.
    """
    matrices = weight.matrices if isinstance(weight, WeightStack) else (weight,)
    parts = [
        _affine_parts(matrix) if matrix.format != "nf4" else _nf4_parts(matrix, dtype)
        for matrix in matrices
    ]
    if isinstance(weight, WeightStack):
        if weight.format == "nf4":
            raise ValueError(
                f"{layer}: experts in nf4 have no place in bitsandbytes' layout; "
                "quantize them to q4 or q8"
            )
        return {f"{layer}.{name}": np.stack([part[name] for part in parts]) for name in parts[0]}
    return {f"{layer}.{name}": array for name, array in parts[0].items()}


def _affine_parts(weight: Weight) -> dict[str, np.ndarray]:
    weight = _in_order(weight)
    g, rows = weight.groups, weight.shape[0]
    assert g is not None and g.offsets is not None
    first = g.first // g.size
    own = slice(first, first + rows * weight.shape[1] // g.size)
    scales, offsets = (
        floats(part, g.scale_format)[own].reshape(rows, -1) for part in (g.scales, g.offsets)
    )
    return {"weight": weight.raw.reshape(rows, -1).view("<u4"), "scales": scales, "biases": offsets}


def _in_order(weight: Weight) -> Weight:
    """The matrix with rows in Hugging Face order and, for nf4, with its own arrays."""
    g = weight.groups
    assert g is not None
    if not weight.head_dim and (weight.format != "nf4" or not g.first):
        return weight
    plain = Weight(weight.raw[:0], weight.format, (0, weight.shape[1]), groups=g._replace(first=0))
    return plain.quantize_alike(weight.dequantize())


def floats(raw: np.ndarray, format: str) -> np.ndarray:
    """The bytes of a float format as an array of that type, not copied."""
    if format == "bf16":
        import ml_dtypes

        return raw.view(ml_dtypes.bfloat16)
    return raw.view({"f32": "<f4", "f16": "<f2"}[format])


def _nf4_parts(weight: Weight, dtype: str) -> dict[str, np.ndarray]:
    whole = _in_order(weight)
    g = whole.groups
    assert g is not None and g.table is not None
    blocks = -(-weight.shape[0] * weight.shape[1] // g.size)
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": g.size,
        "dtype": dtype,
        "shape": list(weight.shape),
    }
    parts = {"weight": whole.raw.reshape(-1, 1), "weight.quant_map": floats(g.table, "f32")}
    if g.map is None or g.nested is None:
        parts["weight.absmax"] = floats(g.scales, "f32")[:blocks]
    else:
        state |= {
            "nested_blocksize": g.nested_size,
            "nested_dtype": "float32",
            "nested_offset": g.nested_offset,
        }
        parts["weight.absmax"] = g.scales[:blocks]
        parts["weight.nested_absmax"] = floats(g.nested, "f32")[: -(-blocks // g.nested_size)]
        parts["weight.nested_quant_map"] = floats(g.map, "f32")
    return {**parts, _STATE: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def settings(
    layers: Mapping[str, Weight | WeightStack], dtype: str, plain: Sequence[str] = ()
) -> dict[str, Any]:
    """The keys of config.json for these quantized layers by name; `plain` are the float layers.

    Raises ValueError for formats that no one folder holds.
    """
    kinds = {"nf4" if weight.format == "nf4" else "affine" for weight in layers.values()}
    if len(kinds) > 1:
        raise ValueError("a folder holds layers in nf4 or in affine groups, not both")
    if kinds == {"nf4"}:
        groups = [_groups(weight) for weight in layers.values()]
        content = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": groups[0].double,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
        }
        # Otherwise transformers would quantize them. Without a list it leaves out only the head.
        if set(plain) - {"lm_head"}:
            content["llm_int8_skip_modules"] = sorted({*plain, "lm_head"})
        return {"quantization_config": content}
    each = {
        name: (FORMATS[weight.format].bits, _groups(weight).size) for name, weight in layers.items()
    }
    usual = Counter(each.values()).most_common(1)[0][0]

    def entry(bits: int, size: int) -> dict[str, Any]:
        return {"group_size": size, "bits": bits, "mode": "affine"}

    content = entry(*usual) | {name: entry(*own) for name, own in each.items() if own != usual}
    return {"quantization": content, "quantization_config": content}


def _groups(weight: Weight | WeightStack) -> Groups:
    groups = (weight.matrices[0] if isinstance(weight, WeightStack) else weight).groups
    assert groups is not None
    return groups
