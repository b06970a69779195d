"""Hidden states of the teacher as targets, beside its probabilities."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pyloss import ops
from pyloss.autograd.scope import no_grad
from pyloss.checks.numbers import real, shown, whole
from pyloss.errors import choices, counted
from pyloss.losses.hidden import KINDS, hidden_state_loss
from pyloss.runtime.device import on_device_of
from pyloss.tuner.losses import PackedTargets

#: Layers of each model that are compared unless others are chosen.
DEFAULT_PAIRS = 4

NEEDS_MODEL = (
    "a loss between hidden states needs a model as its teacher: "
    "a stored teacher has probabilities only"
)

_PAIR = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*", re.ASCII)


def parse_pairs(text: str) -> list[tuple[int, int]]:
    """The pairs of a text such as "3:7,11:29": a layer of the student, a layer of the teacher.

    Raises ValueError naming the part that is no pair.
    """
    pairs = []
    for part in text.split(","):
        found = _PAIR.fullmatch(part)
        if not found:
            raise ValueError(
                f"{shown(part)} in {shown(text)} is not a layer of the student and one of the "
                "teacher such as 3:7"
            )
        pairs.append((int(found[1]), int(found[2])))
    return pairs


def even_pairs(student: int, teacher: int, count: int = DEFAULT_PAIRS) -> list[tuple[int, int]]:
    """Pairs of layers of models with these numbers of layers: the last of `count` equal parts.

    A model with fewer layers than `count` has as many parts as layers.
    """
    parts = min(count, student, teacher)
    return [
        (-(-i * student // parts) - 1, -(-i * teacher // parts) - 1) for i in range(1, parts + 1)
    ]


class HiddenStates:
    """A term of the loss: the distance of a student's hidden states from a teacher's.

    The term is `weight` times the mean over the pairs of layers and the target tokens of
    `hidden_state_loss`. A layer's hidden state is its output, before the next layer's norm; a
    token's is that which predicts it. Where the widths differ, the student's state is multiplied by
    a matrix first, which is trained with the student and is no part of it.

    Args:
        student, teacher: models of `pyloss.load`.
        kind: "cosine" or "mse".
        layers: pairs (layer of the student, layer of the teacher), counted from 0, or a text such
            as "3:7,11:29"; None: the last layers of four equal parts of both models.
        weight: of the term, above 0.
        seed: of the projections' first values, which are normal with the variance 1 / width.

    Attributes:
        pairs: the pairs of layers.
        projections: float32 [width of the teacher, width of the student] by name; empty if the
            widths are equal.

    Raises ValueError for another kind, for a teacher that is no model, for a layer that a model
    lacks, and for a pair given twice.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        kind: str = "cosine",
        layers: Iterable[Sequence[int]] | str | None = None,
        weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"hidden_loss is {kind!r:.60}; it must be {choices(KINDS)}")
        if not hasattr(teacher, "hidden_states"):
            raise ValueError(NEEDS_MODEL)
        self.kind, self.weight = kind, real(weight, "hidden_weight", above=0)
        counts = len(student.layers), len(teacher.layers)
        if layers is None:
            self.pairs = even_pairs(*counts)
        else:
            self.pairs = _checked(
                parse_pairs(layers) if isinstance(layers, str) else layers, counts
            )
        widths = [model.config.hidden_size for model in (student, teacher)]
        self.projections: dict[str, np.ndarray] = {}
        if widths[0] != widths[1]:
            draws = np.random.default_rng(whole(seed, "seed", 0))
            like = next(iter(teacher.parameters().values()), None)
            for pair in self.pairs:
                first = draws.standard_normal((widths[1], widths[0]), np.float32)
                first *= np.float32(widths[0] ** -0.5)
                self.projections[_name(pair)] = on_device_of(like, first)

    def describe(self) -> str:
        """One line for the user: what is compared."""
        pairs = ", ".join(f"{q}:{p}" for q, p in self.pairs)
        text = f"hidden states: {self.kind} of the layers {pairs} (student:teacher)"
        if not self.projections:
            return text
        numbers = sum(array.size for array in self.projections.values())
        return f"{text}, with projections of {numbers:,} numbers that the run's state keeps"

    def without_gradient(self, first: int) -> list[int]:
        """The student's layers below `first`, the first trained one."""
        return sorted({q for q, _ in self.pairs if q < first})

    def of_teacher(self, model: Any, part: PackedTargets) -> tuple[Any, list[Any]]:
        """The teacher's last hidden states [N, E], and those of its layers at the targets."""
        with no_grad():
            last, states = model.hidden_states(
                part.tokens, part.offsets, [p for _, p in self.pairs]
            )
            return last, [_at(state, _rows(part)) for state in states]

    def of_student(self, model: Any, part: PackedTargets) -> tuple[Any, list[Any]]:
        """The student's last hidden states [N, D], and those of its layers, all [N, D]."""
        return model.hidden_states(part.tokens, part.offsets, [q for q, _ in self.pairs])

    def loss(self, part: PackedTargets, student: Sequence[Any], teacher: Sequence[Any]) -> Any:
        """The sum over the part's targets of their weights times the term."""
        rows, total = _rows(part), None
        weights = part.weights[part.labels >= 0] * np.float32(self.weight / len(self.pairs))
        for pair, q, p in zip(self.pairs, student, teacher, strict=True):
            q = _at(q, rows)
            if self.projections:
                q = ops.linear(q, self.projections[_name(pair)])
            term = hidden_state_loss(q, p, kind=self.kind, weights=weights, reduction="sum")
            total = term if total is None else total + term
        return total


def _name(pair: tuple[int, int]) -> str:
    return f"hidden_projections.{pair[0]}:{pair[1]}"


def _rows(part: PackedTargets) -> np.ndarray | None:
    """The tokens that predict a target; None if all do."""
    used = part.labels >= 0
    return None if used.all() else np.flatnonzero(used).astype(np.int32)


def _at(states: Any, rows: np.ndarray | None) -> Any:
    return states if rows is None else ops.gather_rows(states, rows)


def _checked(layers: Iterable[Sequence[int]], counts: tuple[int, int]) -> list[tuple[int, int]]:
    """The pairs of layers, for models with these numbers of layers."""
    pairs: list[tuple[int, int]] = []
    for given in layers:
        if isinstance(given, str) or len(given) != 2:
            raise ValueError(
                f"hidden_layers has {shown(given)}; a pair is (layer of the student, layer of the "
                "teacher)"
            )
        pair = whole(given[0], "hidden_layers", 0), whole(given[1], "hidden_layers", 0)
        for whose, layer, count in zip(("student", "teacher"), pair, counts, strict=True):
            if layer >= count:
                raise ValueError(
                    f"hidden_layers has {pair[0]}:{pair[1]}, and the {whose} has no layer {layer}: "
                    f"it has {counted(count, 'layer')}, counted from 0"
                )
        if pair in pairs:
            raise ValueError(f"hidden_layers has {pair[0]}:{pair[1]} twice")
        pairs.append(pair)
    if not pairs:
        raise ValueError("hidden_layers is empty: give a pair of layers such as 3:7")
    return pairs
