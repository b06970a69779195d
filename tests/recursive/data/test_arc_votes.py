"""Voting: answers of variations are undone, counted, ranked by votes and then by q."""

import json

import numpy as np
import pytest

from pyloss.recursive.data import ArcVotes
from pyloss.recursive.data.arc import Variation, tokens

A, B, C = [[1, 2]], [[3], [4]], [[5]]
QUESTION = [[7, 0, 7]]
PUZZLES = {
    "x": {"train": [], "test": [{"input": QUESTION, "output": B}, {"input": [[9]], "output": C}]},
    "y": {"train": [], "test": [{"input": QUESTION, "output": A}]},
}
RNG = np.random.RandomState(0)
VARIATIONS = [Variation.drawn(RNG) for _ in range(5)]
NAMES = ["<blank>", "x", *(v.name("x") for v in VARIATIONS), "y"]


def batch(*answers):
    """Answers to (identifier, question, answer, q): a batch, predictions and logits."""

    def row(identifier, grid):
        grid = np.array(grid, np.uint8)
        return tokens(VARIATIONS[identifier - 2].of(grid) if 2 <= identifier < 7 else grid)

    ids = np.array([answer[0] for answer in answers])
    inputs = np.stack([row(i, question) for i, question, _, _ in answers])
    preds = np.stack([row(i, answer) for i, _, answer, _ in answers])
    return {"inputs": inputs, "puzzle_identifiers": ids}, preds, [q for *_, q in answers]


def test_votes_then_q_decide():
    votes = ArcVotes(NAMES, PUZZLES)
    votes.update(*batch((1, QUESTION, A, 0.0), (2, QUESTION, A, 1.0), (3, QUESTION, B, 2.0)))
    votes.update(*batch((0, QUESTION, C, 9.0), (0, QUESTION, C, 9.0)))  # padding has no vote
    # two votes before one; B was right
    assert votes.result((1, 2)) == {"ARC/pass@1": 0.0, "ARC/pass@2": 0.25}
    votes.update(*batch((4, QUESTION, B, 2.0)))
    assert votes.result((1,)) == {"ARC/pass@1": 0.25}  # as many, with a larger mean of q
    votes.update(*batch((5, [[9]], C, 0.0), (7, QUESTION, A, -5.0)))
    assert votes.result((1, 2)) == {"ARC/pass@1": 1.0, "ARC/pass@2": 1.0}
    assert votes.submission() == {
        "x": [{"attempt_1": B, "attempt_2": A}, {"attempt_1": C, "attempt_2": C}],
        "y": [{"attempt_1": A, "attempt_2": A}],
    }


def test_without_answers_nothing_is_solved():
    votes = ArcVotes(NAMES, PUZZLES)
    assert set(votes.result().values()) == {0.0}
    assert votes.submission(1)["y"] == [{"attempt_1": [[0]]}]
    with pytest.raises(ValueError, match="k is 0"):
        votes.result((0,))


def test_it_reads_the_folder_of_the_data(tmp_path):
    (tmp_path / "identifiers.json").write_text(json.dumps(NAMES))
    (tmp_path / "test_puzzles.json").write_text(json.dumps(PUZZLES))
    votes = ArcVotes.load(tmp_path)
    votes.update(*batch((7, QUESTION, A, 0.0)))
    assert votes.result((1,)) == {"ARC/pass@1": 0.5}
