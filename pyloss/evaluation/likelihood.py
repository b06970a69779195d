"""The log-probability of given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyloss.autograd.scope import no_grad
from pyloss.autograd.tape import data
from pyloss.losses.head import rows_at_once
from pyloss.losses.public import softmax_cross_entropy
from pyloss.tuner.data.targets import Sample
from pyloss.tuner.losses import PARTS_TOGETHER, parts_of_rows


class TargetScores(NamedTuple):
    """The scores of a sample's targets, the tokens with a weight above 0, in their order.

    Attributes:
        losses: float32 [targets], -log of each token's probability.
        greedy: bool [targets], whether the token has the largest logit.
    """

    losses: np.ndarray
    greedy: np.ndarray


@no_grad()
def score_targets(model: Any, samples: Sequence[Sample]) -> list[TargetScores]:
    """The scores of all samples' targets.

    Samples are packed without padding, and the logits exist a few rows at a time. Tokens that are
    equal up to the last target, such as those of one-token choices after a question, are computed
    once.
    """
    found: list[TargetScores] = [_NONE] * len(samples)
    places = [np.flatnonzero(sample.weights) for sample in samples]
    members: dict[tuple[int, ...], list[int]] = {}
    for i, (sample, own) in enumerate(zip(samples, places, strict=True)):
        if len(own):
            members.setdefault(tuple(sample.tokens[: own[-1]]), []).append(i)
    inputs = list(members)
    for part in parts_of_rows([len(tokens) for tokens in inputs], PARTS_TOGETHER):
        if not len(part):
            continue
        packed = [inputs[k] for k in part]
        offsets = np.cumsum([0, *map(len, packed)]).astype(np.int32)
        hidden = data(model.hidden(np.concatenate(packed).astype(np.int32), offsets))
        scored = [
            (i, begin)
            for k, begin in zip(part, offsets[:-1], strict=True)
            for i in members[inputs[k]]
        ]
        rows = np.concatenate([places[i] - 1 + begin for i, begin in scored])
        labels = np.concatenate([np.asarray(samples[i].tokens)[places[i]] for i, _ in scored])
        losses, greedy = _score_rows(model, hidden, rows, labels.astype(np.int32))
        bounds = np.cumsum([len(places[i]) for i, _ in scored])[:-1]
        pieces = zip(scored, np.split(losses, bounds), np.split(greedy, bounds), strict=True)
        for (i, _), own_losses, own_greedy in pieces:
            found[i] = TargetScores(own_losses, own_greedy)
    return found


_NONE = TargetScores(np.empty(0, np.float32), np.empty(0, bool))


def _score_rows(
    model: Any, hidden: Any, rows: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and greediness of `labels` [N] as tokens after the `rows` [N] of `hidden`."""
    losses, greedy = np.empty(len(rows), np.float32), np.empty(len(rows), bool)
    step = rows_at_once(4 * model.vocab_size)
    hidden = np.asarray(hidden)[rows]
    for begin in range(0, len(rows), step):
        part = slice(begin, begin + step)
        logits = np.asarray(data(model.head(hidden[part])))
        losses[part] = softmax_cross_entropy(logits, labels[part])
        greedy[part] = logits.argmax(1) == labels[part]
    return losses, greedy
