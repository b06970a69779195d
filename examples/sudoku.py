"""A Tiny Recursive Model learns Sudoku from scratch on generated puzzles with one solution.

    python examples/sudoku.py [--size 4|6] [--out build/sudoku]

4 x 4 takes a minute on two cores. Its held-out puzzles have grids that the training set
has not, in no shuffled version. Those of 6 x 6 have grids that no symmetry of Sudoku turns into a
grid of the training set. After training, a puzzle is shown while it is solved.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from pyloss.recursive import steps_of, steps_svg, steps_text, train_recursive
from pyloss.recursive.data import sudoku_dataset, sudoku_puzzles
from pyloss.recursive.data.sudoku_symmetry import split_by_class
from pyloss.recursive.settings import read_settings

SETTINGS = Path(__file__).resolve().parent / "trm_sudoku.yaml"
#: by size: puzzles, empty cells of each, shuffled versions of each, and changes of the settings
DEMOS = {
    4: (800, 10, 3, ["hidden_size=64", "L_cycles=2", "global_batch_size=32", "epochs=28",
                     "eval_interval=7"]),
    6: (4000, 18, 7, ["epochs=40", "eval_interval=10"]),
}  # fmt: skip
#: the share of puzzles that are held out, about
HELD_OUT = 0.15


def data(size, seed=0, count=None):
    """Training puzzles with their shuffled versions, and held-out ones."""
    made, empty, shuffled, _ = DEMOS[size]
    puzzles = list(sudoku_puzzles(count or made, size=size, empty=empty, seed=seed))
    if size == 6:
        train, test = split_by_class(puzzles, HELD_OUT, seed)
    else:
        # 4 x 4 has 288 grids, of two classes: whole grids are held out, not classes.
        grids = sorted({puzzle.answer.tobytes() for puzzle in puzzles})
        np.random.default_rng(seed).shuffle(grids)
        held = set(grids[: round(HELD_OUT * len(grids))])
        train = [puzzle for puzzle in puzzles if puzzle.answer.tobytes() not in held]
        test = [puzzle for puzzle in puzzles if puzzle.answer.tobytes() in held]
    answers = {puzzle.answer.tobytes() for puzzle in test}
    return sudoku_dataset(train, shuffled, seed, exclude=answers), sudoku_dataset(test)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, choices=DEMOS, default=4, help="cells a side")
    parser.add_argument("--out", type=Path, default=Path("build/sudoku"), help="folder of the run")
    parser.add_argument("--precision", help="of products: float32 or bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="changes of the settings")
    options = parser.parse_args()
    began = time.perf_counter()

    train, test = data(options.size, options.seed)
    print(f"{train.total_groups} puzzles to train on, {len(test)} held out")
    settings = read_settings(SETTINGS, [*DEMOS[options.size][-1], *options.settings])
    settings.training |= {"seed": options.seed, "matmul_precision": options.precision}
    head, result = train_recursive(
        settings.arch,
        train,
        test,
        settings.args(),
        folder=options.out,
        overwrite=True,  # this script owns the folder
    )
    print(f"\n{result.evaluation.table()}\n{result.evaluation}\n")

    steps = steps_of(head.model, test.inputs[:1], test.labels[:1])
    print(steps_text(steps, 0, test.vocab_size))
    picture = options.out / "steps.svg"
    picture.write_text(steps_svg(steps, 0, test.vocab_size), encoding="utf-8")
    print(f"\nmodel: {options.out}, picture: {picture}")
    print(f"all in {time.perf_counter() - began:.0f} s")
    return 0 if result.evaluation.exact_accuracy >= 0.95 else 1


if __name__ == "__main__":
    raise SystemExit(main())
