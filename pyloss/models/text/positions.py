"""`Positions`: which tokens of a text hold which of its characters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers


class Positions:
    """A text with its tokens; special tokens in the text are recognized, and none are added.

    Args:
        tokenizer: pyloss's, or one with the same `encode`; offsets come from the
            `tokenizers.Tokenizer` behind it.
        text: str.

    `ids` are the tokens [n]. A token that lies across the border of a range belongs to the range.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        backends = [getattr(tokenizer, name, None) for name in ("backend_tokenizer", "backend")]
        backend = next((b for b in backends if isinstance(b, tokenizers.Tokenizer)), None)
        encoding = None if backend is None else backend.encode(text, add_special_tokens=False)
        if encoding is None or backend is not backends[1]:
            # Other tokenizers may change the library's tokens, so its offsets hold only for its
            # own.
            self.ids = list(tokenizer.encode(text, add_special_tokens=False))
        else:
            self.ids = encoding.ids
        self._encoding = encoding if encoding is not None and self.ids == encoding.ids else None

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        return None if self._encoding is None else _bounds(self._encoding.offsets)

    def tokens(self, begin: int, end: int) -> tuple[int, int]:
        """The tokens (first, end) of the characters `begin <= c < end`; none at `begin == end`."""
        if end <= begin:
            first = self._first(begin)
            return first, first
        return self._first(begin), self._end(end)

    def boundary(self, position: int) -> int:
        """The last position up to `position` at which a token begins or ends."""
        if self._bounds is not None:
            begins, ends = self._bounds
            inside = np.flatnonzero((begins < position) & (ends > position))
            return int(begins[inside[0]]) if len(inside) else position
        while position and self.ids[: len(part := self._encode(position))] != part:
            position -= 1
        return position

    def _first(self, position: int) -> int:
        if self._bounds is not None:
            return int(np.searchsorted(self._bounds[1], position, "right"))
        return common(self._encode(position), self.ids)

    def _end(self, position: int) -> int:
        if self._bounds is not None:
            return int(np.searchsorted(self._bounds[0], position, "left"))
        part = self._encode(position)
        same = common(part, self.ids)
        return min(same + (same < len(part)), len(self.ids))

    def _encode(self, position: int) -> list[int]:
        return list(self._tokenizer.encode(self._text[:position], add_special_tokens=False))


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # slices compare faster than a loop does
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _bounds(given: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Where each token begins and ends, both [n] and ascending, from the tokenizer's offsets."""
    offsets = np.array(given, np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(offsets[:, 1])
    # Spaces or characters that no token's offsets cover belong to the next token.
    begins = np.minimum(offsets[:, 0], np.concatenate(([0], ends[:-1])))
    return np.maximum.accumulate(begins), ends
