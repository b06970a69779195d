"""The reference of the settings: the keys of YAML files, from the schema that checks them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from pyloss.cli.flags import build_parser
from pyloss.tuner.run.settings import (
    DISTILLATION_FLAGS,
    DISTILLATION_SCHEMA,
    LORA_DEFAULTS,
    LORA_FLAGS,
    LORA_SCHEMA,
    RENAMED,
    SCHEMA,
    Key,
    Refused,
)


class _Nothing:
    """A value that no key allows, so that its check says what is allowed."""

    def __repr__(self) -> str:
        return "nothing"


def allowed(key: Key) -> str:
    """Return what a key allows, in the words of the error for other values."""
    try:
        key.check(_Nothing())
    except (Refused, ValueError, TypeError) as refusal:
        return str(refusal)
    raise AssertionError("a key that allows any value")


def flags_of(command: str) -> dict[str, argparse.Action]:
    """Return the actions of a command by the names of their values."""
    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    return {action.dest: action for action in actions if action.option_strings}


def settings_page() -> str:
    """Return the tables of all keys."""
    train, distill = flags_of("train"), flags_of("distill")
    lora = {name: flag for flag, name in LORA_FLAGS.items()}
    distilling = {name: flag for flag, name in DISTILLATION_FLAGS.items()}
    parts = [
        _table(SCHEMA, lambda key: train.get(key) or distill.get(key), {}),
        "## Keys of lora_parameters\n",
        _table(LORA_SCHEMA, lambda key: train.get(lora.get(key, "")), LORA_DEFAULTS),
        "## Keys of distillation\n",
        _table(DISTILLATION_SCHEMA, lambda key: distill.get(distilling.get(key, "")), {}),
        "## Names of other tools\n",
        "Each is refused with pyloss's name for it.\n",
        "| given | pyloss |\n| --- | --- |",
        *(f"| `{name}` | `{known}` |" for name, known in RENAMED.items()),
    ]
    return "\n".join(parts) + "\n"


def _table(schema: Mapping[str, Key], flag: Any, defaults: Mapping[str, Any]) -> str:
    lines = [
        "```{rst-class} keys\n```\n",
        "| key | allowed | default | flag |",
        "| --- | --- | --- | --- |",
    ]
    for name, key in schema.items():
        action = flag(name)
        default = defaults.get(name, key.default)
        long = max(action.option_strings, key=len) if action is not None else ""
        lines.append(
            f"| `{name}` | {_cell(allowed(key))} | {_default(default)} | "
            f"{f'`{long}`' if long else ''} |"
        )
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if value is None or isinstance(value, Mapping):  # a mapping's keys have a table of their own
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return re.sub(r"([\\*_<>\[\]{}$|])", r"\\\1", text)
