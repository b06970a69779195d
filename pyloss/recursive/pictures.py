"""Pictures of a puzzle being solved step by step: text for a terminal, and SVG."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from pyloss.recursive.data.sudoku_search import BOXES
from pyloss.recursive.evaluation import Steps

#: symbols of the tokens: by the vocabulary, the authors' mazes and ARC's colors
MAZE, ARC = " # SGo", " .0123456789"
_GREEN, _RED, _BOLD, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[0m"
_CELL, _GAP, _HEAD = 18, 14, 22
#: the width of a head
_LEAST = 110


def symbols_of(vocab_size: int, side: int) -> list[str]:
    """The symbols of the tokens of a puzzle with `side` cells in a row.

    Sudoku has an empty cell and as many digits as a row has cells, after the token of padding.
    Other vocabularies than those of Sudoku, mazes and ARC have numbers.
    """
    if vocab_size == side + 2:
        return [" ", ".", *map(str, range(1, side + 1))]
    for known in (MAZE, ARC):
        if vocab_size == len(known):
            return list(known)
    return [str(token) for token in range(vocab_size)]


def side_of(length: int) -> int:
    """The cells in a row of a puzzle of `length` tokens: its root, or all in one row."""
    root = math.isqrt(length)
    return root if root * root == length else length


def steps_text(steps: Steps, index: int, vocab_size: int, color: bool = False) -> str:
    """The puzzle and the answers after each step, side by side, as many as 100 columns hold.

    A step's head has the number of wrong cells, where the answer is known, and the probability of
    halting. With `color` given cells are bold, right ones green and wrong ones red.
    """
    side = side_of(steps.inputs.shape[1])
    symbols = symbols_of(vocab_size, side)
    width = max(map(len, symbols))
    answers, wrong = steps.answers(index), steps.wrong(index)
    given = steps.inputs[index] == answers[-1]
    if steps.labels is not None:
        given = (steps.inputs[index] == steps.labels[index]) | (steps.labels[index] < 0)
    heads, grids = ["puzzle"], [[_BOLD * bool(known) for known in given]]
    for number, errors in enumerate(wrong):
        said = f"{errors.sum()} wrong, " if steps.labels is not None else ""
        heads.append(f"{number + 1}: {said}{steps.halting[number, index]:.0%}")
        grids.append(
            [_BOLD if k else _RED if e else _GREEN for k, e in zip(given, errors, strict=True)]
        )
    room = max(side * (width + 1) - 1, 16)
    together = max(100 // (room + 3), 1)
    tokens = [steps.inputs[index], *answers]
    lines = []
    for begin in range(0, len(heads), together):
        group = range(begin, min(begin + together, len(heads)))
        lines.append("   ".join(f"{heads[n]:<{room}}" for n in group).rstrip())
        # Lines that are empty in all grids, such as ARC's padding, are left out.
        filled = np.array([np.array(symbols)[tokens[n]] != " " for n in group]).any(0)
        last = int(np.flatnonzero(filled)[-1]) if filled.any() else 0
        for row in range(0, last + 1, side):
            parts = []
            for n in group:
                cells = [f"{symbols[t]:>{width}}" for t in tokens[n][row : row + side]]
                space = " " * (room - len(" ".join(cells)))
                if color:
                    styles = grids[n][row : row + side]
                    cells = [
                        f"{style}{cell}{_PLAIN}" if style else cell
                        for style, cell in zip(styles, cells, strict=True)
                    ]
                parts.append(" ".join(cells) + space)
            lines.append("   ".join(parts).rstrip())
        lines.append("")
    return "\n".join(lines).rstrip()


def steps_svg(steps: Steps, index: int, vocab_size: int, columns: int = 6) -> str:
    """The same as an SVG picture that needs nothing else, `columns` grids in a row."""
    side = side_of(steps.inputs.shape[1])
    symbols = symbols_of(vocab_size, side)
    answers, wrong = steps.answers(index), steps.wrong(index)
    rows = -(-steps.inputs.shape[1] // side)
    width, height = side * _CELL, rows * _CELL
    grids = [_grid("puzzle", steps.inputs[index], steps.inputs[index], None, symbols, side)]
    for number, answer in enumerate(answers):
        before = answers[number - 1] if number else steps.inputs[index]
        head = f"step {number + 1}, halts {steps.halting[number, index]:.0%}"
        errors = wrong[number] if steps.labels is not None else None
        grids.append(_grid(head, answer, before, errors, symbols, side))
    across = min(columns, len(grids))
    wide, high = max(width, _LEAST) + _GAP, height + _HEAD + _GAP
    places = [(_GAP + n % across * wide, _GAP + n // across * high) for n in range(len(grids))]
    size = _GAP + across * wide, _GAP - (len(grids) // -across) * high
    drawn = "".join(
        f'<g transform="translate({x} {y})">{grid}</g>'
        for (x, y), grid in zip(places, grids, strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" '
        f'width="{size[0]}" height="{size[1]}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="#fff"/>{drawn}</svg>\n'
    )


def _grid(
    head: str,
    tokens: np.ndarray,
    before: np.ndarray,
    wrong: np.ndarray | None,
    symbols: list[str],
    side: int,
) -> str:
    """A grid with its head; cells that changed are marked, and wrong and right ones colored."""
    parts = [f'<text y="12">{escape(head)}</text>']
    for place, token in enumerate(tokens):
        x, y = place % side * _CELL, _HEAD + place // side * _CELL
        changed = token != before[place]
        fill = "#fff3c4" if changed else "#fff"
        ink = "#1c2330"
        if wrong is not None and (wrong[place] or changed):
            ink = "#c22" if wrong[place] else "#1a7f37"
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="{fill}" '
            f'stroke="#c8cfd8"/><text x="{x + _CELL / 2}" y="{y + 13}" fill="{ink}" '
            f'text-anchor="middle">{escape(symbols[token].strip())}</text>'
        )
    if len(symbols) == side + 2 and side in BOXES:
        down, across = BOXES[side]
        lines = [f"M{x * _CELL} {_HEAD}v{side * _CELL}" for x in range(0, side + 1, across)]
        lines += [f"M0 {_HEAD + y * _CELL}h{side * _CELL}" for y in range(0, side + 1, down)]
        parts.append(f'<path d="{"".join(lines)}" stroke="#1c2330" fill="none"/>')
    return "".join(parts)
