"""Two answers side by side, with what differs between them marked."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from html import escape

_PIECE = re.compile(r"\s+|\w+|[^\w\s]")
#: comparing takes the square of the pieces; longer answers are marked as a whole
_MOST_PIECES = 3000


def marked(base: str, tuned: str) -> tuple[str, str]:
    """The HTML of both texts: `<del>` around what only the first has, `<ins>` for the second."""
    before, after = _PIECE.findall(base), _PIECE.findall(tuned)
    if max(len(before), len(after)) > _MOST_PIECES:
        same = base == tuned
        return (escape(base), escape(tuned)) if same else (_tag("del", base), _tag("ins", tuned))
    left, right = [], []
    for kind, a, b, c, d in SequenceMatcher(None, before, after, False).get_opcodes():
        old, new = "".join(before[a:b]), "".join(after[c:d])
        left.append(escape(old) if kind == "equal" else _tag("del", old))
        right.append(escape(new) if kind == "equal" else _tag("ins", new))
    return "".join(left), "".join(right)


def _tag(name: str, text: str) -> str:
    return f"<{name}>{escape(text)}</{name}>" if text else ""
