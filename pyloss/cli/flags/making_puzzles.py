"""Flags of `pyloss puzzles`."""

from __future__ import annotations

from typing import Any

from pyloss.cli.parser import OVERWRITE, command, whole


def puzzles_parser(commands: Any) -> None:
    parser = command(
        commands,
        "puzzles",
        text="make or convert puzzles for recursive models",
        usage="sudoku|maze|arc [SOURCE ...] --output DIR [options]",
        description="Write a folder of puzzles for HRM and TRM, in their authors' format. Sudokus\n"
        "with one solution and mazes with one shortest way are made, or read from the\n"
        "authors' CSV (source, question, answer, rating); ARC's tasks are read from JSON.",
        epilog="""examples:
  pyloss puzzles sudoku --size 6 --output sudoku-6
  pyloss puzzles sudoku --difficulty extreme --augment 100 --output sudoku-extreme
  pyloss puzzles sudoku train.csv --held-out test.csv --train 1000 --augment 1000 --output sudoku
  pyloss puzzles maze --size 30 --min-path 110 --augment 7 --output mazes
  pyloss puzzles arc arc_training_challenges.json --held-out arc_evaluation_challenges.json \\
      --augment 1000 --output arc""",
    )
    add = parser.add_argument
    add("kind", choices=("sudoku", "maze", "arc"), metavar="KIND", help="sudoku, maze or arc")
    add(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="training puzzles: a CSV, or a folder with train.csv and perhaps test.csv; for ARC "
        "files or folders of JSON, solutions beside challenges. Without it puzzles are made",
    )
    add("--held-out", nargs="+", metavar="SOURCE", help="the same for the test set")
    add("--output", "--out", required=True, metavar="DIR", help="folder to write")
    add("--overwrite", action="store_true", help=OVERWRITE)
    numbers = {
        "--train": "training puzzles to make (default: 1000) or to draw from the source "
        "(default: all)",
        "--test": "test puzzles to make (default: 200), or to draw from --held-out (default: all) "
        "or, without it, from the source (default: none)",
        "--augment": "variations of each training puzzle: digits, rows and columns of a Sudoku "
        "shuffled, up to 7 symmetries of a maze, colors and symmetries of an ARC task (default: 0)",
        "--seed": "of all draws (default: 0)",
    }
    for flag, text in numbers.items():
        default = 0 if flag in ("--augment", "--seed") else None
        add(flag, type=whole, default=default, metavar="N", help=text)
    group = parser.add_argument_group("made puzzles")
    group.add_argument(
        "--size",
        type=whole,
        metavar="N",
        help="cells a side: 4, 6 or 9 (default) of a Sudoku, 5 to 128 of a maze (default: 30)",
    )
    group.add_argument(
        "--difficulty",
        metavar="NAME",
        help="Sudokus: easy (a solver needs naked singles only), medium (hidden singles, too), "
        "hard (guesses with 1 to 9 dead ends), extreme (10 or more) (default: any)",
    )
    group.add_argument(
        "--empty",
        type=whole,
        metavar="N",
        help="Sudokus: empty cells (default: as many as leave one solution)",
    )
    group.add_argument(
        "--min-path",
        type=whole,
        metavar="N",
        help="mazes: fewest steps from S to G (default: as many as --size)",
    )
    group = parser.add_argument_group("puzzles of a CSV")
    group.add_argument(
        "--min-rating", type=whole, metavar="N", help="Sudokus: leave out lines of a lower rating"
    )
