"""What a recursive model answers after each step, and how often it is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pyloss.checks.arrays import as_integers
from pyloss.losses.act import IGNORE_INDEX
from pyloss.recursive.data.arc_votes import ArcVotes
from pyloss.recursive.models import RecursiveModel


@dataclass(frozen=True)
class AtStep:
    """The answers after one step.

    Attributes:
        step: its number, from 1.
        exact: the share of all puzzles whose answer is right after this step.
        accuracy: the mean share of right tokens of a puzzle.
        halted: the share of puzzles that would halt here: the first step whose logits say so, or
            the last one.
        halted_exact: the share of all puzzles that would halt here with a right answer.
    """

    step: int
    exact: float
    accuracy: float
    halted: float
    halted_exact: float


@dataclass(frozen=True)
class RecursiveEvaluation:
    """How a model solves puzzles that take all `halt_max_steps` steps, as in the authors' code.

    Attributes:
        count: puzzles.
        loss: the loss of the last step, for each puzzle.
        exact_accuracy: the share of puzzles whose every predicted token is right.
        accuracy: the mean share of right tokens of a puzzle.
        q_halt_accuracy: how often the logit of halting knows whether the answer is right.
        metrics: all metrics of `ACTLossHead` for each puzzle, and ARC's pass@k.
        by_step: the answers after each step.
    """

    count: int
    loss: float
    exact_accuracy: float
    accuracy: float
    q_halt_accuracy: float
    metrics: dict[str, float]
    by_step: list[AtStep]

    @property
    def exact_when_halting(self) -> float:
        """The share of right answers where each puzzle ends as its logits say."""
        return sum(at.halted_exact for at in self.by_step)

    @property
    def steps_when_halting(self) -> float:
        """The mean number of steps where each puzzle ends as its logits say."""
        return sum(at.step * at.halted for at in self.by_step)

    def as_mapping(self) -> dict[str, Any]:
        """The numbers for a JSON file."""
        return asdict(self) | {
            "exact_when_halting": self.exact_when_halting,
            "steps_when_halting": self.steps_when_halting,
        }

    def table(self) -> str:
        """The answers by step as lines of text."""
        lines = ["step   exact  tokens  would halt  right of these"]
        for at in self.by_step:
            right = f"{at.halted_exact / at.halted:14.1%}" if at.halted else f"{'-':>14}"
            shares = f"{at.exact:7.1%} {at.accuracy:7.1%} {at.halted:11.1%}"
            lines.append(f"{at.step:4} {shares} {right}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return (
            f"exact accuracy {self.exact_accuracy:.2%}, token accuracy {self.accuracy:.2%} of "
            f"{self.count} puzzles; halting when it says so: {self.exact_when_halting:.2%} exact "
            f"after {self.steps_when_halting:.2f} steps"
        )


def evaluate_recursive(
    head: Any, batches: Iterable[Mapping[str, Any]], votes: ArcVotes | None = None
) -> RecursiveEvaluation:
    """Evaluates a model in its `ACTLossHead` on batches of puzzles.

    Rows without a label pad a batch, and do not count. `votes` collects the last answers to ARC's
    tasks; its results are then among the metrics.

    Raises ValueError for no puzzles, and for a model that does not halt after `halt_max_steps`.
    """
    model = head.model
    most, was_training = model.halt_max_steps, head.training
    sums: dict[str, float] = {}
    loss, steps = 0.0, np.zeros((most, 4))
    head.eval()
    try:
        for batch in batches:
            carry, waits = head.initial_carry(batch), np.ones(len(batch["inputs"]), bool)
            keys = ("preds", "q_halt_logits", "q_continue_logits")
            for step in range(most):
                carry, value, metrics, outputs, done = head(
                    return_keys=keys, carry=carry, batch=batch
                )
                right, exact, filled = _right(outputs["preds"], carry.current_data["labels"])
                ends = filled & waits & (_says_halt(model, outputs) | (step == most - 1))
                waits &= ~ends
                row = (exact[filled].sum(), right[filled].sum(), ends.sum(), exact[ends].sum())
                steps[step] += row
                if done:
                    break
            else:
                raise ValueError(
                    f"the model has not halted after halt_max_steps, {most}: in evaluation all "
                    "its sequences must have halted then"
                )
            for name, number in metrics.items():
                sums[name] = sums.get(name, 0.0) + number
            loss += float(value)
            if votes is not None:
                votes.update(batch, outputs["preds"], outputs["q_halt_logits"])
    finally:
        head.train(was_training)
    count = int(sums.pop("count", 0))
    if not count:
        raise ValueError("there are no puzzles to evaluate")
    means = {name: number / count for name, number in sums.items()}
    if votes is not None:
        means |= votes.result()
    by_step = [
        AtStep(number, *(float(part) / count for part in row))
        for number, row in enumerate(steps, 1)
    ]
    return RecursiveEvaluation(
        count,
        loss / count,
        means["exact_accuracy"],
        means["accuracy"],
        means["q_halt_accuracy"],
        means,
        by_step,
    )


@dataclass(frozen=True)
class Steps:
    """A model's work on some puzzles.

    Attributes:
        inputs: int32 [B, T], the puzzles.
        preds: int32 [S, B, T], the answers after each step.
        halting: float32 [S, B], the probability that the model gives to a right answer, by which
            it halts.
        labels: int32 [B, T], the right answers, -100 where nothing is predicted; None: not known.
    """

    inputs: np.ndarray
    preds: np.ndarray
    halting: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def answers(self, index: int) -> np.ndarray:
        """The answers [S, T] to a puzzle, with its own tokens where nothing is predicted."""
        answers = self.preds[:, index]
        if self.labels is None:
            return answers
        return np.where(self.labels[index] == IGNORE_INDEX, self.inputs[index], answers)

    def wrong(self, index: int) -> np.ndarray:
        """Which tokens of a puzzle's answers are wrong, bool [S, T]; none where it is not known."""
        if self.labels is None:
            return np.zeros_like(self.preds[:, index], bool)
        labels = self.labels[index]
        return (labels != IGNORE_INDEX) & (self.preds[:, index] != labels)


def steps_of(
    model: RecursiveModel,
    inputs: Any,
    labels: Any = None,
    puzzle_identifiers: Any = None,
    steps: int | None = None,
) -> Steps:
    """The answers of a model to puzzles [B, T], or to one [T], after each of its steps.

    Args:
        labels: the right answers, where they are known.
        puzzle_identifiers: [B], for puzzle embeddings; None: 0, the blank one.
        steps: None: `halt_max_steps`; more or less are possible.
    """
    given = np.atleast_2d(as_integers(inputs, "inputs"))
    known = None if labels is None else np.atleast_2d(as_integers(labels, "labels"))
    if known is not None and known.shape != given.shape:
        raise ValueError(f"labels has shape {known.shape}, inputs {given.shape}")
    batch = {"inputs": given.astype(np.int32)}
    ids = np.zeros(len(given), np.int32) if puzzle_identifiers is None else puzzle_identifiers
    batch["puzzle_identifiers"] = np.atleast_1d(as_integers(ids, "puzzle_identifiers"))
    count = model.halt_max_steps if steps is None else steps
    was_training = model.training
    model.eval()
    try:
        carry, preds, halting = model.initial_carry(batch), [], []
        for _ in range(count):
            carry, outputs = model(carry=carry, batch=batch)
            carry.halted = np.zeros_like(carry.halted)  # goes on beyond halt_max_steps
            preds.append(np.asarray(outputs["logits"]).argmax(-1).astype(np.int32))
            halting.append(np.asarray(outputs["q_halt_logits"], np.float32))
    finally:
        model.train(was_training)
    probability = 1 / (1 + np.exp(-np.stack(halting)))
    return Steps(batch["inputs"], np.stack(preds), probability, known)


def _right(preds: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The share of right tokens of each sequence, whether all are, and whether it has labels."""
    valid = labels != IGNORE_INDEX
    count = valid.sum(-1)
    right = (valid & (preds == labels)).sum(-1)
    return right / np.maximum(count, 1), right == count, count > 0


def _says_halt(model: Any, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Where the logits of a step say that a sequence may end, as while training."""
    above = outputs["q_continue_logits"] if model.learns_to_continue else 0
    return np.asarray(outputs["q_halt_logits"] > above)
