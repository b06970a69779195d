"""Which tape a thread records to."""

from __future__ import annotations

import functools
import inspect
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
        paused: the tapes that recorded when `no_grad` was entered; the last one is the innermost.
    """

    tape: Tape | None = None
    inside = 0

    def __init__(self) -> None:  # called in each thread
        self.paused: list[Tape | None] = []


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
        local.paused.append(local.tape)
        local.tape = None
        local.inside += 1

    def __exit__(self, *unused: object) -> None:
        local.tape = local.paused.pop()
        local.inside -= 1

    def __call__(self, function: F) -> F:
        for kind in (inspect.isgeneratorfunction, inspect.iscoroutinefunction,
                     inspect.isasyncgenfunction):  # fmt: skip
            if kind(function):
                raise TypeError(
                    f"no_grad() is a decorator of plain functions, and {function.__name__} is a "
                    "generator or async: write `with pyloss.no_grad():` in it, around what is "
                    "computed between two yields"
                )

        @functools.wraps(function)
        def constant(*args: Any, **kwargs: Any) -> Any:
            with no_grad():
                return function(*args, **kwargs)

        return cast(F, constant)


def current_tape() -> Tape | None:
    """The tape that this thread records to, or None."""
    return local.tape
