"""Matrices that GGUF has in parts: which rows of a matrix are in which tensor."""

from __future__ import annotations

import numpy as np

from pyloss.models.config.model_config import ModelConfig
from pyloss.models.files.names import shared_parts
from pyloss.weights.formats import FORMATS, SEARCHED
from pyloss.weights.weight import Weight

_DELTA_PARTS = ("in_proj_qkv", "in_proj_z")


def gguf_parts(name: str, rows: int, config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors in place of the matrix `name` [rows, ...], with the rows of each in order.

    Empty if GGUF has the matrix as it is.
    """
    at, found, _ = name.partition(".linear_attn.in_proj_qkvz.")
    if found and config.delta is not None:
        each = config.delta.fused_rows()
        return {
            f"{at}.linear_attn.{part}.weight": rows_of
            for part, rows_of in zip(_DELTA_PARTS, each, strict=True)
        }
    parts = shared_parts(name, config.mixture is not None)
    return dict(zip(parts, np.split(np.arange(rows), len(parts)), strict=True)) if parts else {}


def rows_of(value: np.ndarray | Weight, rows: np.ndarray) -> np.ndarray | Weight:
    """These rows of a matrix; bytes are shared where they follow each other."""
    begin, end = int(rows[0]), int(rows[-1]) + 1
    together = np.array_equal(rows, np.arange(begin, end))
    if isinstance(value, np.ndarray):
        return value[begin:end] if together else value[rows]
    if together:
        return value.slice_rows(begin, end)
    if value.columns is None and value.groups is None and not value.head_dim:
        raw = value.raw.reshape(value.shape[0], -1)[rows]
        return Weight(raw.reshape(-1), value.format, (len(rows), value.shape[1]))
    return plainly_stored(value.dequantize()[rows], value)


def plainly_stored(array: np.ndarray, like: Weight) -> Weight:
    """A matrix in the format of another one, or in f16 where that would change its values.

    f16 holds the values of K-quants; a second search for scales would not.
    """
    kept = FORMATS[like.format].encodes and like.groups is None and like.format not in SEARCHED
    return Weight.quantize(np.ascontiguousarray(array), like.format if kept else "f16")
