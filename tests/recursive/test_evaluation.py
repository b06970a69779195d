"""Answers by step: evaluation, halting, puzzles that are shown while they are solved."""

import re
import types
from xml.etree import ElementTree

import numpy as np
import pytest

import pyloss
from pyloss.recursive import HRM, TRM, RecursiveConfig
from pyloss.recursive.carry import Carry, InnerCarry
from pyloss.recursive.evaluation import Steps, evaluate_recursive, steps_of
from pyloss.recursive.pictures import steps_svg, steps_text, symbols_of

SIZES = {
    "seq_len": 5, "vocab_size": 7, "batch_size": 4, "hidden_size": 16, "num_heads": 2,
    "H_cycles": 2, "L_cycles": 2, "L_layers": 1, "halt_max_steps": 4,
}  # fmt: skip


def head_of(kind=TRM, **changes):
    pyloss.random.seed(0)
    return pyloss.ACTLossHead(kind(RecursiveConfig(**SIZES | changes)), "stablemax_cross_entropy")


class Scripted(pyloss.nn.Module):
    """A model whose answers and logits of each step are given: right [S, B], halting [S, B]."""

    learns_to_continue = False
    gives_own_targets = True

    def __init__(self, right, halting, halts=True):
        super().__init__()
        self.script = [np.asarray(right), np.asarray(halting, np.float32)]
        self.halt_max_steps, self.halts = len(right), halts

    def initial_carry(self, batch):
        count = len(batch["inputs"])
        empty = InnerCarry(np.zeros(0), np.zeros(0))
        return Carry(empty, np.zeros(count, int), np.ones(count, bool), batch)

    def __call__(self, carry, batch):
        step = int(carry.steps[0])
        labels = np.maximum(batch["labels"], 0)
        right, halting = (script[step][: len(labels)] for script in self.script)
        answers = np.where(right[:, None] | (np.arange(labels.shape[1]) > 0), labels, labels + 1)
        logits = 9 * np.eye(7, dtype=np.float32)[answers % 7]
        done = np.full(len(labels), self.halts and step + 1 == self.halt_max_steps)
        after = Carry(carry.inner_carry, carry.steps + 1, done, batch)
        q = {"q_halt_logits": halting, "q_continue_logits": np.zeros_like(halting)}
        return after, {"logits": logits, **q}


def test_answers_by_step():
    right = [[0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]]
    halting = [[-1, 2, -1, 3], [2, -1, -1, -1], [2, 1, -2, 1]]
    head = pyloss.ACTLossHead(Scripted(right, halting), "stablemax_cross_entropy")
    labels = np.array([[1, 2], [3, 4], [5, 6], [1, -100]])
    padded = {"inputs": np.zeros((4, 2), int), "labels": np.full((4, 2), -100)}
    batches = [{"inputs": np.zeros((4, 2), int), "labels": labels}, padded]
    found = evaluate_recursive(head, batches)
    assert found.count == 4 and found.exact_accuracy == 0.5
    rows = [(at.exact, at.halted, at.halted_exact) for at in found.by_step]
    # The second halts after step 1 and is right there, the fourth and is not; the first after 2.
    assert rows == [(0.25, 0.5, 0.25), (0.5, 0.25, 0.25), (0.5, 0.25, 0.0)]
    assert found.by_step[0].accuracy == pytest.approx((0.5 + 1 + 0.5 + 0) / 4)
    assert found.exact_when_halting == 0.5 and found.steps_when_halting == 1.75
    assert "exact accuracy 50.00%" in str(found) and found.table().count("\n") == 3
    assert found.as_mapping()["by_step"][1]["halted"] == 0.25
    assert found.q_halt_accuracy == 0.75 and found.metrics["steps"] == 3


def test_a_model_that_never_halts_is_refused():
    model = Scripted([[1], [1]], [[0], [0]], halts=False)
    head = pyloss.ACTLossHead(model, "stablemax_cross_entropy").train()
    batch = {"inputs": np.zeros((1, 2), int), "labels": np.ones((1, 2), int)}
    with pytest.raises(ValueError, match="has not halted after halt_max_steps, 2"):
        evaluate_recursive(head, [batch])
    assert head.training
    with pytest.raises(ValueError, match="no puzzles"):
        evaluate_recursive(head, [])


@pytest.mark.parametrize("kind", [TRM, HRM])
def test_steps_are_those_of_the_model(kind):
    more = {"H_layers": 1} if kind is HRM else {}
    head = head_of(kind, **more)
    model = head.model.train()
    rng = np.random.default_rng(0)
    inputs, labels = rng.integers(0, 7, (2, 3, 5))
    found = steps_of(model, inputs, labels)
    assert model.training and found.preds.shape == (4, 3, 5) and len(found) == 3
    model.eval()
    batch = {"inputs": inputs, "labels": labels}
    carry = model.initial_carry(batch)
    for step in range(4):
        carry, outputs = model(carry=carry, batch=batch)
        np.testing.assert_array_equal(found.preds[step], outputs["logits"].argmax(-1))
        expected = 1 / (1 + np.exp(-outputs["q_halt_logits"]))
        np.testing.assert_allclose(found.halting[step], expected, rtol=1e-6)
    evaluated = evaluate_recursive(head, [batch])
    exact = (found.preds == labels).all(-1).mean(1)
    assert [at.exact for at in evaluated.by_step] == exact.tolist()
    more_steps = steps_of(model, inputs[0], steps=6)
    assert more_steps.preds.shape == (6, 1, 5) and more_steps.labels is None
    np.testing.assert_array_equal(more_steps.preds[:4, 0], found.preds[:, 0])
    with pytest.raises(ValueError, match="labels has shape"):
        steps_of(model, inputs, labels[:2])


QUESTION = np.array([[2, 1, 4, 1, 1, 5, 1, 3, 3, 1, 5, 1, 1, 4, 1, 2]])
ANSWER = np.array([[2, 3, 4, 5, 4, 5, 2, 3, 3, 2, 5, 4, 5, 4, 3, 2]])


def solved():
    first = np.where(QUESTION == 1, 2, QUESTION)
    return Steps(QUESTION, np.stack([first, ANSWER]), np.array([[0.25], [0.75]]), ANSWER)


def test_a_puzzle_as_text():
    text = steps_text(solved(), 0, 6)
    lines = text.split("\n")
    assert [part.strip() for part in re.split(" {3,}", lines[0])] == [
        "puzzle",
        "1: 6 wrong, 25%",
        "2: 0 wrong, 75%",
    ]
    assert [part.strip() for part in re.split(" {3,}", lines[1])] == [
        "1 . 3 .",
        "1 1 3 1",
        "1 2 3 4",
    ]
    assert len(lines) == 5
    colors = steps_text(solved(), 0, 6, color=True)
    assert colors.count("\x1b[31m") == 6 and re.sub(r"\x1b\[\d+m", "", colors) == text
    unknown = types.SimpleNamespace(**vars(solved()) | {"labels": None})
    assert "wrong" not in steps_text(Steps(**vars(unknown)), 0, 6)


def test_lines_that_are_empty_in_all_grids_are_left_out():
    padded = np.zeros((1, 36), int)
    padded[0, [0, 1, 6, 7]] = 4, 5, 6, 7  # ARC: 2 x 2 in 6 x 6
    answer = padded.copy()
    answer[0, 12] = 3
    text = steps_text(Steps(padded, answer[None], np.array([[0.5]]), answer), 0, 12)
    assert [line.split() for line in text.split("\n")[1:]] == [
        ["2", "3", "2", "3"],
        ["4", "5", "4", "5"],
        ["1"],
    ]


def test_a_puzzle_as_svg():
    picture = ElementTree.fromstring(steps_svg(solved(), 0, 6))
    texts = ["".join(text.itertext()) for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert len(texts) == 3 * 17 and texts[0] == "puzzle" and texts[17] == "step 1, halts 25%"
    digits = "".join(texts[35:])
    assert digits == "1234341221434321"
    fills = [text.get("fill") for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert fills.count("#c22") == 6


def test_symbols():
    assert symbols_of(11, 9)[1:4] == [".", "1", "2"] and symbols_of(6, 4)[5] == "4"
    assert "".join(symbols_of(6, 30)) == " # SGo" and symbols_of(12, 30)[2] == "0"
    assert symbols_of(20, 5)[19] == "19"


def test_votes_on_arcs_tasks_are_metrics():
    taken = []

    class Votes:
        def update(self, batch, preds, q_halt_logits):
            taken.append((batch["puzzle_identifiers"].tolist(), preds, q_halt_logits))

        def result(self):
            return {"ARC/pass@1": 0.5}

    head = pyloss.ACTLossHead(Scripted([[0], [1]], [[1], [3]]), "stablemax_cross_entropy")
    labels = np.array([[1, 2]])
    ids = np.array([7])
    batch = {"inputs": np.zeros((1, 2), int), "labels": labels, "puzzle_identifiers": ids}
    found = evaluate_recursive(head, [batch], Votes())
    assert found.metrics["ARC/pass@1"] == 0.5 and len(taken) == 1
    # The answers and logits are those of the last step.
    assert taken[0][0] == [7] and taken[0][1].tolist() == [[1, 2]] and taken[0][2] == [3]
