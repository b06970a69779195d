"""Flags of `pyloss checkpoints`."""

from __future__ import annotations

from typing import Any

from pyloss.cli.parser import command


def checkpoints_parser(commands: Any) -> None:
    parser = command(
        commands,
        "checkpoints",
        "list the adapters that a run has stored",
        "ADAPTER",
        description="""List the adapters in a run's folder: their iteration, losses and date.
`--adapter-path ADAPTER@400`, `@best` and `@last` name them to the other commands.""",
        epilog="""examples:
  pyloss checkpoints adapters
  pyloss generate --adapter-path adapters@last --prompt "turn off the lamp in the hall\"""",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a run")
