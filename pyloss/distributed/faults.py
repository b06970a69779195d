"""The end of a group: one rank's failure ends all, and signals stop all after the same step.

A rank that left alone would let the others wait for it without end. So a failing rank waits a
moment for the others: if all failed alike, as for a wrong argument, rank 0 speaks for all; else the
failing rank says which one it is, and ends the others by MPI.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from pyloss.distributed.group import Group
from pyloss.io.console import say

#: how long a failing rank waits for the others to fail, too
TOGETHER_SECONDS = 1.0

_ended: Any = None


def end_all_together(group: Any) -> None:
    """From now on, an exception that ends this process ends all processes of `group`."""
    global _ended
    _ended = group
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt) and str(error):
            fail(f"{error}", 130)
        else:
            text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
            fail(text, 1)
        if _ended is None:
            before(kind, error, trace)

    sys.excepthook = hook


def fail(text: str, code: int) -> None:
    """Print the message of a failure; end all ranks if the others did not fail, too.

    Without a group of several ranks the message is printed, and that is all.
    """
    group = _ended
    if group is None:
        say(text, always=True)
    elif group.all_failed(TOGETHER_SECONDS):
        if group.rank() == 0:
            say(text, always=True)
    else:
        say(f"{group.name()}: {text}", always=True)
        group.abort(code)


class Stop:
    """Whether a signal asked this rank to stop, and what then follows.

    The ranks of a group must stop after the same step, so that none waits for another. A signal
    only leaves its number here; the loop asks `agreed` between two steps.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.number: int = 0
        self.previous: dict[int, Any] = {}

    def _seen(self, number: int, frame: FrameType | None) -> None:
        if self.number:  # asked again: at once
            self._interrupt(number, frame)
        self.number = number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        handler = self.previous.get(number)
        if callable(handler):
            handler(number, frame)
        raise KeyboardInterrupt

    def check(self, number: int) -> None:
        """Raise as the handler of signal `number` does: on all ranks, for the one of any rank."""
        if number:
            self.number = 0
            self._interrupt(number, None)

    def agreed(self) -> None:
        """Raise on all ranks if any of them has got a signal."""
        self.check(self.group.most(self.number))


@contextmanager
def stopping_together(group: Group) -> Iterator[Stop]:
    """Ctrl-C and SIGTERM wait in the block for `Stop.check`; in a group of one they do not."""
    stop = Stop(group)
    if group.size() > 1 and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            stop.previous[number] = signal.signal(number, stop._seen)
    try:
        yield stop
    finally:
        for before, handler in stop.previous.items():
            signal.signal(before, handler)
