"""Made Sudokus: unique solutions, difficulties, numbers of empty cells, requests that fail."""

import re
from itertools import islice

import numpy as np
import pytest

from pyloss.recursive.data import solve_sudoku, sudoku_puzzles
from pyloss.recursive.data.sudoku_search import board


def solved_by(question, hidden):
    on = board(len(question))
    found = on.propagate(*on.start(on.bits(question)), hidden=hidden)
    return found is not None and on.solved(found[1])


@pytest.mark.parametrize(
    ("size", "count", "options"),
    [
        (4, 20, {}),
        (4, 20, {"empty": 8}),
        (6, 5, {"empty": 20}),
        (6, 3, {"difficulty": "medium"}),
        (9, 2, {"difficulty": "easy"}),
        (9, 2, {"difficulty": "medium"}),
        (9, 2, {"difficulty": "hard"}),
        (9, 1, {"difficulty": "extreme"}),
        (9, 1, {"difficulty": "easy", "empty": 40}),
        (9, 1, {"empty": 0}),
    ],
)
def test_puzzles_have_one_solution_and_what_was_asked(size, count, options):
    made = list(sudoku_puzzles(count, size=size, seed=4, **options))
    assert len({puzzle.question.tobytes() for puzzle in made}) == count
    for puzzle in made:
        assert puzzle.question.shape == (size, size) and puzzle.question.dtype == np.uint8
        found = solve_sudoku(puzzle.question)  # proves that there is one solution
        np.testing.assert_array_equal(found.answer, puzzle.answer)
        assert found.rating == puzzle.rating
        if "empty" in options:
            assert np.count_nonzero(puzzle.question == 0) == options["empty"]
        naked, both = (solved_by(puzzle.question, hidden) for hidden in (False, True))
        difficulty = options.get("difficulty")
        if difficulty:
            assert naked == (difficulty == "easy")
            assert both == (difficulty in ("easy", "medium"))
            assert puzzle.rating >= {"hard": 1, "extreme": 10}.get(difficulty, 0)
            assert puzzle.rating <= {"hard": 9, "extreme": 1000}.get(difficulty, 0)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_without_a_number_every_given_cell_is_needed(size):
    puzzle = next(sudoku_puzzles(1, size=size))
    for row, column in np.argwhere(puzzle.question > 0):
        question = puzzle.question.copy()
        question[row, column] = 0
        with pytest.raises(ValueError, match="several"):
            solve_sudoku(question)


def test_a_seed_gives_the_same_puzzles_and_no_number_goes_on():
    def some(seed, count=None):
        return [p.question.tobytes() for p in islice(sudoku_puzzles(count, size=4, seed=seed), 20)]

    assert some(1) == some(1, 20) != some(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"empty": 81}, "empty is 81; a 9 x 9 Sudoku with one solution has at most 64"),
        ({"size": 4, "empty": 13}, "has at most 12"),
        ({"size": 8}, "size is 8; it must be one of 4, 6, 9"),
        ({"difficulty": "evil"}, "difficulty is 'evil'; it must be one of easy, medium, hard"),
        ({"seed": -1}, "seed is -1"),
        ({"count": -1}, "count is -1"),
    ],
)
def test_requests_that_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sudoku_puzzles(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4, "difficulty": "hard"}, "500 grids gave no hard puzzle of 4 x 4 after 0"),
        ({"size": 4, "empty": 0, "count": 300}, "gave no new puzzle of 4 x 4 with 0 empty cells"),
        ({"size": 4, "difficulty": "hard", "empty": 3}, "no hard puzzle of 4 x 4 with 3 empty"),
    ],
)
def test_requests_that_cannot_be_met(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        list(sudoku_puzzles(**{"count": 1} | options))
