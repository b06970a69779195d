"""`python -m pyloss.mlx_lm lora ...`: mlx-lm's commands by their names."""

from __future__ import annotations

import importlib
import sys

from pyloss.mlx_lm.command import as_command

COMMANDS = ("convert", "evaluate", "fuse", "generate", "lora", "perplexity")


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1].replace("mlx_lm.", "") if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        said = f"there is no command {name!r}" if name else "a command is needed"
        raise ValueError(f"{said}: the commands are {', '.join(COMMANDS)}")
    del sys.argv[1]
    sys.argv[0] = f"{sys.argv[0]} {name}"
    importlib.import_module(f"pyloss.mlx_lm.{name}").main()


if __name__ == "__main__":
    as_command(main)
