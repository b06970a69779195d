"""Flags of `pyloss report`."""

from __future__ import annotations

from typing import Any

from pyloss.cli.parser import OVERWRITE, command, device_flag, setting, target_flags, whole


def report_parser(commands: Any) -> None:
    parser = command(
        commands,
        "report",
        text="a page about a training run: curves, answers, metrics, layers",
        usage="ADAPTER [options]",
        description="Write one HTML file about a run: curves, metrics with intervals, answers of\n"
        "the base and the adapter side by side, changes of the layers, data, settings.\n"
        "It opens from the disk and reads nothing from elsewhere.",
        epilog="""examples:
  pyloss report adapters
  pyloss report adapters --no-answers --output run.html
                              without the answers, which take the most time

Model and data are those of the run; give --model and --data where they lie elsewhere now.""",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a run, or ADAPTER@400, @best")
    parser.add_argument(
        "--output", metavar="FILE.html", help="the page (default: report.html in ADAPTER)"
    )
    parser.add_argument(
        "--prompts",
        type=whole,
        default=20,
        metavar="N",
        help="test prompts to answer (default: 20)",
    )
    parser.add_argument(
        "--no-answers", dest="answers", action="store_false", help="answer no prompts"
    )
    parser.add_argument(
        "--max-tokens", type=whole, default=200, metavar="N", help="of an answer (default: 200)"
    )
    parser.add_argument("--model", metavar="PATH", help="the base model (default: the run's)")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="the data (default: the run's)")
    target_flags(parser)
    device_flag(parser)
    setting(parser, "--overwrite", OVERWRITE, action="store_true")
