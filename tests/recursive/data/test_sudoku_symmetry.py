"""Classes of full grids under the symmetries of Sudoku."""

from itertools import permutations, product

import numpy as np
import pytest

from pyloss.recursive.data import shuffle_sudoku, sudoku_puzzles
from pyloss.recursive.data.sudoku_symmetry import _moves, split_by_class, sudoku_class


def test_4_x_4_has_two_classes():
    """All 288 grids; the orbits of a class are its grids."""
    rows = list(permutations(range(1, 5)))
    grids = [
        np.array(g)
        for g in product(rows, repeat=4)
        if all(len({r[c] for r in g}) == 4 for c in range(4))
        and all(len({*g[i][j : j + 2], *g[i + 1][j : j + 2]}) == 4 for i in (0, 2) for j in (0, 2))
    ]
    classes = [sudoku_class(grid) for grid in grids]
    counts = sorted(classes.count(each) for each in set(classes))
    assert len(grids) == 288 and counts == [96, 192]


def test_a_class_is_that_of_every_shuffled_grid():
    rng = np.random.default_rng(0)
    puzzles = list(sudoku_puzzles(20, size=6, seed=1))
    found = {sudoku_class(puzzle.answer) for puzzle in puzzles}
    assert 8 <= len(found) <= 20
    for puzzle in puzzles[:8]:
        _, moved = shuffle_sudoku(puzzle.question, puzzle.answer, rng)
        assert sudoku_class(moved) == sudoku_class(puzzle.answer)
    assert _moves(6).shape == (3456, 36) and len(np.unique(_moves(6), axis=0)) == 3456


def test_a_split_by_classes():
    puzzles = list(sudoku_puzzles(60, size=6, empty=10))
    train, test = split_by_class(puzzles, 0.2, seed=3)
    assert len(train) + len(test) == 60 and 6 <= len(test) <= 24
    kinds = [{sudoku_class(puzzle.answer) for puzzle in part} for part in (train, test)]
    assert not kinds[0] & kinds[1]
    again = split_by_class(puzzles, 0.2, seed=3)[1]
    assert [p.question.tobytes() for p in again] == [p.question.tobytes() for p in test]


def test_grids_without_classes():
    with pytest.raises(ValueError, match=r"4 x 4 and 6 x 6 have classes, not of shape \(9, 9\)"):
        sudoku_class(np.ones((9, 9), int))
    one = list(sudoku_puzzles(1, size=4))
    with pytest.raises(ValueError, match="one class"):
        split_by_class(one, 0.5)
