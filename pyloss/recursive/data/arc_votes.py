"""The voting of answers to ARC's tasks: each variation of a task gives one for each test input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyloss.checks.numbers import whole
from pyloss.io.files import PathLike, read_json, user_path
from pyloss.recursive.data.arc import grid_of, inverse_augmentation
from pyloss.recursive.data.dataset import IDENTIFIERS_FILE

TEST_PUZZLES_FILE = "test_puzzles.json"


class ArcVotes:
    """Collects the answers of an evaluation, and ranks them by votes.

    An answer's variation is undone, so that the answers of all variations of a test pair compare.
    The one with most votes is first; among equal numbers that with the larger mean probability to
    halt.
    """

    def __init__(
        self,
        identifiers: Sequence[str],
        test_puzzles: Mapping[str, Any],
        blank_identifier_id: int = 0,
    ):
        self._identifiers, self._puzzles = identifiers, test_puzzles
        self._blank = blank_identifier_id
        self._votes: dict[tuple[str, bytes], dict[bytes, list[float]]] = {}
        self._grids: dict[bytes, np.ndarray] = {}

    @classmethod
    def load(cls, folder: PathLike) -> ArcVotes:
        """For a folder of data: reads its identifiers.json and test_puzzles.json."""
        place = user_path(folder)
        names = read_json(place / IDENTIFIERS_FILE, list)
        return cls(names, read_json(place / TEST_PUZZLES_FILE))

    def update(self, batch: Mapping[str, Any], preds: Any, q_halt_logits: Any) -> None:
        """Takes the answers `preds` [B, 900] to a batch, with the logits to halt [B]."""
        chances = 1 / (1 + np.exp(-np.asarray(q_halt_logits, np.float64)))
        rows = zip(
            np.asarray(batch["puzzle_identifiers"]).tolist(),
            np.asarray(batch["inputs"]),
            np.asarray(preds),
            chances.tolist(),
            strict=True,
        )
        for identifier, inputs, pred, chance in rows:
            if identifier == self._blank:
                continue
            task, undo = inverse_augmentation(self._identifiers[identifier])
            answer = undo(grid_of(pred))
            key = _key(answer)
            self._grids[key] = answer
            votes = self._votes.setdefault((task, _key(undo(grid_of(inputs)))), {})
            votes.setdefault(key, []).append(chance)

    def _ranked(self, task: str, question: Any) -> list[bytes]:
        votes = self._votes.get((task, _key(np.array(question, np.uint8))), {})
        return sorted(
            votes,
            key=lambda key: (len(votes[key]), sum(votes[key]) / len(votes[key])),
            reverse=True,
        )

    def result(self, ks: Sequence[int] = (1, 2, 5, 10, 100, 1000)) -> dict[str, float]:
        """`ARC/pass@k`: the share of test pairs whose output is among the first k answers.

        Each task counts as one, by the share of its pairs.
        """
        for k in ks:
            whole(k, "k", 1)
        solved = dict.fromkeys(ks, 0.0)
        for task, puzzle in self._puzzles.items():
            for pair in puzzle["test"]:
                ranked = self._ranked(task, pair["input"])
                right = _key(np.array(pair["output"], np.uint8))
                for k in ks:
                    solved[k] += (right in ranked[:k]) / len(puzzle["test"])
        return {f"ARC/pass@{k}": found / len(self._puzzles) for k, found in solved.items()}

    def submission(self, attempts: int = 2) -> dict[str, list[dict[str, list[list[int]]]]]:
        """The first answers in the form of ARC's contest: attempt_1, attempt_2, ... of each pair.

        Where there are fewer answers the first one is repeated; without any it is [[0]].
        """
        found: dict[str, list[dict[str, list[list[int]]]]] = {}
        for task, puzzle in self._puzzles.items():
            found[task] = []
            for pair in puzzle["test"]:
                grids = [self._grids[key].tolist() for key in self._ranked(task, pair["input"])]
                grids = (grids or [[[0]]])[:attempts]
                grids += [grids[0]] * (attempts - len(grids))
                found[task].append({f"attempt_{i + 1}": grid for i, grid in enumerate(grids)})
        return found


def _key(grid: np.ndarray) -> bytes:
    return bytes(grid.shape) + grid.tobytes()
