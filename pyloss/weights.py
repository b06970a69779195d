"""`Weight`: a stored matrix, float or group-quantised, over bytes that usually are a file's mapped ones.

The C kernels read these bytes themselves; the NumPy code here says plainly what they mean, and writes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Format(NamedTuple):
    """How a format is laid out along a row: `elements` values share a block of `bytes` bytes."""

    code: int  # pyloss.h's number
    elements: int
    bytes: int


FORMATS: dict[str, Format] = {
    "f32": Format(0, 1, 4),
    "bf16": Format(1, 1, 2),
    "f16": Format(2, 1, 2),
    "q8_0": Format(3, 32, 34),
    "q4_0": Format(4, 32, 18),
    "q4_1": Format(5, 32, 20),
}

# Rows are converted this many values at a time, so that temporaries stay small beside the result.
_CHUNK = 1 << 20


class Weight:
    """A matrix of `shape` (out_features, in_features) in `raw`'s bytes, never trained and never written to.

    Args:
        raw: flat contiguous uint8 array, kept as it is; read-only is fine, and unaligned bytes are copied.
        format: a key of `FORMATS`.
        shape: (out_features, in_features); in_features is a multiple of the format's block elements.
        head_dim: when D > 0, the file stores the rows of each head of D rows with its rotary pairs interleaved: row j
            of a head's first half lies at 2j and row j of its second half at 2j + 1. Whatever this class gives or takes
            is in Hugging Face order all the same.

    Raises:
        TypeError: `raw` is not a uint8 array.
        ValueError: an unknown format, or sizes that don't fit together.
    """

    __slots__ = ("format", "handle", "head_dim", "raw", "shape")

    def __init__(self, raw: Array, format: str, shape: tuple[int, int], head_dim: int = 0) -> None:
        if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8:
            raise TypeError(f"raw must be a uint8 numpy.ndarray, got {getattr(raw, 'dtype', type(raw).__name__)}")
        if raw.ndim != 1 or not raw.flags.c_contiguous:
            raise ValueError(f"raw must be flat and contiguous, got shape {raw.shape} with strides {raw.strides}")
        out_features, in_features = _check_shape(format, shape, head_dim)
        expected = out_features * row_bytes(format, in_features)
        if raw.size != expected:
            raise ValueError(f"raw must hold {expected} bytes for {format} of shape {shape}, got {raw.size}")
        # The kernels load whole elements, so the rare file with odd offsets costs a copy.
        if raw.ctypes.data % (4 if format == "f32" else 2):
            raw = raw.copy()
        self.raw = raw
        self.format = format
        self.shape = (out_features, in_features)
        self.head_dim = int(head_dim)
        # What the C binding takes in place of an array.
        self.handle = (raw, FORMATS[format].code, out_features, in_features, self.head_dim)

    @classmethod
    def quantize(cls, array: Array, format: str, head_dim: int = 0) -> Weight:
        """Store `array` (floating, [out, in], Hugging Face row order) in `format`, rounding as GGUF's reference does.

        Raises:
            ValueError: a shape the format cannot hold, or, for the quantised formats, a block whose values or scale
                are not finite.
        """
        array = np.asarray(array)
        if array.ndim != 2:
            raise ValueError(f"array must have 2 dimensions, got shape {array.shape}")
        shape = _check_shape(format, array.shape, head_dim)
        rows = np.empty((shape[0], row_bytes(format, shape[1])), np.uint8)
        step = max(1, _CHUNK // max(1, shape[1]))
        for start in range(0, shape[0], step):
            chunk = np.ascontiguousarray(array[start : start + step], dtype=np.float32)
            where = _stored_rows(np.arange(start, start + len(chunk)), head_dim)
            rows[where] = _encode(chunk, format)
        return cls(rows.reshape(-1), format, shape, head_dim)

    @property
    def nbytes(self) -> int:
        """The size of the stored bytes."""
        return self.raw.size

    @property
    def dtype_name(self) -> str:
        """The name safetensors and GGUF give to the format, as "BF16" or "Q4_1"."""
        return self.format.upper()

    def dequantize(self) -> Array:
        """The whole matrix, a new float32 array [out, in]."""
        return self.rows(np.arange(self.shape[0]))

    def rows(self, indices: Any) -> Array:
        """The rows at `indices` (integers of any shape), a new float32 array [*indices.shape, in].

        Raises:
            TypeError: `indices` are not integers.
            ValueError: an index outside [0, out).
        """
        indices = np.asarray(indices)
        if not np.issubdtype(indices.dtype, np.integer):
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        flat = indices.reshape(-1)
        outside = (flat < 0) | (flat >= self.shape[0])
        if outside.any():
            position = int(outside.argmax())
            raise ValueError(f"index {flat[position]} at position {position} is outside [0, {self.shape[0]})")
        stored = self.raw.reshape(self.shape[0], row_bytes(self.format, self.shape[1]))
        result = np.empty((flat.size, self.shape[1]), np.float32)
        step = max(1, _CHUNK // max(1, self.shape[1]))
        for start in range(0, flat.size, step):
            where = _stored_rows(flat[start : start + step], self.head_dim)
            with np.errstate(invalid="ignore"):  # a damaged file's infinite scale makes NaN, quietly as in the kernels
                result[start : start + step] = _decode(stored[where], self.format)
        return result.reshape(*indices.shape, self.shape[1])

    def __repr__(self) -> str:
        heads = f", head_dim={self.head_dim}" if self.head_dim else ""
        return f"Weight({self.format}, shape={self.shape}, {self.nbytes} bytes{heads})"


def row_bytes(format: str, in_features: int) -> int:
    """The bytes of one row of `in_features` values. Raises ValueError for a row of broken blocks."""
    layout = FORMATS.get(format)
    if layout is None:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if in_features % layout.elements:
        raise ValueError(f"{format} needs rows of a multiple of {layout.elements} values, got {in_features}")
    return in_features // layout.elements * layout.bytes


def _check_shape(format: str, shape: tuple[int, ...], head_dim: int) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"shape must be (out_features, in_features), got {shape}")
    out_features, in_features = int(shape[0]), int(shape[1])
    row_bytes(format, in_features)
    if head_dim < 0 or head_dim % 2 or (head_dim and out_features % head_dim):
        raise ValueError(f"head_dim must be 0 or an even divisor of the {out_features} rows, got {head_dim}")
    return out_features, in_features


def _stored_rows(rows: Array, head_dim: int) -> Array:
    """Where rows in Hugging Face order lie in the file."""
    if not head_dim:
        return rows
    head, row = np.divmod(rows, head_dim)
    half, pair = np.divmod(row, head_dim // 2)
    return head * head_dim + 2 * pair + half


def _decode(rows: Array, format: str) -> Array:
    """uint8 [n, row bytes] to float32 [n, in]."""
    count = len(rows)
    if format == "f32":
        return rows.view("<f4").astype(np.float32)
    if format == "f16":
        return rows.view("<f2").astype(np.float32)
    if format == "bf16":
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = rows.reshape(-1, FORMATS[format].bytes)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if format == "q8_0":
        return (blocks[:, 2:].view(np.int8) * scale).reshape(count, -1)
    # A byte holds value i of the block in its low half, and value i + 16 in its high half.
    packed = blocks[:, -16:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    if format == "q4_0":
        return ((codes - 8) * scale).reshape(count, -1)
    offset = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    return (codes * scale + offset).reshape(count, -1)


def _encode(rows: Array, format: str) -> Array:
    """float32 [n, in] to uint8 [n, row bytes]."""
    count = len(rows)
    if format == "f32":
        return rows.astype("<f4", copy=False).view(np.uint8)
    if format == "f16":
        with np.errstate(over="ignore"):
            return rows.astype("<f2").view(np.uint8)
    if format == "bf16":
        bits = rows.view(np.uint32)
        # Ties go to even; a NaN must not be rounded into an infinity, so it is made a quiet one instead.
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(rows), (bits >> 16) | 0x40, rounded).astype("<u2").view(np.uint8)
    blocks = rows.reshape(-1, 32)
    if not np.isfinite(blocks).all():
        raise ValueError(f"array cannot be stored as {format}: it holds NaN or infinite values")
    with np.errstate(over="ignore"):
        return np.concatenate(_encode_blocks(blocks, format), axis=1).reshape(count, -1)


def _encode_blocks(blocks: Array, format: str) -> list[Array]:
    """float32 [n, 32] to the uint8 parts of each block, in their order."""
    if format == "q8_0":
        scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        scaled = blocks * _inverse(scale)
        magnitude = np.abs(scaled)
        whole = np.floor(magnitude)
        rounded = np.copysign(whole + np.floor(2 * (magnitude - whole)), scaled)  # halves away from zero
        return [_f16(scale), rounded.astype(np.int8).view(np.uint8)]
    if format == "q4_0":
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
        scale = extreme / np.float32(-8)
        return [_f16(scale), _nibbles(blocks * _inverse(scale) + np.float32(8.5))]
    lowest = blocks.min(axis=1, keepdims=True)
    scale = (blocks.max(axis=1, keepdims=True) - lowest) / np.float32(15)
    return [_f16(scale), _f16(lowest), _nibbles((blocks - lowest) * _inverse(scale) + np.float32(0.5))]


def _inverse(scale: Array) -> Array:
    # A scale so small that its inverse overflows is stored as zero anyway.
    with np.errstate(divide="ignore"):
        inverse = 1 / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _f16(values: Array) -> Array:
    half = values.astype("<f2")
    if not np.isfinite(half).all():
        block = int(np.argmin(np.isfinite(half).ravel()))
        raise ValueError(f"array cannot be quantised: a scale of {values.ravel()[block]} does not fit in float16")
    return half.view(np.uint8)


def _nibbles(codes: Array) -> Array:
    whole = codes.astype(np.uint8).clip(0, 15)
    return whole[:, :16] | (whole[:, 16:] << 4)
