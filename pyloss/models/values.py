"""Values of parsed files, checked for their types."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyloss.errors import FormatError


class Values:
    """Values of a parsed file, checked for their types."""

    def __init__(self, path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
        self.path = path
        self.content = content

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """`content[key]`, which must be of `kind`; a missing or null one is the `default` if there is one."""
        value = self.content.get(key)
        if value is None:
            if default:
                return default[0]
            raise FormatError(self.path, key, "this key is missing")
        # bool is an int to isinstance; and an integer is a fine float.
        if type(value) is int and kind is float and abs(value) < 1 << 1000:
            return float(value)
        if type(value) is not kind:
            raise FormatError(self.path, key, f"expected {kind.__name__}, got {type(value).__name__} {value!r:.100}")
        return value


def shortest(value: float) -> float:
    """The shortest decimal that is this float32, so that GGUF's 9.999999747378752e-06 is 1e-05 again."""
    return float(str(np.float32(value)))
