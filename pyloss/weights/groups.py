"""Formats whose scales are stored in arrays apart from the codes: mlx's affine formats and NF4.

Affine (mlx.core.quantize): a row is a stream of codes of 2 to 8 bits, lowest bits first. Each group
of a row has a scale and an offset: w = code * scale + offset.

NF4, as bitsandbytes stores it (Dettmers et al., QLoRA, arXiv:2305.14314): codes of four bits, the
first of two in the high half of a byte, index a table of 16 quantiles. Each block of the flat
matrix has a scale, its largest magnitude. With double quantization the scales are 8-bit codes of a
map, with their own block scales and an offset.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pyloss.weights.formats import FORMATS, check_finite, decode, encode

Array = np.ndarray[Any, Any]

#: QLoRA's 16 quantiles of the standard normal distribution
NF4_TABLE = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip

_MOST = 1 << 40  # elements of a group, as in the binding
_SCALE_BYTES = {"f32": 4, "bf16": 2, "f16": 2}


class Groups(NamedTuple):
    """The scales of a matrix's codes, as flat uint8 arrays over the bytes of a file.

    Attributes:
        size: elements of a group, a power of two and at least 32.
        scales: in `scale_format`; with a map, 8-bit codes.
        scale_format: "f32", "bf16" or "f16".
        offsets: affine formats only, in `scale_format`.
        table: NF4 only, float32 [16].
        map: double quantization only, float32 [256].
        nested: with a map, float32: the scales of the codes in `scales`.
        nested_size: codes of a nested group.
        nested_offset: added to every scale.
        first: index of the matrix's first element in the arrays, which rows of a larger matrix
            share.
    """

    size: int
    scales: Array
    scale_format: str = "f32"
    offsets: Array | None = None
    table: Array | None = None
    map: Array | None = None
    nested: Array | None = None
    nested_size: int = 0
    nested_offset: float = 0.0
    first: int = 0

    @property
    def double(self) -> bool:
        """Whether the scales are themselves quantized."""
        return self.map is not None

    def handle(self) -> tuple[Any, ...]:
        """The tuple that the C binding takes."""
        code = FORMATS[self.scale_format].code
        parts = (
            self.size,
            self.first,
            self.scales,
            self.offsets,
            code,
            self.table,
            self.map,
            self.nested,
        )
        return (*parts, self.nested_size, self.nested_offset)

    def check(self, format: str, count: int) -> None:
        """Raises ValueError if the arrays do not fit `count` elements of `format`."""
        if (
            not 32 <= self.size <= _MOST
            or self.size & (self.size - 1)
            or self.first < 0
            or self.first % 32
        ):
            raise ValueError(
                "groups must have a power of two of at least 32 elements, "
                f"got {self.size} from {self.first}"
            )
        if self.scale_format not in _SCALE_BYTES:
            raise ValueError(
                f"scales must be stored as one of {', '.join(_SCALE_BYTES)}, "
                f"got {self.scale_format!r}"
            )
        groups = -(-(self.first + count) // self.size)
        needed = {"scales": groups * (1 if self.double else _SCALE_BYTES[self.scale_format])}
        if format == "nf4":
            needed["table"] = 64
            if self.double:
                if not 1 <= self.nested_size <= _MOST or self.nested_size & (self.nested_size - 1):
                    raise ValueError(
                        f"nested groups must have a power of two of scales, got {self.nested_size}"
                    )
                needed |= {"map": 1024, "nested": -(-groups // self.nested_size) * 4}
        else:
            needed["offsets"] = needed["scales"]
        for name in ("scales", "offsets", "table", "map", "nested"):
            array = getattr(self, name)
            if (name in needed and array is None) or (name not in needed and array is not None):
                raise ValueError(
                    f"{format} must come {'with' if name in needed else 'without'} {name}"
                )
            if array is None:
                continue
            if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous:
                raise ValueError(
                    f"{name} must be flat contiguous uint8, "
                    f"got {array.dtype} of shape {array.shape}"
                )
            if array.size < needed[name]:  # rows of a larger matrix have more
                raise ValueError(f"{name} must hold {needed[name]} bytes, got {array.size}")

    def nbytes(self, count: int) -> int:
        """The bytes of the scales of `count` elements."""
        groups = -(-count // self.size)
        if self.double:
            return groups + -(-groups // self.nested_size) * 4
        return groups * _SCALE_BYTES[self.scale_format] * (1 if self.offsets is None else 2)

    def scale_at(self, index: Array) -> Array:
        """The scales of groups, float32."""
        if self.map is None or self.nested is None:
            return _floats(self.scales, self.scale_format)[index]
        outer = _floats(self.nested, "f32")[index // self.nested_size]
        return _floats(self.map, "f32")[self.scales[index]] * outer + np.float32(self.nested_offset)


def _floats(raw: Array, format: str) -> Array:
    return decode(raw[None], format)[0]


def raw(values: Array, format: str = "f32") -> Array:
    """float32 values as the flat bytes of a format."""
    return encode(np.ascontiguousarray(values, np.float32).reshape(1, -1), format)[0]


def decode_rows(codes: Array, format: str, groups: Groups, rows: Array) -> Array:
    """uint8 codes [n, row bytes], the stored rows `rows` [n] of a matrix, to float32 [n, in]."""
    layout = FORMATS[format]
    cols = codes.shape[1] // layout.bytes * layout.elements
    index = (groups.first + rows[:, None] * cols + np.arange(0, cols, 32)) // groups.size
    scale = groups.scale_at(index)[:, :, None]
    values = (
        np.stack([codes >> 4, codes & 15], axis=-1)
        if format == "nf4"
        else decode_stream(codes, layout.bits)
    ).reshape(len(codes), -1, 32)
    if groups.table is not None:
        result = _floats(groups.table, "f32")[values] * scale
    else:
        assert groups.offsets is not None  # `check` saw to it
        result = (
            values.astype(np.float32) * scale
            + _floats(groups.offsets, groups.scale_format)[index][:, :, None]
        )
    return result.reshape(len(codes), cols)


def decode_stream(stream: Array, bits: int) -> Array:
    """A stream of codes, lowest bits first, in uint8 bytes: the codes, uint8 and flat."""
    codes = stream.reshape(-1)
    if bits == 8:
        return codes
    if bits in (2, 4):
        mask = np.uint8((1 << bits) - 1)
        return np.stack([codes >> shift & mask for shift in range(0, 8, bits)], -1).reshape(-1)
    # Eight codes are `bits` bytes, here the low ones of a word.
    words = np.zeros((len(codes) // bits, 8), np.uint8)
    words[:, :bits] = codes.reshape(-1, bits)
    shifts, mask = np.arange(0, 8 * bits, bits, dtype=np.uint64), np.uint64((1 << bits) - 1)
    return (words.view("<u8") >> shifts & mask).astype(np.uint8).reshape(-1)


def encode_affine(matrix: Array, bits: int, size: int, scale_format: str) -> tuple[Array, Groups]:
    """Encodes float32 [out, in], in a multiple of `size`: flat codes and their groups.

    Rounds as mlx.core.quantize does.
    """
    check_finite(matrix, f"affine{bits}")
    groups = matrix.reshape(-1, size)
    codes = np.empty(matrix.size // 8 * bits, np.uint8)
    scales, offsets = np.empty(len(groups), np.float32), np.empty(len(groups), np.float32)
    for part in _parts(groups):
        stream = codes[part.start * size // 8 * bits : part.stop * size // 8 * bits]
        stream[...], scales[part], offsets[part] = _affine(groups[part], bits)
    scale, offset = raw(scales, scale_format), raw(offsets, scale_format)
    if not (
        np.isfinite(_floats(scale, scale_format)).all()
        and np.isfinite(_floats(offset, scale_format)).all()
    ):
        raise ValueError(
            f"array cannot be quantized: a group's scale or offset does not fit in {scale_format}"
        )
    return codes, Groups(size, scale, scale_format, offset)


def _parts(blocks: Array) -> list[slice]:
    """The rows of `blocks` a million values at a time, so that temporaries stay small."""
    step = max(1, (1 << 20) // blocks.shape[1])
    return [slice(begin, min(begin + step, len(blocks))) for begin in range(0, len(blocks), step)]


def _affine(groups: Array, bits: int) -> tuple[Array, Array, Array]:
    """Groups [n, size] to a stream of codes, scales [n] and offsets [n]."""
    highest = np.float32((1 << bits) - 1)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.maximum((high - low) / highest, np.float32(1e-7))
        # The end of the range with the larger magnitude is exact, and so is 0.
        below = np.abs(low) > np.abs(high)
        scale = np.where(below, scale, -scale)
        edge = np.where(below, low, high)
        steps = np.rint(edge / scale)
        exact = steps != 0
        scale = np.where(exact, edge / np.where(exact, steps, 1), scale)
        offset = np.where(exact, edge, np.float32(0))
        codes = np.rint((groups - offset) / scale).clip(0, highest).astype(np.uint8)
    return encode_stream(codes, bits), scale[:, 0], offset[:, 0]


def encode_stream(codes: Array, bits: int) -> Array:
    """uint8 codes below 2^bits to a stream of bytes."""
    if bits == 8:
        return codes.reshape(-1)
    if bits in (2, 4):
        each = codes.reshape(-1, 8 // bits)
        stream = each[:, 0].copy()
        for i in range(1, 8 // bits):
            stream |= each[:, i] << bits * i
        return stream
    words = np.zeros(codes.size // 8, "<u8")
    for i, code in enumerate(codes.reshape(-1, 8).T):
        words |= code.astype(np.uint64) << np.uint64(i * bits)
    return words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)


def encode_nf4(
    matrix: Array, size: int, double: bool, nested_size: int = 256
) -> tuple[Array, Groups]:
    """Encodes float32 [out, in], in a multiple of 32: flat codes and their groups.

    Rounds as bitsandbytes' quantize_4bit does.
    """
    check_finite(matrix, "nf4")
    flat = matrix.reshape(-1)
    codes, scale = _in_blocks(flat, size, NF4_TABLE)
    packed, table = codes[::2] << 4 | codes[1::2], raw(NF4_TABLE)
    if not double:
        return packed, Groups(size, raw(scale), table=table)
    offset = np.float32(scale.mean(dtype=np.float64)) if scale.size else np.float32(0)
    map = dynamic_map()
    inner, outer = _in_blocks(scale - offset, nested_size, map)
    return packed, Groups(
        size,
        inner,
        table=table,
        map=raw(map),
        nested=raw(outer),
        nested_size=nested_size,
        nested_offset=float(offset),
    )


def _in_blocks(flat: Array, size: int, table: Array) -> tuple[Array, Array]:
    """Codes uint8 [n] of values relative to the largest magnitude of their block, and these scales.

    A code is the nearest entry of a sorted table.
    """
    blocks = np.pad(flat, (0, -flat.size % size)).reshape(-1, size)
    scale = np.abs(blocks).max(axis=1)
    codes = np.empty(blocks.shape, np.uint8)
    # Of two equally near entries the lower is taken.
    bounds = (table[:-1] + table[1:]) / np.float32(2)
    for part in _parts(blocks):
        inverse = np.float32(1) / np.maximum(scale[part], np.float32(1e-38))
        codes[part] = np.searchsorted(bounds, (blocks[part] * inverse[:, None]).clip(-1, 1))
    return codes.reshape(-1)[: flat.size], scale


def encode_with_groups(matrix: Array, format: str, groups: Groups) -> Array:
    """Flat codes of float32 [out, in] under existing groups for this shape."""
    check_finite(matrix, format)
    runs = matrix.reshape(-1, 32)
    index = (groups.first + 32 * np.arange(len(runs))) // groups.size
    codes = np.empty(runs.shape, np.uint8)
    for part in _parts(runs):
        scale = groups.scale_at(index[part])[:, None]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if groups.offsets is None:
                values = np.nan_to_num(runs[part] / scale).clip(-1, 1)
                codes[part] = np.searchsorted(
                    (NF4_TABLE[:-1] + NF4_TABLE[1:]) / np.float32(2), values
                )
            else:
                offset = _floats(groups.offsets, groups.scale_format)[index[part]][:, None]
                steps = np.nan_to_num(np.rint((runs[part] - offset) / scale))
                codes[part] = steps.clip(0, (1 << FORMATS[format].bits) - 1)
    flat = codes.reshape(-1)
    return (
        flat[::2] << 4 | flat[1::2]
        if groups.offsets is None
        else encode_stream(flat, FORMATS[format].bits)
    )


def dynamic_map() -> Array:
    """The 256 values of bitsandbytes' signed dynamic 8-bit type, sorted, float32.

    See Dettmers et al., arXiv:2110.02861.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        # Has the bits of torch.linspace(0.1, 1, ...): float32 steps from either end.
        count = 2**exponent
        start, step = np.float32(0.1), (np.float32(1) - np.float32(0.1)) / np.float32(count)
        i = np.arange(count + 1)
        steps = np.where(
            i < (count + 1) // 2, start + np.float64(step) * i, 1 - np.float64(step) * (count - i)
        )
        bounds = steps.astype(np.float32)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        found += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(found, np.float32))
