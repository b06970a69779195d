"""`StoredTeacher`: a teacher whose probabilities of the targets are read from a folder."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.distillation.stored.folder import INDEX_FILE, Shard, read_index
from pyloss.distillation.stored.samples import Targets, targets_of
from pyloss.distillation.vocabularies import vocabulary_hash
from pyloss.errors import FormatError, choices, counted
from pyloss.io.files import PathLike, user_path
from pyloss.losses.distillation import Entries, linear_distillation_from_entries
from pyloss.losses.sparse import RESTS, sparse_kernel
from pyloss.tuner.losses import PackedTargets
from pyloss.tuner.run.plan import BatchShape, Beside


class StoredTeacher:
    """A folder of `write_teacher` as a `Teacher` of `DistillationLoss` and `pyloss.distill`.

    The samples of a batch are found by a hash of their tokens and targets, in any order. Their rows
    are read from the mapped files, and everything read is checked.

    Args:
        path: the folder.
        rest: where the probability of the classes without an entry is, "bucket" or "renormalize",
            see `sparse_distillation_loss`. Without effect for drawn classes.

    Attributes:
        path: the folder.
        settings: how it was written, see `folder.Settings`.

    Raises:
        FormatError: a file that is missing, truncated or damaged.
        ValueError: an unknown `rest`, or a folder whose writing has not ended.
        OSError: a file cannot be read.
    """

    def __init__(self, path: PathLike, rest: str = "bucket") -> None:
        if rest not in RESTS:
            raise ValueError(f"rest is {rest!r:.60}; it must be {choices(RESTS)}")
        self.path, self.rest = user_path(path), rest
        index = read_index(self.path)
        self.settings = index.settings
        if not index.complete:
            done = sum(shard.samples for shard in index.shards)
            raise ValueError(
                f"the stored teacher {self.path} has {done} of its {self.settings.samples} samples:"
                " write it again with the same settings, which goes on where it stopped"
            )
        self._shards = [Shard(self.path, self.settings, entry) for entry in index.shards]
        self._places: dict[bytes, tuple[int, int, int]] = {}
        for number, shard in enumerate(self._shards):
            begin = 0
            for key, end in zip(shard.keys, shard.ends.tolist(), strict=True):
                self._places[key] = number, begin, end
                begin = end
        if len(self._places) != self.settings.samples:
            raise FormatError(self.path / INDEX_FILE, None, "two samples have the same key")

    def check(self, options: dict[str, Any]) -> None:
        """Raises ValueError for options of the loss that this teacher cannot serve."""
        self._kernel(options)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises ValueError for a student's tokenizer with other tokens than the teacher's."""
        known = self.settings.tokenizer
        if known is not None and vocabulary_hash(tokenizer) != known:
            raise ValueError(
                f"the stored teacher {self.path} was written with another tokenizer: "
                "a teacher must have the student's tokens under the same ids"
            )

    def check_data(self, dataset: Any, max_seq_length: int, name: str = "") -> None:
        """Raises ValueError if the teacher lacks a sample of a dataset called `name`."""
        missing, total, first = 0, 0, -1
        for i, sample in targets_of(dataset, max_seq_length):
            total += 1
            if sample.key() not in self._places:
                first = i if not missing else first
                missing += 1
        if missing:
            raise ValueError(
                f"the stored teacher {self.path} lacks {missing} of the "
                f"{counted(total, 'sample')} of the {f'{name} ' if name else ''}data, the first of "
                f"them sample {first}: {self._advice()}"
            )

    def loss(self, model: Any, part: PackedTargets, options: dict[str, Any]) -> Any:
        """See `Teacher`."""
        return linear_distillation_from_entries(
            model.hidden(part.tokens, part.offsets),
            model.head_layer,
            self.entries(part, int(model.head_layer.shape[0])),
            part.labels,
            softcap=getattr(model, "softcap", None),
            weights=part.weights,
            ignore_index=-1,
            logits_bytes=part.logits_bytes,
            reduction="sum",
            **options,
        )

    def beside(self, model: Any, batch: BatchShape) -> Beside:
        """The shards, which are mapped, and a part's entries; see `Beside`."""
        files = sum(shard.path.stat().st_size for shard in self._shards)
        # Ids and float32 log-probabilities as read and as the loss takes them, and float64.
        return Beside(files, 32 * batch.tokens * self.settings.count)

    def _kernel(self, options: dict[str, Any]) -> Any:
        return sparse_kernel(
            options["kind"],
            options["beta"],
            options["skew"],
            self.rest,
            True if self.settings.sampled else None,
            options["temperature"],
            self.settings.temperature,
        )

    def entries(self, part: PackedTargets, classes: int) -> Entries:
        """The entries of a part's targets, with ids below `classes`."""
        found = []
        for begin, end in zip(part.offsets[:-1], part.offsets[1:], strict=True):
            sample = Targets(part.tokens[begin:end], part.labels[begin:end])
            place = self._places.get(sample.key())
            if place is None:
                tokens = shown(sample.tokens[:8].tolist())
                raise ValueError(
                    f"the stored teacher {self.path} lacks a sample of {len(sample.tokens) + 1} "
                    f"tokens and {counted(sample.targets, 'target')}, which begins with {tokens}: "
                    f"{self._advice()}"
                )
            shard = self._shards[place[0]]
            if place[2] - place[1] != sample.targets:
                raise FormatError(shard.path, "ends", "damaged: a sample has other targets")
            found.append(shard.rows(place[1], place[2]))
        ids, logprobs, left = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        shares = None
        if self.settings.sampled:
            ids, logprobs, shares = _counted(ids, logprobs)
        # No student has the padding of a larger head, and a probability of 0 is no entry.
        absent = (ids >= classes) | np.isneginf(logprobs)
        if not self.settings.sampled:
            p = np.exp(logprobs, dtype=np.float64)
            # Rounded log-probabilities do not add up to 1 with the rest.
            logprobs = (
                logprobs + np.log((1 - left.astype(np.float64)) / p.sum(-1))[:, None]
            ).astype(np.float32)
            left = left + (np.exp(logprobs) * absent).sum(-1)
        return Entries(
            np.where(absent, -1, ids),
            np.where(absent, 0, logprobs),
            None if self.settings.sampled else left,
            shares,
            self.rest,
            self.settings.temperature,
            self.settings.classes,
        )

    def _advice(self) -> str:
        return (
            "it must be written from the same data, with the same targets and chat template, and "
            f"max_seq_length {self.settings.max_seq_length}"
        )


def _counted(ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different ids of each ascending row, -1 behind them; their logprobs and shares."""
    rows, draws = ids.shape
    new = np.diff(ids, axis=-1, prepend=-1) > 0
    place = np.cumsum(new, axis=-1) - 1
    width = int(place.max()) + 1
    flat = place + width * np.arange(rows)[:, None]
    counts = np.bincount(flat.reshape(-1), minlength=rows * width).reshape(rows, width)
    found, values = np.full(rows * width, -1, np.int32), np.zeros(rows * width, np.float32)
    found[flat[new]], values[flat[new]] = ids[new], logprobs[new]
    shares = (counts / draws).astype(np.float32)
    return found.reshape(rows, width), values.reshape(rows, width), shares
