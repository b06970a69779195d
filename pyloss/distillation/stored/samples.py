"""The samples of a stored teacher: their inputs and targets, and the key that finds them again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pyloss.tuner.data.dataset_classes import CacheDataset

KEY_BYTES = 16


class Targets(NamedTuple):
    """The inputs and targets of a sample, as a row of `PackedTargets` has them.

    Attributes:
        tokens: int32 [n], up to and without the last target.
        labels: int32 [n], the next token of each, or -1 where it is no target.
    """

    tokens: np.ndarray
    labels: np.ndarray

    @property
    def targets(self) -> int:
        """The number of targets."""
        return int(np.count_nonzero(self.labels >= 0))

    def key(self) -> bytes:
        """A hash of tokens and labels."""
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        digest.update(self.tokens.astype("<i4").tobytes())
        digest.update(self.labels.astype("<i4").tobytes())
        return digest.digest()


def targets_of(dataset: Any, max_seq_length: int) -> Iterator[tuple[int, Targets]]:
    """The samples of a dataset that have a target within `max_seq_length` tokens, by their index.

    Raises the dataset's errors.
    """
    data = dataset if isinstance(dataset, CacheDataset) else CacheDataset(dataset)
    for i in range(len(data)):
        sample = data.sample(i).cut(max_seq_length)
        trained = np.flatnonzero(sample.weights)
        if len(trained):
            end = int(trained[-1])
            tokens = np.asarray(sample.tokens[: end + 1], np.int32)
            labels = np.where(sample.weights[1 : end + 1] > 0, tokens[1:], np.int32(-1))
            yield i, Targets(tokens[:end], labels)
