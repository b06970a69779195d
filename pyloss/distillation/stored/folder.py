"""The files of a stored teacher: an index, and shards with the entries of its samples.

`teacher.json` has the settings and a line per complete shard. A shard is a safetensors file with

    keys      uint8 [S, 16]    the samples, see `Targets.key`
    ends      int64 [S]        the end of each sample's rows
    ids       uint16 or int32 [R, K]    classes of the target tokens, a row each
    logprobs  float16 or float32 [R, K]    the teacher's log-probabilities there
    left      float32 [R]      the probability of all other classes

A row has the K likeliest classes, the likeliest first, or K drawn classes in ascending order.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.distillation.stored.samples import KEY_BYTES
from pyloss.errors import FormatError
from pyloss.io.files import map_file, read_json, replacing, write_safetensors
from pyloss.io.safetensors import read_safetensors

INDEX_FILE = "teacher.json"
FORMAT, VERSION = "pyloss stored teacher", 1
SHARD_NAME = re.compile(r"teacher-\d{5,}\.safetensors")

#: the types of log-probabilities, by their names in the index
DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_SAFETENSORS = {"uint8": "U8", "uint16": "U16", "int32": "I32", "int64": "I64", "float16": "F16",
                "float32": "F32"}  # fmt: skip


def shard_file(number: int) -> str:
    """The name of shard `number`, from 0."""
    return f"teacher-{number + 1:05d}.safetensors"


def id_dtype(classes: int) -> np.dtype[Any]:
    """The type of ids below `classes`."""
    return np.dtype(np.uint16 if classes <= 1 << 16 else np.int32)


@dataclass(frozen=True)
class Settings:
    """How a teacher was stored; runs with equal settings write equal bytes.

    Attributes:
        count: K, the entries of a row.
        sampled: whether they were drawn, else they are the likeliest.
        seed: of the draws.
        temperature: of the probabilities.
        dtype: of the log-probabilities, a key of DTYPES.
        classes: of the teacher.
        max_seq_length: at which samples were cut, in tokens.
        shard_bytes: the size at which a shard ends.
        tokenizer: see `vocabulary_hash`; None if it was not given.
        teacher: the fingerprint of its weights.
        data: a hash of the samples in their order.
        samples, targets: how many the data have.
    """

    count: int
    sampled: bool
    seed: int
    temperature: float
    dtype: str
    classes: int
    max_seq_length: int
    shard_bytes: int
    tokenizer: str | None
    teacher: str
    data: str
    samples: int
    targets: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a target."""
        return self.count * (id_dtype(self.classes).itemsize + DTYPES[self.dtype].itemsize) + 4

    @property
    def nbytes(self) -> int:
        """Bytes of all targets and samples, without the headers of the files."""
        return self.targets * self.row_bytes + self.samples * (KEY_BYTES + 8)


@dataclass(frozen=True)
class ShardEntry:
    """A complete shard in the index."""

    file: str
    samples: int
    targets: int
    nbytes: int
    crc32: int


@dataclass
class Index:
    """The index of a folder."""

    settings: Settings
    shards: list[ShardEntry] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return sum(shard.samples for shard in self.shards) == self.settings.samples

    def write(self, folder: Path) -> None:
        """Replaces the index file, wholly or not at all."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "settings": vars(self.settings),
            "shards": [vars(shard) for shard in self.shards],
        }
        with replacing(folder / INDEX_FILE) as beside:
            beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def is_stored_teacher(path: Path) -> bool:
    """Whether the folder `path` has the index of a stored teacher."""
    return (path / INDEX_FILE).is_file()


def read_index(folder: Path) -> Index:
    """The index of a folder.

    Raises:
        FormatError: a value that is missing or not allowed, by its name.
        OSError: the file cannot be read.
    """
    path = folder / INDEX_FILE
    content = read_json(path)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise FormatError(
            path,
            "format",
            f"expected {FORMAT!r} of version {VERSION}, got {shown(content.get('format'))} of "
            f"version {shown(content.get('version'))}",
        )
    settings = Settings(**_values(path, "settings", content.get("settings"), _SETTINGS))
    if not settings.sampled and settings.count > settings.classes:
        raise FormatError(
            path, "count", f"{settings.count} classes of a row, and there are {settings.classes}"
        )
    listed = content.get("shards")
    if not isinstance(listed, list):
        raise FormatError(path, "shards", f"expected a list, got {shown(listed)}")
    shards = [ShardEntry(**_values(path, "shards", entry, _SHARD)) for entry in listed]
    for number, shard in enumerate(shards):
        if shard.file != shard_file(number):
            raise FormatError(
                path, "shards", f"expected {shard_file(number)}, got {shown(shard.file)}"
            )
    index = Index(settings, shards)
    targets = sum(shard.targets for shard in shards)
    if targets > settings.targets or (index.complete and targets < settings.targets):
        raise FormatError(
            path, "shards", f"they have {targets} targets, and the data have {settings.targets}"
        )
    return index


def _whole(least: int, most: int = 1 << 48) -> Any:
    return lambda value: type(value) is int and least <= value <= most


def _text(value: Any) -> bool:
    return isinstance(value, str)


_SETTINGS = {
    "count": _whole(1, 1 << 31),
    "sampled": lambda value: isinstance(value, bool),
    "seed": _whole(0, 1 << 63),
    "temperature": lambda value: type(value) in (int, float) and 0 < value < float("inf"),
    "dtype": lambda value: isinstance(value, str) and value in DTYPES,
    "classes": _whole(1, 1 << 31),
    "max_seq_length": _whole(2),
    "shard_bytes": _whole(1),
    "tokenizer": lambda value: value is None or _text(value),
    "teacher": _text,
    "data": _text,
    "samples": _whole(1),
    "targets": _whole(1),
}
_SHARD = {
    "file": _text,
    "samples": _whole(1),
    "targets": _whole(1),
    "nbytes": _whole(1),
    "crc32": _whole(0, (1 << 32) - 1),
}


def _values(path: Path, place: str, given: Any, checks: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise FormatError(path, place, f"expected an object, got {shown(given)}")
    for name in given.keys() | checks.keys():
        if name not in checks or name not in given or not checks[name](given[name]):
            what = "unknown" if name not in checks else "missing or not allowed"
            raise FormatError(path, f"{place}.{name:.60}", f"{what}: {shown(given.get(name))}")
    return given


def write_shard(folder: Path, number: int, arrays: dict[str, np.ndarray]) -> ShardEntry:
    """Writes a shard, wholly or not at all, and returns its line of the index."""
    name = shard_file(number)
    write_safetensors(folder / name, arrays)
    data = map_file(folder / name)
    return ShardEntry(
        name, len(arrays["keys"]), len(arrays["ids"]), data.size, zlib.crc32(data.data)
    )


class Shard:
    """A shard of a folder, mapped. Its samples are read at once; its rows stay in the file.

    Raises FormatError for a file that does not fit its line of the index.

    Attributes:
        path: of the file.
        keys: the samples' keys.
        ends: int64 [S], the end of each sample's rows.
    """

    def __init__(self, folder: Path, settings: Settings, entry: ShardEntry) -> None:
        self.path, self._entry, self._checked = folder / entry.file, entry, False
        if not self.path.is_file():
            raise FormatError(folder / INDEX_FILE, entry.file, "there is no such file")
        size = os.stat(self.path).st_size
        if size != entry.nbytes:
            raise FormatError(
                self.path, None, f"truncated or damaged: {size} bytes, expected {entry.nbytes}"
            )
        file, s, r, k = read_safetensors(self.path), entry.samples, entry.targets, settings.count
        expected: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
            "keys": (np.dtype(np.uint8), (s, KEY_BYTES)),
            "ends": (np.dtype(np.int64), (s,)),
            "ids": (id_dtype(settings.classes), (r, k)),
            "logprobs": (DTYPES[settings.dtype], (r, k)),
            "left": (np.dtype(np.float32), (r,)),
        }
        arrays = {}
        for name, (dtype, shape) in expected.items():
            tensor = file.tensor(name)
            data = tensor.data
            if data is None or (tensor.dtype, tensor.shape) != (_SAFETENSORS[dtype.name], shape):
                raise FormatError(
                    self.path,
                    name,
                    f"expected {_SAFETENSORS[dtype.name]} of shape {shape}, "
                    f"got {tensor.dtype} of shape {tensor.shape}",
                )
            arrays[name] = data.view(dtype).reshape(shape)
        if unknown := set(file) - set(expected):
            raise FormatError(self.path, min(unknown), "unknown in a stored teacher")
        self._classes = settings.classes
        self._ids, self._logprobs, self._left = (arrays[n] for n in ("ids", "logprobs", "left"))
        self.keys = [bytes(key) for key in arrays["keys"]]
        self.ends = np.array(arrays["ends"])
        if (np.diff(self.ends, prepend=0) < 1).any() or self.ends[-1] != r:
            raise FormatError(self.path, "ends", f"damaged: expected to ascend from 1 to {r}")

    def check(self) -> None:
        """Compares the file's bytes with the checksum of the index, the first time.

        Raises FormatError.
        """
        if not self._checked and zlib.crc32(map_file(self.path).data) != self._entry.crc32:
            raise FormatError(self.path, None, "damaged: its bytes do not have their checksum")
        self._checked = True

    def rows(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids int32 [n, K], log-probabilities float32 [n, K] and the rest [n] of some rows.

        Raises FormatError for bytes that are damaged, and for values out of their range.
        """
        self.check()
        ids = self._ids[begin:end].astype(np.int32)
        logprobs = self._logprobs[begin:end].astype(np.float32)
        left = np.array(self._left[begin:end])
        for name, good in (
            ("ids", (ids >= 0) & (ids < self._classes)),
            ("logprobs", (logprobs <= 0).all(-1) & (logprobs > -np.inf).any(-1)),
            ("left", (left >= 0) & (left < 1)),
        ):
            if not good.all():
                raise FormatError(self.path, name, f"a value of rows {begin} to {end} is damaged")
        return ids, logprobs, left
