"""The command line.

`entry` runs a command and reports errors, `parser` and `flags` read the command line, `commands`
do the work.
"""

from pyloss.cli.entry import main

__all__ = ["main"]
