"""Writing outputs; earlier outputs move into `previous-N` in the same folder.

The files of a set keep their names in one folder: `adapters/previous-1` is an adapter,
`fused/previous-1` a model. 1 is the oldest. An unfinished folder is `previous-N.part`; if its
process dies, the next one completes it.
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
    """Makes `folder` and its parents.

    OSError names the folder and its `kind`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno or 0, f"cannot make the {kind}: {error.strerror}", str(folder)
        ) from error


@contextmanager
def folder_for(folder: Path, kind: str = "folder") -> Iterator[None]:
    """Makes `folder` and its parents; if the block fails, those that it made and that are empty go.

    OSError as of `make_folder`.
    """
    places = [folder, *folder.parents]
    missing = [place for place in places if not os.path.lexists(place)]
    try:
        make_folder(folder, kind)
        yield
    except BaseException:
        with suppress(OSError):  # one that is not empty, and so the ones above it
            for place in missing:
                place.rmdir()
        raise


def set_aside(folder: Path, moved: Iterable[str], copied: Iterable[str] = ()) -> Path | None:
    """Moves the existing files of `moved` in `folder` into a new `previous-N`, and returns it.

    Copies of the files `copied` go there too. Returns None, without changes, if no file exists.
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
    """Renames a file; `turn` rewrites a relative link for its new folder."""
    if source.is_symlink() and not os.path.isabs(link := os.readlink(source)):
        os.symlink(turn(link), target)
        source.unlink()
    else:
        os.replace(source, target)


def _begun(folder: Path, names: list[str]) -> Path:
    """A `previous-N.part` of a dead process without any of `names`, or else the next one."""
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
    """Writes an output in the block: the files `names` of the folder `path`, or the file `path`.

    Makes and locks the folder. Existing files or folders of these names are set aside, which the
    log says; with `overwrite` they are removed once the block has succeeded. If it fails, they come
    back, and a folder that was made here goes if it is empty.

    Raises:
        OSError: names the file or folder that cannot be made or written.
        BlockingIOError: another process writes there.
    """
    single = names is None
    folder = path.parent if single else path
    lock = f".{path.name[:100]}.lock" if single else LOCK_FILE
    with folder_for(folder), locked(folder, lock):
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
    """The line that tells a user which files were kept, and where."""
    names = sorted(os.listdir(aside))
    said = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"kept what was there before ({said}) in {aside}"


def _bring_back(aside: Path, folder: Path) -> None:
    for entry in list(aside.iterdir()):
        with suppress(FileNotFoundError):
            place = folder / entry.name
            shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
        _move(entry, folder / entry.name, lambda link: link.removeprefix(os.pardir + os.sep))
    with suppress(OSError):
        aside.rmdir()
