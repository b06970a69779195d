"""Reading what `torch.save` writes (`.bin`, `.pt`, `.pth`), without executing anything.

Such a file is a zip archive: `<name>/data.pkl`, a pickle, and `<name>/data/<key>`, the bytes of
each storage. A pickle is a program for a machine with a stack, and Python's own machine calls
whatever the program names. The machine here knows the instructions of plain values, and instead of
calling anything it recognizes the few names that stand for tensors; any other name is refused.

Values are dicts with keys that are strings or integers, lists, tuples, strings, numbers, booleans,
None, and tensors, `StoredTensor`s over the mapped file.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.files import map_file, user_path
from pyloss.io.tensor_file import StoredTensor, TensorFile

#: The pickle with which files begin that torch wrote before version 1.6.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
#: torch's classes of storages, with the names of their types and the bytes of an element.
_STORAGES = {
    "DoubleStorage": ("F64", 8), "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2), "LongStorage": ("I64", 8), "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1), "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}  # fmt: skip
# NumPy's limit of dimensions.
_MAX_DIMENSIONS = 32


def read_torch(path: str | os.PathLike[str]) -> Any:
    """The value in a file of `torch.save`.

    Raises FormatError for a file that is damaged, that holds more than plain values and tensors, or
    that torch wrote before version 1.6; OSError if it cannot be opened.
    """
    path = user_path(path)
    return _Machine(path, _Archive(path)).run()


def read_state_dict(path: str | os.PathLike[str]) -> TensorFile:
    """The tensors of a file of `torch.save` that holds a dict of tensors by name.

    Raises as `read_torch`, and FormatError for anything else in the dict.
    """
    value = read_torch(path)
    if not isinstance(value, dict):
        raise FormatError(path, None, f"expected tensors by name, got {_said(value)}")
    tensors = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise FormatError(path, shown(name), f"expected a tensor, got {_said(tensor)}")
        tensors[name] = StoredTensor(tensor.path, name, tensor.dtype, tensor.shape, tensor.data)
    return TensorFile(os.fspath(path), {}, tensors)


def _said(value: Any) -> str:
    if isinstance(value, StoredTensor):
        return "a tensor"
    return f"a {type(value).__name__}" if isinstance(value, dict | list | tuple) else shown(value)


class _Archive:
    """The entries of a zip file, which are views of the mapped file."""

    def __init__(self, path: Path):
        self.path, self.bytes = path, map_file(path)
        if self.bytes[: len(_LEGACY)].tobytes() == _LEGACY:
            raise FormatError(
                path,
                None,
                "torch wrote it before version 1.6; write it again: "
                "torch.save(torch.load(file, weights_only=True), file)",
            )
        if self.bytes[:1].tobytes() == b"\x80":
            raise FormatError(
                path,
                None,
                "a pickle without the archive of torch.save: reading it could execute code. Where "
                "you trust it, write its tensors again: "
                "torch.save(pickle.load(open(file, 'rb')), another_file)",
            )
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
            raise FormatError(
                path, None, f"truncated, or not a file of torch.save: {error}"
            ) from None
        self.entries = {entry.filename: entry for entry in entries}
        found = [name for name in self.entries if name.endswith("/data.pkl")]
        if len(found) != 1 or len(self.entries) != len(entries):
            raise FormatError(path, None, "not a file of torch.save: it needs one data.pkl")
        self.root = found[0].removesuffix("data.pkl")
        order = f"{self.root}byteorder"
        if order in self.entries and (said := self.entry("byteorder").tobytes()) != b"little":
            raise FormatError(path, None, f"its bytes are in the order {shown(said)}, not 'little'")

    def entry(self, name: str) -> np.ndarray:
        """The bytes of `<root><name>`. Raises FormatError."""
        info = self.entries.get(self.root + name)
        if info is None:
            raise FormatError(self.path, name, "is missing among the file's entries")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise FormatError(self.path, name, "is compressed or encrypted; torch does neither")
        header = self.bytes[info.header_offset : info.header_offset + 30].tobytes()
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise FormatError(self.path, name, "damaged: there is no entry at its place")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if begin + info.file_size > self.bytes.size:
            raise FormatError(
                self.path,
                name,
                f"truncated: it ends at byte {begin + info.file_size} of {self.bytes.size}",
            )
        return self.bytes[begin : begin + info.file_size]


@dataclass(frozen=True)
class _Global:
    """A name of the pickle: a function or a class, which is recognized and never called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, eq=False)
class _Storage:
    """The bytes of a tensor's storage."""

    key: str
    dtype: str
    size: int  # bytes of an element
    data: np.ndarray


class _Mark:
    """The instruction MARK on the stack."""


_MARK = _Mark()


class _Machine:
    """The instructions of pickles of plain values, of protocols 2 to 5."""

    def __init__(self, path: Path, archive: _Archive):
        self.path, self.archive = path, archive
        self.program = archive.entry("data.pkl").tobytes()
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self) -> Any:
        """The value that the program leaves."""
        while True:
            begin, code = self.at, self.bytes(1)
            if code == b".":
                break
            step = _INSTRUCTIONS.get(code)
            if step is None:
                raise self.refused(
                    f"the instruction {code!r} at byte {begin} is none of plain data"
                )
            step(self)
        value = self.pop()
        if self.stack:
            raise self.refused("it ends with more than one value")
        return self.plain(value)

    def refused(self, reason: str) -> FormatError:
        return FormatError(self.path, "data.pkl", reason)

    # Reading the program

    def bytes(self, count: int) -> bytes:
        if count > len(self.program) - self.at:
            raise self.refused(f"truncated at byte {self.at} of {len(self.program)}")
        self.at += count
        return self.program[self.at - count : self.at]

    def whole(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self.bytes(count), "little", signed=signed)

    def text(self, count: int) -> str:
        try:
            return self.bytes(count).decode()
        except UnicodeDecodeError:
            raise self.refused(f"the text at byte {self.at} is not UTF-8") from None

    def line(self) -> str:
        end = self.program.find(b"\n", self.at)
        found = self.text(max(end, self.at) - self.at)
        self.bytes(1)
        return found

    # The stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, kind: type | tuple[type, ...] = object) -> Any:
        value = self.stack.pop() if self.stack else _MARK
        if value is _MARK or not isinstance(value, kind):
            raise self.refused(f"damaged before byte {self.at}: its values do not fit together")
        return value

    def marked(self) -> list[Any]:
        """The values above the last mark."""
        found = []
        while self.stack and self.stack[-1] is not _MARK:
            found.append(self.stack.pop())
        if not self.stack:
            raise self.refused(f"damaged before byte {self.at}: a mark is missing")
        self.stack.pop()
        return found[::-1]

    def remember(self, index: int) -> None:
        value = self.pop()
        self.push(value)
        self.memo[index] = value

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.refused(f"damaged before byte {self.at}: there is no value {index}")
        self.push(self.memo[index])

    # What values become

    def name(self, module: str, name: str) -> None:
        found = _Global(module, name)
        plain = module == "torch" and name in _STORAGES
        if not plain and found not in _CALLS:
            raise self.refused(
                f"it names {shown(str(found))}; pyloss reads tensors and plain values alone, "
                "and executes nothing"
            )
        self.push(found)

    def stack_name(self) -> None:
        name = self.pop(str)
        self.name(self.pop(str), name)

    def call(self) -> None:
        arguments = self.pop(tuple)
        function = self.pop(_Global)
        if function not in _CALLS:
            raise self.refused(f"it calls {function}, which is no function of tensors")
        self.push(_CALLS[function](self, arguments))

    def put(self, target: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise self.refused(f"damaged before byte {self.at}: a value is missing")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise self.refused(f"a key is {_said(key)}; expected text or an integer")
            target[key] = self.plain(value)

    def plain(self, value: Any) -> Any:
        if _holds_names(value):
            raise self.refused(f"damaged before byte {self.at}: a name stands for a value")
        return value

    def tuple_of(self, items: list[Any]) -> None:
        # Arguments of calls hold names and storages; such tuples are parts of nothing else.
        for item in items:
            if isinstance(item, tuple):
                self.plain(item)
        self.push(tuple(items))

    def set_items(self, items: list[Any]) -> None:
        target = self.pop(dict)
        self.put(target, items)
        self.push(target)

    def append(self, items: list[Any]) -> None:
        target = self.pop(list)
        target.extend(map(self.plain, items))
        self.push(target)

    def build(self) -> None:
        """Attributes of an object; state dicts have `_metadata`, versions of modules."""
        self.pop(dict)
        self.push(self.pop(dict))

    def storage(self) -> None:
        """A persistent name: ("storage", class, key, device, number of elements)."""
        given = self.pop(tuple)
        if len(given) != 5 or given[0] != "storage" or not isinstance(given[1], _Global):
            raise self.refused(f"damaged before byte {self.at}: expected a storage")
        _, kind, key, _, count = given
        if kind.name not in _STORAGES or not isinstance(key, str) or not _is_size(count):
            raise self.refused(f"the storage {shown(key)} of {kind} is not readable")
        dtype, size = _STORAGES[kind.name]
        if key not in self.storages:
            self.storages[key] = _Storage(key, dtype, size, self.archive.entry(f"data/{key}"))
        found = self.storages[key]
        if found.dtype != dtype or found.data.size != count * size:
            raise FormatError(
                self.path,
                f"data/{key}",
                f"{count} elements of {dtype} take {count * size} bytes, "
                f"and it has {found.data.size}",
            )
        self.push(found)

    def tensor(self, arguments: tuple[Any, ...]) -> StoredTensor:
        """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`."""
        storage, offset, shape, strides = (*arguments, *[None] * 4)[:4]
        if not isinstance(storage, _Storage):
            raise self.refused("a tensor has no storage")
        place, known = (
            f"data/{storage.key}",
            isinstance(shape, tuple) and isinstance(strides, tuple),
        )
        if (
            not known
            or len(shape) != len(strides)
            or len(shape) > _MAX_DIMENSIONS
            or not all(map(_is_size, (offset, *shape, *strides)))
        ):
            raise FormatError(
                self.path,
                place,
                f"expected an offset, sizes and strides, got {shown((offset, shape, strides))}",
            )
        count = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        held = storage.data.size // storage.size
        if count and (last >= held or count > held):
            raise FormatError(
                self.path,
                place,
                f"a tensor of shape {shown(shape)} with strides {shown(strides)} from element "
                f"{offset} does not lie in its {held} elements",
            )
        begin, size = offset * storage.size, storage.size
        if not count or strides == _row_major(shape):
            data = storage.data[begin : begin + count * size]
        else:
            items = np.ndarray(
                shape,
                f"V{size}",
                storage.data,
                begin,
                tuple(step * size for step in strides),
            )
            data = np.ascontiguousarray(items).reshape(-1).view(np.uint8)
        return StoredTensor(os.fspath(self.path), place, storage.dtype, shape, data)

    def parameter(self, arguments: tuple[Any, ...]) -> StoredTensor:
        """`_rebuild_parameter(tensor, requires_grad, hooks)`."""
        if not arguments or not isinstance(arguments[0], StoredTensor):
            raise self.refused("a parameter has no tensor")
        return arguments[0]

    def ordered(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        """`OrderedDict()`, or one of pairs."""
        found: dict[Any, Any] = {}
        pairs = arguments[0] if arguments else []
        if not isinstance(pairs, list) or any(
            not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs
        ):
            raise self.refused("an OrderedDict is not made of pairs")
        self.put(found, [part for pair in pairs for part in pair])
        return found

    def size(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """`torch.Size(sizes)`."""
        if len(arguments) != 1 or not isinstance(arguments[0], list | tuple):
            raise self.refused("a torch.Size has no sizes")
        return tuple(arguments[0])

    def short_tuple(self, count: int) -> None:
        self.tuple_of([self.pop() for _ in range(count)][::-1])


def _holds_names(value: Any) -> bool:
    parts = value if type(value) is tuple else (value,)
    return any(isinstance(part, _Global | _Storage) for part in parts)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


#: The names that are called, and what stands for them.
_CALLS: dict[_Global, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    _Global("torch._utils", "_rebuild_tensor_v2"): _Machine.tensor,
    _Global("torch._utils", "_rebuild_parameter"): _Machine.parameter,
    _Global("collections", "OrderedDict"): _Machine.ordered,
    _Global("torch", "Size"): _Machine.size,
}

_INSTRUCTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.whole(1),  # PROTO
    b"\x95": lambda m: m.whole(8),  # FRAME
    b"(": lambda m: m.push(_MARK),
    b"0": lambda m: m.pop(),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.whole(4, signed=True)),
    b"K": lambda m: m.push(m.whole(1)),
    b"M": lambda m: m.push(m.whole(2)),
    b"\x8a": lambda m: m.push(m.whole(m.whole(1), signed=True)),  # LONG1
    b"G": lambda m: m.push(struct.unpack(">d", m.bytes(8))[0]),
    b"X": lambda m: m.push(m.text(m.whole(4))),
    b"\x8c": lambda m: m.push(m.text(m.whole(1))),  # SHORT_BINUNICODE
    b"\x8d": lambda m: m.push(m.text(m.whole(8))),  # BINUNICODE8
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.tuple_of(m.marked()),
    b"\x85": lambda m: m.short_tuple(1),
    b"\x86": lambda m: m.short_tuple(2),
    b"\x87": lambda m: m.short_tuple(3),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.marked()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.marked()),
    b"q": lambda m: m.remember(m.whole(1)),
    b"r": lambda m: m.remember(m.whole(4)),
    b"\x94": lambda m: m.remember(len(m.memo)),  # MEMOIZE
    b"h": lambda m: m.recall(m.whole(1)),
    b"j": lambda m: m.recall(m.whole(4)),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": lambda m: m.stack_name(),
    b"R": lambda m: m.call(),
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.storage(),
}
