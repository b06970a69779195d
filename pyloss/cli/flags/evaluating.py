"""Flags of `pyloss eval`: keys of a YAML file, see `tuner.run.settings`, and what to measure."""

from __future__ import annotations

from typing import Any

from pyloss.cli.parser import (
    OVERWRITE,
    command,
    data_flags,
    device_flag,
    distributed_flag,
    precision_flag,
    setting,
    whole,
)


def eval_parser(commands: Any) -> None:
    parser = command(
        commands,
        "eval",
        text="loss, perplexity and scores of answers on test data",
        description="Measure a model, with or without an adapter: its loss and perplexity, and\n"
        "how often it gives the answers of the data. Answers are greedy.",
        epilog="""examples:
  pyloss eval --data examples/data --mask-prompt                            the model as it is
  pyloss eval --data examples/data --mask-prompt --adapter-path adapters    with the adapter
  pyloss eval --data examples/data --mask-prompt --adapter-path adapters \\
      --metric loss,exact-match,json --max-tokens 40 --output answers.jsonl --compare none
                              answers of the adapter beside those of the model without it

metrics: loss, perplexity     of the target tokens (--train-on)
         exact-match          the reference, apart from white space at its ends
         contains             the reference is a part of the answer
         json                 JSON, and the same data as the reference if that is JSON
         f1                   of the words, as SQuAD computes it
The reference of a record is its last assistant turn; the prompt is all that precedes it.""",
    )
    setting(parser, "--model", "a model's folder, a .gguf file, or a known name", metavar="PATH")
    parser.add_argument("--adapter-path", help="folder or file of an adapter (default: none)")
    setting(parser, "--config", "YAML file with any of these settings", "-c", metavar="FILE")
    data_flags(
        parser,
        batch_text="samples in a batch, or answers generated at a time "
        "(default: 4, or 16 where answers are generated)",
    )
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), default="test", help="(default: test)"
    )
    setting(parser, "--test-batches", "batches to measure; -1 for all", type=whole)
    parser.add_argument(
        "--metric",
        metavar="LIST",
        help="what to measure, with commas (default: loss,perplexity)",
    )
    parser.add_argument(
        "--max-tokens",
        type=whole,
        default=100,
        metavar="N",
        help="largest number of tokens of an answer (default: 100)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="JSONL file for the prompt, reference, answer and scores of each record",
    )
    setting(parser, "--overwrite", OVERWRITE, action="store_true")
    parser.add_argument(
        "--compare",
        metavar="BASE",
        help="also measure another model or adapter, or `none`, the model without adapter, "
        "and print the differences with their 95 %% intervals",
    )
    device_flag(parser)
    distributed_flag(parser)
    precision_flag(parser)
