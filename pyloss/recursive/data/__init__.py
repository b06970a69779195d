"""Data of puzzles for recursive models: data sets in the authors' format, Sudokus, mazes, ARC.

The formats, augmentations and draws are those of the scripts of HRM and TRM.
"""

from pyloss.recursive.data.arc import ArcData, arc_datasets, inverse_augmentation, read_arc
from pyloss.recursive.data.arc_votes import ArcVotes
from pyloss.recursive.data.build import Built, build
from pyloss.recursive.data.dataset import PuzzleBatch, PuzzleDataset
from pyloss.recursive.data.maze import Maze, maze_dataset, read_maze_csv, solve_maze
from pyloss.recursive.data.maze_making import maze_puzzles
from pyloss.recursive.data.sudoku import (
    Sudoku,
    read_sudoku_csv,
    shuffle_sudoku,
    solve_sudoku,
    sudoku_dataset,
)
from pyloss.recursive.data.sudoku_making import sudoku_puzzles

__all__ = [
    "ArcData",
    "ArcVotes",
    "Built",
    "Maze",
    "PuzzleBatch",
    "PuzzleDataset",
    "Sudoku",
    "arc_datasets",
    "build",
    "inverse_augmentation",
    "maze_dataset",
    "maze_puzzles",
    "read_arc",
    "read_maze_csv",
    "read_sudoku_csv",
    "shuffle_sudoku",
    "solve_maze",
    "solve_sudoku",
    "sudoku_dataset",
    "sudoku_puzzles",
]
