"""What a resumed run must have in common with its saved state, and what it may change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.runtime.precision import get_matmul_precision
from pyloss.tuner.adapters.base import Base, base_from
from pyloss.tuner.run import checkpoints
from pyloss.tuner.run.args import TrainingArgs
from pyloss.tuner.run.checkpoints import Checkpoint
from pyloss.tuner.run.own_optimizer import optimizer_name

OTHER_BASE = (
    "the run to resume was over another base model: {}: {}; give the model that it began with, or "
    "start a new run from its adapter (--resume-adapter-file)"
)


def check_same_run(
    saved: Checkpoint,
    file: Path,
    optimizer: Any,
    made_for: Base | None,
    arrays: Mapping[str, np.ndarray],
    base: str | None,
) -> None:
    """Raise ValueError unless `saved`, read from `file`, belongs to a run like this one.

    `arrays` are the trainable parameters and the adapter's fixed arrays, `base` is the fingerprint
    of the other weights; None: not known.
    """
    name = optimizer_name(optimizer)
    if saved.optimizer_name != name:
        raise ValueError(
            f"the run to resume was trained with {saved.optimizer_name}, not with {name}"
        )
    was = None if saved.made_for is None else base_from(file, saved.made_for)
    differs = was and made_for and was.difference(made_for)
    if differs:
        raise ValueError(OTHER_BASE.format(f"{was}, and this one is {made_for}", differs))
    checkpoints.check_arrays(arrays, saved.model, "the run to resume")
    if saved.base is not None and base is not None and saved.base != base:
        what = "its weights are not those of this one"
        raise ValueError(OTHER_BASE.format(what, "the shapes agree"))


def skip_batches(batches: Any, saved: Checkpoint, iters: int) -> None:
    """Advance the batches to where the run stopped: restore their state or skip used ones."""
    if saved.batches is not None and hasattr(batches, "set_state"):
        batches.set_state(saved.batches)
        return
    # A finished run needs no further batch, and a state may hold any number: skip <= iters.
    for taken in range(min(saved.progress.iteration, iters)):
        try:
            next(batches)
        except StopIteration:
            raise ValueError(
                f"the run to resume had {saved.progress.iteration} batches, and here are "
                f"{taken} in all"
            ) from None


def kept_settings(args: TrainingArgs, optimizer: Any, ranks: int) -> dict[str, Any]:
    """The settings whose change would make a resumed run differ from an uninterrupted one."""
    names = (
        "max_seq_length",
        "grad_accumulation_steps",
        "max_grad_norm",
        "steps_per_eval",
        "val_batches",
        "loraplus_lr_ratio",
    )
    # Samples of all ranks: their number may change.
    found: dict[str, Any] = {"batch_size": args.batch_size * ranks}
    found |= {name: getattr(args, name) for name in names}
    if optimizer.schedule is None:
        found["learning_rate"] = optimizer.learning_rate
    found["matmul_precision"] = get_matmul_precision()
    return found | ({"ranks": ranks} if ranks > 1 else {})


def notes_of_changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Notes on settings that are others than before, and what follows from other ranks."""
    notes = [
        f"note: {key} is {now[key]!r}, and was {was!r:.80} before"
        for key, was in before.items()
        if key in now and key != "ranks" and now[key] != was
    ]
    ranks = now.get("ranks", 1), before.get("ranks", 1)
    if ranks[0] != ranks[1]:
        notes.append(
            f"note: ranks: {ranks[0]}, and {ranks[1]!r:.80} before: the updates have the same "
            "samples; sums over other ranks round differently, and dropout draws other masks"
        )
    return notes
