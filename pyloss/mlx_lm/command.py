"""What the commands of mlx-lm's names share: errors as one line, and sizes as flags."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from pyloss import starting
from pyloss.cli.entry import BAD_INPUT
from pyloss.errors import cut, said
from pyloss.io import bars, console

_UNITS = {"": 1, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9}


def flag_size(text: str) -> int:
    """The bytes that a flag such as 2GB stands for. Raises ValueError for another text."""
    digits = text.rstrip("MGBmgb ")
    try:
        return int(Decimal(digits) * _UNITS[text[len(digits) :].strip().upper()])
    except (InvalidOperation, KeyError):
        raise ValueError(
            f"a size is a number of bytes such as 500, 100MB or 2G, not {text!r}"
        ) from None


class _Lines(logging.Handler):
    """The library's warnings as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        console.say(f"warning: {self.format(record)}", always=True)


def as_command(main: Callable[[], None]) -> None:
    """Run a command and end the process: 0 done, 1 failed, 2 bad input in one line, 130 Ctrl-C."""
    starting.interrupt_as_usual()
    console.begin()
    bars.show(True)
    log, lines = logging.getLogger("pyloss"), _Lines(logging.WARNING)
    log.addHandler(lines)
    code = 0
    try:
        main()
    except KeyboardInterrupt as stopped:
        console.say(str(stopped) or "interrupted", always=True)
        code = 130
    except FloatingPointError as error:
        console.say(f"error: {error}", always=True)
        code = 1
    except (KeyError, *BAD_INPUT) as error:
        # A KeyError's own text is its message in quotes.
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else said(error)
        console.say(f"error: {cut(' '.join(text.split()), 3000)}", always=True)
        code = 2
    finally:
        log.removeHandler(lines)
        bars.show(False)
    if not console.finish() and code == 0:
        code = 1
    sys.exit(code)
