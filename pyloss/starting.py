"""Ctrl-C while the command line is imported: the process ends with code 130, without a traceback.

`pyloss/__init__.py` imports this first. It does nothing in a program that imports the library:
there Ctrl-C raises KeyboardInterrupt, as everywhere.
"""

from __future__ import annotations

# The module `signal` takes milliseconds to import, in which Ctrl-C would not be handled yet.
import _signal  # type: ignore[import-not-found]
import os
import sys

_INTERRUPTED = 130


def interrupt_as_usual() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again, for a command that handles it."""
    if _signal.getsignal(_signal.SIGINT) is _end:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)


def _end(number: int, frame: object) -> None:
    # In another program of the same name, which goes on after its imports.
    if not any(_is_importing(name) for name in ("pyloss", "pyloss.cli")):
        _signal.default_int_handler(number, frame)
    os.write(2, b"pyloss: interrupted\n")
    # Nothing was begun, so nothing has to be ended; an exception would pass through half-imported
    # modules, some of which turn it into another.
    os._exit(_INTERRUPTED)


def _is_importing(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _is_command() -> bool:
    """Whether the process is `pyloss` or `python -m pyloss`, whose package is imported first."""
    program = (sys.argv or [""])[0]
    if program == "-m":
        words = sys.orig_argv
        at = words.index("-m") if "-m" in words else -1
        return "-mpyloss" in words or (at >= 0 and words[at + 1 : at + 2] == ["pyloss"])
    return os.path.basename(program) == "pyloss"


# Ctrl-C may be ignored, as in `nohup pyloss ... &`.
if _is_command() and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    try:
        _signal.signal(_signal.SIGINT, _end)
    except ValueError:  # imported by another thread than the main one, which gets no signals
        pass
