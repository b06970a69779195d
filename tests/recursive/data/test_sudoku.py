"""Sudokus: solving with proofs, the CSV and its errors, augmentation, data sets."""

import re

import numpy as np
import pytest

from pyloss.recursive.data import (
    read_sudoku_csv,
    shuffle_sudoku,
    solve_sudoku,
    sudoku_dataset,
    sudoku_puzzles,
)
from pyloss.recursive.data.sudoku_search import BOXES

#: "AI Escargot", by Arto Inkala, and a puzzle that naked singles solve
ESCARGOT = "1....7.9..3..2...8..96..5....53..9...1..8...26....4...3......1..4......7..7...3.."
EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


def grid(text):
    size = round(len(text) ** 0.5)
    return np.array([0 if c == "." else int(c) for c in text], np.uint8).reshape(size, size)


def text(grid):
    return "".join(map(str, grid.reshape(-1)))


def is_solution(answer):
    size = len(answer)
    height, width = BOXES[size]
    boxes = [
        answer[r : r + height, c : c + width].reshape(-1)
        for r in range(0, size, height)
        for c in range(0, size, width)
    ]
    return all(sorted(unit) == list(range(1, size + 1)) for unit in [*answer, *answer.T, *boxes])


def test_solving_and_rating():
    easy, hard = solve_sudoku(grid(EASY)), solve_sudoku(grid(ESCARGOT).tolist())
    for found, question in ((easy, EASY), (hard, ESCARGOT)):
        assert is_solution(found.answer) and text(found.question) == question.replace(".", "0")
        given = found.question > 0
        np.testing.assert_array_equal(found.answer[given], found.question[given])
    assert easy.rating == 0 and hard.rating > 3
    assert text(easy.answer[0]) == "534678912"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (np.zeros((9, 9), int), "several solutions"),
        (grid("1" + ESCARGOT[1:8] + "1" + ESCARGOT[9:]), "no solution"),
        (grid(EASY[:2] + "2" + EASY[3:]), "no solution"),
        (np.zeros((5, 5), int), "grid of 4, 6, 9 cells a side, got shape (5, 5)"),
        (np.full((4, 4), 5), "cells from 5 to 5; they must be digits up to 4"),
    ],
)
def test_questions_without_one_solution(question, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        solve_sudoku(question)


def test_solutions_are_counted_as_by_trying_everything():
    rng = np.random.default_rng(0)
    answer = next(sudoku_puzzles(1, size=4)).answer
    seen = set()
    for _ in range(60):
        question = np.where(rng.random((4, 4)) < 0.7, 0, answer)
        count = sum(1 for _ in brute(question.copy()))
        seen.add(min(count, 2))
        if count == 1:
            np.testing.assert_array_equal(solve_sudoku(question).answer, answer)
        else:
            with pytest.raises(ValueError, match="several"):
                solve_sudoku(question)
    assert seen == {1, 2}


def brute(grid):
    """All solutions by trying each digit in each cell."""
    empty = np.argwhere(grid == 0)
    if not len(empty):
        yield grid.copy()
        return
    row, column = empty[0]
    r, c = row // 2 * 2, column // 2 * 2
    for digit in range(1, 5):
        if digit not in {*grid[row], *grid[:, column], *grid[r : r + 2, c : c + 2].reshape(-1)}:
            grid[row, column] = digit
            yield from brute(grid)
            grid[row, column] = 0


@pytest.mark.parametrize("size", [4, 6, 9])
def test_shuffled_puzzles_are_puzzles(size):
    rng = np.random.default_rng(size)
    puzzle = next(sudoku_puzzles(1, size=size, seed=1))
    seen = set()
    for _ in range(30):
        question, answer = shuffle_sudoku(puzzle.question, puzzle.answer, rng)
        assert is_solution(answer) and question.dtype == np.uint8
        np.testing.assert_array_equal(solve_sudoku(question).answer, answer)
        seen.add(question.tobytes())
    assert len(seen) > 25


def test_shuffling_draws_as_the_authors_do():
    # The draws of their shuffle_sudoku after np.random.seed(5), written out.
    np.random.seed(5)
    digits = np.concatenate([[0], np.random.permutation(np.arange(1, 10))])
    transposed = np.random.rand() < 0.5
    rows = np.concatenate([3 * b + np.random.permutation(3) for b in np.random.permutation(3)])
    columns = np.concatenate([3 * b + np.random.permutation(3) for b in np.random.permutation(3)])
    question = grid(ESCARGOT)
    moved = question.T if transposed else question
    expected = [[digits[moved[r, c]] for c in columns] for r in rows]
    found, _ = shuffle_sudoku(question, question, np.random.RandomState(5))
    np.testing.assert_array_equal(found, expected)


def test_tokens_and_groups_of_a_dataset():
    puzzles = list(sudoku_puzzles(3, size=6, seed=2))
    made = sudoku_dataset(puzzles, augment=2, seed=1)
    assert made.inputs.shape == (9, 36) and made.inputs.dtype == np.uint8
    assert (made.vocab_size, made.seq_len, made.ignore_label_id) == (8, 36, 0)
    assert made.group_indices.tolist() == [0, 3, 6, 9]
    for i, puzzle in enumerate(puzzles):
        np.testing.assert_array_equal(made.inputs[3 * i].reshape(6, 6), puzzle.question + 1)
        np.testing.assert_array_equal(made.labels[3 * i].reshape(6, 6), puzzle.answer + 1)
    for row, labels in zip(made.inputs, made.labels):
        np.testing.assert_array_equal(labels[row > 1], row[row > 1])
    again = sudoku_dataset(puzzles, augment=2, seed=np.random.RandomState(1))
    np.testing.assert_array_equal(again.inputs, made.inputs)


def test_no_shuffled_puzzle_has_an_answer_of_the_test_set():
    puzzles = list(sudoku_puzzles(40, size=4, empty=8))
    held = {puzzle.answer.tobytes() for puzzle in puzzles[20:]}
    train = [puzzle for puzzle in puzzles[:20] if puzzle.answer.tobytes() not in held]
    made = sudoku_dataset(train, augment=20, exclude=held)
    found = {(row - 1).astype(np.uint8).tobytes() for row in made.labels}
    assert not found & held
    plain = sudoku_dataset(train, augment=20)
    assert held & {(row - 1).astype(np.uint8).tobytes() for row in plain.labels}
    orbit = {
        shuffle_sudoku(*train[0][:2], np.random.default_rng(i))[1].tobytes() for i in range(3000)
    }
    with pytest.raises(ValueError, match="all had answers of the test set"):
        sudoku_dataset(train[:1], augment=1, exclude=orbit)


@pytest.mark.parametrize(
    ("puzzles", "message"),
    [([], "there are no puzzles"), ("mixed", "4 and 6 cells a side")],
)
def test_datasets_that_cannot_be(puzzles, message):
    if puzzles == "mixed":
        puzzles = [next(sudoku_puzzles(1, size=size)) for size in (4, 6)]
    with pytest.raises(ValueError, match=message):
        sudoku_dataset(puzzles)


HEADER = "source,question,answer,rating"


def csv(tmp_path, *lines, header=HEADER):
    path = tmp_path / "train.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def line(question=None, answer=None, rating="3"):
    found = solve_sudoku(grid(EASY))
    return f"somewhere,{question or EASY},{answer or text(found.answer)},{rating}"


def test_reading_a_csv(tmp_path):
    found = read_sudoku_csv(csv(tmp_path, line(), line(EASY.replace(".", "0"), rating="7"), ""))
    assert [puzzle.rating for puzzle in found] == [3, 7]
    for puzzle in found:
        np.testing.assert_array_equal(puzzle.question, grid(EASY))
        np.testing.assert_array_equal(puzzle.answer, solve_sudoku(grid(EASY)).answer)
    assert [p.rating for p in read_sudoku_csv(tmp_path / "train.csv", min_rating=4)] == [7]
    six = next(sudoku_puzzles(1, size=6))
    path = csv(tmp_path, f"{text(six.answer)},{text(six.question)}", header="answer,Question")
    (found,) = read_sudoku_csv(path)
    assert found.rating == 0 and found.question.shape == (6, 6)


ANSWER = text(solve_sudoku(grid(EASY)).answer)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line(EASY[:-1]), "line 3: question has 80 cells; expected 81, as above"),
        (line(answer=ANSWER + "1"), "line 3: answer has 82 cells; expected 81"),
        (line("x" + EASY[1:]), "line 3: cell 1 is 'x'; cells are digits up to 9, and 0 or ."),
        (line("5é" + EASY[2:]), "line 3: cell 2 is 'é'; cells are digits"),
        (line(answer="." + ANSWER[1:]), "line 3: the answer has an empty cell at row 1, column 1"),
        (
            line("54" + EASY[2:]),
            "line 3: the question has 4 at row 1, column 2, and the answer 3",
        ),
        (line("." * 81, "1" * 81), "line 3: row 1 of the answer repeats a digit"),
        (
            line("." * 81, "".join("123456789"[i:] + "123456789"[:i] for i in range(9))),
            "line 3: box 1 of the answer repeats a digit",
        ),
        (line("." * 81, "123456789" * 9), "line 3: column 1 of the answer repeats a digit"),
        (line(rating="easy"), "line 3: rating is 'easy'; it must be a whole number"),
        ("a,b", "line 3: has 2 columns, and the header 4"),
    ],
)
def test_lines_that_are_no_puzzle(tmp_path, bad, message):
    with pytest.raises(ValueError, match=re.escape(f"train.csv: {message}")):
        read_sudoku_csv(csv(tmp_path, line(), bad))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: the columns are ''; expected source, question, answer, rating"),
        (b"puzzle,solution\n1,2\n", "line 1: the columns are 'puzzle, solution'; expected source"),
        (HEADER.encode() + b"\n", "no puzzle in the file"),
        (HEADER.encode() + b"\na,12,12,1\n", "line 2: question has 2 cells; expected 16, 36 or 81"),
        (HEADER.encode() + b"\na,\xff,b,1\n", "not UTF-8 text"),
    ],
)
def test_files_that_hold_no_puzzles(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_sudoku_csv(path)
    with pytest.raises(OSError):
        read_sudoku_csv(tmp_path / "none.csv")
