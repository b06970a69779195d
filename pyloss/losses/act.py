"""The loss head of the Hierarchical Reasoning Model, which learns when to halt.

Wang et al. 2025, "Hierarchical Reasoning Model", arXiv:2506.21734, section 2 ("Adaptive
computational time"). The interface is that of the authors' `ACTLossHead`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pyloss.autograd.scope import no_grad
from pyloss.autograd.tape import data
from pyloss.checks.arrays import as_integers
from pyloss.checks.numbers import real
from pyloss.losses.public import (
    binary_cross_entropy_with_logits,
    compute_accuracy,
    softmax_cross_entropy,
    stablemax_cross_entropy,
)
from pyloss.nn import Module

IGNORE_INDEX = -100

_LOSSES: dict[str, Callable] = {
    "stablemax_cross_entropy": stablemax_cross_entropy,
    "softmax_cross_entropy": softmax_cross_entropy,
}
_PADDED_ROWS = ("reference", "ignore")


class ACTLossHead(Module):
    """One step of a recurrent model with adaptive computation time (ACT), and its loss.

    `model(**model_kwargs)` gives `(new_carry, outputs)` for a batch of B sequences:

    - `new_carry.current_data["labels"]` integers [B, T] in [0, V), -100 where nothing is predicted;
      or [B, loops, T]: a sequence's step i is trained on `labels[:, i - 1]`, later steps on the
      last of them;
    - `new_carry.halted` bool [B], `new_carry.steps` integers [B]: which sequences end here, and
      after how many steps;
    - `outputs["logits"]` [B, T, V] and `outputs["q_halt_logits"]` [B] of any real type,
      differentiable; with `q_continue` also `outputs["q_continue_logits"]` [B], and if the model
      computes it `outputs["target_q_continue"]` [B] in [0, 1].

    `loss_type` is "stablemax_cross_entropy", "softmax_cross_entropy", or a function `f(logits,
    labels, ignore_index=-100)` that gives losses [B, T], 0 where the label is -100.

    The loss is `lm_loss + q_factor (q_halt_loss + q_continue_loss)`, summed over the sequences:
    `lm_loss` is each sequence's mean over its valid labels, the others are binary cross entropies
    of the q logits. q_halt's target is whether every valid label is predicted right at this step.
    q_continue's target is a constant, the first of these that exists:

    1. `outputs["target_q_continue"]`;
    2. from a real forward pass of the next step, which `model.next_q_logits(new_carry)` does
       (nothing is recorded) and returns as `(q_halt_logits, q_continue_logits)`: sigmoid(max of
       both), but sigmoid(q_halt_logits) where `new_carry.steps` has reached `model.halt_max_steps`:
       the sequence has to halt there;
    3. sigmoid(max of both q logits of this step).

    `q_continue=False` leaves that term out, and with it the second forward pass. By default it is
    left out where a model that `gives_own_targets` (`pyloss.recursive`) gives none.

    A sequence without a valid label is a row that pads the batch. With `padded_rows="reference"` it
    is, as in the authors' code ("assuming the batch is always full"), a sequence predicted right:
    it adds its q_halt loss with the target 1 and its q_continue loss, and `all_halted` waits for
    it. With "ignore" it adds nothing and is not waited for: a padded batch then has the loss and
    the gradients of the batch without its padding. Metrics of halted sequences leave it out in
    both.
    """

    def __init__(
        self,
        model: Any,
        loss_type: str | Callable,
        *,
        q_continue: bool | None = None,
        q_factor: float = 0.5,
        padded_rows: str = "reference",
    ) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"model must be callable, not {type(model).__name__}")
        if not callable(loss_type) and loss_type not in tuple(_LOSSES):
            raise ValueError(
                f"loss_type is {loss_type!r}; it must be {' or '.join(map(repr, _LOSSES))}, "
                "or a function"
            )
        if padded_rows not in _PADDED_ROWS:
            raise ValueError(
                f"padded_rows is {padded_rows!r}; it must be {' or '.join(map(repr, _PADDED_ROWS))}"
            )
        if (
            q_continue is not False
            and hasattr(model, "next_q_logits")
            and not hasattr(model, "halt_max_steps")
        ):
            raise ValueError("a model with next_q_logits must say its halt_max_steps")
        self.model = model
        self.loss_fn: Callable = loss_type if callable(loss_type) else _LOSSES[loss_type]
        self.q_continue = q_continue
        self.q_factor = real(q_factor, "q_factor", 0)
        self.padded_rows = padded_rows

    def initial_carry(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own initial carry."""
        return self.model.initial_carry(*args, **kwargs)

    def __call__(
        self, return_keys: Sequence[str] = (), **model_kwargs: Any
    ) -> tuple[Any, Any, dict[str, int | float], dict[str, np.ndarray], bool]:
        """Runs the model for a step: `(new_carry, loss, metrics, outputs, all_halted)`.

        `loss` is a scalar, a Tensor while a gradient is recorded; float64 logits are computed in
        float64, others in float32. `outputs` are those of the model named in `return_keys`, as
        ndarrays, and "preds" is the argmax of the logits, [B, T]; names that it does not return are
        ignored, so that one list may also name a batch's keys. `all_halted`: whether all sequences
        have halted.

        `metrics` are Python numbers. Sums over the halted sequences, to be divided by `count`,
        their number: `accuracy` (share of valid labels predicted right), `exact_accuracy` (all
        right), `q_halt_accuracy` (q_halt's sign says whether all are right), `steps`. Sums over the
        batch: `lm_loss`, `q_halt_loss`, `q_continue_loss` (0.0 without `q_continue`).

        Raises ValueError naming an output that is missing or has a wrong shape, and the errors of
        the losses for wrong labels.
        """
        if isinstance(return_keys, str):
            raise TypeError(
                f"return_keys must be a sequence of names, not the string {return_keys!r}"
            )
        new_carry, outputs = self.model(**model_kwargs)
        given = as_integers(
            _given(new_carry.current_data, "labels", "new_carry.current_data"), "labels"
        )
        logits = _given(outputs, "logits", "the model's outputs")
        shape = np.shape(data(logits))
        of_steps = given.ndim == 3 and given.shape[1] > 0
        if (
            not (given.ndim == 2 or of_steps)
            or len(shape) != 3
            or shape[:2] != (given.shape[0], given.shape[-1])
        ):
            raise ValueError(
                "logits must be [B, T, V] and labels [B, T] or [B, loops, T], "
                f"got shapes {shape} and {given.shape}"
            )
        rows = given.shape[:1]
        steps = data(_per_row(new_carry.steps, "new_carry.steps", rows))
        labels = _of_step(given, steps) if of_steps else given
        q_halt = _per_row(
            _given(outputs, "q_halt_logits", "the model's outputs"), "q_halt_logits", rows
        )
        halted = data(_per_row(new_carry.halted, "new_carry.halted", rows)).astype(bool)

        valid_count = (labels != IGNORE_INDEX).sum(-1)
        filled, divisor = valid_count > 0, np.maximum(valid_count, 1)
        right, exact = compute_accuracy(logits, labels, ignore_index=IGNORE_INDEX)
        all_right = ~filled | (exact == 1)

        kept = filled if self.padded_rows == "ignore" else np.ones_like(filled)
        token_loss = self.loss_fn(logits, labels, ignore_index=IGNORE_INDEX)
        lm_loss = (token_loss / divisor[:, None].astype(data(token_loss).dtype)).sum()
        q_halt_loss = _q_loss(q_halt, all_right, kept)
        q_loss, q_continue_loss = q_halt_loss, 0.0
        wanted = self.q_continue
        if wanted is None:
            own = getattr(self.model, "gives_own_targets", False)
            wanted = not own or "target_q_continue" in outputs
        if wanted:
            q_continue_loss = self._q_continue_loss(new_carry, outputs, q_halt, steps, kept)
            q_loss = q_halt_loss + q_continue_loss

        counted = halted & filled
        metrics = {
            "count": int(counted.sum()),
            "accuracy": float(right[counted].sum()),
            "exact_accuracy": int((counted & all_right).sum()),
            "q_halt_accuracy": int((counted & ((data(q_halt) >= 0) == all_right)).sum()),
            "steps": int(steps[counted].sum()),
            "lm_loss": float(data(lm_loss)),
            "q_halt_loss": float(data(q_halt_loss)),
            "q_continue_loss": float(data(q_continue_loss)),
        }
        returned = {key: data(outputs[key]) for key in return_keys if key in outputs}
        if "preds" in return_keys and "preds" not in outputs:
            returned["preds"] = np.asarray(data(logits)).argmax(-1)
        loss = lm_loss + q_loss * self.q_factor
        return new_carry, loss, metrics, returned, bool(halted[kept].all())

    def _q_continue_loss(
        self,
        new_carry: Any,
        outputs: Mapping[str, Any],
        q_halt: Any,
        steps: np.ndarray,
        kept: np.ndarray,
    ) -> Any:
        rows = kept.shape
        q_continue = _per_row(
            _given(outputs, "q_continue_logits", "the model's outputs"), "q_continue_logits", rows
        )
        if "target_q_continue" in outputs:
            target = data(_per_row(outputs["target_q_continue"], "target_q_continue", rows))
        elif hasattr(self.model, "next_q_logits"):
            with no_grad():
                halt, go_on = (
                    data(_per_row(q, "next_q_logits", rows))
                    for q in self.model.next_q_logits(new_carry)
                )
            target = _sigmoid(
                np.where(steps >= self.model.halt_max_steps, halt, np.maximum(halt, go_on))
            )
        else:
            target = _sigmoid(np.maximum(data(q_halt), data(q_continue)))
        return _q_loss(q_continue, target, kept)


def _of_step(labels: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The labels [B, T] of the step that each sequence has made, of labels [B, loops, T]."""
    step = np.clip(steps.astype(np.int64), 1, labels.shape[1])
    return np.take_along_axis(labels, step[:, None, None] - 1, 1)[:, 0]


def _q_loss(q_logits: Any, target: np.ndarray, kept: np.ndarray) -> Any:
    """The binary cross entropy summed over the rows in `kept`."""
    dtype = np.float64 if data(q_logits).dtype == np.float64 else np.float32
    return binary_cross_entropy_with_logits(
        q_logits, target.astype(dtype), weights=kept.astype(dtype), reduction="sum"
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64 if x.dtype == np.float64 else np.float32)
    return np.exp(-np.logaddexp(x.dtype.type(0), -x))


def _given(values: Mapping[str, Any], name: str, owner: str) -> Any:
    if name not in values:
        raise ValueError(
            f"{owner} must have {name!r}; given: {', '.join(map(repr, values)) or 'nothing'}"
        )
    return values[name]


def _per_row(x: Any, name: str, shape: tuple[int, ...]) -> Any:
    if np.shape(data(x)) != shape:
        raise ValueError(
            f"{name} has shape {np.shape(data(x))}, expected one value per sequence: {shape}"
        )
    return x


__all__ = ["ACTLossHead"]
