"""`TensorFile` and `StoredTensor`: the content of a mapped model file of any format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pyloss.errors import FormatError
from pyloss.weights.formats import encode
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import SINGLE, Weight

#: Types that models are not stored in, and modules' buffers may be.
_PLAIN = {
    "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?",
}  # fmt: skip
#: Types of 8-bit floats, which are expanded, with ml_dtypes' names for them.
FLOAT8 = {
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as its file holds it.

    Attributes:
        path: the file.
        name: the tensor's name in that file.
        dtype: the file format's own name for the type, as "BF16" or "Q4_1".
        shape: in NumPy order (outermost first).
        data: its bytes, a read-only uint8 view of the mapped file; None when the type's size is not
            known to pyloss.
    """

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray | None = field(repr=False)

    def weight(self, head_dim: int = 0) -> Weight:
        """The matrix, not copied; 8-bit floats are expanded to bfloat16, which holds them exactly.

        FormatError unless it is a matrix of a type that pyloss reads.
        """
        data = self._readable()
        if len(self.shape) != 2:
            raise FormatError(self.path, self.name, f"expected a matrix, got shape {self.shape}")
        if self.dtype in FLOAT8:
            table = encode(self._float8_values()[None], "bf16").view("<u2")[0]
            return Weight(table[data].view(np.uint8), "bf16", (self.shape[0], self.shape[1]))
        try:
            return Weight(data, self.dtype.lower(), (self.shape[0], self.shape[1]), head_dim)
        except ValueError as error:
            raise FormatError(self.path, self.name, str(error)) from None

    def stack(self) -> WeightStack:
        """The matrices of a tensor with three dimensions, not copied.

        Raises FormatError as `weight` does.
        """
        data = self._readable()
        if self.dtype in FLOAT8 and len(self.shape) == 3:
            count, rows, cols = self.shape
            whole = replace(self, shape=(count * rows, cols)).weight()
            return WeightStack.from_rows(whole, count)
        if len(self.shape) != 3:
            raise FormatError(
                self.path, self.name, f"expected a stack of matrices, got shape {self.shape}"
            )
        count, rows, cols = self.shape
        try:
            return WeightStack.from_rows(
                Weight(data, self.dtype.lower(), (count * rows, cols)), count
            )
        except ValueError as error:
            raise FormatError(self.path, self.name, str(error)) from None

    def array(self) -> np.ndarray:
        """The values, a new float32 array of `shape`.

        FormatError for a type that pyloss does not read.
        """
        data = self._readable()
        if self.dtype in FLOAT8:
            return self._float8_values()[data].reshape(self.shape)
        rows, columns = (math.prod(self.shape[:-1]), self.shape[-1]) if self.shape else (1, 1)
        return Weight(data, self.dtype.lower(), (rows, columns)).dequantize().reshape(self.shape)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows of a matrix of 8-bit floats, a new float32 array."""
        return self._float8_values()[self._readable().reshape(self.shape)[indices]]

    def _float8_values(self) -> np.ndarray:
        """The 256 values of the type, float32."""
        import ml_dtypes

        return (
            np.arange(256, dtype=np.uint8)
            .view(getattr(ml_dtypes, FLOAT8[self.dtype]))
            .astype(np.float32)
        )

    def values(self) -> np.ndarray:
        """The values in the file's type where that is one of NumPy's, else as `array`."""
        plain = _PLAIN.get(self.dtype)
        if plain is None or self.data is None:
            return self.array()
        return np.asarray(self.data).reshape(-1).view(plain).reshape(self.shape)

    def _readable(self) -> np.ndarray:
        if self.data is None or (self.dtype.lower() not in SINGLE and self.dtype not in FLOAT8):
            known = ", ".join([*(name.upper() for name in SINGLE), *FLOAT8])
            raise FormatError(
                self.path, self.name, f"stored as {self.dtype}, and pyloss reads {known}"
            )
        return self.data


@dataclass(frozen=True, eq=False)
class TensorFile:
    """A model file, or a folder of shards read as one.

    Attributes:
        path: the file or folder.
        metadata: its metadata.
        tensors: its tensors by name.
        asked: the names of the tensors requested so far.
    """

    path: str
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, StoredTensor] = field(repr=False)
    asked: set[str] = field(repr=False, default_factory=set)

    def tensor(self, name: str) -> StoredTensor:
        """The tensor `name`. Raises FormatError when the file has none of that name."""
        self.asked.add(name)
        found = self.tensors.get(name)
        if found is None:
            raise FormatError(
                self.path, name, f"missing among the {len(self.tensors)} tensors of this file"
            )
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def layers_held(names: Iterable[str], prefix: str) -> int:
    """The number of layers in names like "blk.3.attn_q.weight", with the `prefix` "blk."."""
    layers = (
        name.removeprefix(prefix).split(".", 1)[0] for name in names if name.startswith(prefix)
    )
    return 1 + max(
        (int(layer) for layer in layers if layer.isdecimal() and len(layer) < 10), default=-1
    )
