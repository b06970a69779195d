"""Puzzles of recursive models: CSV of Sudokus and mazes, ARC's JSON, folders of arrays."""

import io
import json

import numpy as np
from running import put_files

TASK = {
    "train": [{"input": [[1, 2], [3, 0]], "output": [[2, 1, 0]]}],
    "test": [{"input": [[7]], "output": [[8], [8]]}],
}
WORDS = ["train", "test", "input", "output", "name", "sets", "all", "more", "ignore_label_id"]
#: Characters of CSV and of cells.
CELLS = '0123456789.# SGo,"\n\r\0é'
#: The files of each kind, made by `prepare`.
KINDS = []


def prepare():
    from pyloss.recursive.data import maze_puzzles, sudoku_dataset, sudoku_puzzles
    from pyloss.recursive.data.maze import CHARSET

    def csv(puzzles, characters):
        lines = ["source,question,answer,rating"]
        for puzzle in puzzles:
            grids = ("".join(characters[c] for c in grid.reshape(-1)) for grid in puzzle[:2])
            lines.append(",".join(["x", *grids, str(puzzle.rating)]))
        return "\n".join(lines).encode()

    sudokus = list(sudoku_puzzles(3, size=4))
    made = sudoku_dataset(sudokus, augment=1)
    folder = {"train/dataset.json": json.dumps(made.metadata).encode()}
    for name in ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices"):
        file = io.BytesIO()
        np.save(file, getattr(made, name))
        folder[f"train/all__{name}.npy"] = file.getvalue()
    KINDS[:] = [
        {"sudoku.csv": csv(sudokus, "0123456789")},
        {"maze.csv": csv(maze_puzzles(3, size=5), CHARSET)},
        {"arc.json": json.dumps(TASK).encode()},
        {
            "arc_challenges.json": json.dumps({"x": TASK, "y": TASK}).encode(),
            "arc_solutions.json": json.dumps({"x": [[[1]]], "y": [[[2, 3]]]}).encode(),
        },
        folder,
    ]


def _cells(m, data):
    """Text with some characters that cells have, or others."""
    text = list(data.decode())
    for _ in range(m.count()):
        at = m.below(len(text))
        text[at] = m.pick((*CELLS, "", text[at] * 2))
    return "".join(text).encode()


def make(m):
    files = dict(m.pick(KINDS))
    if m.pristine:
        return files
    name = m.pick(list(files))
    data = files[name]
    if name.endswith(".json"):
        files[name] = m.json(data, WORDS)
    elif name.endswith(".csv") and m.chance(0.8):
        files[name] = _cells(m, data) if m.chance(0.6) else m.lines(data.decode(), WORDS)
    else:
        files[name] = m.bytes(data)
    return files


def use(files, folder):
    from pyloss.recursive.data import (
        PuzzleDataset,
        arc_datasets,
        maze_dataset,
        read_arc,
        read_maze_csv,
        read_sudoku_csv,
        sudoku_dataset,
    )

    put_files(folder, files)
    if "sudoku.csv" in files:
        made = sudoku_dataset(read_sudoku_csv(folder / "sudoku.csv"), augment=1)
    elif "maze.csv" in files:
        made = maze_dataset(read_maze_csv(folder / "maze.csv"), augment=1)
    elif "train/dataset.json" in files:
        made = PuzzleDataset.load(folder)
    else:
        tasks = read_arc(folder / next(iter(files)))
        made, test, *_ = arc_datasets([(tasks, True)], augment=1)
        assert test is not None and len(test) >= len(tasks)
    for train in (True, False):
        for batch in made.batches(1, train=train):
            inputs, labels = batch["inputs"], batch["labels"]
            assert inputs.shape == labels.shape == (1, made.seq_len)
            assert 0 <= inputs.min() <= inputs.max() < made.vocab_size
            assert ((labels == -100) | (labels >= 0)).all() and labels.max() < made.vocab_size
