"""The flags of the commands, a file for each group."""

from __future__ import annotations

import argparse

import pyloss
from pyloss.cli.flags.checkpoints import checkpoints_parser
from pyloss.cli.flags.converting import (
    convert_parser,
    export_parser,
    fuse_parser,
    prune_parser,
)
from pyloss.cli.flags.distilling import distill_parser
from pyloss.cli.flags.evaluating import eval_parser
from pyloss.cli.flags.generating import chat_parser, generate_parser
from pyloss.cli.flags.inspecting import data_parser
from pyloss.cli.flags.making_puzzles import puzzles_parser
from pyloss.cli.flags.measuring import bench_parser, info_parser
from pyloss.cli.flags.quantizing import quantize_parser
from pyloss.cli.flags.recursive import train_recursive_parser
from pyloss.cli.flags.reporting import report_parser
from pyloss.cli.flags.training import train_parser
from pyloss.cli.parser import Parser

__all__ = ["build_parser"]


def build_parser(prog: str = "pyloss") -> argparse.ArgumentParser:
    """The parser of all commands, for the program `prog`; `command` holds the command's name."""
    parser = Parser(
        prog=prog,
        description="Fine-tune language models on ordinary computers.",
        epilog="""a first run:
  pyloss train --data examples/data --mask-prompt --iters 100 --learning-rate 1e-3
  pyloss generate --adapter-path adapters --prompt "turn off the lamp in the hall"

`pyloss COMMAND --help` explains a command. PYLOSS_DEBUG=1 adds a traceback to errors.""",
    )
    parser.add_argument(
        "--version", action="version", version=f"pyloss {pyloss.__version__}", help="the version"
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    train_parser(commands)
    data_parser(commands)
    distill_parser(commands)
    checkpoints_parser(commands)
    report_parser(commands)
    eval_parser(commands)
    generate_parser(commands)
    chat_parser(commands)
    fuse_parser(commands)
    export_parser(commands)
    convert_parser(commands)
    quantize_parser(commands)
    prune_parser(commands)
    puzzles_parser(commands)
    train_recursive_parser(commands)
    bench_parser(commands)
    info_parser(commands)
    for each in commands.choices.values():
        _message_flags(each)
    return parser


def _message_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --quiet and --verbose under those of their names that the command has no flag of."""
    group = parser.add_argument_group("messages")
    for flag, text in (
        ("--quiet", "only results, warnings and errors: no progress, no log"),
        ("--verbose", "also the version, the processor's instructions, and tracebacks of errors"),
    ):
        names = [x for x in (flag[1:3], flag) if x not in parser._option_string_actions]
        dest = f"messages_{flag[2:]}"
        group.add_argument(*names, action="store_true", default=None, dest=dest, help=text)
