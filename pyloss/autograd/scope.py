"""Which tape a thread records to."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from pyloss.autograd.tape import Tape


F = TypeVar("F", bound=Callable[..., Any])


class Local(threading.local):
    """A thread's state.

    Attributes:
        tape: records, or None.
        inside: how many recordings and `no_grad` the thread has entered.
    """

    tape: Tape | None = None
    inside = 0


local = Local()


class Root:
    """Identifies a recording: a tape and those within it."""

    __slots__ = ("_entered",)

    def __init__(self) -> None:
        self._entered = 0

    def enter(self) -> None:
        """One of the recording's tapes is entered."""
        self._entered += 1
        OPEN.add(self)

    def leave(self) -> None:
        """One of the recording's tapes is left."""
        self._entered -= 1
        if not self._entered:
            OPEN.discard(self)


#: The recordings of all threads that are under way.
OPEN: set[Root] = set()


class no_grad:
    """A context, or a decorator, in which nothing is recorded: results are constants."""

    def __enter__(self) -> None:
        self._outer = local.tape
        local.tape = None
        local.inside += 1

    def __exit__(self, *unused: object) -> None:
        local.tape = self._outer
        local.inside -= 1

    def __call__(self, function: F) -> F:
        @functools.wraps(function)
        def constant(*args: Any, **kwargs: Any) -> Any:
            with no_grad():
                return function(*args, **kwargs)

        return cast(F, constant)


def current_tape() -> Tape | None:
    """The tape that this thread records to, or None."""
    return local.tape
