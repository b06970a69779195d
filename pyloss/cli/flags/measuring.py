"""Flags of `pyloss bench` and `pyloss info`."""

from __future__ import annotations

from typing import Any

from pyloss.cli.parser import command, whole
from pyloss.runtime.precision import PRECISIONS
from pyloss.tuner.run.settings import DEFAULT_MODEL


def bench_parser(commands: Any) -> None:
    parser = command(
        commands,
        "bench",
        text="measure this machine",
        description="Measure how fast a model trains, evaluates and generates here, and the speed\n"
        "of memory and matrix products. Nothing is written.",
        epilog="""examples:
  pyloss bench
  pyloss bench --model model.gguf --max-seq-length 2048 --grad-checkpoint --train-tokens 500000
  pyloss bench --model Qwen3-0.6B/config.json --type q4_1
                              before a download: random weights of that shape""",
    )
    add = parser.add_argument
    text = (
        "folder, .gguf file, known name, or a config.json alone, for random weights of its shape "
        f"(default: {DEFAULT_MODEL}, or its shape if it is not installed)"
    )
    add("--model", help=text)
    add(
        "--type",
        "--quantize",
        metavar="NAME",
        help="measure random weights stored as f32, bf16, q8_0, q4_1, q4_k, q4 (mlx), nf4, ... "
        "(default: the model's own; for a config.json, what it says)",
    )
    add(
        "--fine-tune-type",
        choices=("lora", "dora"),
        default="lora",
        help="adapters to train (default: lora)",
    )
    add("--rank", type=whole, default=8, metavar="N", help="rank of the adapters (default: 8)")
    add("--batch-size", type=whole, default=4, metavar="N", help="samples in a batch (default: 4)")
    add(
        "--max-seq-length",
        type=whole,
        default=256,
        metavar="N",
        help="tokens of a sample (default: 256)",
    )
    add(
        "--grad-checkpoint",
        action="store_true",
        help="recompute activations: less memory, more time",
    )
    add(
        "--matmul-precision",
        "--precision",
        default="float32",
        choices=PRECISIONS,
        help="precision of the layers' products; mixed: activations in bfloat16, too (default: "
        "float32)",
    )
    add(
        "--train-tokens",
        type=whole,
        default=1_000_000,
        metavar="N",
        help="print the time for this many tokens (default: 1000000)",
    )


def info_parser(commands: Any) -> None:
    parser = command(
        commands,
        "info",
        "version, processor and threads in use; or what a model is",
        "[MODEL | --report]",
        description="""Print the version, the processor, threads and devices. With MODEL, print its
family, layers, formats and sizes, its chat template's features, and the memory of LoRA.
A model that pyloss does not support is refused with the part that is missing.""",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder, .gguf file, known name, or a config.json alone",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="print what a report of an error needs: versions, processor, features, memory and "
        "packages, without names of people or computers and without paths",
    )
