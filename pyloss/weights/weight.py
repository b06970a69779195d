"""`Weight`: a stored matrix, float or group-quantized, usually over a file's mapped bytes.

The C kernels read these bytes. The NumPy code in `formats.py` and `groups.py` defines their meaning
and writes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss.weights.formats import (
    FLOATS,
    FORMATS,
    SINGLE,
    decode,
    encode,
    encode_blocks_with_scales,
    row_bytes,
)
from pyloss.weights.groups import Groups, decode_rows, encode_affine, encode_nf4, encode_with_groups

__all__ = ["FORMATS", "SINGLE", "Groups", "Weight", "row_bytes"]

Array = np.ndarray[Any, Any]

# Rows are converted this many values at a time, so that temporaries stay small.
_CHUNK = 1 << 20


class Weight:
    """A stored matrix over the bytes of `raw`. It is never trained and never written to.

    Args:
        raw: flat contiguous uint8 array, kept as it is; read-only is fine, and unaligned bytes are
            copied.
        format: a key of `FORMATS`.
        shape: (out_features, in_features); in_features is a multiple of the format's block
            elements.
        head_dim: when D > 0, the file interleaves the rotary pairs of each head of D rows: row j of
            the head's first half lies at 2j, row j of its second half at 2j + 1. This class still
            gives and takes rows in Hugging Face order.
        columns: int32 [in_features], the column at each place of the stored rows, or None if they
            are in order. This class gives and takes columns in order, and the kernels' handle
            knows nothing of them: `ops.project_all` reorders what the kernels multiply.

    Attributes:
        orders: `columns` and their inverse on the kernels' device, or None.

    Raises:
        TypeError: `raw` is not a uint8 array.
        ValueError: an unknown format, or sizes that don't fit together.
    """

    __slots__ = ("columns", "format", "groups", "handle", "head_dim", "orders", "raw", "shape")

    def __init__(
        self,
        raw: Array,
        format: str,
        shape: tuple[int, int],
        head_dim: int = 0,
        groups: Groups | None = None,
        columns: Array | None = None,
    ) -> None:
        if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8:
            raise TypeError(
                "raw must be a uint8 numpy.ndarray, "
                f"got {getattr(raw, 'dtype', type(raw).__name__)}"
            )
        if raw.ndim != 1 or not raw.flags.c_contiguous:
            raise ValueError(
                f"raw must be flat and contiguous, got shape {raw.shape} with strides {raw.strides}"
            )
        out_features, in_features = _check_shape(format, shape, head_dim)
        expected = out_features * row_bytes(format, in_features)
        if raw.size != expected:
            raise ValueError(
                f"raw must hold {expected} bytes for {format} of shape {shape}, got {raw.size}"
            )
        if (groups is not None) != bool(FORMATS[format].bits):
            raise ValueError(f"{format} must come {'without' if groups else 'with'} groups")
        if groups is not None:
            groups.check(format, out_features * in_features)
        # The kernels load whole elements, so the rare file with odd offsets costs a copy.
        if raw.ctypes.data % {"f32": 4, "bf16": 2, "f16": 2}.get(format, 1):
            raw = raw.copy()
        self.raw = raw
        self.format = format
        self.shape = (out_features, in_features)
        self.head_dim = int(head_dim)
        self.groups = groups
        self.columns = columns
        self.orders: tuple[Any, Any] | None = None
        if columns is not None:
            if not np.array_equal(np.sort(columns), np.arange(in_features)):
                raise ValueError(f"columns must be all numbers below {in_features}, each once")
            self.orders = columns, _inverse(columns)
        # The C binding takes this in place of an array.
        self.handle: tuple[Any, ...] = self.handle_of_host()

    def handle_of_host(self) -> tuple[Any, ...]:
        """The handle over the bytes in host memory."""
        parts = (self.raw, FORMATS[self.format].code, *self.shape, self.head_dim)
        return parts if self.groups is None else (*parts, self.groups.handle())

    def moved(self, put: Callable[[Array], Any]) -> Weight:
        """This matrix for kernels on a device: `put` moves the arrays of the kernels' handle.

        Its own arrays stay on the host for everything else.
        """
        again = copy.copy(self)
        parts = self.handle_of_host()
        again.handle = tuple(_put(part, put) for part in parts)
        if self.columns is not None:
            again.orders = put(self.columns), put(_inverse(self.columns))
        return again

    @classmethod
    def quantize(
        cls,
        array: Array,
        format: str,
        head_dim: int = 0,
        *,
        group_size: int = 64,
        scale_format: str = "f32",
        double: bool = True,
        importance: Array | None = None,
    ) -> Weight:
        """Store `array` (floating, [out, in], Hugging Face row order) in `format`.

        Rounds as the format's reference does: ggml, mlx.core.quantize, bitsandbytes. Scales of
        K-quants and IQ4 are searched for, with `importance` (float32 [in], such as the mean squares
        of the layer's inputs) as the weights of squared errors.

        `group_size` is that of the affine formats and of nf4, `scale_format` ("f32", "bf16" or
        "f16") how the affine ones keep scales and offsets, `double` whether nf4 quantizes its
        scales too.

        Raises:
            ValueError: a shape the format cannot hold, a format that is only read here, or, for the
                quantized formats, a block whose values or scale are not finite.
        """
        array = np.asarray(array)
        if array.ndim != 2:
            raise ValueError(f"array must have 2 dimensions, got shape {array.shape}")
        shape = _check_shape(format, array.shape, head_dim)
        layout = FORMATS[format]
        if not layout.encodes:
            known = ", ".join(name for name, other in FORMATS.items() if other.encodes)
            raise ValueError(f"{format} can be read but not written; what can be written: {known}")
        if layout.bits:
            return cls._quantize_grouped(array, format, head_dim, group_size, scale_format, double)
        rows = np.empty((shape[0], row_bytes(format, shape[1])), np.uint8)
        step = max(1, _CHUNK // max(1, shape[1]))
        for start in range(0, shape[0], step):
            chunk = np.ascontiguousarray(array[start : start + step], dtype=np.float32)
            where = stored_rows(np.arange(start, start + len(chunk)), head_dim)
            rows[where] = encode(chunk, format, importance)
        return cls(rows.reshape(-1), format, shape, head_dim)

    @classmethod
    def _quantize_grouped(
        cls, array: Array, format: str, head_dim: int, size: int, scale_format: str, double: bool
    ) -> Weight:
        if size < 32 or size & (size - 1):
            raise ValueError(f"group_size must be a power of two of at least 32, got {size}")
        if format != "nf4" and array.shape[1] % size:
            raise ValueError(
                f"{format} needs rows of a multiple of the group size {size}, got {array.shape[1]}"
            )
        matrix = _in_stored_order(array, head_dim)
        if format == "nf4":
            codes, groups = encode_nf4(matrix, size, double)
        else:
            codes, groups = encode_affine(matrix, FORMATS[format].bits, size, scale_format)
        return cls(codes, format, matrix.shape, head_dim, groups)

    def quantize_alike(self, array: Array) -> Weight:
        """`array` [any, in] in the format of this matrix. ValueError as for `quantize`."""
        g = self.groups
        if g is None:
            return Weight.quantize(array, self.format, self.head_dim)
        options: dict[str, Any] = {
            "group_size": g.size,
            "scale_format": g.scale_format,
            "double": g.double,
        }
        if self.columns is None:
            return Weight.quantize(array, self.format, self.head_dim, **options)
        ordered = np.asarray(array)[:, self.columns]
        stored = Weight.quantize(ordered, self.format, self.head_dim, **options)
        return Weight(
            stored.raw, self.format, stored.shape, self.head_dim, stored.groups, self.columns
        )

    def requantize(self, array: Array) -> Weight:
        """`array` [out, in], a change of this matrix, in its format.

        It keeps the scales of this matrix if they give a smaller error than new ones: then values
        that change by less than a step stay as they were. ValueError as for `quantize`.
        """
        g, fresh = self.groups, self.quantize_alike(array)
        if self.is_float:
            return fresh
        ordered = array if self.columns is None else array[:, self.columns]
        matrix = _in_stored_order(ordered, self.head_dim)
        if g is not None:
            codes = encode_with_groups(matrix, self.format, g)
        else:
            blocks = self.raw.reshape(-1, FORMATS[self.format].bytes)
            codes = encode_blocks_with_scales(matrix, self.format, blocks).reshape(-1)
        again = Weight(codes, self.format, self.shape, self.head_dim, g, self.columns)
        return min(
            (again, fresh),
            key=lambda stored: float(np.sum((stored.dequantize() - array) ** 2, dtype=np.float64)),
        )

    def slice_rows(self, begin: int, end: int) -> Weight:
        """Rows [begin, end) over the same bytes; with `head_dim`, whole heads.

        ValueError outside the matrix.
        """
        out_features, in_features = self.shape
        if not 0 <= begin <= end <= out_features:
            raise ValueError(
                f"rows [{begin}, {end}) are not within the {out_features} of this matrix"
            )
        if self.head_dim and (begin % self.head_dim or end % self.head_dim):
            raise ValueError(f"rows [{begin}, {end}) are not whole heads of {self.head_dim}")
        width = row_bytes(self.format, in_features)
        groups = self.groups and self.groups._replace(first=self.groups.first + begin * in_features)
        return Weight(
            self.raw[begin * width : end * width],
            self.format,
            (end - begin, in_features),
            self.head_dim,
            groups,
            self.columns,
        )

    @property
    def is_float(self) -> bool:
        """Whether the values are stored as floats, not quantized."""
        return self.format in FLOATS

    @property
    def can_requantize(self) -> bool:
        """Whether pyloss can write its format."""
        return FORMATS[self.format].encodes

    @property
    def nbytes(self) -> int:
        """The size of the stored bytes, scales included."""
        return self.raw.size + (
            self.groups.nbytes(self.shape[0] * self.shape[1]) if self.groups else 0
        )

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
            raise ValueError(
                f"index {flat[position]} at position {position} is outside [0, {self.shape[0]})"
            )
        stored = self.raw.reshape(self.shape[0], row_bytes(self.format, self.shape[1]))
        result = np.empty((flat.size, self.shape[1]), np.float32)
        step = max(1, _CHUNK // max(1, self.shape[1]))
        places = slice(None) if self.columns is None else self.columns
        for start in range(0, flat.size, step):
            where = stored_rows(flat[start : start + step], self.head_dim)
            # a damaged file's infinite scale makes NaN, quietly as in the kernels
            with np.errstate(invalid="ignore"):
                if self.groups is None:
                    part = decode(stored[where], self.format)
                else:
                    part = decode_rows(stored[where], self.format, self.groups, where)
            result[start : start + step, places] = part
        return result.reshape(*indices.shape, self.shape[1])

    def __repr__(self) -> str:
        heads = f", head_dim={self.head_dim}" if self.head_dim else ""
        groups = f" in groups of {self.groups.size}" if self.groups else ""
        order = ", columns in another order" if self.columns is not None else ""
        sizes = f"shape={self.shape}, {self.nbytes} bytes"
        return f"Weight({self.format}{groups}, {sizes}{heads}{order})"


def _inverse(columns: Array) -> Array:
    """The place of each column, int32."""
    return np.argsort(columns).astype(np.int32)


def _put(part: Any, put: Callable[[Array], Any]) -> Any:
    """A part of a handle with its arrays put elsewhere."""
    if isinstance(part, tuple):
        return tuple(_put(inner, put) for inner in part)
    return put(part) if isinstance(part, np.ndarray) else part


def _check_shape(format: str, shape: tuple[int, ...], head_dim: int) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"shape must be (out_features, in_features), got {shape}")
    out_features, in_features = int(shape[0]), int(shape[1])
    row_bytes(format, in_features)
    if head_dim < 0 or head_dim % 2 or (head_dim and out_features % head_dim):
        raise ValueError(
            f"head_dim must be 0 or an even divisor of the {out_features} rows, got {head_dim}"
        )
    return out_features, in_features


def _in_stored_order(array: Array, head_dim: int) -> Array:
    """Rows in Hugging Face order, put into the file's order, float32."""
    order = np.argsort(stored_rows(np.arange(len(array)), head_dim)) if head_dim else slice(None)
    return np.ascontiguousarray(array[order], dtype=np.float32)


def stored_rows(rows: Array, head_dim: int) -> Array:
    """The places in the file of rows in Hugging Face order."""
    if not head_dim:
        return rows
    head, row = np.divmod(rows, head_dim)
    half, pair = np.divmod(row, head_dim // 2)
    return head * head_dim + 2 * pair + half
