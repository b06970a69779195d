"""README.md files of models: cards as pyloss wrote them, and those that are the user's.

The last line of a card has a hash of its text. An edited card, like any other README.md, is the
user's: it stays when another model is written.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from pyloss.errors import FormatError
from pyloss.io.files import read_text, write_text

CARD_FILE = "README.md"

_MARK = "<!-- pyloss model card, sha256 {} -->\n"
_MARKED = re.compile(r"(.*)" + re.escape(_MARK).replace(re.escape("{}"), "([0-9a-f]{64})"), re.S)
# Also where text was added behind the line.
_LAST_LINE = re.compile(re.escape(_MARK.strip()).replace(re.escape("{}"), "[0-9a-f]{64}"))


def marked(text: str) -> str:
    """The text of a card with its last line."""
    return text + _MARK.format(_hash(text))


def is_unedited(text: str) -> bool:
    """Whether a README.md is a card as pyloss wrote it."""
    match = _MARKED.fullmatch(text)
    return match is not None and match[2] == _hash(match[1])


def has_own_card(folder: Path) -> bool:
    """Whether the folder's README.md is a card as pyloss wrote it."""
    try:
        return is_unedited(read_text(folder / CARD_FILE))
    except (FormatError, OSError):  # none, or no text: a folder, another encoding
        return False


def is_edited_card(folder: Path) -> bool:
    """Whether the folder's README.md is a card of pyloss's that was edited."""
    try:
        text = read_text(folder / CARD_FILE)
    except (FormatError, OSError):
        return False
    return not is_unedited(text) and _LAST_LINE.search(text) is not None


def write_card(folder: Path, text: str) -> bool:
    """Writes a card into the folder, unless a README.md of the user's is there; returns whether."""
    if os.path.lexists(folder / CARD_FILE) and not has_own_card(folder):
        return False
    write_text(folder / CARD_FILE, text)
    return True


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
