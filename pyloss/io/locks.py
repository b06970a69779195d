"""One writer at a time: a lock file in the folder that a run or an export writes to.

The kernel holds the lock (`flock`), and it ends with the process. So no lock is stale, and two
processes cannot both take one over. Linux carries it over NFS. The file's text (process, host,
start) is for the message. It decides only on file systems without `flock`, where a dead process of
this host holds no lock.

A lock belongs to the open file, which `fork` shares. Children close it, so that none keeps it
longer than its parent.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyloss.io.files import process_is_alive, sweep

#: the lock of a folder as a whole
LOCK_FILE = ".pyloss.lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()


@contextmanager
def locked(folder: Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Hold the lock `name` of an existing folder, and remove temporary files of dead processes.

    Raises:
        BlockingIOError: another process holds the lock; names the process.
        OSError: the folder cannot be written to; names the folder.
    """
    path, owner = folder / name, os.getpid()
    descriptor = _take(path)
    _held.add(descriptor)
    try:
        sweep(folder)
        yield
    finally:
        if os.getpid() == owner:
            # Removed while it is held, so it is no other process's file. A process that has opened
            # it meanwhile sees that it is gone.
            with suppress(OSError):
                path.unlink()
            _held.discard(descriptor)
            os.close(descriptor)


def _take(path: Path) -> int:
    """A descriptor of the lock file, locked, with this process written into it."""
    while True:
        try:
            # Following a symbolic link here could overwrite another file.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise OSError(
                error.errno or 0, f"cannot write here: {error.strerror}", str(path.parent)
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, *_NO_LOCKS):
                    raise OSError(
                        error.errno or 0, f"cannot lock: {error.strerror}", str(path)
                    ) from error
                holder = _read(descriptor)
                if error.errno not in _NO_LOCKS or _may_run(holder):
                    raise _busy(path, holder) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    _write(descriptor)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the file between the opening and the lock


def _write(descriptor: int) -> None:
    said = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(said).encode() + b"\n", 0)


def _read(descriptor: int) -> dict[str, Any]:
    """The holder's text; empty if it has not written it yet."""
    with suppress(ValueError, OSError):
        said = json.loads(os.pread(descriptor, 4096, 0))
        if isinstance(said, dict) and isinstance(said.get("pid"), int):
            return said
    return {}


def _may_run(holder: dict[str, Any]) -> bool:
    if not holder or holder["pid"] == os.getpid():
        return False
    return holder.get("host") != socket.gethostname() or process_is_alive(holder["pid"])


def _busy(path: Path, holder: dict[str, Any]) -> BlockingIOError:
    who = "another process"
    if holder:
        who = f"process {holder['pid']} on {holder.get('host')}, started {holder.get('started')}"
    text = (
        f"another run is writing here: {who} (its lock is {path.name}); wait for it, "
        "or give another place"
    )
    return BlockingIOError(errno.EWOULDBLOCK, text, str(path.parent))


def _close_in_child() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
