"""Targets that the student draws itself, so that it learns from the teacher where it errs (GKD)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import random
from pyloss.autograd.scope import no_grad
from pyloss.checks.numbers import real, whole
from pyloss.distillation.loss import DistillationLoss, LiveTeacher
from pyloss.generation.batch import BatchGenerator
from pyloss.generation.sampling import SamplingParams
from pyloss.tuner.losses import target_weights
from pyloss.tuner.run.plan import BatchShape, Beside, forward_bytes


class OnPolicyLoss:
    """A `DistillationLoss` in which a share of the rows have targets that the student draws.

    Agarwal et al., arXiv:2306.13649, algorithm 1. In training, each row of a batch is drawn with
    probability `share`: the tokens before its first target are the prompt, the student's own
    answer at temperature 1 becomes the targets, and their loss is the divergence alone. In
    evaluation it is the loss on the given targets.

    Args:
        loss: with a live teacher, which scores the answers.
        tokenizer: the student's, which knows the end tokens.
        share: in [0, 1].
        max_new_tokens: of an answer.

    Raises ValueError for a share or a number out of range, and for a stored teacher.
    """

    def __init__(
        self, loss: DistillationLoss, tokenizer: Any, share: float, max_new_tokens: int = 128
    ) -> None:
        self.loss, self.tokenizer = loss, tokenizer
        self.share = real(share, "on_policy", 0, 1)
        self.max_new_tokens = whole(max_new_tokens, "max_new_tokens", 1)
        if self.share and not isinstance(loss.teacher, LiveTeacher):
            raise ValueError(
                "on-policy distillation needs a model as its teacher: "
                "a stored teacher knows the probabilities of its own data only"
            )

    def loss_parameters(self) -> dict[str, np.ndarray]:
        """See `DistillationLoss`."""
        return self.loss.loss_parameters()

    def beside(self, model: Any, batch: BatchShape) -> Beside:
        """What the loss and the generation of answers need, see `Beside`."""
        longest = batch.longest + self.max_new_tokens
        found = self.loss.beside(model, BatchShape.of(batch.rows, longest))
        drawing = model.cache_bytes([longest] * batch.rows) + forward_bytes(model, batch.longest)
        drawing += 4 * batch.rows * model.vocab_size
        mixed = self.share < 1 and self.loss.options["alpha"] == 1
        return found._replace(
            first=max(found.first, drawing), columns=found.columns + mixed * model.vocab_size
        )

    def plan_notes(self, model: Any) -> list[str]:
        """See `DistillationLoss`."""
        return self.loss.plan_notes(model)

    def __call__(self, model: Any, batch: Any, lengths: Any) -> tuple[Any, float]:
        """The loss of a batch, see `tuner.losses.default_loss`."""
        if not (self.share and model.training):
            return self.loss(model, batch, lengths)
        batch, weights = np.asarray(batch), target_weights(batch, lengths)
        draws = random.generator()
        chosen = np.flatnonzero((draws.random(len(batch)) < self.share) & (weights > 0).any(axis=1))
        if not len(chosen):
            return self.loss(model, batch, lengths)
        first = np.argmax(weights[chosen] > 0, axis=1)
        prompts = [batch[row, :begin].tolist() for row, begin in zip(chosen, first, strict=True)]
        answers = self._answers(model, prompts, [random.next_seed() for _ in prompts])
        batch, weights = _with_answers(batch, weights, chosen, prompts, answers)
        alpha = np.full(len(batch), self.loss.options["alpha"], np.float32)
        alpha[chosen] = 0
        return self.loss.of(model, batch, weights, alpha)

    def _answers(self, model: Any, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """The student's answers, each with its end token."""
        params = [
            SamplingParams(max_tokens=self.max_new_tokens, temperature=1.0, seed=seed)
            for seed in seeds
        ]
        answers: list[list[int]] = [[] for _ in prompts]
        model.eval()
        try:
            with no_grad():
                generator = BatchGenerator(model, self.tokenizer, len(prompts))
                for done in generator.run(prompts, params):
                    answers[done.index] = done.tokens
        finally:
            model.train()
        return answers


def _with_answers(
    batch: np.ndarray,
    weights: np.ndarray,
    rows: np.ndarray,
    prompts: list[list[int]],
    answers: list[list[int]],
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, T] and weights [B, T] with `rows` replaced by their prompts and answers."""
    drawn = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    kept = np.delete(np.arange(len(batch)), rows)
    used = np.flatnonzero((weights[kept] > 0).any(axis=0))
    width = max(int(used[-1]) + 1 if len(used) else 0, *map(len, drawn))
    ids = np.zeros((len(batch), width), np.int32)
    shares = np.zeros((len(batch), width), np.float32)
    common = min(width, batch.shape[1])
    ids[kept, :common], shares[kept, :common] = batch[kept, :common], weights[kept, :common]
    for row, prompt, tokens in zip(rows, prompts, drawn, strict=True):
        ids[row, : len(tokens)] = tokens
        shares[row, len(prompt) : len(tokens)] = 1
    return ids, shares
