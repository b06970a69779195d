"""Batches: sorts samples by token count, cuts them into batches, and shuffles these by a seed.

Iteration can resume at any batch.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pyloss.checks.numbers import shown
from pyloss.errors import counted
from pyloss.io.bars import watched
from pyloss.tuner.data.dataset_classes import CacheDataset
from pyloss.tuner.data.targets import Sample

log = logging.getLogger("pyloss")

Batch = tuple[npt.NDArray[np.int32], npt.NDArray[Any]]


class NoTargets(ValueError):
    """The data has no target token, so no loss can be computed."""


@dataclass
class BatchReport:
    """Counts of the samples used, cut and skipped.

    Attributes:
        samples: samples in the dataset.
        used: samples with a target within the window.
        cut: used samples that were longer than the window.
        skipped: samples without a target within the window.
        tokens: tokens of the used samples, after cutting.
        targets: target tokens among `tokens`.
        max_seq_length: the window, in tokens.
        checksum: CRC-32 of the used samples' tokens, in the order of the data.
    """

    samples: int = 0
    used: int = 0
    cut: int = 0
    skipped: int = 0
    tokens: int = 0
    targets: int = 0
    max_seq_length: int = 0
    checksum: int = 0

    @property
    def text(self) -> str:
        """The report as one line."""
        line = f"{self.used} of {self.samples} samples used: {self.tokens} tokens, "
        line += f"{self.targets} of them targets"
        if self.cut:
            line += f"; {self.cut} longer than {self.max_seq_length} tokens and cut"
        if self.skipped:
            line += (
                f"; {self.skipped} skipped, having no target within {self.max_seq_length} tokens"
            )
        return line


class BatchIterator(Iterator[Batch]):
    """Yields `(batch, lengths)`, or `(batch, weights)` if a row's targets are not its tail.

    `batch`: int32 [B, T], token ids, padded with 0 to the longest row. `lengths`: int32 [B, 2],
    (first target token, number of tokens). `weights`: float32 [B, T], each token's weight as a
    target, 0 on padding. `lengths` is used if in every row all tokens from the first target to
    the end are targets of weight 1.

    The constructor tokenizes all samples. It cuts samples to `max_seq_length` tokens and skips
    samples without a target in them; a warning with the counts is logged once per dataset. A
    short last batch is used like any other. The workers of a `comm_group` (`rank()`, `size()`)
    share the rows of every batch, so that they have like numbers of tokens: batches are those of
    one worker. A worker's part of a batch with few rows may have none: `batch` is then [0, 0]. The
    order depends only on `seed`
    (None means 0) and the epoch. `state()` returns the position in that order; `set_state()`
    resumes from it.

    Attributes:
        seed: seed of the shuffles.
        report: counts of the samples used, cut and skipped.

    Raises:
        NoTargets: no sample has a target (a `ValueError`).
        ValueError: an empty dataset, a `batch_size` that is not a positive multiple of the number
            of workers, `max_seq_length` < 2, a negative `seed`, or, if `vocab_size` is given, a
            token id outside [0, vocab_size).
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        max_seq_length: int,
        loop: bool = False,
        seed: int | None = None,
        comm_group: Any = None,
        vocab_size: int | None = None,
    ):
        rank, size = (0, 1) if comm_group is None else (comm_group.rank(), comm_group.size())
        if batch_size < 1 or batch_size % size:
            raise ValueError(
                f"batch_size is {batch_size}, and must be a positive multiple of the {size} "
                f"worker(s)"
            )
        if max_seq_length < 2:
            raise ValueError(
                f"max_seq_length is {max_seq_length}, and must be at least 2: a token and its "
                f"successor"
            )
        if seed is not None and seed < 0:
            raise ValueError(f"seed is {seed}, and must be a whole number >= 0, or None")
        self._dataset = dataset if isinstance(dataset, CacheDataset) else CacheDataset(dataset)
        self._window = max_seq_length
        self._loop = loop
        self._epoch = self._position = 0
        self.seed = 0 if seed is None else seed
        self.report = BatchReport(samples=len(self._dataset), max_seq_length=max_seq_length)
        lengths = self._usable(vocab_size)
        order = sorted(lengths, key=lambda i: lengths[i])
        bounds = list(range(0, len(order), batch_size)) + [len(order)]
        self._batches = [order[a:b] for a, b in pairwise(bounds)]
        if size > 1:
            self._batches = [
                dealt(batch, [lengths[i] for i in batch], size)[rank] for batch in self._batches
            ]
        self._permutation = self._shuffled()

    def _usable(self, vocab_size: int | None) -> dict[int, int]:
        """Token counts of the samples with a target, by their indices. Fills the report."""
        report = self.report
        lengths: dict[int, int] = {}
        if not report.samples:
            raise ValueError("the dataset is empty")
        for i in watched(range(report.samples), "tokenizing the data", "sample"):
            whole = self._dataset.sample(i)
            if vocab_size is not None:
                _check_ids(whole, i, vocab_size)
            sample = whole.cut(self._window)
            targets = int(np.count_nonzero(sample.weights))
            if not targets:
                report.skipped += 1
                continue
            lengths[i] = len(sample.tokens)
            report.cut += len(whole.tokens) > self._window
            report.tokens += len(sample.tokens)
            report.targets += targets
            tokens = np.asarray(sample.tokens, np.int32)
            report.checksum = zlib.crc32(tokens.tobytes(), report.checksum)
        report.used = len(lengths)
        if not lengths:
            raise NoTargets(
                f"none of the {counted(report.samples, 'sample')} has a target within "
                f"max_seq_length={self._window} tokens: "
                "the prompts fill the window, or no answer is there to train on"
            )
        if (report.cut or report.skipped) and report.text not in self._dataset.said:
            self._dataset.said.add(report.text)
            log.warning("%s", report.text)
        return lengths

    def _shuffled(self) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, self._epoch]).permutation(len(self._batches))

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches in one pass over the data."""
        return len(self._batches)

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        if self._position == len(self._batches):
            if not self._loop:
                raise StopIteration
            self._epoch, self._position = self._epoch + 1, 0
            self._permutation = self._shuffled()
        rows = self._batches[self._permutation[self._position]]
        self._position += 1
        return self._collate([self._dataset.sample(i).cut(self._window) for i in rows])

    def _collate(self, samples: list[Sample]) -> Batch:
        width = max((len(s.tokens) for s in samples), default=0)
        batch = np.zeros((len(samples), width), np.int32)
        for row, sample in zip(batch, samples, strict=True):
            row[: len(sample.tokens)] = sample.tokens
        if all(s.is_span for s in samples):
            spans = [(s.offset, len(s.tokens)) for s in samples]
            return batch, np.array(spans, np.int32).reshape(-1, 2)
        weights = np.zeros(batch.shape, np.float32)
        for line, sample in zip(weights, samples, strict=True):
            line[: len(sample.tokens)] = sample.weights
        return batch, weights

    def state(self) -> dict[str, int]:
        """The position in the data, as a dict that JSON can hold.

        It has `seed`, `epoch`, `position` within the epoch, and the counts that `set_state`
        compares.
        """
        return {
            "seed": self.seed,
            "epoch": self._epoch,
            "position": self._position,
            **self._fingerprint(),
        }

    def _fingerprint(self) -> dict[str, int]:
        return {
            "batches": len(self._batches),
            "samples": self.report.used,
            "tokens": self.report.tokens,
            "checksum": self.report.checksum,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes from `state`: the same batches follow as after the matching `state()` call.

        Raises `ValueError` if the state lacks a key, or was taken with other data, another batch
        size or another window.
        """
        own = self.state()
        if not isinstance(state, Mapping):
            raise ValueError(
                f"the state of the batches is {state!r:.80}; it must be what state() gave"
            )
        state = {"checksum": own["checksum"], **state}  # older states have none
        bad = [k for k in own if not isinstance(state.get(k), int) or state[k] < 0]
        if bad:
            found = ", ".join(f"{key} {shown(state.get(key))}" for key in bad)
            raise ValueError(
                f"the state of the batches has {found}: {', '.join(bad)} must be whole numbers >= 0"
            )
        other = {k: state[k] for k, v in self._fingerprint().items() if state[k] != v}
        if other or state["position"] > len(self._batches):
            said, here = (
                ", ".join(f"{shown(place[key])} {key}" for key in self._fingerprint())
                for place in (state, own)
            )
            raise ValueError(
                f"the state was taken over other data, batch size or window: it had {said}, "
                f"and here are {here}; "
                "to go on with other data, start a new run from the adapter (--resume-adapter-file)"
            )
        self.seed, self._epoch, self._position = state["seed"], state["epoch"], state["position"]
        self._permutation = self._shuffled()


def dealt(rows: Sequence[int], lengths: Sequence[int], workers: int) -> list[list[int]]:
    """Divide rows, given their `lengths`, among workers so that the sums of lengths are alike.

    The longest row goes first, to the worker with the smallest sum so far. A worker's rows stay in
    their order.
    """
    parts: list[list[int]] = [[] for _ in range(workers)]
    sums = [0] * workers
    for place in sorted(range(len(rows)), key=lambda place: -lengths[place]):
        least = sums.index(min(sums))
        parts[least].append(place)
        sums[least] += lengths[place]
    return [[rows[place] for place in sorted(part)] for part in parts]


def _check_ids(sample: Sample, index: int, vocab_size: int) -> None:
    tokens = np.asarray(sample.tokens, np.int64)
    bad = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(bad):
        at = int(bad[0])
        raise ValueError(
            f"sample {index}, position {at}: token id {tokens[at]} is outside the vocabulary "
            f"[0, {vocab_size}); "
            "is the tokenizer another model's?"
        )


def iterate_batches(
    dataset: Any,
    batch_size: int,
    max_seq_length: int,
    loop: bool = False,
    seed: int | None = None,
    comm_group: Any = None,
    vocab_size: int | None = None,
) -> BatchIterator:
    """The batches of `dataset`, for one epoch or, with `loop`, without end; see `BatchIterator`."""
    return BatchIterator(dataset, batch_size, max_seq_length, loop, seed, comm_group, vocab_size)
