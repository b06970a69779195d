"""llms.txt: the pages with their first sentences, for programs that read documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes


def first_sentence(tree: nodes.document) -> str:
    """Return the first sentence of a page's first paragraph."""
    for paragraph in tree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.section):
            text = " ".join(paragraph.astext().split())
            return re.split(r"(?<=[.:])\s", text)[0].rstrip(":.") + "."
    return ""


def write_llms(app: Any, error: Exception | None) -> None:
    """Called by Sphinx at the end of a build."""
    if error is not None or app.builder.format != "html":
        return
    env = app.env
    first = env.get_doctree(env.config.root_doc)
    lines = [f"# {env.config.project}", "", f"> {first_sentence(first)}"]
    for tree in first.findall(addnodes.toctree):
        lines += ["", f"## {tree['caption']}", ""]
        for _, name in tree["entries"]:
            title = env.titles[name].astext()
            lines.append(
                f"- [{title}]({app.builder.get_target_uri(name)}): "
                f"{first_sentence(env.get_doctree(name))}"
            )
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
