"""Reads JSONL records and checks records. Error messages name file, line and expected form."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from pyloss.errors import FormatError
from pyloss.io.files import kind_named, kind_of
from pyloss.models.text.chat_forms import tools_of

Record = dict[str, Any]


class Records(list[Record]):
    """The records of one file, in order.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, found: Iterable[tuple[str, Record]] | None = None):
        """Takes the records of `found`, each with its place in the file.

        Without `found` it reads `path` as JSONL, skips blank lines, and raises `FormatError` for a
        line that is not one UTF-8 JSON object.
        """
        super().__init__()
        self.path = path
        self._places: list[str] = []
        for place, record in read_lines(path) if found is None else found:
            self.append(record)
            self._places.append(place)

    def where(self, index: int) -> str:
        """The file and place of a record, for error messages."""
        return f"{self.path}, {self._places[index]}"

    def select(self, indices: Sequence[int]) -> Records:
        """Some of the records, with their places."""
        return Records(self.path, [(self._places[i], self[i]) for i in indices])


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed if its name ends in .gz or .zst.

    Raises `FormatError` for a pipe or folder, and for a damaged or truncated compressed file,
    `ImportError` where the package for .zst is missing.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise FormatError(path, None, "is not a file")
    if path.suffix.lower() == ".zst":
        yield io.BytesIO(_decompressed(path))
        return
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            yield file  # type: ignore[misc]
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise FormatError(path, None, f"is not a whole gzip file: {e}") from None


def _decompressed(path: Path) -> bytes:
    """The content of a .zst file, by Python's own module from 3.14 on, or by zstandard."""
    raw = path.read_bytes()
    try:
        module: Any = import_module("compression.zstd")
        errors: tuple[type[Exception], ...] = (module.ZstdError, EOFError)

        def decompress() -> bytes:
            return bytes(module.decompress(raw))
    except ImportError:
        try:
            module = import_module("zstandard")
        except ImportError as e:
            raise ImportError(
                f"{path}: reading .zst needs the package zstandard: pip install 'pyloss[zstd]'"
            ) from e
        errors = (module.ZstdError, EOFError)

        def decompress() -> bytes:
            # Frames may lack their size, and a file may have several of them.
            found, rest = [], raw
            while rest:
                frame = module.ZstdDecompressor().decompressobj()
                found.append(frame.decompress(rest))
                if not frame.eof:
                    raise EOFError("it ends within a frame")
                rest = frame.unused_data
            return b"".join(found)

    try:
        return decompress()
    except errors as e:
        raise FormatError(path, None, f"is not a whole zstd file: {e}") from None


def read_lines(path: Path) -> Iterator[tuple[str, Record]]:
    """The records of a JSONL file, each with its line."""
    with opened(path) as file:
        yield from records_of_lines(path, file)


def records_of_lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, Record]]:
    """The records of lines of JSON, which errors say to be those of `path`."""
    for number, raw in enumerate(lines, 1):
        what = f"line {number}"
        record = parsed(path, what, raw)
        if record is not None:
            yield what, as_record(path, what, record[0])


def as_record(path: Path, what: str, value: Any) -> Record:
    """`value` if it is an object; else `FormatError`."""
    if not isinstance(value, dict):
        raise FormatError(
            path, what, f'is {kind_of(value)}, and must be an object such as {{"text": ...}}'
        )
    return value


def parsed(path: Path, what: str | None, raw: bytes) -> list[Any] | None:
    """A one-element list with the JSON value (which may be null) of a line or file; None if blank.

    Raises `FormatError` naming `path` and `what` for anything else.
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise FormatError(path, what, "is UTF-16 text, and must be UTF-8")
    try:
        # Concatenated files have byte order marks in the middle.
        line = raw.decode().strip().lstrip("\ufeff").strip()
    except UnicodeDecodeError as e:
        raise FormatError(
            path, what, f"is not UTF-8: byte 0x{raw[e.start]:02x} at byte {e.start + 1}"
        ) from None
    if not line:
        return None
    if "\0" in line:
        raise FormatError(
            path,
            what,
            f"holds a NUL byte at column {line.index(chr(0)) + 1}; in JSON it is written \\u0000",
        )
    try:
        record = json.loads(line)
        if "\\u" in line:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as e:
        at = f"line {e.lineno}, column {e.colno}" if e.lineno > 1 else f"column {e.colno}"
        raise FormatError(
            path, what, f"is not valid JSON: {e.msg.removesuffix(' at')} at {at}"
        ) from None
    except UnicodeEncodeError:
        raise FormatError(
            path, what, "holds half of a surrogate pair (\\ud800 to \\udfff alone)"
        ) from None
    except RecursionError:
        raise FormatError(
            path, what, "is not JSON that can be read: it is nested too deep"
        ) from None
    except ValueError:
        raise FormatError(
            path,
            what,
            "is not JSON that can be read: it holds a whole number of thousands of digits",
        ) from None
    return [record]


def keys_of(record: Mapping[str, Any]) -> str:
    """The first keys of a record, for error messages."""
    shown = [f"{key!r:.40}" for key, _ in zip(record, range(10), strict=False)]
    return ", ".join([*shown, "..."] if len(record) > len(shown) else shown) or "none"


def field(record: Mapping[str, Any], key: str, kind: type, where: str, expected: str) -> Any:
    """`record[key]`; `ValueError` if the key is missing or its value is not a `kind`.

    The message names `where`, what was found and what is expected.
    """
    if key not in record:
        raise ValueError(
            f"{where}: the record has no {key!r}; its keys are {keys_of(record)}; expected "
            f"{expected}"
        )
    value = record[key]
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {key!r} is {kind_of(value)}, and must be {kind_named(kind)}")
    return value


def check_messages(record: Mapping[str, Any], key: str, where: str) -> None:
    """Raises `ValueError` unless a chat record is valid.

    `record[key]` must be a non-empty list of objects with "role" and "content" ("tool_calls" may
    replace "content"); "tools" must pass `check_tools`.
    """
    messages = field(record, key, list, where, f"{key!r}, and 'tools' if there are any")
    if not messages:
        raise ValueError(f"{where}: {key!r} is empty, and must hold at least one message")
    for i, message in enumerate(messages):
        at = f"{where}: {key}[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(
                f"{at} is {kind_of(message)}, and must be an object with 'role' and 'content'"
            )
        field(message, "role", str, at, "'role' and 'content'")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise ValueError(
                f"{at} has no 'content' (and no 'tool_calls'); its keys are {keys_of(message)}"
            )
        if content is not None and not isinstance(content, (str, list)):
            raise ValueError(f"{at}: 'content' is {kind_of(content)}, and must be a string")
    check_tools(record, where)


def check_tools(record: Mapping[str, Any], where: str) -> None:
    """Raises `ValueError` for invalid "tools"; the message names `where`.

    Valid are a list of objects, JSON text of one, or no "tools" at all.
    """
    try:
        tools_of(record.get("tools"))
    except (TypeError, ValueError):
        wanted = "a list of objects, or JSON text of one"
        raise ValueError(
            f"{where}: 'tools' is {kind_of(record['tools'])}, and must be {wanted}"
        ) from None
