"""Tables of names in pages: their cells, and whether a name exists in pyloss."""

import argparse
import importlib
import re
from pathlib import Path

from pyloss.cli.flags import build_parser
from pyloss.tuner.run.settings import DISTILLATION_SCHEMA, LORA_SCHEMA, SCHEMA

DOCS = Path(__file__).resolve().parents[2] / "docs"


def rows(page, other):
    """The cells of a page's tables between the comments of `other`'s names."""
    text = (DOCS / page).read_text(encoding="utf-8")
    part = re.search(
        rf"<!-- names of {other} -->\n(.*?)<!-- end of the names of {other} -->", text, re.DOTALL
    )
    lines = re.findall(r"^\| (.*) \|$", part[1], re.MULTILINE)
    cells = [re.split(r" ?(?<!\\)\| ?", line) for line in lines]
    return [row for row in cells if row[0] != other and not set(row[0]) <= set("-: ")]


def codes(cell):
    return re.findall(r"`([^`]+)`", cell)


def is_known(name):
    """Whether pyloss has a name: of a module, a model's method, a setting, or a command."""
    if name.startswith("pyloss "):
        (commands,) = (
            a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)
        )
        return name.split()[1] in commands.choices
    if name in SCHEMA or name in LORA_SCHEMA or name in DISTILLATION_SCHEMA:
        return True
    if name.startswith("Model."):
        name = f"pyloss.models.{name}"
    if not name.startswith("pyloss."):
        return False
    found = importlib.import_module("pyloss")
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True
