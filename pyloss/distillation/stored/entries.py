"""What is stored of a row of the teacher's logits: its likeliest classes, or drawn ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Entries of n target tokens.

    Attributes:
        ids: int64 [n, K].
        logprobs: float32 [n, K], the log-probabilities there.
        left: float32 [n], the probability of all other classes.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    left: np.ndarray


def likeliest(logits: np.ndarray, temperature: float, count: int) -> Rows:
    """The `count` likeliest classes of float32 logits [n, V] over `temperature`, in their order.

    Classes of equal probability are in the order of their ids.
    """
    ids = np.sort(np.argpartition(logits, -count, axis=-1)[:, -count:], axis=-1)
    order = np.argsort(-np.take_along_axis(logits, ids, -1), axis=-1, kind="stable")
    ids = np.take_along_axis(ids, order, -1)
    return _rows(_Softmax.of(logits, temperature), ids)


def drawn(logits: np.ndarray, temperature: float, count: int, random: np.random.Generator) -> Rows:
    """`count` classes drawn with the probabilities of the logits [n, V], in ascending order.

    Sparse logit sampling with the teacher as its proposal (Anshumann et al., arXiv:2503.16870).
    """
    softmax = _Softmax.of(logits, temperature)
    sums = np.cumsum(softmax.weights, axis=-1, dtype=np.float64)
    places = random.random((len(logits), count)) * sums[:, -1:]
    ids = np.stack([np.searchsorted(s, p, side="right") for s, p in zip(sums, places, strict=True)])
    # A place may round up to the sum of all.
    return _rows(softmax, np.sort(np.minimum(ids, logits.shape[1] - 1), axis=-1))


class _Softmax(NamedTuple):
    """Probabilities as weights e^(z - largest z) over their sum."""

    shifted: np.ndarray  # z - largest z, float32 [n, V]
    weights: np.ndarray  # float32 [n, V]
    total: np.ndarray  # float64 [n]

    @classmethod
    def of(cls, logits: np.ndarray, temperature: float) -> _Softmax:
        z = logits / np.float32(temperature)
        z -= z.max(axis=-1, keepdims=True)
        weights = np.exp(z)
        return cls(z, weights, weights.sum(axis=-1, dtype=np.float64))


def _rows(softmax: _Softmax, ids: np.ndarray) -> Rows:
    logprobs = np.take_along_axis(softmax.shifted, ids, -1) - np.log(softmax.total)[:, None]
    # Not 1 less the entries: that difference has few digits.
    np.put_along_axis(softmax.weights, ids, 0, -1)
    left = softmax.weights.sum(axis=-1, dtype=np.float64) / softmax.total
    return Rows(ids, np.minimum(logprobs, 0).astype(np.float32), left.astype(np.float32))
