"""Values of a parsed file by key, each checked once for its type and range."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from pyloss.checks import numbers
from pyloss.errors import FormatError

T = TypeVar("T")

#: Takes a value of a file and returns it as Python has it, or raises TypeError or ValueError.
Kind = Callable[[Any], Any]


class Values(dict[str, Any]):
    """The values of `content` under the keys of `kinds`.

    A missing or null key has its default. Raises FormatError naming the key if it has no default,
    or if its value is of another kind.

    Attributes:
        path: the file, for errors.
        prefix: what precedes every key in the file, such as GGUF's architecture and a dot.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        content: Mapping[str, Any],
        kinds: Mapping[str, Kind],
        defaults: Mapping[str, Any],
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.path, self.prefix = path, prefix
        for key, kind in kinds.items():
            value = content.get(prefix + key)
            if value is not None:
                try:
                    self[key] = kind(value)
                except (TypeError, ValueError) as error:
                    raise self.wrong(key, str(error)) from None
            elif key in defaults:
                self[key] = defaults[key]
            else:
                raise self.wrong(key, "this key is missing")

    def wrong(self, key: str, reason: str) -> FormatError:
        """The error for the value of a key."""
        return FormatError(self.path, self.prefix + key, reason)

    def unsupported(self, what: str, supported: str = "") -> ValueError:
        """The error for an option that pyloss does not have."""
        allowed = f"; supported is {supported}" if supported else ""
        return ValueError(f"{self.path}: {what} is not supported{allowed}")


def checked(path: str | os.PathLike[str], make: Callable[..., T], **fields: Any) -> T:
    """`make(**fields)`; values that it refuses become a FormatError of the file."""
    try:
        return make(**fields)
    except ValueError as error:
        raise FormatError(path, None, str(error)) from None


def whole(low: int | None = None, high: int | None = None) -> Kind:
    """Integers from `low` to `high`, both included; of 64 bits without a bound."""
    return lambda value: numbers.whole(value, "the value", low, high)


def real(value: Any) -> float:
    """Finite numbers."""
    return numbers.real(value, "the value")


def float32(value: Any) -> float:
    """Finite numbers of GGUF as shortest decimals; it stores 1e-05 as 9.999999747378752e-06."""
    with np.errstate(over="ignore"):  # callers refuse infinity
        return float(str(np.float32(real(value))))


def of_type(kind: type) -> Kind:
    """Values of exactly one type."""

    def check(value: Any) -> Any:
        if type(value) is not kind:
            found = f"{type(value).__name__} {numbers.shown(value)}"
            raise TypeError(f"expected {kind.__name__}, got {found}")
        return value

    return check


def counts(value: Any) -> int | list[int]:
    """An integer of at least 0, or a list with one of each layer."""
    if isinstance(value, list) and value:
        return [numbers.whole(item, "the value", 0) for item in value]
    return numbers.whole(value, "the value", 0)


TEXT, FLAG, LIST, OBJECT = of_type(str), of_type(bool), of_type(list), of_type(dict)
