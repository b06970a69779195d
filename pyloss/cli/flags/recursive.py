"""Flags of `pyloss train-recursive`."""

from __future__ import annotations

from typing import Any

from pyloss.cli.parser import OVERWRITE, command, whole
from pyloss.runtime.precision import PRECISIONS
from pyloss.tuner.callbacks import SERVICES


def train_recursive_parser(commands: Any) -> None:
    parser = command(
        commands,
        "train-recursive",
        text="train HRM or TRM on puzzles, from scratch",
        usage="-c FILE [options] [KEY=VALUE ...]",
        description="Train a Hierarchical Reasoning Model or a Tiny Recursive Model on puzzles.\n"
        "Settings and words such as arch.L_layers=2 are those of the authors' pretrain.py.",
        epilog="""examples:
  pyloss train-recursive -c config/cfg_pretrain.yaml --data data/sudoku-extreme-1k-aug-1000 \\
      epochs=50000 eval_interval=5000 weight_decay=1.0 arch.mlp_t=True arch.pos_encodings=none
                              the authors' files and words
  pyloss train-recursive -c trm.yaml --data sudoku epochs=100 global_batch_size=64
                              a file of an architecture, or with all settings in one
  pyloss train-recursive --output recursive --resume
                              continue a stopped run as if it had not stopped
  pyloss train-recursive --output recursive --data sudoku --test-only --show 2
                              evaluate, and show two puzzles being solved

Ctrl-C (or SIGTERM) saves everything; --resume continues from there. An earlier run in the folder
moves to previous-1, previous-2, ... there, unless --overwrite is given.""",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings, which override the file: lr=1e-4, arch.H_cycles=3, arch=hrm",
    )
    group = parser.add_argument_group("what to train")
    group.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="YAML file: cfg_pretrain.yaml, a file of an architecture, or both in one",
    )
    group.add_argument(
        "--data",
        metavar="FOLDER",
        help="folder of puzzles with the splits train and test (default: data_paths)",
    )
    group.add_argument(
        "--output",
        metavar="FOLDER",
        help="folder of the run (default: checkpoint_path, or recursive)",
    )
    group.add_argument(
        "--load-checkpoint",
        metavar="FILE",
        help="weights to begin with: a checkpoint of the authors' code, or a model.safetensors",
    )
    group.add_argument(
        "--matmul-precision",
        "--precision",
        choices=[name for name in PRECISIONS if name != "int8"],
        help="precision of the layers' products: bfloat16 may be faster (default: float32)",
    )
    group.add_argument(
        "--max-time",
        metavar="2h|90m|1h30m",
        help="stop after this time; --resume goes on (default: off)",
    )
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--test-only", action="store_true", help="evaluate the model in the folder of a run"
    )
    group.add_argument(
        "--show",
        nargs="?",
        const=1,
        type=whole,
        metavar="N",
        help="show N test puzzles being solved step by step (N: 1)",
    )
    group.add_argument(
        "--picture", metavar="FILE.svg", help="draw the first of these puzzles as an SVG picture"
    )
    group = parser.add_argument_group("saving, resuming, reporting")
    group.add_argument(
        "--resume", action="store_true", help="continue the run in --output where it stopped"
    )
    group.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    group.add_argument(
        "--report-to",
        metavar="NAMES",
        help=f"also report to {', '.join(SERVICES)}, or several with commas",
    )
    group.add_argument("--project-name", metavar="TEXT", help="name of the project for --report-to")
