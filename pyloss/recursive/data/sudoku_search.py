"""Solves Sudokus, proves that their solution is the only one, and rates them.

All candidates are the bits of one Python integer, a plane of cells for each digit, so that one pass
of some 40 shifts finds every cell and every unit that have one candidate left, on the whole board.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import NamedTuple

import numpy as np

#: Rows and columns of a box by the size of the grid.
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


class _Units(NamedTuple):
    """Places that share one thing: the digits of a cell, or a digit's cells in a row, ...

    Attributes:
        shifts: the bits of a unit, from its first one.
        first: the first bit of every unit.
        spread: times the first bit of a unit, all its bits.
    """

    shifts: tuple[int, ...]
    first: int
    spread: int


class Board:
    """The arithmetic of grids of one size. Bit (digit - 1) * cells + cell is a candidate."""

    def __init__(self, size: int):
        self.size, self.cells = size, size * size
        height, width = BOXES[size]
        n, cells = size, self.cells
        everything = (1 << n * cells) - 1
        boxes = [r * n + c for r in range(0, n, height) for c in range(0, n, width)]
        inside = [r * n + c for r in range(height) for c in range(width)]

        def units(firsts: Sequence[int], shifts: Sequence[int], planes: int = n) -> _Units:
            starts = [1 << d * cells + x for d in range(planes) for x in firsts]
            return _Units(tuple(shifts), sum(starts), sum(1 << s for s in shifts))

        self.by_cell = units(range(cells), range(0, n * cells, cells), 1)
        self.by_unit = (
            units(range(0, cells, n), range(n)),
            units(range(n), range(0, cells, n)),
            units(boxes, inside),
        )
        #: For each candidate all bits but those that it excludes; its own bit stays.
        self.kept = []
        for bit in range(n * cells):
            digit, cell = divmod(bit, cells)
            row, column = divmod(cell, n)
            corner = row // height * height * n + column // width * width
            plane = {row * n + i for i in range(n)} | {column + i * n for i in range(n)}
            plane |= {corner + i for i in inside}
            others = {digit * cells + x for x in plane} | {d * cells + cell for d in range(n)}
            self.kept.append(everything & ~sum(1 << x for x in others - {bit}))
        self.everything = everything

    def bits(self, grid: np.ndarray) -> list[int]:
        """The candidate of each cell that is not empty."""
        values = enumerate(grid.reshape(-1).tolist())
        return [(digit - 1) * self.cells + cell for cell, digit in values if digit]

    def start(self, bits: Sequence[int]) -> tuple[int, int]:
        """The candidates that these leave, and these as a number."""
        candidates, placed = self.everything, 0
        for bit in bits:
            candidates &= self.kept[bit]
            placed |= 1 << bit
        return candidates, placed

    def grid(self, placed: int) -> np.ndarray:
        """The cells, uint8 [size, size], of placed candidates."""
        found = np.zeros(self.cells, np.uint8)
        while placed:
            low = placed & -placed
            digit, cell = divmod(low.bit_length() - 1, self.cells)
            found[cell] = digit + 1
            placed ^= low
        return found.reshape(self.size, self.size)

    def solved(self, placed: int) -> bool:
        return placed.bit_count() == self.cells

    def propagate(
        self, candidates: int, placed: int, hidden: bool = True
    ) -> tuple[int, int] | None:
        """Places single candidates until none is left; None if a cell or unit has no candidate.

        Without `hidden` only naked singles are placed: cells with one candidate. Hidden singles are
        digits with one cell in a row, column or box.
        """
        kinds = (self.by_cell, *self.by_unit) if hidden else (self.by_cell,)
        while True:
            forced = 0
            for shifts, first, spread in kinds:
                one = two = 0
                for shift in shifts:
                    at = candidates >> shift
                    two |= one & at
                    one |= at
                if ~one & first:
                    return None
                forced |= (one & ~two & first) * spread
            new = forced & candidates & ~placed
            if not new:
                return candidates, placed
            placed |= new
            while new:
                low = new & -new
                candidates &= self.kept[low.bit_length() - 1]
                new ^= low

    def branches(self, candidates: int) -> list[int]:
        """Candidates of which exactly one holds: a cell or unit with two, else the fewest."""
        for shifts, first, spread in (self.by_cell, *self.by_unit):
            one = two = three = 0
            for shift in shifts:
                at = candidates >> shift
                three |= two & at
                two |= one & at
                one |= at
            if pairs := two & ~three & first:
                return _bits((pairs & -pairs) * spread & candidates)
        spread = self.by_cell.spread
        each = (_bits((spread << cell) & candidates) for cell in range(self.cells))
        return min((bits for bits in each if len(bits) > 1), key=len)


@cache
def board(size: int) -> Board:
    """The board of grids of 4, 6 or 9 cells a side."""
    return Board(size)


def _bits(number: int) -> list[int]:
    found = []
    while number:
        low = number & -number
        found.append(low.bit_length() - 1)
        number ^= low
    return found


class Search(NamedTuple):
    """What a search found.

    Attributes:
        solutions: at most as many as asked for, each as placed candidates.
        dead_ends: the guesses that led to a contradiction, until the search ended.
    """

    solutions: list[int]
    dead_ends: int


def search(
    on: Board, candidates: int, placed: int, limit: int = 2, rng: Random | None = None
) -> Search:
    """Searches for up to `limit` solutions by singles and guesses; `rng` draws their order."""
    open_ends, dead_ends = [(candidates, placed)], 0
    solutions: list[int] = []
    while open_ends and len(solutions) < limit:
        found = on.propagate(*open_ends.pop())
        if found is None:
            dead_ends += 1
        elif on.solved(found[1]):
            solutions.append(found[1])
        else:
            branches = on.branches(found[0])
            if rng is not None:
                rng.shuffle(branches)
            for bit in branches:
                open_ends.append((found[0] & on.kept[bit], found[1] | 1 << bit))
    return Search(solutions, dead_ends)
