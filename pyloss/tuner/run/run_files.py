"""What a training run writes: its state, and the adapters with their metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.io.files import write_safetensors
from pyloss.tuner.run import checkpoints
from pyloss.tuner.run.checkpoints import Checkpoint, Progress, uninterrupted
from pyloss.tuner.run.run_folder import BEST_FILE, STATE_FILE, numbered
from pyloss.tuner.run.stored import VALIDATION_KEY, metadata_of

Arrays = Mapping[str, np.ndarray]


class RunFiles:
    """The files in the folder of a run; nothing is written where `writes` is false.

    Attributes:
        file: the adapter's file; None: the run saves nothing.
        folder: its folder.
        writes: whether this process writes: in a group only rank 0 does.
        saved_at: the state file, once this process has written it.
    """

    def __init__(
        self,
        file: Path | None,
        writes: bool,
        layout: Callable[[Arrays], dict[str, np.ndarray]],
        of_base: Mapping[str, str],
    ) -> None:
        """`layout` makes the arrays of an adapter's file from parameters; `of_base` says in its
        metadata what it is made for."""
        self.file = file
        self.folder = None if file is None else file.parent
        self.writes = writes and file is not None
        self.layout, self.of_base = layout, of_base
        self.saved_at: Path | None = None

    def save_state(self, checkpoint: Checkpoint) -> None:
        if self.folder is not None and self.writes:
            path = self.folder / STATE_FILE
            with uninterrupted():
                checkpoints.save_checkpoint(path, checkpoint)
            self.saved_at = path

    def told(self, progress: Progress, iteration: int) -> dict[str, str]:
        """The metadata of the adapter at `iteration`, this one or the best one."""
        p = progress
        if iteration != p.iteration:
            return metadata_of(iteration, val_loss=p.best_loss) | dict(self.of_base)
        val_loss = p.val_loss if p.validated_at == iteration else None
        return metadata_of(iteration, p.train_loss, val_loss) | dict(self.of_base)

    def save_adapter(self, parameters: Arrays, progress: Progress, iteration: int) -> None:
        """Save the parameters, which are those of `iteration`, as the run's adapter."""
        if self.file is not None and self.writes:
            write_safetensors(self.file, self.layout(parameters), self.told(progress, iteration))

    def save_numbered(self, parameters: Arrays, progress: Progress) -> Path | None:
        """Save the current parameters under the iteration's number; return the file."""
        if self.folder is None:
            return None
        done = progress.iteration
        file = self.folder / numbered(done)
        if self.writes:
            write_safetensors(file, self.layout(parameters), self.told(progress, done))
        return file

    def save_best(self, parameters: Arrays, iteration: int, val_loss: float) -> None:
        if self.folder is not None and self.writes:
            told: dict[str, Any] = {"iteration": iteration, "val_loss": val_loss}
            metadata = {VALIDATION_KEY: json.dumps(told), **self.of_base}
            write_safetensors(self.folder / BEST_FILE, self.layout(parameters), metadata)

    def remember_best(self, best: dict[str, np.ndarray], progress: Progress) -> None:
        """Add the best adapter, found by the final validation, to the saved state."""
        if self.saved_at is None:
            return
        saved = checkpoints.load_checkpoint(self.saved_at)
        saved.best = best
        saved.progress.best_loss = progress.best_loss
        saved.progress.best_iteration = progress.best_iteration
        with uninterrupted():
            checkpoints.save_checkpoint(self.saved_at, saved)
