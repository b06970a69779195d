"""Values of parsed files, checked for their types and ranges."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyloss.checks import numbers
from pyloss.errors import FormatError


class Values:
    """Values of a parsed file, checked for their types and ranges."""

    def __init__(self, path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
        self.path = path
        self.content = content

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """`content[key]`, which must be of `kind`; a missing or null one is the `default` if there is one.

        An int fits into 64 bits, a float is finite. Raises FormatError naming the key.
        """
        value = self.content.get(key)
        if value is None:
            if default:
                return default[0]
            raise FormatError(self.path, key, "this key is missing")
        if kind is int:
            return self.whole(key)
        if kind is float:
            return self.real(key)
        if type(value) is not kind:
            raise FormatError(
                self.path,
                key,
                f"expected {kind.__name__}, got {type(value).__name__} {numbers.shown(value)}",
            )
        return value

    def whole(self, key: str, low: int | None = None, high: int | None = None) -> int:
        """`content[key]`, an integer from `low` to `high`, as `numbers.whole`. Raises FormatError naming the key."""
        try:
            return numbers.whole(self.content[key], "the value", low, high)
        except (TypeError, ValueError) as error:
            raise FormatError(self.path, key, str(error)) from None

    def real(self, key: str) -> float:
        """`content[key]`, a finite number, as `numbers.real`. Raises FormatError naming the key."""
        try:
            return numbers.real(self.content[key], "the value")
        except (TypeError, ValueError) as error:
            raise FormatError(self.path, key, str(error)) from None


def shortest(value: float) -> float:
    """The shortest decimal that is this float32, so that GGUF's 9.999999747378752e-06 is 1e-05 again."""
    with np.errstate(over="ignore"):  # infinity is refused where it is read
        return float(str(np.float32(value)))
