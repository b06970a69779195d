"""The loss of a batch against a teacher: `loss=` of the trainer and of `evaluate`."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from pyloss.autograd.scope import no_grad
from pyloss.checks.numbers import real
from pyloss.distillation.hidden import NEEDS_MODEL, HiddenStates
from pyloss.losses.distillation import linear_distillation
from pyloss.losses.pairs import divergence
from pyloss.tuner.losses import PackedTargets, loss_in_parts
from pyloss.tuner.run.plan import (
    BatchShape,
    Beside,
    first_trained_layer,
    forward_bytes,
    stored_bytes,
)


class Teacher(Protocol):
    """What a student learns from."""

    def loss(self, model: Any, part: PackedTargets, options: dict[str, Any]) -> Any:
        """The sum over the part's targets of their weights times their losses.

        `options` are those of `linear_distillation`: kind, temperature, beta, skew and alpha, which
        may be one for each token. A teacher may have `check(options)`, which refuses some before a
        run.
        """


class LiveTeacher:
    """A model that runs over each part of a batch before the student does.

    Its parameters get no gradient, and its activations are freed before the student's exist.

    Args:
        model: the teacher, with the student's tokens (see `check_vocabularies`).
        hidden: a term of its hidden states, which is added to the loss.
    """

    def __init__(self, model: Any, hidden: HiddenStates | None = None) -> None:
        if not hasattr(model, "hidden") or not hasattr(model, "head_layer"):
            raise TypeError(
                f"a teacher must be a model of pyloss.load, not a {type(model).__name__}"
            )
        self.model, self.hidden = model.eval(), hidden

    def loss(self, model: Any, part: PackedTargets, options: dict[str, Any]) -> Any:
        """See `Teacher`."""
        if self.hidden is not None:
            known, targets = self.hidden.of_teacher(self.model, part)
            own, states = self.hidden.of_student(model, part)
            term = self.hidden.loss(part, states, targets)
            return self._of_logits(model, own, known, part, options) + term
        with no_grad():
            known = self.model.hidden(part.tokens, part.offsets)
        own = model.hidden(part.tokens, part.offsets)
        return self._of_logits(model, own, known, part, options)

    def _of_logits(
        self, model: Any, own: Any, known: Any, part: PackedTargets, options: dict[str, Any]
    ) -> Any:
        """The loss of the student's and the teacher's last hidden states under their heads."""
        return linear_distillation(
            own,
            model.head_layer,
            known,
            self.model.head_layer,
            part.labels,
            softcap=(getattr(model, "softcap", None), getattr(self.model, "softcap", None)),
            weights=part.weights,
            ignore_index=-1,
            logits_bytes=part.logits_bytes,
            reduction="sum",
            **options,
        )

    def beside(self, model: Any, batch: BatchShape) -> Beside:
        """What the teacher needs beside the student, see `Beside`."""
        width, classes = self.model.config.hidden_size, self.model.head_layer.shape[0]
        pairs = 0 if self.hidden is None else len(self.hidden.pairs)
        # Its last hidden states, twice where some tokens are no targets; then those of its layers.
        kept = 4 * batch.tokens * width * (2 + pairs)
        if self.hidden is not None:
            # Differences and gradients by the student's states.
            kept += 4 * batch.tokens * (width + model.config.hidden_size) * pairs
        first = forward_bytes(self.model, batch.without_gradients)
        return Beside(stored_bytes(self.model), kept, first, classes)


class DistillationLoss:
    """`loss(model, batch, lengths)`: (the weighted mean over the targets, the sum of weights).

    Each target's loss is alpha CE + (1 - alpha) T^2 D, see `pyloss.losses.linear_distillation`,
    plus the term of hidden states, if there is one.

    Args:
        teacher: a model, a `StoredTeacher`, or another `Teacher`.
        kind: the divergence D: "forward-kl", "reverse-kl", "js" (with `beta`), "skew-kl" or
            "skew-reverse-kl" (with `skew`).
        temperature: T > 0, divides the logits of both.
        alpha: in [0, 1], the share of the labels' cross entropy.
        hidden: the distance of hidden states, of this student and teacher; a `StoredTeacher` has
            none.

    Raises ValueError for an unknown kind, for numbers out of their range, and for hidden states of
    a teacher that is no model.
    """

    def __init__(
        self,
        teacher: Any,
        kind: str = "forward-kl",
        temperature: float = 1.0,
        alpha: float = 0.0,
        beta: float = 0.5,
        skew: float = 0.1,
        hidden: HiddenStates | None = None,
    ) -> None:
        divergence(kind, temperature=temperature, beta=beta, skew=skew)
        if hidden is not None and hasattr(teacher, "loss"):
            raise ValueError(NEEDS_MODEL)
        self.teacher: Teacher = (
            teacher if hasattr(teacher, "loss") else LiveTeacher(teacher, hidden)
        )
        self.options: dict[str, Any] = {
            "kind": kind,
            "temperature": real(temperature, "temperature", above=0),
            "alpha": real(alpha, "alpha", 0, 1),
            "beta": real(beta, "beta", 0, 1),
            "skew": real(skew, "skew", 0, below=1),
        }
        self.hidden = hidden
        if hasattr(self.teacher, "check"):
            self.teacher.check(self.options)

    def loss_parameters(self) -> dict[str, np.ndarray]:
        """The arrays that are trained beside the student: projections of hidden states."""
        return {} if self.hidden is None else self.hidden.projections

    def beside(self, model: Any, batch: BatchShape) -> Beside:
        """What the loss needs beside the student, see `Beside`."""
        of_teacher = getattr(self.teacher, "beside", None)
        found = Beside() if of_teacher is None else of_teacher(model, batch)
        # Slopes of the divergence and of the cross entropy.
        both = 0 < self.options["alpha"] < 1
        return found._replace(columns=found.columns + both * model.head_layer.shape[0])

    def plan_notes(self, model: Any) -> list[str]:
        """Lines for the plan of a run."""
        if self.hidden is None:
            return []
        below = self.hidden.without_gradient(first_trained_layer(model))
        if not below:
            return []
        return [
            f"hidden states of the student's {'layer' if len(below) == 1 else 'layers'} "
            f"{', '.join(map(str, below))} are below the first trained layer: "
            "their distance changes nothing"
        ]

    def __call__(self, model: Any, batch: Any, lengths: Any) -> tuple[Any, float]:
        """The loss of a batch, see `tuner.losses.default_loss`."""
        return self.of(model, batch, lengths)

    def of(
        self, model: Any, batch: Any, lengths: Any, alpha: np.ndarray | None = None
    ) -> tuple[Any, float]:
        """The loss of a batch, with an `alpha` for each of its rows [B] in place of the loss's."""

        def of_part(part: PackedTargets) -> Any:
            if alpha is None:
                return self.teacher.loss(model, part, self.options)
            each = np.repeat(alpha[part.rows], np.diff(part.offsets)).astype(np.float32)
            return self.teacher.loss(model, part, self.options | {"alpha": each})

        return loss_in_parts(model, batch, lengths, of_part)
