"""All text goes out here: messages to standard error, results to standard output.

No function raises an error of its stream. Characters that the encoding lacks are escaped. Text that
cannot be written is dropped (a closed pipe or descriptor, a full disk), so lost output never ends a
run. `lost()` says whether the results arrived.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO

#: why the text of `out` was lost, or None while all of it arrived
_lost: str | None = None
#: why a log on standard output was lost; what `out` writes from then on is lost, too
_log_lost: str | None = None


class Console:
    """A text stream that never raises, over `stream`, or over `sys.NAME` at the time of each call.

    It has the methods that progress bars need: `write`, `flush`, `isatty`, `fileno`, `encoding`.
    With `log` it carries no results, so a loss of its text is none of the command's.
    """

    def __init__(
        self, name: str = "stderr", stream: TextIO | None = None, log: bool = False
    ) -> None:
        self.name = name
        self._stream = stream
        self._log = log

    @property
    def stream(self) -> TextIO | None:
        """The stream below, or None if the process started without it."""
        return self._stream if self._stream is not None else getattr(sys, self.name)

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Writes `text` as far as possible; returns its length."""
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
        if _piped:
            return False
        try:
            return self.stream is not None and self.stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """The descriptor below. Raises OSError if there is none."""
        if self.stream is None:
            raise OSError("the stream is closed")
        return self.stream.fileno()

    def _dropped(self, why: str) -> None:
        global _lost, _log_lost
        if self.name == "stdout" and self._log:
            _log_lost = _log_lost or why
        elif self.name == "stdout":
            _lost = _lost or why


_out, _err = Console("stdout"), Console("stderr")
#: the bar on the terminal, which makes room for the lines of `say`
_bar: Any = None
#: whether messages are left out; results and errors are written
_quiet = False
#: whether no stream is a user's terminal
_piped = False
#: whether results are left out, too
_silent = False


def be_quiet(quiet: bool) -> None:
    """Leaves out the lines of `say` and of progress from now on, or not; see `begin`."""
    global _quiet
    _quiet = quiet


def be_piped() -> None:
    """Take no stream for a terminal: mpirun gives its processes one, and reads them itself."""
    global _piped
    _piped = True


def be_silent() -> None:
    """Leaves out results as well, until `begin`: another process writes them for this one."""
    global _silent, _quiet
    _silent = _quiet = True


def is_quiet() -> bool:
    """Whether lines about the work are left out."""
    return _quiet


def make_room(bar: Any) -> None:
    """Lets lines go above a bar, which has tqdm's `clear` and `refresh`; None: there is none."""
    global _bar
    _bar = bar


def colored() -> bool:
    """Whether results may have colors: on a terminal, unless NO_COLOR or TERM=dumb forbid them."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return _out.isatty() and not plain


def reason(error: Exception) -> str:
    """The system's message, without number and path."""
    return getattr(error, "strerror", None) or str(error)


def visible(text: str) -> str:
    """Text with control characters other than tabs and line breaks escaped, as in `\\x1b`."""
    return "".join(
        c if c in "\n\t" or ord(c) >= 160 or c.isprintable() else f"\\x{ord(c):02x}" for c in text
    )


def out(text: str, end: str = "\n", flush: bool = False, foreign: bool = False) -> None:
    """Write a result to standard output. Never raises: `lost()` says whether it arrived.

    On a terminal, control characters of `foreign` text, such as a model's, are escaped: they could
    move the cursor, or make the terminal answer.
    """
    if _silent:
        return
    if foreign and _out.isatty():
        text = visible(text)
    if _log_lost is not None:
        _out._dropped(_log_lost)
    _out.write(text + end)
    if flush:
        _out.flush()


def say(text: str, always: bool = False) -> None:
    """Write a line about the work to standard error. Never raises.

    With --quiet only those that come `always`, such as errors, are written.
    """
    if _quiet and not always:
        return
    if _bar is not None:
        _bar.clear()
    _err.write(text + "\n")
    _err.flush()
    if _bar is not None:
        _bar.refresh()


def ask(text: str) -> str:
    """The line that a user types behind `text`. Raises EOFError at the end of the input.

    Where standard output is no terminal, `text` goes to standard error.
    """
    _out.flush()
    if _out.isatty():
        return input(text)
    _err.write(text)
    _err.flush()
    return input()


def lost() -> bool:
    """Whether text of `out` is known to be lost; `flush=True` makes sure."""
    return _lost is not None


def why_lost() -> str:
    """The system's words for the first loss, such as "Broken pipe"; empty while there is none."""
    return _lost or ""


def begin() -> None:
    """Forgets earlier losses, and opens the null device for closed standard descriptors.

    Otherwise the next open file would get that descriptor, and a library's output would go into it.
    """
    global _lost, _log_lost, _silent
    _lost = _log_lost = None
    _silent = False
    be_quiet(False)
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def finish() -> bool:
    """Flushes both streams; returns whether all text of `out` arrived.

    A stream that cannot be written gets the null device, since the interpreter flushes it once
    more.
    """
    for console in (_out, _err):
        stream = console.stream
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            if console is _err or _log_lost is None:
                console._dropped(reason(error))
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
                stream.flush()
    return not lost()
