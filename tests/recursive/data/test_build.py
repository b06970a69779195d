"""Folders of puzzles: what is made and read, held-out puzzles, whole folders or none."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pyloss.recursive.data import (
    ArcVotes,
    PuzzleDataset,
    build,
    maze_puzzles,
    sudoku_dataset,
    sudoku_puzzles,
)
from pyloss.recursive.data.maze import CHARSET

TASK = {
    "train": [{"input": [[1, 2], [3, 0]], "output": [[2, 1, 0]]}],
    "test": [{"input": [[7]], "output": [[8], [8]]}],
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_csv(path, puzzles, characters="0123456789"):
    lines = ["source,question,answer,rating"]
    for puzzle in puzzles:
        grids = ("".join(characters[c] for c in grid.reshape(-1)) for grid in puzzle[:2])
        lines.append(",".join(["x", *grids, str(puzzle.rating)]))
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n")


def write_json(name, content):
    Path(name).write_text(json.dumps(content))
    return name


def answers(dataset):
    return {row.tobytes() for row in dataset.labels}


def test_made_sudokus():
    made = build("sudoku", None, "out", size=4, train=30, test=12, empty=8, augment=2, seed=3)
    train, test = (PuzzleDataset.load("out", split) for split in ("train", "test"))
    assert (len(train), len(test), train.total_groups) == (90, 12, 30)
    assert json.loads(Path("out/identifiers.json").read_text()) == ["<blank>"]
    assert not answers(train) & answers(test)
    assert ((train.inputs == 1).sum(1) == 8).all() and train.vocab_size == 6
    assert made.lines == [
        "train: 30 puzzles of 4 x 4, 8.0 cells given, ratings 0 to 0 (median 0); "
        "with 2 variations of each: 90",
        "test: 12 puzzles of 4 x 4, 8.0 cells given, ratings 0 to 0 (median 0)",
    ]
    again = build("sudoku", None, "again", size=4, train=30, test=12, empty=8, augment=2, seed=3)
    np.testing.assert_array_equal(again.train.inputs, train.inputs)
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "identifiers.json", "test", "train",
    ]  # fmt: skip


def test_made_mazes():
    made = build("maze", None, "out", size=7, train=4, test=2, min_path=9, augment=1)
    assert len(PuzzleDataset.load("out")) == 8 and len(PuzzleDataset.load("out", "test")) == 2
    assert re.fullmatch(
        r"train: 4 mazes of 7 x 7, ratings \d+ to \d+ \(median \d+\); with 1 variation of each: 8",
        made.lines[0],
    )


def test_sudokus_of_a_csv_are_drawn_as_by_the_authors():
    puzzles = list(sudoku_puzzles(9, size=4))
    write_csv("data/train.csv", puzzles[:6])
    write_csv("data/test.csv", puzzles[6:])
    made = build("sudoku", "data", "out", train=4, augment=2, seed=5)
    rng = np.random.RandomState(5)  # as after np.random.seed(5)
    chosen = [puzzles[i] for i in rng.choice(6, size=4, replace=False)]
    held = {puzzle.answer.tobytes() for puzzle in puzzles[6:]}
    expected = sudoku_dataset(chosen, 2, rng, held)
    np.testing.assert_array_equal(made.train.inputs, expected.inputs)
    np.testing.assert_array_equal(made.test.inputs, sudoku_dataset(puzzles[6:]).inputs)
    other = build(
        "sudoku", "data/train.csv", "b", held_out="data/test.csv", train=4, augment=2, seed=5
    )
    np.testing.assert_array_equal(other.train.inputs, made.train.inputs)
    assert len(build("sudoku", "data", "c", test=2).test) == 2


def test_a_part_of_a_csv_is_held_out():
    puzzles = list(sudoku_puzzles(10, size=6))
    write_csv("train.csv", puzzles)
    made = build("sudoku", "train.csv", "out", test=3)
    assert (len(made.train), len(made.test)) == (7, 3) and not answers(made.train) & answers(
        made.test
    )
    assert build("sudoku", "train.csv", "none").test is None
    assert not Path("none/test").exists()
    write_csv("train.csv", puzzles + puzzles[:2])
    (line,) = build("sudoku", "train.csv", "b", held_out="train.csv").lines[2:]
    assert line == "note: 12 training puzzles with an answer of the test set"


def test_mazes_of_a_csv():
    write_csv("train.csv", maze_puzzles(3, size=6), CHARSET)
    made = build("maze", "train.csv", "out", augment=7)
    assert made.train.group_indices.tolist() == [0, 8, 16, 24] and made.test is None


def test_tasks_of_arc():
    trained = write_json("a_training_challenges.json", {"x": TASK, "y": TASK})
    held = write_json("a_evaluation_challenges.json", {"z": TASK})
    made = build("arc", [trained], "out", held_out=held, augment=3, seed=1)
    train, test = (PuzzleDataset.load("out", split) for split in ("train", "test"))
    assert (len(train), train.total_puzzles, len(test)) == (2 * 4 * 2 + 4, 12, 4)
    assert made.lines == [
        "train: 3 tasks (train pairs only of 1), 12 puzzles, 20 pairs",
        "test: 1 task, 4 puzzles, 4 pairs",
    ]
    names = json.loads(Path("out/identifiers.json").read_text())
    assert len(names) == train.num_puzzle_identifiers == 13
    votes = ArcVotes.load("out")
    (batch,) = test.batches(4, train=False)
    votes.update(batch, np.where(batch["labels"] < 0, 0, batch["labels"]), np.zeros(4))
    assert votes.result((1,)) == {"ARC/pass@1": 1.0}
    hidden = {"z": {"train": TASK["train"], "test": [{"input": [[7]]}]}}
    made = build("arc", trained, "b", held_out=write_json("b.json", hidden))
    assert made.lines[2].startswith("note: 1 task of the test set without outputs")
    dull = {
        "x": {
            "train": [{"input": [[0]], "output": [[0]]}],
            "test": [{"input": [[0]], "output": [[0]]}],
        }
    }
    made = build("arc", write_json("c.json", dull), "c", augment=2)
    assert made.lines[1:] == [
        "note: 1 task with fewer than 2 variations: others give the same pairs"
    ]


def test_earlier_folders_move_or_are_replaced():
    options = {"size": 4, "train": 3, "test": 2}
    first = build("sudoku", None, "out", **options).train.inputs
    build("sudoku", None, "out", **options, seed=1)
    kept = PuzzleDataset.load("out/previous-1")
    np.testing.assert_array_equal(kept.inputs, first)
    assert (PuzzleDataset.load("out").inputs != first).any()
    build("sudoku", None, "out", **{**options, "test": 0}, seed=2, overwrite=True)
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "identifiers.json", "previous-1", "train",
    ]  # fmt: skip


def test_a_failure_leaves_what_was_there(monkeypatch):
    options = {"size": 4, "train": 3, "test": 2}
    build("sudoku", None, "out", **options)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    real = PuzzleDataset.save

    def fails(self, folder, split="train", identifiers=None):
        real(self, folder, split, identifiers)
        if split == "test":
            raise OSError(28, "No space left on device", "all__labels.npy")

    monkeypatch.setattr(PuzzleDataset, "save", fails)
    with pytest.raises(OSError, match="No space left"):
        build("sudoku", None, "out", **options, seed=1)
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    with pytest.raises(OSError, match="No space left"):
        build("sudoku", None, "new/folder", **options)
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("chess", {}, "kind is 'chess'; it must be one of sudoku, maze, arc"),
        ("arc", {}, "arc needs a source: ARC's JSON files or folders"),
        ("sudoku", {"min_path": 3}, "min_path is no option of made puzzles of kind sudoku; they"),
        ("sudoku", {"held_out": "x"}, "held_out is no option of made puzzles of kind sudoku"),
        ("sudoku", {"source": "x", "size": 9}, "size is no option of read puzzles of kind sudoku"),
        ("arc", {"source": "x", "train": 9}, "train is no option of read puzzles of kind arc"),
        ("sudoku", {"source": ["x", "y"]}, "sudoku takes one source, a CSV or a folder with"),
        ("sudoku", {"train": 0}, "train is 0; it must be a whole number of at least 1"),
        ("sudoku", {"empty": 81}, "empty is 81; a 9 x 9 Sudoku with one solution has at most 64"),
        ("sudoku", {"out": "x.csv"}, "x.csv is named like a table, and a folder is written"),
        ("maze", {"augment": 8, "size": 6, "train": 1}, "augment is 8"),
        ("sudoku", {"size": 4, "test": 3000, "train": 1, "empty": 8}, "0 of 1 training puzzles"),
    ],
)
def test_requests_that_cannot_be_met(kind, options, message):
    given = {"source": None, "out": "out"} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        build(kind, given.pop("source"), given.pop("out"), **given)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 9}, "train is 9; six.csv has 5 puzzles to draw from"),
        ({"test": 5}, "test is 5; six.csv has 5 puzzles"),
        ({"held_out": "four.csv"}, "four.csv: has grids of another size than the training puzzles"),
        ({"min_rating": 50}, "six.csv: no puzzle of rating 50 or more in the file"),
    ],
)
def test_files_that_do_not_fit(options, message):
    write_csv("six.csv", sudoku_puzzles(5, size=6))
    write_csv("four.csv", sudoku_puzzles(5, size=4))
    with pytest.raises(ValueError, match=re.escape(message)):
        build("sudoku", "six.csv", "out", **options)
