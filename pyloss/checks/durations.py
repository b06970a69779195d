"""Durations as text: `2h`, `1h30m` and `1 h 12 min`, and parts of an epoch: `0.1ep`."""

from __future__ import annotations

import re
from typing import Any

from pyloss.checks.numbers import real, shown, whole

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_NUMBER = re.compile(r"\d{1,300}(?:\.\d+)?")
_TEXT = re.compile(r"(\d+(?:\.\d+)?) *(d|h|m|s)(?:ays?|ours?|in(?:utes?)?|ec(?:onds?)?)?(?: *)")


_EPOCHS = re.compile(r"(\d+(?:\.\d+)?|\.\d+) *(?:ep|epochs?)")


def every(value: Any, name: str) -> int | str:
    """A number of iterations as an int, or a share of an epoch as text such as "0.1ep".

    Raises ValueError naming the argument and what is allowed.
    """
    if isinstance(value, str):
        found = _EPOCHS.fullmatch(value.strip().lower())
        if found is not None and float(found[1]) > 0:
            return f"{float(found[1]):g}ep"
        if value.strip().isdecimal():
            value = int(value[:20])
    try:
        return whole(value, name, 1)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} is {shown(value)}; it must be a part of an epoch such as 0.1ep, or a whole "
            "number of iterations of at least 1"
        ) from None


def iterations(value: int | str, epoch: int) -> int:
    """The iterations of what `every` returns, where an epoch has `epoch` of them; at least 1."""
    if isinstance(value, int):
        return value
    return max(round(float(value.removesuffix("ep")) * epoch), 1)


def duration(value: Any, name: str) -> float:
    """The seconds of a duration above 0: text such as 2h, 90m, 1h30m or 45s, or their number.

    Raises ValueError naming the argument and what is allowed.
    """
    if isinstance(value, str):
        text, seconds, at = value.strip().lower(), 0.0, 0
        while found := _TEXT.match(text, at):
            seconds, at = seconds + float(found[1]) * _UNITS[found[2]], found.end()
        if at == len(text) and 0 < seconds < float("inf"):
            return seconds
        if _NUMBER.fullmatch(text):
            value = float(text)
    if not isinstance(value, str):
        try:
            return real(value, name, above=0)
        except (TypeError, ValueError):
            pass
    raise ValueError(
        f"{name} is {shown(value)}; it must be a time such as 2h, 90m or 1h30m, "
        "or a number of seconds above 0"
    )


def precise_text(seconds: float) -> str:
    """As `duration_text`, with a decimal below a minute: 7.4 s, 12 min, 1 h 12 min."""
    return f"{seconds:.1f} s" if seconds < 59.95 else duration_text(seconds)


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: 45 s, 12 min, 1 h 12 min, 2 d 3 h."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    large, small, names = (
        (*divmod(minutes, 60), ("h", "min"))
        if minutes < 24 * 60
        else (*divmod(round(seconds / 3600), 24), ("d", "h"))
    )
    return f"{large} {names[0]}" + (f" {small} {names[1]}" if small else "")
