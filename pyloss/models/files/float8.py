"""Layers stored in 8-bit floats with scales (`quant_method` "fp8"): `Float8` expands them.

A layer has `weight`, and `weight_scale_inv` or `weight_scale`: w = weight * scale, with a scale for
each block of `weight_block_size`, for each row, or for the matrix. Scales of activations change
nothing here: pyloss multiplies floats.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.tensor_file import FLOAT8, StoredTensor, TensorFile
from pyloss.weights.formats import encode
from pyloss.weights.weight import Weight

_SCALES = ("weight_scale_inv", "weight_scale")
_OF_ACTIVATIONS = ("activation_scale", "input_scale")
# Values that are expanded at a time, so that temporaries stay small.
_CHUNK = 1 << 22


class Float8:
    """The settings of such layers in the config.json at `path`; `format` is what they become.

    Without `values` the floats are memory that is not written, for descriptions.

    Raises ValueError for options that pyloss does not read, FormatError for damaged settings.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        format: str,
        values: bool = True,
    ) -> None:
        self._format = format
        self._values = values
        block = settings.get("weight_block_size")
        if block is not None and not (
            isinstance(block, list)
            and len(block) == 2
            and all(type(size) is int and 0 < size < 1 << 31 for size in block)
        ):
            raise FormatError(
                path, "weight_block_size", f"expected two positive integers, got {shown(block)}"
            )
        self._block: tuple[int, int] | None = None if block is None else (block[0], block[1])
        if settings.get("expert_dtype", "fp8") != "fp8":
            kind = shown(settings["expert_dtype"])
            raise ValueError(f"{path}: expert_dtype {kind} is not supported; supported is fp8")

    def weight(self, file: TensorFile, layer: str, rows: int, cols: int) -> Weight | None:
        """The matrix of `layer` as floats, None if it is stored as such."""
        name = f"{layer}.weight"
        if name not in file or file.tensor(name).dtype not in FLOAT8:
            return None
        tensor = file.tensor(name)
        if tensor.shape != (rows, cols):
            reason = f"has shape {tensor.shape}, where the configuration gives {(rows, cols)}"
            raise FormatError(tensor.path, name, reason)
        kinds = [kind for kind in _SCALES if f"{layer}.{kind}" in file]
        scales = file.tensor(f"{layer}.{kinds[0] if kinds else _SCALES[0]}")
        for kind in _OF_ACTIVATIONS:
            if f"{layer}.{kind}" in file:
                file.tensor(f"{layer}.{kind}")
        scale, block = self._scales(scales, rows, cols)
        raw = np.empty((rows, cols * (4 if self._format == "f32" else 2)), np.uint8)
        columns = np.arange(cols) // block[1]
        step = max(1, _CHUNK // max(cols, 1))
        for begin in range(0, rows, step) if self._values else ():
            part = np.arange(begin, min(begin + step, rows))
            values = tensor.rows(part)
            values *= scale[part // block[0]][:, columns]
            raw[part] = encode(values, self._format)
        return Weight(raw.reshape(-1), self._format, (rows, cols))

    def _scales(
        self, tensor: StoredTensor, rows: int, cols: int
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """float32 scales of two dimensions, and the size of their blocks."""
        if tensor.shape in ((), (1,), (1, 1)):
            return tensor.array().reshape(1, 1), (max(rows, 1), max(cols, 1))
        if tensor.shape in ((rows,), (rows, 1)):
            return tensor.array().reshape(rows, 1), (1, max(cols, 1))
        down, across = self._block or (rows, cols)
        shape = (-(-rows // down), -(-cols // across))
        if tensor.shape != shape:
            reason = f"has shape {tensor.shape}, expected {shape} for {rows} rows of {cols} values"
            raise FormatError(tensor.path, tensor.name, reason)
        return tensor.array(), (down, across)
