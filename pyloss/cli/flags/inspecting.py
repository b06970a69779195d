"""Flags of `pyloss data`."""

from __future__ import annotations

from typing import Any

from pyloss.cli.parser import OVERWRITE, command, setting, target_flags


def data_parser(commands: Any) -> None:
    parser = command(
        commands,
        "data",
        text="what training would make of your data",
        usage="PATH ... [options]",
        description="Show what was recognized in data, the lengths of the records in tokens, what\n"
        "is cut, repeated, empty and trained, and a sample with the trained tokens marked.",
        epilog="""examples:
  pyloss data examples/data --mask-prompt
  pyloss data mine.csv --map prompt=question,completion=reply --write mine.jsonl
                              convert to a JSONL file of prompts and completions""",
    )
    parser.add_argument(
        "data",
        nargs="+",
        metavar="PATH",
        help="file of records, folder or name of a dataset, as --data of pyloss train",
    )
    setting(
        parser,
        "--model",
        "the model whose tokenizer and chat template are used",
        metavar="PATH",
    )
    setting(parser, "--config", "YAML file with any of these settings", "-c", metavar="FILE")
    target_flags(parser)
    parser.add_argument(
        "--write", metavar="FILE", help="JSONL file to convert the records of a file to"
    )
    parser.add_argument(
        "--as",
        dest="form",
        choices=("messages", "pairs"),
        help="write messages, or prompt and completion (default: the form that fits the layout)",
    )
    setting(parser, "--overwrite", OVERWRITE, action="store_true")
