"""`metrics.jsonl`: the reports and validations of a run, one JSON object on each line.

A line is appended by one call of the system, so a killed run leaves whole lines. A resumed run
first drops the lines that are later than its state, and appends: but for times, the file is that of
a run which was never stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pyloss.errors import FormatError
from pyloss.io.files import append_whole, read_text, user_path, write_text

METRICS_FILE = "metrics.jsonl"

Row = dict[str, Any]


class MetricsLog:
    """The file of a run that is under way.

    Attributes:
        rows: all lines of the run, those before it was resumed included.
    """

    def __init__(self, path: Path | None, rows: Iterable[Row] = ()) -> None:
        """Starts the file with `rows`; with None as `path` nothing is written."""
        self.path = path
        self.rows = list(rows)
        if path is not None and (self.rows or path.exists()):
            write_text(path, "".join(map(_line, self.rows)))

    @property
    def seconds(self) -> float:
        """The seconds of training that the lines tell of."""
        return float(self.rows[-1].get("seconds") or 0.0) if self.rows else 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a line. Raises OSError naming the file, which then ends with the line before."""
        self.rows.append(dict(row))
        if self.path is not None:
            append_whole(self.path, _line(row))


def column(rows: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """The values of a name in the lines that have one, with their iterations."""
    return [(row["iteration"], float(row[name])) for row in rows if row.get(name) is not None]


def _line(row: Mapping[str, Any]) -> str:
    """The JSON of a line; a number that JSON does not have becomes null."""
    known = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(known, allow_nan=False) + "\n"


def read_metrics(folder: str | os.PathLike[str]) -> list[Row]:
    """The lines of `metrics.jsonl` in a run's folder; none if there is no such file.

    The end of a file without a line break is left out. Raises FormatError for a line that is no
    report.
    """
    path = user_path(folder) / METRICS_FILE
    if not path.is_file():
        return []
    rows = []
    for number, text in enumerate(read_text(path).split("\n")[:-1], 1):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(path, f"line {number}", f"not JSON: {error}") from None
        if not isinstance(row, dict) or type(row.get("iteration")) is not int:
            raise FormatError(path, f"line {number}", "is no object with an iteration")
        for key, value in row.items():
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise FormatError(path, f"line {number}", f"{key} is no number")
        rows.append(row)
    return rows


def rows_until(rows: Iterable[Row], reported_at: int, validated_at: int) -> list[Row]:
    """The reports up to `reported_at`, and the validations up to `validated_at`."""
    return [
        row
        for row in rows
        if row["iteration"] <= (validated_at if "val_loss" in row else reported_at)
    ]
