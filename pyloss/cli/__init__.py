"""The command line: `parser` has the flags of each command, `commands` does the work."""

from pyloss.cli.parser import main

__all__ = ["main"]
