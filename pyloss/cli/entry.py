"""The entry point: runs one command, and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from pyloss import starting
from pyloss.cli import invocation
from pyloss.cli.flags import build_parser
from pyloss.cli.parser import UsageError
from pyloss.distributed import Launch, faults, launch
from pyloss.errors import DeviceError, cut
from pyloss.io import bars, console

#: The errors of bad input and of a machine that lacks something. Others are bugs, and show a
#: traceback.
BAD_INPUT = (ValueError, OSError, ImportError, NotImplementedError, MemoryError, DeviceError)


#: the commands that divide their work among the ranks of mpirun or srun
TOGETHER = ("train", "distill", "eval", "generate")


class Terminated(KeyboardInterrupt):
    """SIGTERM, where a command tells it from Ctrl-C."""


class _Lines(logging.Handler):
    """The library's log as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        console.say(self.format(record), always=record.levelno >= logging.WARNING)


def main(argv: Sequence[str] | None = None, prog: str = "pyloss") -> int:
    """Runs one command and returns its exit code; `prog` is the program's name in help texts.

    0: done. 1: training failed, or standard output could not be written. 2: bad input, reported in
    one line on standard error. 130: Ctrl-C. 143: SIGTERM, which ends a command as Ctrl-C does.
    """
    try:
        starting.interrupt_as_usual()
        return _reported(argv, prog)
    except KeyboardInterrupt as interrupt:  # before or after the command
        return _fail(interrupt, 130, "interrupted")


def _reported(argv: Sequence[str] | None, prog: str) -> int:
    """Runs one command; its exit code says also whether standard output was written."""
    console.begin()
    with _terminated_as_interrupted() as terminated:
        code = _run(argv, prog)
    if code == 130 and terminated:
        code = 143
    if not console.finish() and code == 0:
        code = 1
        # A closed pipe is no error to report: `head` closes it on purpose.
        if console.why_lost() != os.strerror(errno.EPIPE):
            text = f"pyloss: error: cannot write to standard output: {console.why_lost()}"
            console.say(text, always=True)
    return code


@contextmanager
def _terminated_as_interrupted() -> Iterator[list[int]]:
    """Turns SIGTERM in the block into KeyboardInterrupt, so that a run saves as after Ctrl-C.

    Yields a list of the signals received.
    """
    seen: list[int] = []
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield seen  # the embedding program handles it, or this thread may not
        return

    def interrupt(number: int, frame: Any) -> None:
        seen.append(number)
        raise Terminated

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(argv: Sequence[str] | None, prog: str) -> int:
    """Parses and runs a command; returns the exit code for every error of `BAD_INPUT`."""
    log, handler = logging.getLogger("pyloss"), _Lines()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    command, verbose = "", False
    try:
        parser = build_parser(prog)
        if "_ARGCOMPLETE" in os.environ:  # a shell asks for the words that may follow
            _complete(parser)
        arguments = vars(parser.parse_args(argv))
        invocation.remember(sys.argv[1:] if argv is None else argv)
        command = arguments.pop("command")
        _check_launch(command, launch())
        both = [bool(arguments.pop(f"messages_{name}")) for name in ("quiet", "verbose")]
        if all(both):
            raise ValueError("--quiet and --verbose are given: give one of them")
        quiet, verbose = both
        console.be_quiet(quiet)
        bars.show(True)
        if verbose:
            _say_versions()
        from pyloss.cli import commands

        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            code = commands.COMMANDS[command](arguments)
            # A rank that is done sooner keeps taking signals until all are.
            faults.ended_together()
            return code
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except KeyboardInterrupt as interrupt:
        code = 143 if isinstance(interrupt, Terminated) else 130
        return _fail(interrupt, code, str(interrupt) or "interrupted", verbose)
    except FloatingPointError as error:
        return _fail(error, 1, f"error: {error}", verbose)
    except BAD_INPUT as error:
        return _fail(error, 2, f"error: {_text(error, command)}", verbose)
    finally:
        bars.show(False)
        log.removeHandler(handler)
        log.setLevel(level)


def _text(error: BaseException, command: str) -> str:
    """The message of an error of `command`."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{cut(os.fsdecode(error.filename), 500)}: {error.strerror}"
    if isinstance(error, MemoryError):
        options = {
            "train": "--batch-size or --max-seq-length, or --grad-checkpoint,",
            "eval": "--batch-size or --max-seq-length",
        }
        options["bench"] = options["distill"] = options["train"]
        advice = f"; a smaller {options[command]} needs less" if command in options else ""
        return f"out of memory{advice}" + (f" ({error})" if str(error) else "")
    # a quoted value may be of any length
    return cut(str(error), 3000) or type(error).__name__


def _warn(
    message: Warning | str,
    category: Any,
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    """Prints a warning without its place in the code."""
    console.say(f"pyloss: warning: {' '.join(str(message).split())}", always=True)


def _fail(error: BaseException, code: int, text: str, verbose: bool = False) -> int:
    """Prints an error as one line; returns `code`.

    With --verbose or PYLOSS_DEBUG=1 a traceback comes first.
    """
    if verbose or os.environ.get("PYLOSS_DEBUG") == "1":
        import traceback

        console.say("".join(traceback.format_exception(error)).rstrip(), always=True)
    line = f"pyloss: {' '.join(text.split())}"
    if not faults.fail(line, code):
        if _speaks(error):
            console.say(line, always=True)
        else:
            time.sleep(faults.TOGETHER_SECONDS)  # the launcher ends all when the first one ends
    return code


def _check_launch(command: str, found: Launch | None) -> None:
    """Raises UsageError for a command that several ranks would run each for itself."""
    if found is not None and found.size > 1 and command not in TOGETHER:
        raise UsageError(
            f"{found.launcher} started {found.size} processes, and pyloss {command} works in one: "
            f"start it by itself (several can {', '.join(TOGETHER)})"
        )


def _speaks(error: BaseException) -> bool:
    """Whether this process prints an error from before it joined others.

    All ranks have the same command line, so rank 0 speaks for all about that.
    """
    if not isinstance(error, UsageError):
        return True
    try:
        found = launch()
    except ValueError:
        return True
    return found is None or found.rank == 0


def _complete(parser: Any) -> None:
    """Answers a shell by argcomplete, which ends the process; without it nothing is done."""
    with suppress(ImportError):
        import argcomplete

        argcomplete.autocomplete(parser)


def _say_versions() -> None:
    import platform

    import pyloss

    info = pyloss.info()
    console.say(
        f"pyloss {info['version']}, {info['isa']}, {info['threads']} threads, "
        f"Python {platform.python_version()}, NumPy {info['numpy']}, {platform.platform()}"
    )
