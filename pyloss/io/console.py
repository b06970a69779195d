"""The one way out for text: lines to standard error, results to standard output.

Nothing here raises because of the stream that it writes to. Characters that the stream's encoding lacks are written as
escapes, and text that cannot be written (a closed pipe, a closed descriptor, a full disk) is dropped, so that lost output
never ends a run. Whoever owes the user a result asks `lost()` whether it arrived.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

#: why the text of `out` was lost, or None while all of it arrived
_lost: str | None = None


class Console:
    """A text stream that never raises, over `stream` or, without it, over what `sys.NAME` is at each call.

    It has what progress bars ask of a file: `write`, `flush`, `isatty`, `fileno` and `encoding`.
    """

    def __init__(self, name: str = "stderr", stream: TextIO | None = None) -> None:
        self.name = name
        self._stream = stream

    @property
    def stream(self) -> TextIO | None:
        """The stream below; None where the process was started without it."""
        return self._stream if self._stream is not None else getattr(sys, self.name)

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write `text` as far as that is possible; gives its length."""
        stream = self.stream
        if stream is None:
            self._dropped("it is closed")
            return len(text)
        try:
            try:
                stream.write(text)
            except UnicodeEncodeError:
                stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._dropped(reason(error))
        return len(text)

    def flush(self) -> None:
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError) as error:
            self._dropped(reason(error))

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """The descriptor below. Raises OSError where there is none."""
        if self.stream is None:
            raise OSError("the stream is closed")
        return self.stream.fileno()

    def _dropped(self, why: str) -> None:
        global _lost
        if self.name == "stdout" and _lost is None:
            _lost = why


_out, _err = Console("stdout"), Console("stderr")


def reason(error: Exception) -> str:
    """What the system said, without numbers and paths."""
    return getattr(error, "strerror", None) or str(error)


def out(text: str, end: str = "\n", flush: bool = False) -> None:
    """Write a result to standard output. Never raises: `lost()` says whether it arrived."""
    _out.write(text + end)
    if flush:
        _out.flush()


def say(text: str) -> None:
    """Write a line about the work to standard error. Never raises."""
    _err.write(text + "\n")
    _err.flush()


def lost() -> bool:
    """Whether text of `out` could not be written, as far as this is known (`flush=True` makes sure)."""
    return _lost is not None


def why_lost() -> str:
    """The system's words for the first loss, such as "Broken pipe"; empty while there is none."""
    return _lost or ""


def begin() -> None:
    """Forget earlier losses, and give closed standard descriptors to the null device.

    Else the next file that is opened takes the place of a closed descriptor, and what a library prints would go into it.
    """
    global _lost
    _lost = None
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def finish() -> bool:
    """Flush both streams. Those that cannot be written go to the null device, as the interpreter flushes them once more
    when it ends. Gives whether all text of `out` arrived."""
    for console in (_out, _err):
        stream = console.stream
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            console._dropped(reason(error))
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
                stream.flush()
    return not lost()
