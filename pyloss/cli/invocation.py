"""The words of the command that runs, for files that say how they were made."""

from __future__ import annotations

from collections.abc import Sequence

_words: tuple[str, ...] = ()


def remember(words: Sequence[str]) -> None:
    """Sets the words after the program's name."""
    global _words
    _words = tuple(words)


def words() -> tuple[str, ...]:
    """The words after the program's name."""
    return _words
