"""Data sets of puzzles: batches as the authors draw them, their folder format, bad input."""

import json
import re

import numpy as np
import pytest

from pyloss.recursive.data import PuzzleDataset


def dataset(groups=5, puzzles=2, examples=3, **more):
    """Groups of puzzles of examples; the tokens of an example are its number and its puzzle's."""
    count, total = groups * puzzles, groups * puzzles * examples
    numbers = np.arange(total)
    inputs = np.stack([numbers, numbers // examples], 1).astype(np.uint8)
    given = {
        "vocab_size": 100,
        "puzzle_identifiers": np.arange(1, count + 1),
        "puzzle_indices": np.arange(count + 1) * examples,
        "group_indices": np.arange(groups + 1) * puzzles,
        "num_puzzle_identifiers": count + 1,
    }
    return PuzzleDataset(inputs, inputs[:, ::-1].copy(), **given | more)


def test_numbers_of_a_dataset():
    made = dataset()
    assert (len(made), made.seq_len, made.total_groups, made.total_puzzles) == (30, 2, 5, 10)
    assert made.mean_puzzle_examples == 3 and made.sets == ["all"]
    single = PuzzleDataset(np.zeros((4, 3), np.int8), np.ones((4, 3), np.int64), 2)
    assert single.puzzle_indices.tolist() == single.group_indices.tolist() == [0, 1, 2, 3, 4]
    assert single.puzzle_identifiers.tolist() == [0] * 4 and single.mean_puzzle_examples == 1


# A batch takes what fits of its last puzzle, and the rest of that is left out.
@pytest.mark.parametrize(("batch_size", "count"), [(1, 5), (4, 2), (15, 1)])
def test_an_epoch_takes_one_puzzle_of_each_group(batch_size, count):
    made = dataset()
    batches = list(made.batches(batch_size, seed=3))
    assert len(batches) == count
    rows = np.concatenate([batch["inputs"] for batch in batches])
    assert len(set(rows[:, 0].tolist())) == len(rows)
    groups = {group: set() for group in range(5)}
    for puzzle in rows[:, 1]:
        groups[puzzle // 2].add(puzzle)
    assert all(len(drawn) <= 1 for drawn in groups.values())
    for batch in batches:
        assert batch.count == batch_size and list(batch) == [
            "inputs", "labels", "puzzle_identifiers",
        ]  # fmt: skip
        assert all(array.dtype == np.int32 for array in batch.values())
        np.testing.assert_array_equal(batch["puzzle_identifiers"], batch["inputs"][:, 1] + 1)


def test_the_order_depends_on_seed_and_epoch_only():
    big = dataset(40, vocab_size=256)

    def rows(**options):
        return [batch["inputs"][:, 0].tolist() for batch in big.batches(8, **options)]

    whole = rows(seed=5, epoch=2)
    np.random.seed(0)
    assert rows(seed=5, epoch=2) == whole and rows(seed=5, epoch=2, start=3) == whole[3:]
    assert rows(seed=5, epoch=1) != whole and rows(seed=6, epoch=2) != whole
    assert len(rows(seed=5, epochs=3)) > 3 * len(whole) - 2
    firsts = {str(rows(seed=5, epoch=i)) for i in range(10)}
    assert len(firsts) == 10


def test_groups_and_puzzles_are_drawn_as_by_the_authors():
    # The draws of their _sample_batch for puzzles of one example: Philox of seed + epoch + 1.
    made = dataset(50, 4, 1, vocab_size=256)
    rng = np.random.Generator(np.random.Philox(seed=7 + 3))
    order = np.concatenate([rng.permutation(50), rng.permutation(50)])
    expected = [rng.integers(4 * group, 4 * group + 4) for group in order]
    found = [
        row for batch in made.batches(10, seed=7, epoch=2, epochs=2) for row in batch["inputs"]
    ]
    np.testing.assert_array_equal(np.stack(found)[:, 0], expected)


def test_test_batches_hold_everything_in_order_and_are_padded():
    made = dataset(pad_id=9)
    batches = list(made.batches(8, train=False))
    assert [batch.count for batch in batches] == [8, 8, 8, 6]
    rows = np.concatenate([batch["inputs"] for batch in batches])
    np.testing.assert_array_equal(rows[:30], made.inputs)
    np.testing.assert_array_equal(rows[30:], 9)
    last = batches[-1]
    assert (last["labels"][6:] == -100).all() and last["puzzle_identifiers"][6:].tolist() == [0, 0]
    assert [b["inputs"].tolist() for b in made.batches(8, train=False, start=3)] == [
        last["inputs"].tolist()
    ]


def test_ignored_labels_become_minus_100():
    labels = np.array([[0, 1, -100], [2, 0, 1]])
    made = PuzzleDataset(np.ones((2, 3), int), labels, 3)
    assert made.examples([1, 0])["labels"].tolist() == [[2, -100, 1], [-100, 1, -100]]
    kept = PuzzleDataset(np.ones((2, 3), int), labels, 3, ignore_label_id=None)
    assert kept.examples([0])["labels"].tolist() == [[0, 1, -100]]


def test_the_folder_is_the_authors(tmp_path):
    made = dataset()
    names = ["<blank>", *(f"p{i}" for i in range(10))]
    made.save(tmp_path / "new", "test", names)
    folder = tmp_path / "new" / "test"
    assert json.loads((folder / "dataset.json").read_text()) == {
        "pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "vocab_size": 100,
        "seq_len": 2, "num_puzzle_identifiers": 11, "total_groups": 5,
        "mean_puzzle_examples": 3.0, "total_puzzles": 10, "sets": ["all"],
    }  # fmt: skip
    assert json.loads((tmp_path / "new" / "identifiers.json").read_text()) == names
    assert sorted(path.name for path in folder.iterdir()) == [
        "all__group_indices.npy", "all__inputs.npy", "all__labels.npy",
        "all__puzzle_identifiers.npy", "all__puzzle_indices.npy", "dataset.json",
    ]  # fmt: skip
    read = PuzzleDataset.load(tmp_path / "new", "test")
    assert isinstance(read.inputs, np.memmap) and read.metadata == made.metadata
    for name in ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    assert [b["inputs"].tolist() for b in read.batches(4)] == [
        b["inputs"].tolist() for b in made.batches(4)
    ]


def test_several_sets_become_one(tmp_path):
    made = dataset()
    made.save(tmp_path, "train")
    folder = tmp_path / "train"
    assert not (tmp_path / "identifiers.json").exists()  # they have no names here
    for path in list(folder.glob("all__*")):
        (folder / path.name.replace("all", "more")).write_bytes(path.read_bytes())
    # as HRM's older files: no total_puzzles
    numbers = made.metadata | {"sets": ["all", "more"]}
    numbers.pop("total_puzzles")
    (folder / "dataset.json").write_text(json.dumps(numbers))
    read = PuzzleDataset.load(tmp_path)
    assert (len(read), read.total_groups, read.total_puzzles) == (60, 10, 20)
    np.testing.assert_array_equal(read.examples([31])["puzzle_identifiers"], [1])
    assert read.group_indices.tolist() == [2 * i for i in range(11)]


INPUTS = np.ones((4, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": INPUTS[:, :2]}, "one shape [examples, tokens]"),
        ({"inputs": INPUTS[:0], "labels": INPUTS[:0]}, "at least one of each"),
        ({"inputs": np.full((4, 3), 5)}, "inputs of example 0 have 5 at position 0"),
        (
            {"labels": np.array([[1, 1, 1]] * 3 + [[1, 7, 1]])},
            "labels of example 3 have 7 at position 1; the vocabulary is 0 to 4",
        ),
        ({"labels": np.array([[1, -1, 1]] * 4)}, "labels of example 0 have -1 at position 1"),
        ({"inputs": np.array([[1, -100, 1]] * 4)}, "inputs of example 0 have -100"),
        ({"puzzle_indices": [0, 2, 2, 4]}, "increase from 0 to the number of examples, 4"),
        ({"group_indices": [0, 5]}, "increase from 0 to the number of puzzles, 4, got [0, 5]"),
        ({"puzzle_identifiers": [0, 0, 0]}, "must be 4 numbers below num_puzzle_identifiers 1"),
        ({"puzzle_identifiers": [0, 0, 0, 1]}, "got shape (4,) from 0 to 1"),
        ({"pad_id": 5}, "pad_id is 5; it must be a whole number from 0 to 4"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_arrays_that_do_not_fit(changes, message):
    given = {"inputs": INPUTS, "labels": INPUTS, "vocab_size": 5}
    with pytest.raises(ValueError, match=re.escape(message)):
        PuzzleDataset(**given | changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 16}, "1 epoch of 5 groups give no batch of 16 examples"),
        ({"batch_size": 2, "seed": -1}, "seed is -1"),
        ({"batch_size": 2, "epochs": 0}, "epochs is 0"),
    ],
)
def test_batches_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        list(dataset().batches(**options))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset.json", "{", "dataset.json: line 1 column 2: not JSON"),
        ("dataset.json", {"vocab_size": "11"}, "vocab_size is '11'; it must be a whole number"),
        ("dataset.json", {"sets": []}, "sets: is []; it must be a list of names"),
        ("dataset.json", {"seq_len": 3}, "seq_len: is 3, and inputs have 2 tokens"),
        ("dataset.json", {"vocab_size": 5}, "train: inputs of example 5 have 5 at position 0"),
        ("all__labels.npy", "text", "all__labels.npy: not an array of NumPy's"),
        ("all__labels.npy", "", "all__labels.npy: not an array of NumPy's"),
        ("all__labels.npy", np.zeros((30, 2)), "holds float64; it must be an array of integers"),
        ("all__group_indices.npy", np.arange(3), "train: group_indices must increase"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, name, content, message):
    made = dataset()
    made.save(tmp_path)
    place = tmp_path / "train" / name
    if isinstance(content, dict):
        content = json.dumps(made.metadata | content)
    if isinstance(content, str):
        place.write_text(content)
    else:
        np.save(place, content)
    with pytest.raises(ValueError, match=re.escape(message)):
        PuzzleDataset.load(tmp_path)


def test_missing_files_and_splits(tmp_path):
    dataset().save(tmp_path)
    with pytest.raises(ValueError, match="no such split; the folder has train"):
        PuzzleDataset.load(tmp_path, "test")
    with pytest.raises(FileNotFoundError):
        PuzzleDataset.load(tmp_path / "none")
    with pytest.raises(ValueError, match="identifiers are 2 names for 11"):
        dataset().save(tmp_path, identifiers=["a", "b"])
    (tmp_path / "train" / "all__inputs.npy").unlink()
    with pytest.raises(FileNotFoundError, match="all__inputs.npy"):
        PuzzleDataset.load(tmp_path)
