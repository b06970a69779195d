"""A Sphinx extension: makes the site of Markdown files that GitHub shows, too.

While a page is read,
- `<!-- site: commands -->`, `settings`, `api MODULE` and `file PATH` become what they name,
- links to files outside of the pages become links to the repository, if its address is known by
  the environment's PYLOSS_REPOSITORY, and text if not; a link to a missing file is a warning,
- the lists of links on the first page also become the tables of contents,
- sentences for readers on GitHub (`On the site, this page has ...`) are left out.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from site_api import Api
from site_commands import commands_page
from site_llms import write_llms
from site_settings import settings_page
from sphinx.ext.autodoc.mock import mock
from sphinx.util import logging

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
MARKER = re.compile(r"^<!-- site: (\w+) ?(\S*) -->$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
#: what readers on GitHub are told in the place of a marker
NOTE = re.compile(r"^On the site, this page has .*\n\n", re.MULTILINE)
#: files of the repository that a page shows in full
SHOWN = {"CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}

log = logging.getLogger(__name__)


def linked(text: str, folder: Path, page: str) -> str:
    """Return the text with the links of a file in `folder` as the page of the site needs them."""
    here = (DOCS / page).parent

    def target(match: re.Match[str]) -> str:
        words, path, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", path):
            return match[0]
        found = (folder / path).resolve()
        if not found.exists():
            log.warning("%s: a link to %s, which does not exist", page, path)
            return match[0]
        name = found.relative_to(REPOSITORY).as_posix()
        found = DOCS / SHOWN[name] if name in SHOWN else found
        if found.is_relative_to(DOCS):
            return f"[{words}]({os.path.relpath(found, here)}{anchor})"
        address = os.environ.get("PYLOSS_REPOSITORY")
        kind = "tree" if found.is_dir() else "blob"
        return f"[{words}]({address}/{kind}/main/{name}{anchor})" if address else words

    # Fenced blocks are left alone; inline code is not, since a link's words may be code.
    pieces = re.split(r"(^ *```.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(LINK.sub(target, p) if i % 2 == 0 else p for i, p in enumerate(pieces))


def tables_of_contents(text: str) -> str:
    """Return a hidden toctree for each section of the first page, of the pages that it lists."""
    trees = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        pages = re.findall(r"^- \[[^\]]+\]\(([^)#:]+)\.md\)", body, re.MULTILINE)
        if pages:
            lines = "\n".join(pages)
            trees.append(f"```{{toctree}}\n:hidden:\n:caption: {title.strip()}\n\n{lines}\n```\n")
    return "\n" + "\n".join(trees)


def dashes(app: Any, tree: nodes.document) -> None:
    """Sphinx writes a dash between a parameter and its description as " -- "."""
    for text in list(tree.findall(nodes.Text)):
        if text.startswith(" -- "):
            text.parent.replace(text, nodes.Text(" \u2013 " + text[4:]))


class Pages:
    """What the build knows while it reads and writes the pages."""

    def __init__(self) -> None:
        self.api = Api()

    def source_read(self, app: Any, name: str, content: list[str]) -> None:
        page = f"{name}.md"
        folder = (DOCS / page).parent
        text = linked(NOTE.sub("", content[0]), folder, page)
        if name == "index":
            text += tables_of_contents(text)
        content[0] = MARKER.sub(lambda match: self.written(match, page), text)

    def written(self, marker: re.Match[str], page: str) -> str:
        """What replaces a marker of a page."""
        kind, value = marker[1], marker[2]
        if kind == "commands":
            return commands_page()
        if kind == "settings":
            return settings_page()
        if kind == "api":
            return self.api.page(value)
        if kind == "file":
            file = REPOSITORY / value
            text = file.read_text(encoding="utf-8").partition("\n")[2]
            return linked(text, file.parent, page)
        raise ValueError(f"{page}: <!-- site: {kind} -->; known are commands, settings, api, file")


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx: connects the functions of this folder to the events of a build."""
    # PyTorch is not needed to describe the functions that take its tensors.
    with mock(["torch"]):
        pages = Pages()
    app.connect("source-read", pages.source_read)
    # Before napoleon, which turns sections of docstrings into fields.
    app.connect("autodoc-process-docstring", pages.api.docstring, priority=400)
    app.connect("doctree-read", dashes)
    app.connect("doctree-read", pages.api.anchors)
    app.connect("missing-reference", pages.api.reference)
    app.connect("build-finished", write_llms)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
