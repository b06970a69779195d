"""ARC: its files and their errors, variations and their inverses, the data sets of tasks."""

import json
import re

import numpy as np
import pytest

from pyloss.recursive.data import arc_datasets, inverse_augmentation, read_arc
from pyloss.recursive.data.arc import Variation, grid_of, tokens, variations

PAIR = {"input": [[1, 2], [3, 0]], "output": [[2, 1, 0]]}
OTHER = {"input": [[5]], "output": [[6, 6]]}
TASK = {"train": [PAIR, OTHER], "test": [{"input": [[7]], "output": [[8], [8]]}]}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def lists(task):
    return {
        part: [{"input": i.tolist(), "output": o.tolist()} for i, o in pairs]
        for part, pairs in task.items()
    }


def test_a_task_a_folder_and_challenges(tmp_path):
    one = read_arc(write(tmp_path / "abc.json", TASK))
    assert list(one) == ["abc"] and lists(one["abc"]) == TASK
    write(tmp_path / "b.json", {**TASK, "name": "Own"})
    assert list(read_arc(tmp_path)) == ["abc", "Own"]
    hidden = {"test": [{"input": [[7]]}], "train": [PAIR]}
    folder = tmp_path / "kaggle"
    folder.mkdir()
    path = write(folder / "arc_evaluation_challenges.json", {"x": hidden, "y": hidden})
    unknown = read_arc(path)
    assert unknown["x"]["test"][0][1].shape == (0, 0) and list(unknown["x"]) == ["test", "train"]
    write(folder / "arc_evaluation_solutions.json", {"x": [[[9]]], "y": [[[0, 1]]]})
    found = read_arc(path)
    assert found["y"]["test"][0][1].tolist() == [[0, 1]]
    assert list(read_arc(folder)) == ["x", "y"]  # solutions are no tasks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([TASK], "holds a list, expected an object"),
        ({}, "holds no task"),
        ({"x": [1]}, "task x: is a list; ARC's tasks are objects with train and test"),
        ({"x": {"train": [PAIR]}}, "task x: is an object; ARC's tasks are objects with train and"),
        ({"train": [], "test": [PAIR]}, "task a: train: must be a list of pairs, at least one"),
        ({"train": [{"output": [[1]]}], "test": [PAIR]}, "task a: train pair 1: must be an object"),
        ({"train": [{"input": [[1]]}], "test": [PAIR]}, "task a: train pair 1: has no output"),
        (
            {"train": [PAIR], "test": [{"input": [[1, 2], [3]]}]},
            "task a: test pair 1: input: row 2: has 1 cells, and row 1 has 2",
        ),
        (
            {"train": [PAIR, {"input": [[1]], "output": [[10]]}], "test": [PAIR]},
            "task a: train pair 2: output: row 1: has the color 10; colors are 0 to 9",
        ),
        ({"train": [{"input": [[True]], "output": [[1]]}], "test": [PAIR]}, "the color True"),
        ({"train": [{"input": [[0] * 31], "output": [[1]]}], "test": [PAIR]}, "is 1 x 31; grids"),
        ({"train": [{"input": [1, 2], "output": [[1]]}], "test": [PAIR]}, "must be a list of rows"),
    ],
)
def test_json_that_is_not_arc(tmp_path, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_arc(write(tmp_path / "a.json", content))


def test_folders_and_solutions_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=re.escape("has no file *.json")):
        read_arc(tmp_path)
    path = write(tmp_path / "a_challenges.json", {"x": {"train": [PAIR], "test": [PAIR, PAIR]}})
    write(tmp_path / "a_solutions.json", {"x": [[[1]]]})
    with pytest.raises(ValueError, match="task x: has 2 test pairs, and its solutions are 1"):
        read_arc(path)
    write(tmp_path / "a_solutions.json", {"x": [[[1]], [[2]]]})
    write(tmp_path / "x.json", TASK)
    with pytest.raises(ValueError, match="task x: is in another file of the folder, too"):
        read_arc(tmp_path)
    with pytest.raises(OSError):
        read_arc(tmp_path / "none.json")


def test_tokens_of_a_grid():
    canvas = tokens(np.array([[1, 2, 3], [4, 5, 6]]), 3, 1).reshape(30, 30)
    assert canvas[3:6, 1:5].tolist() == [[3, 4, 5, 1], [6, 7, 8, 1], [1, 1, 1, 0]]
    assert canvas.sum() == sum((3, 4, 5, 6, 7, 8)) + 5
    whole = tokens(np.full((30, 30), 9))
    assert (whole == 11).all() and (grid_of(whole) == 9).all()
    at_the_edge = tokens(np.zeros((1, 2), np.uint8), 29, 28).reshape(30, 30)
    assert at_the_edge[29, 28:].tolist() == [2, 2] and at_the_edge.sum() == 4


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (30, 2), (2, 30), (30, 30)])
def test_a_grid_comes_back_from_its_tokens(shape):
    grid = np.random.default_rng(0).integers(0, 10, shape).astype(np.uint8)
    np.testing.assert_array_equal(grid_of(tokens(grid)), grid)


def test_the_largest_rectangle_of_colors_is_the_grid():
    canvas = np.zeros((30, 30), int)
    canvas[:4, :3] = 5
    canvas[0, :8] = 5  # 4 x 3 is more than 1 x 8
    canvas[3, 2] = 1  # and 3 x 3, too
    assert grid_of(canvas).shape == (3, 3)
    canvas[3, 1] = 12
    canvas[0, :] = 11
    assert grid_of(canvas).shape == (1, 30)
    assert grid_of(np.zeros(900)).shape == (0, 0)


def test_variations_and_their_inverses():
    rng = np.random.RandomState(3)
    grid = np.arange(10, dtype=np.uint8).reshape(2, 5)
    for _ in range(30):
        variation = Variation.drawn(rng)
        assert variation.of(np.zeros((1, 1), np.uint8)) == 0
        task, undo = inverse_augmentation(variation.name("a|b"))
        assert task == "a|b"
        np.testing.assert_array_equal(undo(variation.of(grid)), grid)
    name = Variation(7, np.array([0, 2, 1, 3, 4, 5, 6, 7, 8, 9], np.uint8)).name("x")
    assert name == "x|||t7|||0213456789"
    task, same = inverse_augmentation("plain")
    assert task == "plain" and same(grid) is grid
    for bad in ("x|||t8|||0123456789", "x|||t1|||0123456788", "x|||0123456789"):
        with pytest.raises(ValueError, match="must end in"):
            inverse_augmentation(bad)


def tasks(tmp_path, names="xyz", task=TASK):
    return read_arc(write(tmp_path / "some.json", dict.fromkeys(names, task)))


def test_variations_of_a_task_are_different_and_no_more_than_there_are(tmp_path):
    (task,) = tasks(tmp_path, "x").values()
    rng = np.random.RandomState(0)
    found = variations(task, 20, rng)
    assert found[0] is None and len(found) == 21
    flat = {
        str([[v.of(g).tolist() for g in pair] for p in task.values() for pair in p])
        for v in found[1:]
    }
    assert len(flat) == 20
    black = {"train": [{"input": [[0]], "output": [[0]]}], "test": [{"input": [[0]]}]}
    (task,) = tasks(tmp_path, "x", black).values()
    assert variations(task, 5, rng) == [None]


def test_the_datasets_of_tasks(tmp_path):
    trained, held = tasks(tmp_path, "xyz"), tasks(tmp_path, "ab")
    made = arc_datasets([(trained, False), (held, True)], augment=3, seed=1)
    train, test = made.train, made.test
    # three tasks of 3 pairs and the two train pairs of two, and their test pairs; 4 puzzles each
    assert (len(train), train.total_puzzles, train.total_groups) == (3 * 12 + 2 * 8, 20, 5)
    assert (len(test), test.total_puzzles, test.total_groups) == (8, 8, 2)
    assert train.num_puzzle_identifiers == test.num_puzzle_identifiers == 21
    assert made.identifiers[0] == "<blank>" and len(set(made.identifiers)) == 21
    assert set(made.test_puzzles) == {"a", "b"} and made.test_puzzles["a"] == TASK
    assert made.short == {} and (train.vocab_size, train.seq_len) == (12, 900)
    moved = 0
    for dataset, parts in ((train, ("train", "test")), (test, ("test",))):
        examples = dataset.examples(np.arange(len(dataset)))
        for number, inputs, labels in zip(
            examples["puzzle_identifiers"], examples["inputs"], examples["labels"]
        ):
            _, undo = inverse_augmentation(made.identifiers[number])
            pairs = []
            for row in (inputs, np.where(labels < 0, 0, labels)):
                canvas = row.reshape(30, 30)
                down, right = (int(x.min()) for x in np.nonzero(canvas > 1))
                moved += down + right > 0
                assert dataset is train or (down, right) == (0, 0)
                whole = np.zeros((30, 30), int)
                whole[: 30 - down, : 30 - right] = canvas[down:, right:]
                pairs.append(undo(grid_of(whole)).tolist())
            known = [[p["input"], p["output"]] for part in parts for p in TASK[part]]
            assert pairs in known
    assert moved > 20
    again = arc_datasets([(trained, False), (held, True)], augment=3, seed=1)
    np.testing.assert_array_equal(again.train.inputs, train.inputs)


def test_outputs_that_are_not_known(tmp_path):
    hidden = {"train": [PAIR], "test": [{"input": [[7]]}]}
    made = arc_datasets([(tasks(tmp_path, "x", hidden), False)])
    assert len(made.train) == 1 and made.test is None  # nothing is learnt from a pair without one
    made = arc_datasets([(tasks(tmp_path, "x", hidden), True)])
    assert grid_of(made.test.labels[0]).tolist() == [[0]]
    assert made.test_puzzles["x"]["test"] == [{"input": [[7]], "output": [[0]]}]


@pytest.mark.parametrize(
    ("held", "augment", "message"),
    [("y", 0, "the task y is trained, and held out, too"), ("", -1, "augment is -1")],
)
def test_tasks_that_make_no_datasets(tmp_path, held, augment, message):
    sources = [(tasks(tmp_path, "xy"), False)]
    sources += [(tasks(tmp_path, held), True)] if held else []
    with pytest.raises(ValueError, match=message):
        arc_datasets(sources, augment)
    with pytest.raises(ValueError, match="there are no tasks"):
        arc_datasets([])
