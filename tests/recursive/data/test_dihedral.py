"""The symmetries of a square are eight, under the authors' numbers, and have their inverses."""

import numpy as np
import pytest

from pyloss.recursive.data.dihedral import dihedral, inverse_dihedral

GRID = np.array([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, [[1, 2, 3], [4, 5, 6]]),
        (1, [[3, 6], [2, 5], [1, 4]]),
        (2, [[6, 5, 4], [3, 2, 1]]),
        (3, [[4, 1], [5, 2], [6, 3]]),
        (4, [[3, 2, 1], [6, 5, 4]]),
        (5, [[4, 5, 6], [1, 2, 3]]),
        (6, [[1, 4], [2, 5], [3, 6]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
    ],
)
def test_symmetries_and_inverses(number, expected):
    found = dihedral(GRID, number)
    assert found.tolist() == expected
    np.testing.assert_array_equal(inverse_dihedral(found, number), GRID)
