"""Bars for long waits: what is being done, and how far it is.

Commands show them (`show`), on a terminal and without --quiet; a program that calls the library has
none. A bar appears after half a second, is gone when its work is done, and is the only one: work
within other work has no bar of its own. Without tqdm there are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

from pyloss.io.console import Console, is_quiet, make_room

T = TypeVar("T")

_DELAY = 0.5  # seconds before a bar appears

#: whether a command runs, and whether a bar is open
_shown = False
_open = False


def show(on: bool) -> None:
    """Shows bars from now on, or not."""
    global _shown
    _shown = on


def possible(stream: Console | None = None) -> bool:
    """Whether a bar can be shown: on a terminal, with tqdm and without --quiet."""
    return not is_quiet() and (stream or Console()).isatty() and find_spec("tqdm") is not None


def terminal_bar(stream: Console, **options: Any) -> Any:
    """tqdm's bar, or None where it is not `possible`."""
    if not possible(stream):
        return None
    from tqdm import tqdm

    return tqdm(file=stream, dynamic_ncols=True, leave=False, **options)


class Bar:
    """What `bar` gives: `step()` is called after each part of the work."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def step(self, count: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(count)


@contextmanager
def bar(text: str, total: int | None = None, unit: str = "it") -> Iterator[Bar]:
    """A bar for work of `total` parts, such as `bar("quantizing", 210, "layer")`."""
    global _open
    if not _shown or _open:
        yield Bar(None)
        return
    found = terminal_bar(Console(), total=total, desc=text, unit=unit, delay=_DELAY)
    _open = True
    make_room(found)
    try:
        yield Bar(found)
    finally:
        _open = False
        make_room(None)
        if found is not None:
            found.close()


def watched(
    items: Iterable[T], text: str, unit: str = "it", total: int | None = None
) -> Iterator[T]:
    """The items, with a `bar` that moves on after each."""
    count = len(items) if total is None and isinstance(items, Sized) else total
    with bar(text, count, unit) as shown:
        for item in items:
            yield item
            shown.step()
