"""Flags of `pyloss quantize`."""

from __future__ import annotations

from typing import Any

from pyloss.cli.parser import (
    OVERWRITE,
    command,
    dtype_flag,
    group_size_flag,
    model_flags,
    push_flags,
    real,
    whole,
)


def quantize_parser(commands: Any) -> None:
    parser = command(
        commands,
        "quantize",
        usage="[MODEL] --to TYPE --output PATH [options]",
        text="write a model quantized, with its scales tuned if asked for",
        description="Write a quantized copy of a model. --tune trains its scales and offsets on a\n"
        "little text, so that its probabilities come near the original's.",
        epilog="""examples:
  pyloss quantize some_folder --to q4_k_m --output model.gguf
                              a GGUF file for llama.cpp
  pyloss quantize some_folder --to q3 --tune --tune-data texts.jsonl --output quantized
                              3 bits in mlx's layout, tuned; the result is as large as untuned""",
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="MODEL", help="the model, as --model")
    model_flags(add)
    add(
        "--to",
        required=True,
        metavar="TYPE",
        help="q2, q3, q4, q5, q6 or q8 (a folder in mlx's layout), nf4 (bitsandbytes'), or for a "
        "GGUF file q8_0, q5_0, q5_1, q4_0, q4_1 or a mixture such as q4_k_m (see `pyloss export`)",
    )
    add("--output", required=True, metavar="PATH", help="file to write for GGUF, else a folder")
    add("--overwrite", action="store_true", help=OVERWRITE)
    group_size_flag(add, what="folders: ")
    dtype_flag(add, "folders: type of scales and of what is not quantized (default: the model's)")
    add(
        "--importance-data",
        metavar="FILE",
        help="with a mixture: text or records that say which columns of the matrices matter",
    )
    push_flags(add)
    group = parser.add_argument_group("tuning")
    more = group.add_argument
    more(
        "--tune",
        action="store_true",
        help="train scales and offsets towards the original's probabilities",
    )
    more(
        "--tune-data",
        nargs="+",
        metavar="PATH",
        help="text or records to train on, as --data of `pyloss train`",
    )
    more("--map", metavar="LIST", help="keys of the records, as prompt=question,completion=reply")
    numbers = {
        "--valid-split": "share of the text that is held out to measure on "
        "(default: 0.05 of a single file)",
        "--iters": "batches to train on (default: 100)",
        "--learning-rate": "most by which a scale changes in a step, relative to itself "
        "(default: 1e-3)",
        "--batch-size": "samples in a batch (default: 4)",
        "--max-seq-length": "largest number of tokens of a sample (default: 512)",
        "--val-batches": "batches of held-out text to measure on; -1: all (default: 25)",
        "--seed": "order of the samples (default: 0)",
    }
    for flag, text in numbers.items():
        kind, metavar = (
            (real, "X") if flag in ("--valid-split", "--learning-rate") else (whole, "N")
        )
        more(flag, type=kind, metavar=metavar, help=text)
    more(
        "--grad-checkpoint",
        action="store_true",
        default=None,
        help="recompute activations: less memory, more time",
    )
