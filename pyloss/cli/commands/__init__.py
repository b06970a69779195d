"""The commands, a file for each group: a command takes its flags and returns the exit code."""

from __future__ import annotations

from collections.abc import Callable

from pyloss.cli.commands.chatting import chat
from pyloss.cli.commands.checkpoints import checkpoints
from pyloss.cli.commands.converting import convert, export, fuse, prune
from pyloss.cli.commands.distilling import distill
from pyloss.cli.commands.evaluating import evaluate
from pyloss.cli.commands.generating import generate
from pyloss.cli.commands.inspecting import data
from pyloss.cli.commands.making_puzzles import puzzles
from pyloss.cli.commands.measuring import bench, info
from pyloss.cli.commands.quantizing import quantize
from pyloss.cli.commands.recursive import train_recursive
from pyloss.cli.commands.reporting import report
from pyloss.cli.commands.shared import Flags
from pyloss.cli.commands.training import train

COMMANDS: dict[str, Callable[[Flags], int]] = {
    "train": train,
    "data": data,
    "distill": distill,
    "checkpoints": checkpoints,
    "report": report,
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "fuse": fuse,
    "export": export,
    "convert": convert,
    "quantize": quantize,
    "prune": prune,
    "puzzles": puzzles,
    "train-recursive": train_recursive,
    "bench": bench,
    "info": info,
}
