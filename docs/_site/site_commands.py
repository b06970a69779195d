"""The reference of the command line, from the parser that reads it."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import Any

from pyloss.cli.flags import build_parser


def commands_page() -> str:
    """Return a section for each command, with all its flags."""
    parser = build_parser()
    (commands,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    short = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    return "\n".join(
        _command(name, command, short[name]) for name, command in commands.choices.items()
    )


def _command(name: str, parser: argparse.ArgumentParser, short: str) -> str:
    lines = [f"## pyloss {name}", ""]
    lines += _prose(parser.description or f"{short[:1].upper()}{short[1:]}.")
    usage = parser.format_usage().removeprefix("usage: ").strip()
    lines += ["```text", usage, "```", "", f"```{{program}} pyloss {name}", "```", ""]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS]
        if actions:
            title = (group.title or "").replace("positional arguments", "arguments")
            lines += [f"**{title[:1].upper()}{title[1:]}**", ""]
            lines += _prose(group.description or "")
            for action in actions:
                lines += _option(parser, action)
    if parser.epilog:
        lines += ["```text", textwrap.dedent(parser.epilog).strip(), "```", ""]
    return "\n".join(lines)


def _prose(text: str) -> list[str]:
    """Paragraphs; those with indented lines are shown as they are."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(text).strip()):
        if re.search(r"^\s", paragraph, re.MULTILINE):
            lines += ["```text", paragraph, "```", ""]
        elif paragraph:
            lines += [_escaped(paragraph), ""]
    return lines


def _option(parser: argparse.ArgumentParser, action: Any) -> list[str]:
    values = ""
    if action.nargs != 0:
        values = parser._get_formatter()._format_args(action, (action.metavar or action.dest))
    named = ", ".join(f"{flag} {values}".strip() for flag in action.option_strings) or values
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    lines = [f"```{{option}} {named}", _escaped(text)]
    if action.choices and "{" not in named:
        lines += ["", "One of " + ", ".join(f"`{choice}`" for choice in action.choices) + "."]
    return [*lines, "```", ""]


def _escaped(text: str) -> str:
    """Text in which Markdown finds no markup but code."""
    pieces = re.split(r"(`[^`]+`)", text)
    return "".join(
        piece if i % 2 else re.sub(r"([\\*_<>\[\]{}$])", r"\\\1", piece)
        for i, piece in enumerate(pieces)
    )
