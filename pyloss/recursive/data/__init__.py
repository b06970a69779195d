"""Data of puzzles for recursive models: data sets in the authors' format, Sudokus.

The formats, augmentations and draws are those of the scripts of HRM and TRM.
"""

from pyloss.recursive.data.dataset import PuzzleBatch, PuzzleDataset
from pyloss.recursive.data.sudoku import (
    Sudoku,
    read_sudoku_csv,
    shuffle_sudoku,
    solve_sudoku,
    sudoku_dataset,
)
from pyloss.recursive.data.sudoku_making import sudoku_puzzles

__all__ = [
    "PuzzleBatch",
    "PuzzleDataset",
    "Sudoku",
    "read_sudoku_csv",
    "shuffle_sudoku",
    "solve_sudoku",
    "sudoku_dataset",
    "sudoku_puzzles",
]
