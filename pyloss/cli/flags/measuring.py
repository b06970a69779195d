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
        description="Measure the speed of memory, matrix products and a training step.",
        epilog="""examples:
  pyloss bench
  pyloss bench --model model.gguf --max-seq-length 2048 --grad-checkpoint --train-tokens 500000""",
    )
    add = parser.add_argument
    text = (
        f"folder, .gguf file or known name (default: {DEFAULT_MODEL}, "
        "or random weights of its shape if that is missing)"
    )
    add("--model", help=text)
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
        default="float32",
        choices=PRECISIONS,
        help="precision of the layers' products (default: float32)",
    )
    add(
        "--train-tokens",
        type=whole,
        default=1_000_000,
        metavar="N",
        help="print the time for this many tokens (default: 1000000)",
    )


def info_parser(commands: Any) -> None:
    commands.add_parser(
        "info",
        help="version, processor and threads in use",
        description="Print the version, the processor, threads and devices.",
    )
