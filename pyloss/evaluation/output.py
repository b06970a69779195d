"""The file of an evaluation: one JSON line for each record."""

from __future__ import annotations

import json
import math
from typing import Any

from pyloss.evaluation.measurement import Evaluation, Result
from pyloss.io.files import PathLike, replacing, user_path
from pyloss.io.outputs import output


def write_results(
    path: PathLike, found: Evaluation, base: Evaluation | None = None, overwrite: bool = False
) -> None:
    """Writes the results of each record to a JSONL file, wholly or not at all.

    An earlier file moves to `previous-N` in its folder; `overwrite` replaces it.

    A line has `record` (its number in the dataset, from 0), `prompt`, `reference`, `answer`,
    `finish_reason` and `scores`; without generated answers `record` and `scores` only. `base`, the
    evaluation to compare with, adds an object `base` with its own answer and scores. OSError names
    `path`.
    """
    target = user_path(path)
    with (
        output(target, overwrite=overwrite),
        replacing(target) as part,
        open(part, "w", encoding="utf-8", newline="\n") as file,
    ):
        for index, result in enumerate(found.results):
            line: dict[str, Any] = {"record": index}
            if result.answer is not None:
                line |= {"prompt": result.prompt, "reference": result.reference}
            line |= _measured(result)
            if base is not None:
                line["base"] = _measured(base.results[index])
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _measured(result: Result) -> dict[str, Any]:
    answer = {"answer": result.answer, "finish_reason": result.finish_reason}
    # A perplexity may be infinite, which JSON cannot say.
    scores = {k: v if v is None or math.isfinite(v) else None for k, v in result.scores.items()}
    return ({} if result.answer is None else answer) | {"scores": scores}
