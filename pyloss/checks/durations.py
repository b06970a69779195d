"""Durations as text: `2h`, `1h30m`, and `1 h 12 min`."""

from __future__ import annotations

import re
from typing import Any

from pyloss.checks.numbers import real, shown

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_TEXT = re.compile(r"(\d+(?:\.\d+)?) *(d|h|m|s)(?:ays?|ours?|in(?:utes?)?|ec(?:onds?)?)?(?: *)")


def duration(value: Any, name: str) -> float:
    """The seconds of a duration above 0: text such as 2h, 90m, 1h30m or 45s, or a number of them.

    Raises ValueError naming the argument and what is allowed.
    """
    if isinstance(value, str):
        text, seconds, at = value.strip().lower(), 0.0, 0
        while found := _TEXT.match(text, at):
            seconds, at = seconds + float(found[1]) * _UNITS[found[2]], found.end()
        if at == len(text) and 0 < seconds < float("inf"):
            return seconds
    else:
        try:
            return real(value, name, above=0)
        except (TypeError, ValueError):
            pass
    raise ValueError(
        f"{name} is {shown(value)}; it must be a time such as 2h, 90m or 1h30m, "
        "or a number of seconds above 0"
    )


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
