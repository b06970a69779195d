"""`pyloss puzzles`: what it writes and prints, and its refusals."""

import pytest
from tiny_commands import fails

from pyloss.cli import main
from pyloss.recursive.data import PuzzleDataset, build


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_it_writes_and_prints_what_it_made(capsys):
    argv = ["puzzles", "sudoku", "--size", "4", "--train", "6", "--test", "3", "--out", "a"]
    assert main([*argv, "--augment", "1", "--empty", "7", "--seed", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "train: 6 puzzles of 4 x 4, 9.0 cells given, ratings 0 to 0 (median 0); "
        "with 1 variation of each: 12",
        "test: 3 puzzles of 4 x 4, 9.0 cells given, ratings 0 to 0 (median 0)",
    ]
    assert "wrote the puzzles to a" in err
    same = build("sudoku", None, "b", size=4, train=6, test=3, augment=1, empty=7, seed=2)
    assert (PuzzleDataset.load("a").inputs == same.train.inputs).all()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chess", "--output", "a"], "invalid choice: 'chess'"),
        (["sudoku"], "the following arguments are required: --output"),
        (["sudoku", "--empty", "81", "--output", "a"], "at most 64 empty cells"),
        (["sudoku", "bad.csv", "--output", "a"], "bad.csv: line 2: question has 3 cells"),
        (["sudoku", "none.csv", "--output", "a"], "none.csv: No such file"),
        (["arc", "bad.csv", "--output", "a"], "bad.csv: line 1 column 1: not JSON"),
        (["sudoku", "bad.csv", "--size", "9", "--output", "a"], "size is no option of read"),
        (["maze", "--output", "bad.csv"], "bad.csv"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, argv, message):
    (tmp_path / "bad.csv").write_text("question,answer\n123,123\n")
    assert len(fails(capsys, ["puzzles", *argv], message)) == 1
    assert not (tmp_path / "a").exists()


def test_ctrl_c_writes_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(self, folder, split="train", identifiers=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(PuzzleDataset, "save", interrupted)
    argv = ["puzzles", "sudoku", "--size", "4", "--train", "1", "--test", "1", "--output", "a"]
    fails(capsys, argv, "interrupted: nothing is written", code=130)
    assert not (tmp_path / "a").exists()
