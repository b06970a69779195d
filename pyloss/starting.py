"""Ctrl-C while the command line is imported: the process ends with code 130, without a traceback.

`pyloss/__init__.py` imports this first. It does nothing in a program that imports the library:
there Ctrl-C raises KeyboardInterrupt, as everywhere.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_INTERRUPTED = 130


def interrupt_as_usual() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again, for a command that handles it."""
    import signal

    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: Any) -> None:
    import signal

    # In another program of the same name, which goes on after its imports.
    if not any(_is_importing(name) for name in ("pyloss", "pyloss.cli")):
        signal.default_int_handler(number, frame)
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


def _begin() -> None:
    # Imported here, since a program that imports the library need not wait for them.
    import signal
    import threading

    if (
        threading.current_thread() is threading.main_thread()
        # Ctrl-C may be ignored, as in `nohup pyloss ... &`.
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _end)


if _is_command():
    _begin()
