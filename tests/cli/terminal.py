"""A pseudo-terminal of a given width, and what a user sees in it."""

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyloss

_SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


class Screen:
    """The lines of a terminal without an end: what a program wrote, at its width.

    It knows what pyloss and tqdm write: text, line feeds, carriage returns, backspaces, and the
    sequences that erase a line, move up and set colors. Other sequences are errors.
    """

    def __init__(self, columns):
        self.columns = columns
        self.rows, self.row, self.column = [""], 0, 0

    def feed(self, text):
        place = 0
        while place < len(text):
            match = _SEQUENCE.match(text, place)
            if match:
                self._sequence(match[1], match[2])
                place = match.end()
                continue
            self._sign(text[place])
            place += 1

    def _sequence(self, numbers, kind):
        if kind == "K":
            assert numbers in ("", "0"), numbers
            self.rows[self.row] = self.rows[self.row][: self.column]
        elif kind == "A":
            self.row -= int(numbers or 1)
        elif kind not in "mhl":  # colors, modes
            raise AssertionError(f"unknown sequence {numbers}{kind}")

    def _sign(self, sign):
        if sign == "\r":
            self.column = 0
        elif sign == "\n":
            self._down()
        elif sign == "\b":
            self.column = max(self.column - 1, 0)
        elif sign == "\t":
            self.column = min(self.column // 8 * 8 + 8, self.columns - 1)
        elif sign >= " ":  # a random model's answer has control characters, too
            if self.column == self.columns:  # as terminals do, at the next sign
                self._down()
                self.column = 0
            line = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = line[: self.column] + sign + line[self.column + 1 :]
            self.column += 1

    def _down(self):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")

    @property
    def text(self):
        """What is there now."""
        return "\n".join(row.rstrip() for row in self.rows).rstrip("\n")


class Run:
    """How a command ended in a terminal: its status, the screen, and all that was written."""

    def __init__(self, status, screen, written, before):
        self.status, self.screen, self.written, self.before = status, screen, written, before


def run(argv, columns, cwd, typed=(), timeout=180, **environment):
    """Runs `pyloss ARGV` in a terminal of so many columns.

    `typed` are pairs: a text to wait for, and what is typed then. `Run.before` has the screens at
    these moments.
    """
    code = (
        "import sys, pyloss.io.bars; pyloss.io.bars._DELAY = 0; "
        "from pyloss.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return run_python(["-c", code, *argv], columns, cwd, typed, timeout, **environment)


def run_python(argv, columns, cwd, typed=(), timeout=180, **environment):
    """Runs Python with these arguments, as `run`."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(pyloss.__file__).parents[1]),
        "PYLOSS_NUM_THREADS": "1",
        "TERM": "xterm",
        "LANG": "C.UTF-8",
        **environment,
    }
    process = subprocess.Popen(
        [sys.executable, *argv],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=cwd,
        env=env,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    screen, written, before, waiting, seen = Screen(columns), "", [], list(typed), 0
    raw, end = b"", time.monotonic() + timeout
    try:
        while True:
            if time.monotonic() > end:
                raise AssertionError(f"no end after {timeout} s; on the screen:\n{screen.text}")
            if not select.select([ours], [], [], 0.2)[0]:
                continue
            try:
                some = os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            if not some:
                break
            raw += some
            text = raw.decode("utf-8", "ignore") if _whole(raw) else ""
            if text:
                raw = b""
                written += text
                screen.feed(text)
            while waiting and (at := written.find(waiting[0][0], seen)) >= 0:
                seen = at + len(waiting[0][0])
                before.append(screen.text)
                os.write(ours, waiting.pop(0)[1].encode())
        status = process.wait(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(ours)
    assert not waiting, f"never seen: {waiting[0][0]!r}; on the screen:\n{screen.text}"
    return Run(status, screen, written, before)


def _whole(raw):
    """Whether bytes end with a whole character and a whole sequence."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return not re.search(r"\x1b(\[[?\d;]*)?$", text)
