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
    if not _BY_MODULE and not any(_is_importing(name) for name in ("pyloss", "pyloss.cli")):
        _signal.default_int_handler(number, frame)
    os.write(2, b"pyloss: interrupted\n")
    # Nothing was begun, so nothing has to be ended; an exception would pass through half-imported
    # modules, some of which turn it into another.
    os._exit(_INTERRUPTED)


def _is_importing(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _module() -> str:
    """The module that the process runs by `python -m`, while its package is imported; else ""."""
    if (sys.argv or [""])[0] != "-m":
        return ""
    words = sys.orig_argv
    at = words.index("-m") if "-m" in words else len(words)
    return next((w[2:] for w in words if w.startswith("-mpyloss")), "".join(words[at + 1 : at + 2]))


# The modules of mlx_lm's names are commands whose imports go on after this package's.
_BY_MODULE = _module().startswith("pyloss.mlx_lm")


def _is_command() -> bool:
    """Whether the process is `pyloss`, or `python -m` of a command of this package."""
    return (
        _BY_MODULE or _module() == "pyloss" or os.path.basename((sys.argv or [""])[0]) == "pyloss"
    )


# Ctrl-C may be ignored, as in `nohup pyloss ... &`.
if _is_command() and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    try:
        _signal.signal(_signal.SIGINT, _end)
    except ValueError:  # imported by another thread than the main one, which gets no signals
        pass
