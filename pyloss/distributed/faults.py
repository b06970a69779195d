"""The end of a group: one rank's failure ends all, and signals stop all after the same step.

A rank that left alone would let the others wait for it without end. So a failing rank waits a
moment for the others: if all failed alike, as for a wrong argument, rank 0 speaks for all; else the
failing rank says which one it is, and ends the others by MPI.
"""

from __future__ import annotations

import atexit
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from pyloss.distributed.group import Group
from pyloss.io.console import say

#: how long a failing rank waits for the others to fail, too
TOGETHER_SECONDS = 1.0
#: how long a rank that has ended waits for the others before it says so
LEAVE_SECONDS = 20.0

_ended: Any = None


def end_all_together(group: Any) -> None:
    """From now on, an exception that ends this process ends all processes of `group`."""
    global _ended
    _ended = group

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt) and str(error):
            fail(str(error), 130)
        else:
            fail("".join(traceback.format_exception(kind, error, trace)).rstrip(), 1)

    sys.excepthook = hook
    atexit.register(_leave, group)


def _leave(group: Any) -> None:
    """Meet the other ranks at the end of the process. If they do not come, say so once.

    A rank that ended alone, as by `sys.exit`, is waited for by sums of the others.
    """
    if not group.all_leave(LEAVE_SECONDS):
        say(
            f"{group.name()} has ended and waits for the other ranks. If they wait for it, it has "
            "left too early (sys.exit on one rank?): python -m mpi4py SCRIPT ends all of them",
            always=True,
        )


def fail(text: str, code: int) -> bool:
    """Print the message of a failure, and end all ranks if the others did not fail, too.

    Returns false, without a message, where there is no group of several ranks.
    """
    group = _ended
    if group is None:
        return False
    if group.all_failed(TOGETHER_SECONDS):
        if group.rank() == 0:
            say(text, always=True)
    else:
        say(f"{group.name()}: {text}", always=True)
        group.abort(code)
    return True


def ended_together() -> None:
    """Wait until all ranks have come so far."""
    if _ended is not None:
        _ended.barrier()


class Stop:
    """Whether a signal asked this rank to stop, and what then follows.

    The ranks of a group must stop after the same step, so that none waits for another. A signal
    only leaves its number here; the loop asks `agreed` between two steps.
    The votes may also go with another sum of the ranks.

    Attributes:
        together: whether all ranks have been told to stop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, group: Group) -> None:
        self.group = group
        self.number: int = 0
        self.together = False
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

    def votes(self) -> list[float]:
        """Numbers that the ranks add, for `check`."""
        return [float(self.number == number) for number in self.SIGNALS]

    def check(self, votes: Sequence[float]) -> None:
        """Raise as the signal's handler does, on all ranks, if the sum of `votes` has a signal."""
        for number, count in zip(self.SIGNALS, votes, strict=True):
            if count:
                self.number, self.together = 0, True
                self._interrupt(number, None)

    def agreed(self) -> None:
        """Raise on all ranks if any of them has got a signal."""
        self.check(self.group.all_sum(np.array(self.votes())).tolist())


@contextmanager
def stopping_together(group: Group) -> Iterator[Stop]:
    """Ctrl-C and SIGTERM wait in the block for `Stop.check`; in a group of one they do not."""
    stop = Stop(group)
    if group.size() > 1 and threading.current_thread() is threading.main_thread():
        for number in Stop.SIGNALS:
            stop.previous[number] = signal.signal(number, stop._seen)
    try:
        yield stop
    finally:
        for before, handler in stop.previous.items():
            signal.signal(before, handler)
