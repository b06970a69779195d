"""Reading GGUF files (versions 2 and 3, little-endian) over a memory map.

The `gguf` package takes seconds for a vocabulary of 49k tokens, and trusts the file's numbers.
"""

from __future__ import annotations

import math
import os
import re
import struct
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.files import map_file, user_path
from pyloss.io.tensor_file import StoredTensor, TensorFile
from pyloss.weights.weight import SINGLE, row_bytes

#: ggml's tensor types by number
GGML_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip

#: values of tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Metadata value types: the scalars by their struct letters, then the two that have a length.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_MAX_DIMENSIONS = 4


def read_gguf(path: str | os.PathLike[str]) -> TensorFile:
    """Map a GGUF file, or all files of a split model where `path` is one of them.

    The files of a split model are called NAME-00001-of-00003.gguf and so on. The metadata are those
    of the first one.

    Metadata values are Python numbers, bools, strings, and lists of these. Tensor types have ggml's
    names ("Q4_1"), shapes are in NumPy order. Types that pyloss cannot read are listed too; only
    reading their values is an error.

    Raises:
        FormatError: not a GGUF file, or one that is truncated or damaged, naming the key or tensor
            and what is wrong; a split model with a missing file, or with files of several models.
        OSError: the file cannot be opened.
    """
    place = os.fspath(user_path(path))
    file = _Reader(place).read()
    count = file.metadata.get("split.count", 0)
    return file if count in (0, 1) else _joined(place, file, count)


_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def _joined(path: str, file: TensorFile, count: Any) -> TensorFile:
    """The files of the split model of which `file`, at `path`, is one."""
    name = _PART.fullmatch(path)
    if type(count) is not int or name is None or int(name[3]) != count:
        raise FormatError(
            path,
            "split.count",
            f"one of {shown(count)} files of a split model, which must be called "
            "NAME-00001-of-00003.gguf and so on",
        )
    tensors: dict[str, StoredTensor] = {}
    first = file
    for number in range(1, count + 1):
        at = f"{name[1]}-{number:05}-of-{name[3]}.gguf"
        if not os.path.exists(at):
            raise FormatError(
                path, "split.count", f"file {number} of {count} is missing: {os.path.basename(at)}"
            )
        part = file if at == path else _Reader(at).read()
        first = part if number == 1 else first
        for key, wanted in (
            ("split.no", number - 1),
            ("split.count", count),
            ("split.tensors.count", first.metadata.get("split.tensors.count")),
        ):
            if part.metadata.get(key) != wanted:
                reason = f"it is {shown(part.metadata.get(key))}, and the other files say {wanted}"
                raise FormatError(at, key, reason)
        # llama.cpp and gguf-py write the metadata into the first file alone. Where others say them
        # twice, they must say the same.
        for key in part.metadata.keys() & first.metadata.keys():
            said, wanted = part.metadata[key], first.metadata[key]
            if said != wanted and not key.startswith("split."):
                reason = f"it is {shown(said)}, and {first.path} says {shown(wanted)}"
                raise FormatError(at, key, f"{reason}: files of two models")
        for tensor in part:
            if tensor in tensors:
                raise FormatError(at, tensor, f"this tensor is in {tensors[tensor].path} too")
        tensors |= part.tensors
    total = first.metadata.get("split.tensors.count")
    if total is not None and total != len(tensors):
        raise FormatError(
            first.path, "split.tensors.count", f"it is {total}, and the files have {len(tensors)}"
        )
    return TensorFile(first.path, first.metadata, tensors)


class _Reader:
    """One pass over the header. No length is allocated before it is checked against the file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.data = map_file(path)
        self.buffer = self.data.data
        self.size = self.data.size
        self.offset = 0

    def read(self) -> TensorFile:
        if bytes(self.buffer[:4]) != b"GGUF":
            raise FormatError(
                self.path, None, f"not a GGUF file: it starts with {bytes(self.buffer[:4])!r}"
            )
        self.offset = 4
        version = self.number(_U32, "header")
        if version not in (2, 3):
            swapped = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise FormatError(
                self.path,
                None,
                f"GGUF version {version}{swapped}, and pyloss reads versions 2 and 3",
            )
        tensor_count = self.number(_U64, "header")
        key_count = self.number(_U64, "header")
        metadata: dict[str, Any] = {}
        for index in range(key_count):
            key = self.string(f"key {index} of {key_count}")
            if key in metadata:
                raise FormatError(self.path, key, "this key occurs twice")
            metadata[key] = self.value(key)
        tensors = self.tensors(tensor_count, metadata.get("general.alignment", 32))
        return TensorFile(self.path, metadata, tensors)

    def take(self, size: int, what: str) -> int:
        """Skip `size` bytes and return where they start."""
        start = self.offset
        if size > self.size - start:
            reason = f"truncated: {size} bytes expected at {start}, and the file has {self.size}"
            raise FormatError(self.path, what, reason)
        self.offset = start + size
        return start

    def number(self, layout: struct.Struct, what: str) -> int:
        return layout.unpack_from(self.buffer, self.take(layout.size, what))[0]

    def string(self, what: str) -> str:
        size = self.number(_U64, what)
        start = self.take(size, what)
        try:
            return str(self.buffer[start : self.offset], "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(
                self.path, what, f"not UTF-8 text at byte {start + error.start}"
            ) from None

    def value(self, key: str) -> Any:
        kind = self.number(_U32, key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key)
        return self.scalars(key, kind, 1)[0]

    def array(self, key: str) -> list[Any]:
        kind = self.number(_U32, key)
        count = self.number(_U64, key)
        if kind != _STRING:
            return self.scalars(key, kind, count)
        # A vocabulary has tens of thousands of strings, so this loop repeats `string` by hand.
        buffer, unpack, offset, size = self.buffer, _U64.unpack_from, self.offset, self.size
        if count > (size - offset) // 8:
            raise FormatError(
                self.path, key, f"truncated: {count} strings cannot fit in {size - offset} bytes"
            )
        strings = []
        try:
            for _ in range(count):
                start = offset + 8
                offset = start + unpack(buffer, offset)[0]
                if offset > size:
                    break
                strings.append(str(buffer[start:offset], "utf-8"))
        except struct.error:
            pass
        except UnicodeDecodeError:
            raise FormatError(self.path, key, f"string {len(strings)} is not UTF-8 text") from None
        if len(strings) < count:
            raise FormatError(
                self.path, key, f"truncated: the file ends in string {len(strings)} of {count}"
            )
        self.offset = offset
        return strings

    def scalars(self, key: str, kind: int, count: int) -> list[Any]:
        letter = _SCALARS.get(kind)
        if letter is None:
            raise FormatError(
                self.path, key, f"value type {kind} is not one of GGUF's, or is an array of arrays"
            )
        dtype = np.dtype("<" + letter)
        start = self.take(count * dtype.itemsize, key)
        return np.frombuffer(self.data, dtype, count, start).tolist() if count else []

    def tensors(self, count: int, alignment: Any) -> dict[str, StoredTensor]:
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise FormatError(
                self.path, "general.alignment", f"{shown(alignment)} is not a power of two"
            )
        found: list[tuple[str, str, tuple[int, ...], int]] = []
        for index in range(count):
            found.append(self.tensor_info(f"tensor {index} of {count}"))
        base = -(-self.offset // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, dtype, shape, offset in found:
            if name in tensors:
                raise FormatError(self.path, name, "this tensor occurs twice")
            if offset % alignment:
                raise FormatError(
                    self.path,
                    name,
                    f"offset {offset} is not a multiple of the alignment {alignment}",
                )
            data = self.tensor_data(name, dtype, shape, base + offset)
            tensors[name] = StoredTensor(self.path, name, dtype, shape, data)
        return tensors

    def tensor_info(self, what: str) -> tuple[str, str, tuple[int, ...], int]:
        name = self.string(what)
        dimensions = self.number(_U32, name)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise FormatError(
                self.path, name, f"{dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}"
            )
        # ggml counts dimensions from the innermost.
        shape = tuple(self.number(_U64, name) for _ in range(dimensions))[::-1]
        if min(shape) < 1:
            raise FormatError(self.path, name, f"shape {shape} has an empty dimension")
        kind = self.number(_U32, name)
        return name, GGML_TYPES.get(kind, f"ggml type {kind}"), shape, self.number(_U64, name)

    def tensor_data(
        self, name: str, dtype: str, shape: tuple[int, ...], start: int
    ) -> np.ndarray | None:
        size = 0
        if dtype.lower() in SINGLE:
            try:
                size = math.prod(shape[:-1]) * row_bytes(dtype.lower(), shape[-1])
            except ValueError as error:
                raise FormatError(self.path, name, str(error)) from None
        if start + size > self.size:
            reason = (
                f"truncated: {dtype} of shape {shape} ends at byte {start + size}, "
                f"and the file has {self.size}"
            )
            raise FormatError(self.path, name, reason)
        return self.data[start : start + size] if size else None
