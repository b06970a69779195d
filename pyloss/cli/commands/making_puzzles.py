"""`pyloss puzzles`."""

from __future__ import annotations

from pyloss.cli.commands.shared import Flags
from pyloss.io.console import out, say


def puzzles(flags: Flags) -> int:
    """`pyloss puzzles`: writes a folder of puzzles and prints what it holds."""
    from pyloss.recursive.data import build

    target = flags.pop("output")
    try:
        made = build(flags.pop("kind"), flags.pop("sources") or None, target, **flags)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: nothing is written") from None
    for line in made.lines:
        out(line)
    say(f"wrote the puzzles to {target}")
    return 0
