"""Whole files: mapped reading, JSON with clear errors, writing without partial files."""

from __future__ import annotations

import codecs
import errno
import json
import mmap
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pyloss.errors import FormatError
from pyloss.runtime.device import DeviceArray

PathLike = str | os.PathLike[str]

#: Names of temporary files: .<name>.<process>.<random>.tmp
_TEMPORARY = re.compile(r"\..+\.(\d{1,10})\.[0-9a-f]{8}\.tmp", re.DOTALL)


def user_path(path: PathLike) -> Path:
    """The path that a user means. Every path from outside goes through here; twice does no harm.

    A leading `~` or `~name` is the home folder; if there is no such user it stays, as in a shell.
    Names that are not UTF-8 are kept as Python has them (`os.fsdecode`).

    Raises:
        TypeError: neither text nor a path.
        ValueError: an empty path, a null character, or `~` where no home folder is known.
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise TypeError(f"a path is {path!r:.40}; it must be text or a path object") from None
    if not text:
        raise ValueError("a path is empty; it must name a file or a folder")
    if "\0" in text:
        raise ValueError(f"the path {text!r:.80} has a null character, which no name can have")
    if not text.startswith("~"):
        # pathlib turns "./~" into "~", which would mean another place at the next reading.
        plain = Path(text)
        return Path.cwd() / plain if str(plain).startswith("~") else plain
    home = os.path.expanduser(text)
    if home == text:
        if text == "~" or text.startswith("~/"):
            raise ValueError(
                f"the path {text!r} begins with ~, and no home folder is known: set HOME"
            )
        return Path.cwd() / text
    return Path(home)


#: Endings by which programs know a format, and what a file with them is.
_ENDINGS = {
    ".gguf": "a GGUF file", ".safetensors": "a safetensors file", ".json": "a JSON file",
    ".jsonl": "a file of JSON lines", ".csv": "a table", ".tsv": "a table",
    ".parquet": "a Parquet file", ".html": "an HTML page", ".svg": "an SVG picture",
    ".npz": "a file of NumPy's arrays",
    ".bin": "a file of PyTorch's", ".pt": "a file of PyTorch's", ".pth": "a file of PyTorch's",
    ".onnx": "an ONNX file", ".gz": "a compressed file", ".zst": "a compressed file",
    ".zip": "an archive",
}  # fmt: skip


def check_target(path: PathLike, folder: bool = False, ending: str = "") -> None:
    """Refuses a file (or `folder`) that cannot be written, before work is done for it.

    Missing parent folders will be made. A name must not end like another format's: a folder's like
    no file's, a file's as `ending`, such as ".gguf", or like no known format's.

    Raises OSError naming the path, ValueError for its ending.
    """
    place = user_path(path)
    _check_ending(place, os.fsdecode(path).endswith(os.sep), folder, ending)
    whole = Path(os.path.abspath(place))
    if whole.is_dir() != folder and whole.exists():
        number, what = (
            (errno.ENOTDIR, "a file is there; a folder is needed")
            if folder
            else (errno.EISDIR, "it is a folder")
        )
        raise OSError(number, f"cannot write: {what}", os.fspath(place))
    above = (
        whole
        if folder and whole.is_dir()
        else next(path for path in whole.parents if os.path.lexists(path))
    )
    if not above.is_dir():
        raise OSError(errno.ENOTDIR, f"cannot write: {above} is not a folder", os.fspath(place))
    if not os.access(above, os.W_OK | os.X_OK):
        raise OSError(
            errno.EACCES, f"cannot write: no permission to write into {above}", os.fspath(place)
        )


def _check_ending(place: Path, named_as_folder: bool, folder: bool, ending: str) -> None:
    """See `check_target`. A folder that exists has proven its name."""
    other = _ENDINGS.get(place.suffix.lower())
    if folder and other and not place.exists():
        ways = "; `pyloss export --to gguf` and `pyloss quantize --to q4_k_m` write GGUF files"
        raise ValueError(
            f"{place} is named like {other}, and a folder is written: give a folder's name"
            f"{ways if 'GGUF' in other else ''}"
        )
    if not folder and named_as_folder:
        raise ValueError(f"{place}{os.sep} is named like a folder, and a file is written")
    if ending and other and place.suffix.lower() != ending:
        raise ValueError(
            f"{place} is named like {other}, and {_ENDINGS[ending]} is written: give a name that "
            f"ends in {ending}"
        )


def temporary_beside(target: Path) -> Path:
    """A new name beside `target`, which `sweep` knows."""
    return target.with_name(f".{target.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A new file in the folder of `path`, which replaces `path` if the block succeeds.

    The new file is flushed to the disk before it is renamed, so `path` always holds the old content
    or all of the new. If anything fails, the new file is removed and `path` stays.

    Raises:
        OSError: such as a full disk, or a missing or read-only folder; names `path`.
    """
    # A symbolic link stays; its target is replaced.
    target = Path(os.path.realpath(user_path(path)))
    beside = temporary_beside(target)
    try:
        try:
            os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield beside
            _flush(beside)
            with suppress(FileNotFoundError):
                os.chmod(beside, target.stat().st_mode & 0o7777)
            os.replace(beside, target)
        finally:
            with suppress(OSError):
                os.unlink(beside)
    except OSError as error:
        number = error.errno or 0
        raise OSError(
            number, f"cannot write: {error.strerror or error}", os.fspath(path)
        ) from error
    # The rename itself lasts only once the folder is flushed; some file systems cannot, and the
    # data is safe anyway.
    with suppress(OSError):
        _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def process_is_alive(pid: int) -> bool:
    """Whether any user's process with this number runs on this host."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def sweep(folder: Path) -> None:
    """Removes temporary files and folders that a killed process left in `folder`.

    Files of live processes stay. Call it with the folder's lock: then no process of another host,
    which looks dead from here, writes there.
    """
    for name in os.listdir(folder):
        match = _TEMPORARY.fullmatch(name)
        if match and 0 < int(match[1]) < 1 << 31 and not process_is_alive(int(match[1])):
            path = folder / name
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_bytes(path: PathLike, data: bytes) -> None:
    """Write `data` to `path`, wholly or not at all. Raises OSError naming `path`."""
    with replacing(path) as beside:
        beside.write_bytes(data)


def write_text(path: PathLike, text: str) -> None:
    """Write `text` as UTF-8 to `path`, wholly or not at all. Raises OSError naming `path`."""
    write_bytes(path, text.encode())


def append_whole(path: PathLike, text: str) -> None:
    """Append `text` to a file by one call of the system, which a killed process does not split.

    Raises OSError naming the file, which then ends as before.
    """
    raw = text.encode()
    try:
        descriptor = os.open(user_path(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            # A file system that is nearly full takes a part.
            if os.write(descriptor, raw) != len(raw):
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(
            error.errno or 0, f"cannot write: {error.strerror}", os.fspath(path)
        ) from error


def write_json(path: PathLike, value: Any, sort_keys: bool = False) -> None:
    """Write `value` as indented JSON to `path`, wholly or not at all.

    Raises:
        TypeError, ValueError: `value` is not JSON (NaN and infinities are not); nothing is written.
        OSError: naming `path`.
    """
    text = (
        json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys) + "\n"
    )
    # Names of files that are not UTF-8 hold lone surrogates. This escape of one is also JSON's.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


_KINDS = {
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


def kind_of(value: Any) -> str:
    """The type of a JSON value in words."""
    return "null" if value is None else _KINDS.get(type(value), f"of type {type(value).__name__}")


def kind_named(kind: type) -> str:
    """The words of `kind_of` for the values of a type."""
    return _KINDS[kind]


def read_json(path: PathLike, kind: type = dict) -> Any:
    """The JSON value in `path`, of the Python type `kind`. A byte order mark is allowed.

    Raises:
        FormatError: the file is not UTF-8 or not JSON (with the line), or holds another type.
        OSError: the file cannot be read.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise FormatError(
            path, f"line {error.lineno} column {error.colno}", f"not JSON: {error.msg}"
        ) from None
    except FormatError:
        raise
    # Nested thousands deep, or an integer of thousands of digits.
    except (RecursionError, ValueError) as error:
        raise FormatError(path, None, f"not JSON that can be read: {error}") from None
    if not isinstance(value, kind):
        raise FormatError(path, None, f"holds {kind_of(value)}, expected {kind_named(kind)}")
    return value


def read_text(path: PathLike) -> str:
    """The UTF-8 text in `path`, without a byte order mark.

    Raises:
        FormatError: it is not a regular file, not UTF-8, or a Git LFS pointer.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        content = file.read()
    _refuse_pointer(path, content[:_POINTER_BYTES])
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise FormatError(path, f"byte {error.start}", "not UTF-8 text") from None


def map_file(path: PathLike) -> np.ndarray:
    """The bytes of `path` as a read-only uint8 array [size] over a memory map.

    Raises:
        FormatError: the file is empty, not a regular file, or a Git LFS pointer.
        OSError: the file cannot be opened.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise FormatError(path, None, "the file is empty")
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    _refuse_pointer(path, data[:_POINTER_BYTES].tobytes())
    return data


def open_regular(path: PathLike) -> BinaryIO:
    """`path` opened for reading bytes.

    Raises:
        FormatError: it is not a regular file: a pipe would block, and a device may never end.
        OSError: the file cannot be opened.
    """
    # Opening a pipe waits for its writer unless it is asked not to.
    flags = (
        os.O_RDONLY
        | getattr(os, "O_NONBLOCK", 0)
        | getattr(os, "O_CLOEXEC", 0)
        | getattr(os, "O_BINARY", 0)
    )
    descriptor = os.open(user_path(path), flags)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kinds = (
            (stat.S_ISDIR, "a folder"),
            (stat.S_ISFIFO, "a pipe"),
            (stat.S_ISCHR, "a device"),
            (stat.S_ISBLK, "a device"),
        )
        kind = next((name for test, name in kinds if test(mode)), "no regular file")
        raise FormatError(path, None, f"this is {kind}; expected a regular file")
    return os.fdopen(descriptor, "rb")


# the content of a large file in a clone without Git LFS
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 64


def _refuse_pointer(path: PathLike, start: bytes) -> None:
    if start.removeprefix(codecs.BOM_UTF8).startswith(_POINTER):
        raise FormatError(
            path,
            None,
            "this is a Git LFS pointer; the file itself was not downloaded: run git lfs pull",
        )


def write_safetensors(
    path: PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays as a safetensors file, wholly or not at all.

    Arrays may have any strides. The type of bfloat16 is `ml_dtypes.bfloat16`.

    Raises:
        TypeError: a name or metadata that is not text, a value that is not an array, or one of a
            dtype without a safetensors name.
        OSError: naming `path`.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    tensors = {
        name: array.numpy() if isinstance(array, DeviceArray) else array
        for name, array in tensors.items()
    }
    for name, array in tensors.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise TypeError(
                f"tensors must map str to numpy.ndarray, got {name!r}: {type(array).__name__}"
            )
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata must map str to str, got {key!r}: {text!r}")
    # The library reads each array's memory from its first byte on, and trusts that it is
    # contiguous.
    dense = {name: np.require(array, requirements="C") for name, array in tensors.items()}
    with replacing(path) as beside:
        mode = beside.stat().st_mode & 0o7777
        # The library has temporary files of names of its own: in a folder that `sweep` removes.
        folder = temporary_beside(beside)
        folder.mkdir()
        try:
            save_file(dense, folder / "tensors", metadata=dict(metadata) if metadata else None)
            os.replace(folder / "tensors", beside)
        except SafetensorError as error:
            system = re.search(r"os error (\d+)", str(error))
            if system is None:
                raise TypeError(f"tensors cannot be written as safetensors: {error}") from None
            raise OSError(int(system[1]), os.strerror(int(system[1]))) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        # The library's file may be read by its owner only.
        os.chmod(beside, mode)
        if metadata and len(metadata) > 1:
            _sort_metadata(beside)


def _sort_metadata(path: Path) -> None:
    """Sorts the keys of the metadata, which the library writes in any order.

    So the same content makes the same file.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        before = file.read(size)
        header = json.loads(before)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        after = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(after.ljust(size))
