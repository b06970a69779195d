"""The weight formats, and GGUF's decoded and encoded in NumPy.

Encoders give the bits of ggml's reference, but for the formats whose scales are searched for: the
core's search (csrc/encoders) comes nearer to the values. Formats with scales in separate arrays are
in `groups.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pyloss import _core

Array = np.ndarray[Any, Any]


class Format(NamedTuple):
    """The layout of a format along a row: `elements` values share a block of `bytes` bytes.

    Attributes:
        code: the core's number.
        elements: values of a block.
        bytes: bytes of a block.
        encodes: whether pyloss can write the format.
        bits: of a code, if the scales are stored apart; else 0.
    """

    code: int
    elements: int
    bytes: int
    encodes: bool = True
    bits: int = 0


_READ_ONLY = ("mxfp4",)

#: Formats that the core encodes, and the largest multiple of a float16 factor that they hold, of
#: offsets where they have some.
SEARCHED = {
    "q2_k": 15, "q3_k": 31 * 3, "q4_k": 63, "q5_k": 63, "q6_k": 127 * 31,
    "iq4_nl": 113, "iq4_xs": 31 * 113,
}  # fmt: skip

# The values of codes of 4 bits: ggml's for IQ4, and twice those of E2M1.
_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)

#: Formats of stored weights by their keys; the core's table, csrc/formats.def.
FORMATS: dict[str, Format] = {
    name.lower(): Format(code, elements, bytes, encodes=name.lower() not in _READ_ONLY, bits=bits)
    for code, (name, elements, bytes, bits) in enumerate(_core.formats())
}
#: Formats of floats, and formats that one tensor of a file holds.
FLOATS = ("f32", "bf16", "f16")
SINGLE = tuple(name for name, layout in FORMATS.items() if not layout.bits)


def row_bytes(format: str, in_features: int) -> int:
    """The bytes of a row of `in_features` values. ValueError unless these are whole blocks."""
    layout = FORMATS.get(format)
    if layout is None:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if in_features % layout.elements:
        raise ValueError(
            f"{format} needs rows of a multiple of {layout.elements} values, got {in_features}"
        )
    return in_features // layout.elements * layout.bytes


def decode(rows: Array, format: str) -> Array:
    """uint8 [n, row bytes] to float32 [n, in]."""
    count = len(rows)
    if format == "f32":
        return rows.view("<f4").astype(np.float32)
    if format == "f16":
        return rows.view("<f2").astype(np.float32)
    if format == "bf16":
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = rows.reshape(-1, FORMATS[format].bytes)
    if format in ("iq4_nl", "iq4_xs", "mxfp4"):
        values = _decode_codebook(blocks, format)
    else:
        values = _decode_k(blocks, format) if format.endswith("_k") else _decode_32(blocks, format)
    return values.reshape(count, -1)


def _half(blocks: Array, begin: int) -> Array:
    """The float16 at byte `begin` of each block, [n, 1]."""
    return blocks[:, begin : begin + 2].copy().view("<f2").astype(np.float32)


def _decode_32(blocks: Array, format: str) -> Array:
    scale = _half(blocks, 0)
    if format == "q8_0":
        return blocks[:, 2:].view(np.int8) * scale
    # A byte holds value i of the block in its low half, and value i + 16 in its high half.
    packed = blocks[:, -16:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=1)
    if format.startswith("q5"):
        codes |= np.unpackbits(blocks[:, -20:-16], axis=1, bitorder="little") << 4
    if format.endswith("_0"):
        return (codes.astype(np.float32) - (16 if format == "q5_0" else 8)) * scale
    return codes.astype(np.float32) * scale + _half(blocks, 2)


def _shifted(packed: Array, shifts: list[int], mask: int) -> Any:
    """[n, groups, 32] to [n, groups, len(shifts), 32]: the same bytes shifted by each."""
    return packed[:, :, None] >> np.array(shifts, np.uint8)[:, None] & np.uint8(mask)


def _decode_k(blocks: Array, format: str) -> Array:
    """Blocks of 256: 8 runs of 32, or 16 of 16, each with a scale (and an offset) of a few bits."""
    n = len(blocks)
    if format in ("q4_k", "q5_k"):
        first, second, mixed = (blocks[:, i : i + 4] for i in (4, 8, 12))
        scale = np.concatenate([first & 63, mixed & 15 | first >> 2 & 48], axis=1)
        offset = np.concatenate([second & 63, mixed >> 4 | second >> 2 & 48], axis=1)
        codes = _shifted(blocks[:, -128:].reshape(n, 4, 32), [0, 4], 15).reshape(n, 8, 32)
        if format == "q5_k":
            codes = (
                codes | _shifted(blocks[:, None, 16:48], list(range(8)), 1).reshape(n, 8, 32) << 4
            )
        d, m = (
            _half(blocks, 0) * scale.astype(np.float32),
            _half(blocks, 2) * offset.astype(np.float32),
        )
        return codes.astype(np.float32) * d[:, :, None] - m[:, :, None]
    if format == "q2_k":
        codes = _shifted(blocks[:, 16:80].reshape(n, 2, 32), [0, 2, 4, 6], 3).reshape(n, 16, 16)
        d = _half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
        m = _half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
        return codes.astype(np.float32) * d[:, :, None] - m[:, :, None]
    if format == "q3_k":
        codes = (
            _shifted(blocks[:, 32:96].reshape(n, 2, 32), [0, 2, 4, 6], 3)
            .reshape(n, 16, 16)
            .astype(np.int8)
        )
        codes += (
            4 * _shifted(blocks[:, None, :32], list(range(8)), 1).reshape(n, 16, 16).astype(np.int8)
            - 4
        )
        low = _shifted(blocks[:, None, 96:104], [0, 4], 15).reshape(n, 16)
        high = _shifted(blocks[:, None, 104:108], [0, 2, 4, 6], 3).reshape(n, 16)
        scale, d = (low | high << 4).astype(np.int8) - 32, _half(blocks, 108)
    else:
        low = _shifted(blocks[:, :128].reshape(n, 2, 64), [0, 4], 15).reshape(n, 16, 16)
        high = _shifted(blocks[:, 128:192].reshape(n, 2, 32), [0, 2, 4, 6], 3).reshape(n, 16, 16)
        codes = (low | high << 4).astype(np.int8) - 32
        scale, d = blocks[:, 192:208].view(np.int8), _half(blocks, 208)
    return codes.astype(np.float32) * (d * scale.astype(np.float32))[:, :, None]


def _decode_codebook(blocks: Array, format: str) -> Array:
    """Runs of 32 values: a scale times the values that codes of 4 bits stand for."""
    n, table = len(blocks), _IQ4
    if format == "mxfp4":  # the scale is 2^(byte - 128), and _E2M1 has twice the values
        scale, table = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128), _E2M1
        packed = blocks[:, 1:].reshape(n, 1, 16)
    elif format == "iq4_nl":
        scale, packed = _half(blocks, 0), blocks[:, 2:].reshape(n, 1, 16)
    else:
        high = blocks[:, 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
        low = (blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15).reshape(n, 8)
        scale = _half(blocks, 0) * ((low | high << 4).astype(np.float32) - 32)
        packed = blocks[:, 8:].reshape(n, 8, 16)
    codes = np.concatenate([packed & 15, packed >> 4], axis=2)
    with np.errstate(over="ignore"):
        return np.asarray(table[codes] * scale[:, :, None], np.float32)


def encode(rows: Array, format: str, importance: Array | None = None) -> Array:
    """float32 [n, in] to uint8 [n, row bytes].

    `importance` [in] weighs squared errors of the columns, in the formats of `SEARCHED`.
    """
    count = len(rows)
    if format in SEARCHED:
        return _search(rows, format, importance)
    if format == "f32":
        return rows.astype("<f4", copy=False).view(np.uint8)
    if format == "f16":
        with np.errstate(over="ignore"):
            return rows.astype("<f2").view(np.uint8)
    if format == "bf16":
        bits = rows.view(np.uint32)
        # Ties go to even; a NaN must not be rounded into an infinity, so it is made a quiet one
        # instead.
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(rows), (bits >> 16) | 0x40, rounded).astype("<u2").view(np.uint8)
    blocks = rows.reshape(-1, 32)
    check_finite(blocks, format)
    with np.errstate(over="ignore"):
        return np.concatenate(_encode_blocks(blocks, format), axis=1).reshape(count, -1)


def _search(rows: Array, format: str, importance: Array | None = None, like: Any = None) -> Array:
    """The core's encoder; `like` has the scales."""
    check_finite(rows, format)
    most = 0.9 * float(np.finfo(np.float16).max) * SEARCHED[format]
    if rows.size and (largest := float(np.abs(rows).max())) > most:
        raise ValueError(
            f"array cannot be stored as {format}: values are up to {largest:g}, and scales in "
            f"float16 reach {most:.3g}"
        )
    found: Array = _core.encode(FORMATS[format].code, rows, importance, like)
    return found


def check_finite(values: Array, format: str) -> None:
    """Raises ValueError for values that no scale covers."""
    if not np.isfinite(values).all():
        raise ValueError(f"array cannot be stored as {format}: it holds NaN or infinite values")


def _encode_blocks(blocks: Array, format: str) -> list[Array]:
    """float32 [n, 32] to the uint8 parts of each block, in their order."""
    offset = None
    if format == "q8_0":
        scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    elif format.endswith("_0"):
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
        scale = extreme / -np.float32((_highest(format) + 1) // 2)
    else:
        offset = blocks.min(axis=1, keepdims=True)
        scale = (blocks.max(axis=1, keepdims=True) - offset) / np.float32(_highest(format))
    stored = [_f16(scale)] if offset is None else [_f16(scale), _f16(offset)]
    return [*stored, *_codes(blocks, format, scale, offset)]


def encode_blocks_with_scales(rows: Array, format: str, blocks: Array) -> Array:
    """`encode` with the scales and offsets of existing `blocks`, uint8 [blocks, block bytes]."""
    if format in SEARCHED:
        return _search(rows, format, like=np.ascontiguousarray(blocks))
    offset = None if format.endswith("_0") else _half(blocks, 2)
    head = 2 if offset is None else 4
    codes = _codes(rows.reshape(-1, 32), format, _half(blocks, 0), offset)
    return np.concatenate([blocks[:, :head], *codes], axis=1).reshape(len(rows), -1)


def _highest(format: str) -> int:
    return 31 if format.startswith("q5") else 15


def _codes(blocks: Array, format: str, scale: Array, offset: Array | None) -> list[Array]:
    """The codes of blocks [n, 32] for scales (and offsets) [n, 1], rounded as ggml does."""
    if format == "q8_0":
        scaled = (blocks * _inverse(scale)).clip(-127, 127)
        magnitude = np.abs(scaled)
        whole = np.floor(magnitude)
        # halves away from zero
        rounded = np.copysign(whole + np.floor(2 * (magnitude - whole)), scaled)
        return [rounded.astype(np.int8).view(np.uint8)]
    highest = _highest(format)
    if offset is None:
        codes = blocks * _inverse(scale) + (np.float32((highest + 1) // 2) + np.float32(0.5))
    else:
        codes = (blocks - offset) * _inverse(scale) + np.float32(0.5)
    return _packed(codes.clip(0, highest), highest)


def _inverse(scale: Array) -> Array:
    # A scale so small that its inverse overflows is stored as zero anyway.
    with np.errstate(divide="ignore"):
        inverse = 1 / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _f16(values: Array) -> Array:
    half = values.astype("<f2")
    if not np.isfinite(half).all():
        block = int(np.argmin(np.isfinite(half).ravel()))
        raise ValueError(
            f"array cannot be quantized: a scale of {values.ravel()[block]} does not fit in float16"
        )
    return half.view(np.uint8)


def _packed(codes: Array, highest: int) -> list[Array]:
    """The fifth bits, if there are any, and the nibbles."""
    whole = codes.astype(np.uint8).clip(0, highest)
    nibbles = whole[:, :16] & 15 | whole[:, 16:] << 4
    return (
        [np.packbits(whole >> 4, axis=1, bitorder="little"), nibbles] if highest > 15 else [nibbles]
    )
