"""The log-probability of given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

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


def score_targets(model: Any, samples: Sequence[Sample]) -> list[TargetScores]:
    """The scores of all samples' targets.

    Samples are packed without padding, and the logits exist a few rows at a time.
    """
    found: list[TargetScores] = [_NONE] * len(samples)
    used = [int(np.flatnonzero(s.weights).max(initial=0)) for s in samples]
    for part in parts_of_rows(used, PARTS_TOGETHER):
        if not len(part):
            continue
        tokens = np.concatenate([samples[i].tokens[: used[i]] for i in part]).astype(np.int32)
        offsets = np.concatenate(([0], np.cumsum([used[i] for i in part]))).astype(np.int32)
        places = [np.flatnonzero(samples[i].weights) for i in part]
        labels = np.concatenate(
            [np.asarray(samples[i].tokens)[p] for i, p in zip(part, places, strict=True)]
        ).astype(np.int32)
        rows = np.concatenate([p - 1 + o for p, o in zip(places, offsets[:-1], strict=True)])
        losses, greedy = _score_rows(model, data(model.hidden(tokens, offsets)), rows, labels)
        bounds = np.cumsum([len(p) for p in places])[:-1]
        for i, own, best in zip(
            part, np.split(losses, bounds), np.split(greedy, bounds), strict=True
        ):
            found[i] = TargetScores(own, best)
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
