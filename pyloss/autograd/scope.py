"""Which tape a thread records to."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyloss.autograd.tape import Tape


class Local(threading.local):
    """A thread's state."""

    tape: Tape | None = None


local = Local()


class no_grad:
    """A context in which nothing is recorded; results are constants to the outer tape."""

    def __enter__(self) -> None:
        self._outer = local.tape
        local.tape = None

    def __exit__(self, *unused: object) -> None:
        local.tape = self._outer


def current_tape() -> Tape | None:
    """The tape that this thread records to, or None."""
    return local.tape
