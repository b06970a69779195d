"""Makes Sudokus: a random full grid, from which cells are taken while the solution stays unique."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from pyloss.checks.numbers import shown, whole
from pyloss.recursive.data.making import ATTEMPTS, different
from pyloss.recursive.data.sudoku import Sudoku
from pyloss.recursive.data.sudoku_search import BOXES, Board, board, search

#: The difficulties, and the ratings that they allow. Easy puzzles need naked singles alone (a cell
#: with one candidate), medium ones hidden singles, too, and the others guesses.
DIFFICULTIES = {"easy": (0, 0), "medium": (0, 0), "hard": (1, 9), "extreme": (10, None)}
#: The most empty cells that leave one solution.
MOST_EMPTY = {4: 12, 6: 28, 9: 64}


def sudoku_puzzles(
    count: int | None = None,
    *,
    size: int = 9,
    empty: int | None = None,
    difficulty: str | None = None,
    seed: int = 0,
) -> Iterator[Sudoku]:
    """Different puzzles with one solution each, the same ones for a seed.

    Args:
        count: how many; None: as many as are taken.
        size: 4, 6 or 9 cells a side.
        empty: the empty cells of each. None: cells are taken until each that is left is needed for
            the solution, or for the difficulty.
        difficulty: "easy" (naked singles solve it), "medium" (naked and hidden singles), "hard"
            (the solver of `solve_sudoku` guesses, with 1 to 9 dead ends), "extreme" (10 or more).
            None: whatever comes.

    Raises:
        ValueError: numbers out of range, or a request for which 500 grids in a row give no new
            puzzle, such as hard puzzles of 4 x 4.
    """
    if count is not None:
        whole(count, "count", 0)
    if size not in BOXES:
        raise ValueError(f"size is {shown(size)}; it must be one of {', '.join(map(str, BOXES))}")
    if difficulty is not None and difficulty not in DIFFICULTIES:
        raise ValueError(
            f"difficulty is {shown(difficulty)}; it must be one of {', '.join(DIFFICULTIES)}"
        )
    if empty is not None:
        whole(empty, "empty", 0)
        if empty > MOST_EMPTY[size]:
            raise ValueError(
                f"empty is {empty}; a {size} x {size} Sudoku with one solution has at most "
                f"{MOST_EMPTY[size]} empty cells"
            )
    on, rng = board(size), Random(whole(seed, "seed", 0))

    def refusal(made: int) -> str:
        wanted = "" if difficulty is None else f" {difficulty}"
        cells = "" if empty is None else f" with {empty} empty cells"
        return (
            f"{ATTEMPTS} grids gave no{' new' * bool(made)}{wanted} puzzle of {size} x "
            f"{size}{cells} after {made}: ask for fewer puzzles, or change empty or difficulty"
        )

    return different(lambda: _attempt(on, rng, empty, difficulty), count, refusal)


def _attempt(on: Board, rng: Random, empty: int | None, difficulty: str | None) -> Sudoku | None:
    """A puzzle from a new grid, or None if it is not as wanted."""
    answer = search(on, on.everything, 0, 1, rng).solutions[0]
    grid = on.grid(answer)
    bits = _dug(on, on.bits(grid), rng, empty, difficulty)
    if empty is not None and len(bits) != on.cells - empty:
        return None
    placed = sum(1 << bit for bit in bits)
    start = on.start(bits)
    rating = search(on, *start).dead_ends
    if difficulty is not None:
        least, most = DIFFICULTIES[difficulty]
        if rating < least or (most is not None and rating > most):
            return None
        if difficulty == "medium":
            naked = on.propagate(*start, hidden=False)
            if naked is not None and on.solved(naked[1]):
                return None
    return Sudoku(on.grid(placed), grid, rating)


def _dug(
    on: Board, bits: list[int], rng: Random, empty: int | None, difficulty: str | None
) -> list[int]:
    """The given candidates after cells were taken in a random order, `empty` at most."""
    left, most = set(bits), len(bits) if empty is None else empty
    rng.shuffle(bits)
    for bit in bits:
        if on.cells - len(left) == most:
            break
        candidates, placed = on.start(sorted(left - {bit}))
        if difficulty in ("easy", "medium"):
            # What logic solves has one solution.
            found = on.propagate(candidates, placed, hidden=difficulty == "medium")
            fits = found is not None and on.solved(found[1])
        else:
            # Another solution would have another digit there.
            fits = not search(on, candidates & ~(1 << bit), placed, 1).solutions
        if fits:
            left.discard(bit)
    return sorted(left)
