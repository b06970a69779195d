"""Mazes: the CSV and its errors, shortest ways, augmentation and data sets."""

import re

import numpy as np
import pytest

from pyloss.recursive.data import maze_dataset, maze_puzzles, read_maze_csv, solve_maze
from pyloss.recursive.data.dihedral import dihedral
from pyloss.recursive.data.maze import CHARSET

HEADER = "source,question,answer,rating\n"
QUESTION = "S #   # #   ### ".replace("### ", "###G")
ANSWER = "S # oo# #ooo###G"


def grid(text):
    size = round(len(text) ** 0.5)
    return np.array([CHARSET.index(c) for c in text], np.uint8).reshape(size, size)


def csv(tmp_path, *lines, header=HEADER):
    path = tmp_path / "train.csv"
    path.write_text(header + "".join(f"{line}\n" for line in lines))
    return path


def test_reading_a_csv(tmp_path):
    (maze,) = read_maze_csv(csv(tmp_path, f"mine,{QUESTION},{ANSWER},6"))
    np.testing.assert_array_equal(maze.question, grid(QUESTION))
    np.testing.assert_array_equal(maze.answer, grid(ANSWER))
    assert maze.rating == 6


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        (QUESTION[:-1], ANSWER, "line 3: question has 15 cells; expected 16, as above"),
        (QUESTION, ANSWER + "#", "line 3: answer has 17 cells; expected 16, as above"),
        (QUESTION, ANSWER.replace("G", "X"), "cell 16 of the answer is 'X'; cells are '#', ' ',"),
        (QUESTION.replace("G", " "), ANSWER, "line 3: the question has 0 G; a maze has one"),
        (QUESTION.replace(" ", "S", 1), ANSWER, "line 3: the question has 2 S"),
        (ANSWER, ANSWER, "line 3: the question has o, the way of an answer"),
        (QUESTION, "So#  o# #ooo###G", None),
        (QUESTION, ANSWER[:2] + "o" + ANSWER[3:], "'#' at row 1, column 3, and the answer 'o'"),
        (QUESTION, ANSWER.replace("ooo", "oo "), "the answer's o make no way from S to G"),
    ],
)
def test_lines_that_are_no_maze(tmp_path, question, answer, message):
    path = csv(tmp_path, f"mine,{QUESTION},{ANSWER},6", f"mine,{question},{answer},6")
    if message is None:
        assert len(read_maze_csv(path)) == 2
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        read_maze_csv(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no maze in the file"),
        ("a,SG,SG,1\n", "question has 2 cells; expected the square of 2"),
    ],
)
def test_files_that_hold_no_maze(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_text(HEADER + content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_maze_csv(path)


def test_the_shortest_way():
    maze = solve_maze(grid(QUESTION))
    assert maze.rating == 6
    np.testing.assert_array_equal(np.sort(np.unique(maze.answer)), range(5))
    assert np.count_nonzero(maze.answer == CHARSET.index("o")) == 5
    np.testing.assert_array_equal(maze.answer[2:], grid(ANSWER)[2:])
    for text, message in (
        ("S###" + QUESTION[4:4] + "####" * 2 + "###G", "no way from S to G"),
        (QUESTION.replace("S", " "), "one S, and this one 0"),
    ):
        with pytest.raises(ValueError, match=message):
            solve_maze(grid(text))


@pytest.mark.parametrize(
    ("size", "count", "options"),
    [
        (5, 10, {}),
        (8, 10, {}),
        (9, 10, {"openings": 0}),
        (12, 5, {"min_path": 30, "openings": 0.02}),
        (30, 2, {"min_path": 110}),
    ],
)
def test_made_mazes(tmp_path, size, count, options):
    made = list(maze_puzzles(count, size=size, seed=2, **options))
    assert len({maze.question.tobytes() for maze in made}) == count
    text = ["".join(CHARSET[c] for c in g.reshape(-1)) for maze in made for g in maze[:2]]
    # the checks of the reader hold for them
    lines = (f"x,{q},{a},{m.rating}" for q, a, m in zip(text[::2], text[1::2], made))
    read = read_maze_csv(csv(tmp_path, *lines))
    for maze, same in zip(made, read):
        np.testing.assert_array_equal(maze.answer, same.answer)
        assert maze.rating == solve_maze(maze.question).rating >= options.get("min_path", size)
        # no other shortest way: each of its cells is needed for one
        for row, column in np.argwhere(maze.answer == CHARSET.index("o")):
            closed = maze.question.copy()
            closed[row, column] = 0
            try:
                assert solve_maze(closed).rating > maze.rating
            except ValueError as error:
                assert "no way" in str(error)
                continue
            assert options.get("openings") != 0
    again = maze_puzzles(count, size=size, seed=2, **options)
    assert all((a.answer == b.answer).all() for a, b in zip(again, made))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "size is 4; it must be a whole number from 5 to 128"),
        ({"size": 5, "min_path": 17}, "a maze of 5 x 5 has at most 16 steps"),
        ({"size": 15, "min_path": 126}, "gave no one with one shortest way of 126 steps or more"),
        ({"size": 5, "count": 100000, "min_path": 16}, "gave no new one with one shortest way"),
        ({"openings": 2}, "openings is 2"),
    ],
)
def test_mazes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        list(maze_puzzles(**{"count": 1} | options))


def test_symmetries_of_a_dataset():
    mazes = list(maze_puzzles(2, size=6))
    made = maze_dataset(mazes, augment=7)
    assert made.inputs.shape == (16, 36) and made.vocab_size == 6
    assert made.group_indices.tolist() == [0, 8, 16]
    for i in range(8):
        expected = dihedral(mazes[1].question, i).reshape(-1) + 1
        np.testing.assert_array_equal(made.inputs[8 + i], expected)
        expected = dihedral(mazes[1].answer, i).reshape(-1) + 1
        np.testing.assert_array_equal(made.labels[8 + i], expected)
    with pytest.raises(ValueError, match="augment is 8"):
        maze_dataset(mazes, augment=8)
    with pytest.raises(ValueError, match="there are no mazes"):
        maze_dataset([])
    with pytest.raises(ValueError, match=re.escape("(5, 5) and (6, 6) cells")):
        maze_dataset([*mazes, next(maze_puzzles(1, size=5))])
