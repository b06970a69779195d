"""The authors' CSV of puzzles: a line with source, question, answer and rating for each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import NamedTuple

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.files import PathLike, open_regular

COLUMNS = ("source", "question", "answer", "rating")


class Row(NamedTuple):
    """A line of the file; its number counts from 1, the header's."""

    line: int
    question: str
    answer: str
    rating: int


def read_puzzle_csv(path: PathLike) -> Iterator[Row]:
    """The lines of a CSV whose header names question and answer, and perhaps rating (else 0).

    Raises:
        FormatError: another header, a line of another number of columns, a rating that is no whole
            number, text that is not UTF-8; names the line.
        OSError: the file cannot be read.
    """
    with open_regular(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            header = [name.strip().lower() for name in next(reader, [])]
            places = [header.index(name) if name in header else -1 for name in COLUMNS[1:]]
            question, answer, rating = places
            if min(question, answer) < 0:
                raise FormatError(
                    path,
                    "line 1",
                    f"the columns are {shown(', '.join(header))}; expected {', '.join(COLUMNS)}",
                )
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise FormatError(
                        path,
                        f"line {reader.line_num}",
                        f"has {len(cells)} columns, and the header {len(header)}",
                    )
                rated = 0 if rating < 0 else _rating(path, reader.line_num, cells[rating])
                yield Row(reader.line_num, cells[question], cells[answer], rated)
        except UnicodeDecodeError:
            place = f"after line {reader.line_num}"
            raise FormatError(path, place, "not UTF-8 text") from None
        except csv.Error as error:
            raise FormatError(path, f"line {reader.line_num}", f"not CSV: {error}") from None


def _rating(path: PathLike, line: int, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise FormatError(
            path, f"line {line}", f"rating is {shown(text)}; it must be a whole number"
        ) from None
