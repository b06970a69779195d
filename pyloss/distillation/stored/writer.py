"""`write_teacher`: runs a teacher once over data and stores its probabilities of the targets."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyloss.autograd.scope import no_grad
from pyloss.checks.numbers import real, whole
from pyloss.distillation.stored.entries import Rows, drawn, likeliest
from pyloss.distillation.stored.folder import (
    DTYPES,
    INDEX_FILE,
    SHARD_NAME,
    Index,
    Settings,
    Shard,
    ShardEntry,
    id_dtype,
    is_stored_teacher,
    read_index,
    write_shard,
)
from pyloss.distillation.stored.samples import KEY_BYTES, Targets, targets_of
from pyloss.distillation.vocabularies import vocabulary_hash
from pyloss.distributed import Group, group_of
from pyloss.distributed.agreement import check_same
from pyloss.errors import FormatError, choices, counted, size_text
from pyloss.io.bars import watched
from pyloss.io.files import PathLike, check_target, user_path
from pyloss.io.locks import locked
from pyloss.io.outputs import folder_for, kept_note, set_aside
from pyloss.losses.head import fused, head
from pyloss.tuner.data.batching import NoTargets
from pyloss.tuner.losses import PART_TOKENS, PARTS_TOGETHER
from pyloss.tuner.run.fingerprint import fingerprint

log = logging.getLogger("pyloss")

TOP_K = 64
#: a killed run loses what it computed for one shard
SHARD_BYTES = 16 << 20


def write_teacher(
    teacher: Any,
    dataset: Any,
    path: PathLike,
    *,
    val_dataset: Any = None,
    top_k: int | None = None,
    samples: int | None = None,
    temperature: float = 1.0,
    max_seq_length: int = 2048,
    dtype: str = "float16",
    tokenizer: Any = None,
    seed: int = 0,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    group: Group | None = None,
) -> Path:
    """Store a teacher's probabilities of each target token of the data in the folder `path`.

    `StoredTeacher` reads the folder. The size is logged before anything is written. A killed call
    leaves the shards that it completed; the next call with the same arguments goes on there, and
    its folder has the same bytes as one that was written at once.

    Args:
        teacher: a model of `pyloss.load`.
        dataset, val_dataset: as in `pyloss.train`. Equal samples are stored once.
        top_k: the number K of likeliest classes to store; by default 64, or all if there are fewer.
        samples: instead, the number of classes to draw from the teacher's distribution.
        temperature: T > 0, divides the logits.
        max_seq_length: in tokens; that of the training run.
        dtype: of the log-probabilities, "float16" or "float32".
        tokenizer: the teacher's; a student with another one is then refused.
        seed: of the draws.
        overwrite: remove a teacher that the folder has with other settings.
        shard_bytes: the size at which a shard ends.
        group: the ranks that compute shards (`pyloss.distributed`), which rank 0 writes; None: all
            processes of MPI's launcher.

    Returns `path`.

    Raises:
        ValueError: arguments out of their range, such as `top_k` above the number of classes, a
            folder with a teacher of other settings, or a teacher whose logits are not finite.
        NoTargets: no sample has a target.
        BlockingIOError: another process writes there.
        OSError: the disk has too little room, or a file cannot be written.
    """
    if not hasattr(teacher, "hidden") or not hasattr(teacher, "head_layer"):
        raise TypeError(f"a teacher must be a model of pyloss.load, not a {type(teacher).__name__}")
    classes = int(teacher.head_layer.shape[0])
    if samples is not None:
        entries = whole(samples, "samples", 1, 65535)
    else:
        entries = min(TOP_K, classes) if top_k is None else whole(top_k, "top_k", 1, classes)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r:.60}; it must be {choices(tuple(DTYPES))}")
    window, size = whole(max_seq_length, "max_seq_length", 2), whole(shard_bytes, "shard_bytes", 1)
    t, start = real(temperature, "temperature", above=0), whole(seed, "seed", 0)
    stored = _distinct((dataset, val_dataset), window, int(teacher.vocab_size))
    settings = Settings(
        count=entries,
        sampled=samples is not None,
        seed=start if samples is not None else 0,
        temperature=t,
        dtype=dtype,
        classes=classes,
        max_seq_length=window,
        shard_bytes=size,
        tokenizer=None if tokenizer is None else vocabulary_hash(tokenizer),
        teacher=fingerprint(teacher, ()),
        data=hashlib.blake2b(b"".join(stored), digest_size=KEY_BYTES).hexdigest(),
        samples=len(stored),
        targets=sum(sample.targets for sample in stored.values()),
    )
    group = group_of(group)
    check_same(group, {name: repr(value) for name, value in vars(settings).items()})
    folder = user_path(path)

    def check() -> None:
        check_target(path, folder=True)
        index = _index_there(folder, settings, overwrite)
        _check_room(folder, settings, sum(shard.nbytes for shard in index.shards) if index else 0)

    group.first(check)
    with ExitStack() as held:

        def begin() -> Index:
            held.enter_context(folder_for(folder))
            held.enter_context(locked(folder))
            return _begun(folder, settings, overwrite)

        index = group.first(begin)
        _write(teacher.eval(), stored, folder, index, group)
    return folder


def _distinct(datasets: Iterable[Any], window: int, vocabulary: int) -> dict[bytes, Targets]:
    """The different samples of the datasets by their keys, in their order."""
    found: dict[bytes, Targets] = {}
    for dataset in datasets:
        for i, sample in targets_of(dataset if dataset is not None else [], window):
            for values in (sample.tokens, sample.labels):
                if values.max() >= vocabulary or sample.tokens.min() < 0:
                    raise ValueError(
                        f"sample {i} has a token id outside the teacher's vocabulary "
                        f"[0, {vocabulary}); is the tokenizer another model's?"
                    )
            found.setdefault(sample.key(), sample)
    if not found:
        raise NoTargets(f"no sample has a target within max_seq_length={window} tokens")
    return found


def _index_there(folder: Path, settings: Settings, overwrite: bool) -> Index | None:
    """The folder's index if it has these settings.

    Raises ValueError for another teacher, unless it is to be overwritten.
    """
    if not is_stored_teacher(folder):
        return None
    index = read_index(folder)
    there, here = vars(index.settings), vars(settings)
    other = [name for name in here if there[name] != here[name]]
    if other and not overwrite:
        said = ", ".join(f"{name} {there[name]}, not {here[name]}" for name in other)
        raise ValueError(
            f"{folder} has a stored teacher with {said}: give another folder, or overwrite it"
        )
    return None if other else index


def _check_room(folder: Path, settings: Settings, held: int) -> None:
    """Logs the size, and refuses one that the disk has no room for beside the `held` bytes."""
    place = Path(os.path.abspath(folder))
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, max(settings.nbytes - held, 0)
    kind = "drawn classes" if settings.sampled else "likeliest classes"
    log.info(
        "%s",
        f"stored teacher {folder}: {settings.targets} target tokens x {settings.count} {kind}, "
        f"{settings.row_bytes} bytes a token: {_size(settings.nbytes)}",
    )
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"a stored teacher needs {_size(needed)}, and the disk has {_size(free)}",
            os.fspath(folder),
        )


def _size(nbytes: int) -> str:
    return size_text(nbytes) if nbytes >= 10_000_000 else f"{nbytes} bytes"


class _Plan(NamedTuple):
    """The samples of a shard."""

    number: int
    keys: list[bytes]
    samples: list[Targets]


def _plans(stored: dict[bytes, Targets], settings: Settings) -> Iterator[_Plan]:
    """The shards: samples in their order, until a shard has `shard_bytes`."""
    plan, size, number = _Plan(0, [], []), 0, 0
    for key, sample in stored.items():
        plan.keys.append(key)
        plan.samples.append(sample)
        size += sample.targets * settings.row_bytes
        if size >= settings.shard_bytes:
            yield plan
            number, size = number + 1, 0
            plan = _Plan(number, [], [])
    if plan.keys:
        yield plan


def _write(
    teacher: Any, stored: dict[bytes, Targets], folder: Path, index: Index, group: Group
) -> None:
    """Compute the shards that the index lacks, one for each rank at a time; rank 0 writes them."""
    settings = index.settings
    begin, done = time.perf_counter(), 0
    plans = list(_plans(stored, settings))

    def missing() -> list[int]:
        whole = [_is_whole(folder, settings, entry) for entry in index.shards]
        return [at for at in range(len(plans)) if at >= len(whole) or not whole[at]]

    todo = group.first(missing)
    size = group.size()
    for first in watched(range(0, len(todo), size), "running the teacher", "shard"):
        numbers = todo[first : first + size]
        own = None
        if group.rank() < len(numbers):
            own = _computed(teacher, plans[numbers[group.rank()]], settings)
        for at, arrays in zip(numbers, group.gather(own) or (), strict=False):
            assert arrays is not None
            entry = write_shard(folder, at, arrays)
            index.shards[at : at + 1] = [entry]
            index.write(folder)
            done += entry.targets
            log.info(
                "%s",
                f"{entry.file}: {sum(s.targets for s in index.shards)} of {settings.targets} "
                f"target tokens, {done / (time.perf_counter() - begin):.0f} a second",
            )


def _begun(folder: Path, settings: Settings, overwrite: bool) -> Index:
    """The index of the folder with these settings, or a new one."""
    if (index := _index_there(folder, settings, overwrite)) is not None:
        state = "complete" if index.complete else "going on"
        log.info("%s", f"{counted(len(index.shards), 'shard')} written before: {state}")
        return index
    with suppress(FileNotFoundError):
        (folder / INDEX_FILE).unlink()
    others = sorted(name for name in os.listdir(folder) if SHARD_NAME.fullmatch(name))
    if (aside := set_aside(folder, others)) is not None and overwrite:
        shutil.rmtree(aside, ignore_errors=True)
    elif aside is not None:
        log.warning("%s", kept_note(aside))
    index = Index(settings)
    index.write(folder)
    return index


def _is_whole(folder: Path, settings: Settings, entry: ShardEntry) -> bool:
    try:
        Shard(folder, settings, entry).check()
    except FormatError as error:
        log.warning("%s", f"written anew: {error}")
        return False
    return True


def _computed(teacher: Any, plan: _Plan, settings: Settings) -> dict[str, np.ndarray]:
    """The arrays of a shard."""
    random = np.random.default_rng([settings.seed, plan.number])
    found = [_entries(teacher, part, settings, random) for part in _parts(plan.samples)]
    ids, logprobs, left = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    ends = np.cumsum([sample.targets for sample in plan.samples], dtype=np.int64)
    return {
        "keys": np.frombuffer(b"".join(plan.keys), np.uint8).reshape(-1, KEY_BYTES),
        "ends": ends,
        "ids": ids.astype(id_dtype(settings.classes)),
        "logprobs": logprobs,
        "left": left,
    }


def _parts(samples: list[Targets]) -> Iterator[list[Targets]]:
    """The samples in parts that run through the teacher together."""
    part: list[Targets] = []
    size = 0
    for sample in samples:
        if part and size + len(sample.tokens) > PARTS_TOGETHER * PART_TOKENS:
            yield part
            part, size = [], 0
        part.append(sample)
        size += len(sample.tokens)
    yield part


def _entries(
    teacher: Any, part: list[Targets], settings: Settings, random: np.random.Generator
) -> Rows:
    """The entries of the targets of some samples, in their order; log-probabilities as stored."""
    tokens = np.concatenate([sample.tokens for sample in part])
    labels = np.concatenate([sample.labels for sample in part])
    offsets = np.cumsum([0, *(len(sample.tokens) for sample in part)]).astype(np.int32)
    rows = np.flatnonzero(labels >= 0).astype(np.int32)
    found: list[Rows] = []

    def collect(part: slice, logits: Any, dloss: Any, loss: Any, slopes: Any) -> None:
        z = np.asarray(logits[0])
        if not np.isfinite(z.max(axis=-1)).all():
            raise ValueError("the teacher's logits are not finite: its weights are damaged")
        entries = (
            drawn(z, settings.temperature, settings.count, random)
            if settings.sampled
            else likeliest(z, settings.temperature, settings.count)
        )
        stored = entries.logprobs.astype(DTYPES[settings.dtype])
        found.append(entries._replace(logprobs=stored))

    with no_grad():
        top = head(teacher.hidden(tokens, offsets), teacher.head_layer)
        run = fused((top,), rows if len(rows) < len(labels) else None, 0.0, collect)
        run(None, (), np.zeros(len(labels), np.float32))
    return Rows(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))
