"""The eight symmetries of a square, under the authors' numbers."""

from __future__ import annotations

import numpy as np

SYMMETRIES = 8
_INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)


def dihedral(grid: np.ndarray, number: int) -> np.ndarray:
    """A view of a grid: 0 to 3 turn it by as many quarters to the left; 4 mirrors left and right,
    5 top and bottom, 6 at the diagonal, 7 at the other one."""
    if number < 4:
        return np.rot90(grid, number)
    if number == 7:
        return np.rot90(grid, 2).T
    return (grid[:, ::-1], grid[::-1], grid.T)[number - 4]


def inverse_dihedral(grid: np.ndarray, number: int) -> np.ndarray:
    """The grid of which `dihedral(..., number)` made this one."""
    return dihedral(grid, _INVERSE[number])
