"""How datasets are shown: how many records, and a sample of them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from pyloss.nn.display import counted_in_thousands, html_table

_TEXT, _ITEMS, _RECORDS = 60, 2, 3  # the most that is shown


def shortened(value: Any) -> str:
    """`repr` of a record with long texts cut and long lists counted."""
    if isinstance(value, str) and len(value) > _TEXT:
        return f"{value[:_TEXT]!r}..."
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {shortened(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        items = [shortened(item) for item in value[:_ITEMS]]
        items += [f"... {len(value) - _ITEMS} more"] if len(value) > _ITEMS else []
        return f"[{', '.join(items)}]" if isinstance(value, list) else f"({', '.join(items)})"
    text = repr(value)
    return text if len(text) <= 2 * _TEXT else f"{text[: 2 * _TEXT]}..."


class ShownDataset:
    """A dataset whose `repr` has its number of records, `_facts` and the first record."""

    def __len__(self) -> int:
        raise NotImplementedError

    def _facts(self) -> list[str]:
        """What is said of the dataset besides its number of records."""
        return []

    def _shown_record(self, idx: int) -> Any:
        """A record as it was given."""
        return self[idx]  # type: ignore[index]

    def _head(self) -> str:
        facts = [counted_in_thousands(len(self), "record"), *self._facts()]
        return f"{type(self).__name__}({', '.join(facts)}"

    def __repr__(self) -> str:
        if not len(self):
            return f"{self._head()})"
        return f"{self._head()}; first: {shortened(self._shown_record(0))})"

    def _repr_html_(self) -> str:
        first = [self._shown_record(i) for i in range(min(_RECORDS, len(self)))]
        rows = [[str(i), shortened(record)] for i, record in enumerate(first)]
        table = html_table(["", "record"], rows, 2) if rows else ""
        return f"<div>{escape(self._head())})</div>{table}"
