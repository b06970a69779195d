"""Reads records: JSONL, a JSON list, CSV, TSV, plain text, compressed too; Parquet; a pipe."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pyloss.distributed import group_of
from pyloss.errors import FormatError
from pyloss.tuner.data.records import (
    Record,
    Records,
    as_record,
    keys_of,
    opened,
    parsed,
    read_lines,
    records_of_lines,
)

#: the splits of a folder or dataset, each with the names that it may have
SPLITS = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
NO_SPLITS = "no train.jsonl, valid.jsonl or test.jsonl in this folder"
ALLOWED = ".jsonl, .json, .csv, .tsv or .txt, each also with .gz or .zst, and .parquet"
#: the name of standard input
STANDARD_INPUT = "-"
_COMPRESSED = (".gz", ".zst")


def kind(path: Path) -> str | None:
    """The file's kind by its name, such as ".csv" for data.csv.gz; None if it is no such file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffixes = suffixes[:-1] if suffixes and suffixes[-1] in _COMPRESSED else suffixes
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def read_records(path: Path) -> Records:
    """The records of a file; the end of its name says its kind.

    A .csv or .tsv file begins with the names of its columns. A .txt file has records
    `{"text": ...}`, the blocks between blank lines. The name "-" is standard input: JSONL, or a
    JSON list.

    Raises `FormatError` for another kind of file, and for what is not a record of its kind.
    """
    if str(path) == STANDARD_INPUT:
        return _standard_input()
    found = kind(path)
    if found is None:
        raise FormatError(path, None, f"is of an unknown kind; allowed are files {ALLOWED}")
    return Records(path, _READERS[found](path))


def split_files(folder: Path, splits: Sequence[tuple[str, ...]]) -> list[Path | None]:
    """The file of each split in a folder, whose names are given for each split.

    All are of one kind, the first of `ALLOWED` that the folder has, so that files of other kinds
    beside train.jsonl are left alone. A file that is not compressed comes first.
    """
    for end in _READERS:
        found = [
            next(
                (
                    path
                    for name in names
                    for path in (folder / f"{name}{end}{more}" for more in ("", *_COMPRESSED))
                    if path.exists()
                ),
                None,
            )
            for names in splits
        ]
        if any(path is not None for path in found):
            return found
    return [None for _ in splits]


def _standard_input() -> Records:
    stream = sys.stdin
    if group_of().size() > 1:
        raise ValueError("the data are '-', standard input, which one rank alone gets: give a file")
    if stream is None or stream.isatty():
        raise ValueError(
            "the data are '-', standard input, and that is a terminal or closed: "
            "pipe records into it, as cat data.jsonl | pyloss ... --data -"
        )
    raw = stream.buffer.read()
    path = Path("standard input")
    is_list = raw.lstrip().startswith(b"[")
    return Records(path, _list(path, raw) if is_list else records_of_lines(path, raw.split(b"\n")))


def _parquet(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise ImportError(
            f"{path}: reading .parquet needs the package pyarrow: pip install 'pyloss[parquet]'"
        ) from e
    number = 0
    try:
        with opened(path) as file, parquet.ParquetFile(pyarrow.PythonFile(file, "r")) as table:
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"record {number}", _without_missing(record)
    except (pyarrow.ArrowException, OSError) as e:
        if isinstance(e, FileNotFoundError):
            raise
        raise FormatError(path, None, f"is not Parquet that can be read: {e}") from None


def _without_missing(value: Any) -> Any:
    """A record without the keys that its table has for others."""
    if isinstance(value, dict):
        return {key: _without_missing(item) for key, item in value.items() if item is not None}
    return [_without_missing(item) for item in value] if isinstance(value, list) else value


def _json(path: Path) -> Iterator[tuple[str, Record]]:
    with opened(path) as file:
        raw = file.read()
    return _list(path, raw)


def _list(path: Path, raw: bytes) -> Iterator[tuple[str, Record]]:
    try:
        value = parsed(path, None, raw)
    except FormatError as error:
        if "Extra data" not in error.reason:
            raise
        reason = f"{error.reason}; a file of one object per line is named .jsonl"
        raise FormatError(path, None, reason) from None
    if value is None:
        return
    if not isinstance(value[0], list):
        keys = f" with the keys {keys_of(value[0])}" if isinstance(value[0], dict) else ""
        raise FormatError(
            path, None, f"holds one value{keys}, and must hold a list of records: [{{...}}]"
        )
    for number, record in enumerate(value[0], 1):
        what = f"record {number}"
        yield what, as_record(path, what, record)


def _csv(path: Path) -> Iterator[tuple[str, Record]]:
    return _table(path, ",")


def _tsv(path: Path) -> Iterator[tuple[str, Record]]:
    return _table(path, "\t")


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, Record]]:
    text = _text(path)
    head = text.lstrip("\r\n").partition("\n")[0]
    if delimiter == "," and "," not in head and ";" in head:
        delimiter = ";"  # as spreadsheets write CSV where the comma is in numbers
    before = csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    try:
        while True:
            what = f"record {number + 1} (line {rows.line_num + 1})"
            row = next(rows, None)
            if row is None:
                return
            if not row:
                continue
            if header is None:
                header = _header(path, row)
                continue
            number += 1
            if len(row) != len(header):
                raise FormatError(
                    path,
                    what,
                    f"has {len(row)} fields, and the header has {len(header)}: a field with the "
                    "delimiter or a line break in it needs quotation marks",
                )
            # Without a name: the number of the row, as pandas writes it.
            cells = {name: cell for name, cell in zip(header, row, strict=True) if name}
            if not cells.get("tools", "-"):
                del cells["tools"]
            yield what, cells
    except csv.Error as e:
        raise FormatError(path, what, f"is not valid CSV: {e}") from None
    finally:
        csv.field_size_limit(before)


def _header(path: Path, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    if len(set(names)) != len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise FormatError(
            path, "the header", f"names {double!r} twice; the first line must name each column"
        )
    return names


def _blocks(path: Path) -> Iterator[tuple[str, Record]]:
    block: list[str] = []
    number = 1
    for at, line in enumerate([*_text(path, universal=True).split("\n"), ""], 1):
        if line.strip():
            block.append(line)
        elif block:
            yield f"record {number} (line {at - len(block)})", {"text": "\n".join(block)}
            number, block = number + 1, []


def _text(path: Path, universal: bool = False) -> str:
    """The file as text; `universal` turns every line break into a line feed."""
    with opened(path) as file:
        raw = file.read()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise FormatError(path, None, "is UTF-16 text, and must be UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise FormatError(
            path, f"line {line}", f"is not UTF-8: byte 0x{raw[e.start]:02x} at byte {e.start + 1}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if universal else text


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Record]]]] = {
    ".jsonl": read_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _blocks,
    ".parquet": _parquet,
}
