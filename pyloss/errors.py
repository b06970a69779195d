"""The exceptions pyloss adds to Python's own, and the wording that messages share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

# Characters of a FormatError's parts.
_LONGEST_WHAT, _LONGEST_REASON = 200, 2000


def cut(text: str, longest: int) -> str:
    """`text`, without its middle if it is longer than `longest`."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


class FormatError(ValueError):
    """A file that is damaged, truncated, or not of the kind it should be.

    Attributes:
        path: the file, as text.
        what: the tensor, key or part concerned; None for the whole file.
        reason: what is wrong with it, and what would be right.
    """

    def __init__(self, path: str | os.PathLike[str], what: str | None, reason: str) -> None:
        self.path = os.fspath(path)
        # Names and values of a damaged file may be as long as the file.
        self.what = what if what is None else cut(what, _LONGEST_WHAT)
        self.reason = cut(reason, _LONGEST_REASON)
        # All three stay in `args`, so that the error survives pickling between processes.
        super().__init__(self.path, self.what, self.reason)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.path, self.what, self.reason) if part)


class DeviceError(RuntimeError):
    """An OpenCL device or its driver failed.

    The message names the operation, the device and OpenCL's error, and has the log of a program
    that could not be built. Too little memory is a `MemoryError` instead. The processor remains
    usable.
    """


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` may be a typo of, or None."""
    import difflib

    found = difflib.get_close_matches(name, list(names), 1, 0.75)
    return found[0] if found else None


def choices(texts: Sequence[str]) -> str:
    """The texts between commas, on one line; the first 8 of a longer list, and how many follow."""
    more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
    return ", ".join(texts[:8]) + more


def listed(problems: list[str]) -> str:
    """The problems as indented lines, each begun by a line break; long lists are cut."""
    more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "".join(f"\n  {problem}" for problem in problems[:20] + more)


def counted(count: int, thing: str, plural: str = "") -> str:
    """ "1 update", "2 updates"; `plural` where an s does not make it."""
    return f"{count} {thing if count == 1 else plural or thing + 's'}"


def size_text(size: float) -> str:
    """A number of bytes as text: in GB from one on, else in MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def said(error: BaseException) -> str:
    """An exception's message, or its type if it has none, like MemoryError."""
    return str(error) or type(error).__name__
