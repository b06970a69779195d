"""Layers of GPTQ's and AWQ's folders: `Packed` repacks them into affine groups, once and exactly.

Both have tensors `qweight`, `qzeros` and `scales`: w = scale * (code - zero), where scale and zero
belong to a group of a row's columns. GPTQ's `g_idx` has the group of each column.

GPTQ packs the codes of a row's columns into a stream of 32-bit words, lowest bits first, which is
that of the affine formats: qweight [cols * bits / 32, rows] only needs to be transposed. qzeros
[groups, rows * bits / 32] has a stream per group. In GPTQ's first format zeros are stored less 1:
of whole words of 2, 4 or 8 bits a word of ones is subtracted, and 3-bit zeros wrap around.

AWQ packs eight rows' codes into a word, in another order: qweight [cols, rows / 8], qzeros
[groups, rows / 8].

With `desc_act` the columns of a group lie apart. They are then stored sorted by their group, and
`Weight.columns` says where they belong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.tensor_file import StoredTensor, TensorFile
from pyloss.weights.groups import decode_stream, encode_stream, raw
from pyloss.weights.weight import Groups, Weight

Array = np.ndarray[Any, Any]

#: GPTQ's numbers of bits; AWQ has 4.
GPTQ_BITS = (2, 3, 4, 8)
# Groups are cut into runs of a power of two, as the core has them; mlx knows these sizes.
_RUNS = (128, 64, 32)
# The rows of the eight codes in AWQ's words, lowest bits first.
_AWQ_ROWS = np.array([0, 2, 4, 6, 1, 3, 5, 7])
# Values that are unpacked at a time, so that temporaries stay small.
_CHUNK = 1 << 22
# Options that would change the values, with what they are otherwise.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "rotation": (None, ""),
    "adapter": (None,),
    "is_marlin_format": (None, False),
    "pack_dtype": (None, "int32"),
    "planar": (None, False),
}


class Packed:
    """The settings of GPTQ's or AWQ's layers in the config.json at `path`.

    Without `values` the codes of matrices are memory that is not written, for descriptions.

    Raises:
        ValueError: an option that pyloss does not read.
        FormatError: damaged settings.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any], values: bool = True
    ) -> None:
        self._path = path
        self._values = values
        method = settings["quant_method"]
        self._awq = method == "awq"
        self.bits = settings.get("bits", settings.get("w_bit"))
        self._size = settings.get("group_size", settings.get("q_group_size", 128))
        # gptqmodel's rules for layers that differ; their tensors show how.
        self._differ = bool(settings.get("dynamic"))
        format = self._format(settings)
        self._less_one = format == "gptq"
        if type(self.bits) is not int or self.bits not in (GPTQ_BITS if not self._awq else (4,)):
            known = "4" if self._awq else ", ".join(map(str, GPTQ_BITS))
            raise ValueError(
                f"{path}: quantized by {method}: bits must be one of {known}, "
                f"got {shown(self.bits)}"
            )
        if type(self._size) is not int or (self._size != -1 and self._size < 1):
            raise FormatError(
                path, "group_size", f"expected -1 or a positive integer, got {shown(self._size)}"
            )
        if self._size != -1 and self._size % 32:
            raise ValueError(f"{path}: group_size must be -1 or a multiple of 32, got {self._size}")
        self._orders: dict[bytes, Array] = {}

    def _format(self, settings: Mapping[str, Any]) -> str:
        """The name of the layout of the tensors; ValueError for one that pyloss does not read."""
        method = settings["quant_method"]
        names = ("version", "format") if self._awq else ("checkpoint_format", "format")
        found = next((settings[name] for name in names if settings.get(name) is not None), None)
        known = ("gemm",) if self._awq else ("gptq", "gptq_v2")
        format = found.lower() if isinstance(found, str) else known[0] if found is None else found
        if settings.get("backend") == "llm-awq":
            format = "llm-awq"
        if format not in known:
            raise ValueError(
                f"{self._path}: quantized by {method} in the format {shown(format)}; "
                f"pyloss reads {' and '.join(known)}"
            )
        if self._awq and not settings.get("zero_point", True):
            raise ValueError(f"{self._path}: quantized by awq without zero points (zero_point)")
        for name, neutral in _REFUSED.items():
            if (value := settings.get(name)) not in neutral:
                raise ValueError(
                    f"{self._path}: {name} {shown(value)} of {method} is not supported"
                )
        return format

    def weight(self, file: TensorFile, layer: str, rows: int, cols: int) -> Weight:
        """The matrix of `layer`, whose tensor `qweight` is in `file`."""
        packed, zeros, scales = (
            file.tensor(f"{layer}.{name}") for name in ("qweight", "qzeros", "scales")
        )
        bits = self._bits(packed, cols)
        groups = self._group_of_columns(file, layer, scales, cols)
        count = int(groups.max()) + 1 if len(groups) else 0
        if scales.dtype not in ("F32", "F16", "BF16"):
            reason = f"stored as {scales.dtype}, expected F32, F16 or BF16"
            raise FormatError(scales.path, scales.name, reason)
        if len(scales.shape) != 2 or scales.shape[0] < count or scales.shape[1] != rows:
            reason = f"has shape {scales.shape}, expected ({count}, {rows})"
            raise FormatError(scales.path, scales.name, reason)
        count = scales.shape[0]
        if rows * bits % 32 or cols % 32:
            reason = f"{rows} rows of {cols} codes of {bits} bits do not fill words of 32 bits"
            raise FormatError(packed.path, packed.name, reason)
        shape = (cols, rows // 8) if self._awq else (cols * bits // 32, rows)
        words = _words(packed, *shape)
        zero = self._zeros(_words(zeros, count, rows * bits // 32), rows, bits)
        columns, size = self._order(groups, packed)
        runs = (groups if columns is None else groups[columns])[::size]
        parts = _in_groups(scales, zero, runs, size)
        return Weight(
            self._codes(words, rows, bits, columns),
            f"affine{bits}",
            (rows, cols),
            groups=parts,
            columns=columns,
        )

    def _bits(self, packed: StoredTensor, cols: int) -> int:
        if self._awq or not self._differ:
            return int(self.bits)
        found = next((n for n in GPTQ_BITS if packed.shape[:1] == (cols * n // 32,)), None)
        if found is None:
            reason = f"has shape {packed.shape}, which holds rows of {cols} in no number of bits"
            raise FormatError(packed.path, packed.name, reason)
        return found

    def _group_of_columns(
        self, file: TensorFile, layer: str, scales: StoredTensor, cols: int
    ) -> Array:
        size = cols if self._size == -1 else self._size
        held = scales.shape[0] if scales.shape else 0
        if self._differ and held and not cols % held:
            size = cols // held
        size = min(size, cols)
        count = -(-cols // size)
        usual = np.arange(cols) // size
        if self._awq or f"{layer}.g_idx" not in file:
            return self._checked(usual, scales, count)
        tensor = file.tensor(f"{layer}.g_idx")
        if tensor.dtype not in ("I32", "I64") or tensor.shape != (cols,):
            reason = f"{tensor.dtype} of shape {tensor.shape}, expected I32 of ({cols},)"
            raise FormatError(tensor.path, tensor.name, reason)
        found = tensor.values().astype(np.int64)
        if not found.any():  # as some programs write it where groups are in order
            return self._checked(usual, scales, count)
        if not 0 <= found.min() <= found.max() < held:
            reason = f"names groups from {found.min()} to {found.max()}, and there are {held}"
            raise FormatError(tensor.path, tensor.name, reason)
        return found

    @staticmethod
    def _checked(groups: Array, scales: StoredTensor, count: int) -> Array:
        """`groups` of the configured size, if `scales` has a row for each."""
        if scales.shape[:1] != (count,):
            expected = (count, *scales.shape[1:])
            reason = f"has shape {scales.shape}, expected {expected}, as group_size says"
            raise FormatError(scales.path, scales.name, reason)
        return groups

    def _order(self, groups: Array, packed: StoredTensor) -> tuple[Array | None, int]:
        """The columns sorted by group, None if they are in order, and the size of runs."""
        order = np.argsort(groups, kind="stable").astype(np.int32)
        ordered = groups[order]
        for size in _RUNS:
            runs = ordered[: len(ordered) // size * size].reshape(-1, size)
            if not len(ordered) % size and (runs == runs[:, :1]).all():
                break
        else:
            reason = "groups of columns that are not in runs of 32 are not supported"
            raise FormatError(packed.path, packed.name, reason)
        if np.array_equal(order, np.arange(len(order))):
            return None, size
        # Layers with the same input have the same order; then it is one array.
        return self._orders.setdefault(order.tobytes(), order), size

    def _zeros(self, words: Array, rows: int, bits: int) -> Array:
        """uint8 [groups, rows]"""
        if self._awq:
            return _awq_codes(words)
        if self._less_one and 32 % bits == 0:
            ones = encode_stream(np.ones(32 // bits, np.uint8), bits).view("<u4")
            words = words + ones
        zeros = decode_stream(np.ascontiguousarray(words).view(np.uint8), bits).reshape(-1, rows)
        return (zeros + 1) & np.uint8(7) if self._less_one and bits == 3 else zeros

    def _codes(self, words: Array, rows: int, bits: int, columns: Array | None) -> Array:
        """The streams of all rows, flat."""
        cols = len(words) if self._awq else len(words) * 32 // bits
        if not self._values:
            return np.empty(rows * cols * bits // 8, np.uint8)
        if not self._awq and columns is None:
            return np.ascontiguousarray(words.T).view(np.uint8).reshape(-1)
        result = np.empty((rows, cols * bits // 8), np.uint8)
        step = max(32, _CHUNK // max(cols, 1) // 32 * 32)
        for begin in range(0, rows, step):
            part = slice(begin, min(begin + step, rows))
            if self._awq:
                codes = _awq_codes(words[:, part.start // 8 : part.stop // 8])
            else:
                codes = _gptq_codes(words[:, part], bits)
            result[part] = _rows_of(codes if columns is None else codes[columns], bits)
        return result.reshape(-1)


def _words(tensor: StoredTensor, *shape: int) -> Array:
    if tensor.dtype not in ("I32", "U32") or tensor.shape != shape:
        reason = f"{tensor.dtype} of shape {tensor.shape}, expected I32 of {shape}"
        raise FormatError(tensor.path, tensor.name, reason)
    return tensor.values().view("<u4")


def _gptq_codes(words: Array, bits: int) -> Array:
    """Words [cols * bits / 32, rows] to uint8 [cols, rows]."""
    rows = words.shape[1]
    if 8 % bits:
        stream = np.ascontiguousarray(words.T).view(np.uint8)
        return decode_stream(stream, bits).reshape(rows, -1).T
    bytes_ = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), rows, 4)
    codes = np.empty((len(words), 4, 8 // bits, rows), np.uint8)
    for i in range(8 // bits):
        codes[:, :, i] = (bytes_ >> i * bits & np.uint8((1 << bits) - 1)).transpose(0, 2, 1)
    return codes.reshape(-1, rows)


def _rows_of(codes: Array, bits: int) -> Array:
    """uint8 codes [cols, rows] to the stream of each row, uint8 [rows, cols * bits / 8]."""
    if 8 % bits:
        return encode_stream(np.ascontiguousarray(codes.T), bits).reshape(codes.shape[1], -1)
    each = 8 // bits
    packed = codes[::each].copy()
    for i in range(1, each):
        packed |= codes[i::each] << i * bits
    return packed.T


def _awq_codes(words: Array) -> Array:
    """Words [n, rows / 8] to uint8 [n, rows]."""
    pairs = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 4)
    codes = np.empty((len(pairs), 8), np.uint8)
    codes[:, _AWQ_ROWS[::2]] = pairs & 15
    codes[:, _AWQ_ROWS[1::2]] = pairs >> 4
    return codes.reshape(len(words), -1)


def _in_groups(scales: StoredTensor, zeros: Array, runs: Array, size: int) -> Groups:
    """Scales and offsets of each row's runs; in the file's type if it holds the offsets exactly."""
    scale = scales.array()
    offset = zeros.astype(np.float32) * -scale
    format = scales.dtype.lower()
    if not np.array_equal(_rounded(offset, format), offset):
        format = "f32"
    parts = (raw(np.ascontiguousarray(part[runs].T), format) for part in (scale, offset))
    return Groups(size, next(parts), format, next(parts))


def _rounded(values: Array, format: str) -> Array:
    return Weight.quantize(values, format).dequantize()
