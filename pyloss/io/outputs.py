"""What an earlier run or export left stays: before anything takes its place, it moves into a folder `previous-N` beside it.

The files keep their names there, all of a set in one folder: `adapters/previous-1` is an adapter, `fused/previous-1` a model.
The numbers rise: 1 is the oldest. A folder under way is called `previous-N.part`; if the process dies, the next one finishes it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyloss.io.locks import LOCK_FILE, locked

log = logging.getLogger("pyloss")

_NAME = re.compile(r"previous-(\d{1,9})(\.part)?")


def make_folder(folder: Path, kind: str = "folder") -> None:
    """Make `folder` and those above it. OSError naming it, and saying that it is the `kind`, if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno or 0, f"cannot make the {kind}: {error.strerror}", str(folder)
        ) from error


def set_aside(folder: Path, moved: Iterable[str], copied: Iterable[str] = ()) -> Path | None:
    """Move the files `moved` of `folder`, as far as they are there, into a new `previous-N`; gives that folder.

    The files `copied` are copied there too, if any is moved. Nothing is there to move: None, and nothing changes.
    """
    there = [name for name in moved if os.path.lexists(folder / name)]
    if not there:
        return None
    part = _begun(folder, there)
    part.mkdir(exist_ok=True)
    for name in copied:
        if (folder / name).is_file() and not (part / name).exists():
            shutil.copy2(folder / name, part / name)
    for name in there:
        _move(folder / name, part / name, lambda link: os.path.join(os.pardir, link))
    aside = part.with_suffix("")
    os.rename(part, aside)
    return aside


def _move(source: Path, target: Path, turn: Callable[[str], str]) -> None:
    """Rename a file; a relative link, which means another place from there, becomes `turn` of what it says."""
    if source.is_symlink() and not os.path.isabs(link := os.readlink(source)):
        os.symlink(turn(link), target)
        source.unlink()
    else:
        os.replace(source, target)


def _begun(folder: Path, names: list[str]) -> Path:
    """The `previous-N.part` that a dead process began, unless it holds one of `names`; else the next one."""
    found = {
        int(match[1]): match for name in os.listdir(folder) if (match := _NAME.fullmatch(name))
    }
    for match in found.values():
        if match[2] and not any(os.path.lexists(folder / match[0] / name) for name in names):
            return folder / match[0]
    return folder / f"previous-{max(found, default=0) + 1}.part"


@contextmanager
def output(
    path: Path, names: Iterable[str] | None = None, overwrite: bool = False
) -> Iterator[None]:
    """Write an output in the block: the files `names` of the folder `path`, or without `names` the file `path`.

    The folder is made, and locked meanwhile. Files of these names that were there are set aside, which the log says, or with
    `overwrite` removed once the block has ended well. When it fails they come back.

    Raises OSError naming what cannot be made or written, BlockingIOError while another process writes there.
    """
    single = names is None
    folder = path.parent if single else path
    make_folder(folder)
    with locked(folder, f".{path.name[:100]}.lock" if single else LOCK_FILE):
        if single and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder: give the name of a file", str(path))
        aside = set_aside(folder, [path.name] if names is None else names)
        try:
            yield
        except BaseException:
            if aside is not None:
                _bring_back(aside, folder)
            raise
        if aside is not None and overwrite:
            shutil.rmtree(aside, ignore_errors=True)
        elif aside is not None:
            log.warning("%s", kept_note(aside))


def kept_note(aside: Path) -> str:
    """The line that tells a user what was kept, and where."""
    names = sorted(os.listdir(aside))
    said = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"kept what was there before ({said}) in {aside}"


def _bring_back(aside: Path, folder: Path) -> None:
    for entry in list(aside.iterdir()):
        with suppress(FileNotFoundError):
            (folder / entry.name).unlink()
        _move(entry, folder / entry.name, lambda link: link.removeprefix(os.pardir + os.sep))
    with suppress(OSError):
        aside.rmdir()
