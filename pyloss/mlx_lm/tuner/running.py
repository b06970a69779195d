"""A run of pyloss's training loop on mlx-lm's terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyloss.distributed import group_of
from pyloss.mlx_lm.arrays import seen_as_mlx
from pyloss.models.transformer import Model
from pyloss.tuner import TrainingArgs
from pyloss.tuner.adapters.layout import CONFIG_FILE
from pyloss.tuner.run.training_run import TrainingRun


def settings_of(args: Any, adapter_config: Mapping[str, Any] | None) -> TrainingArgs:
    """pyloss's settings for mlx-lm's. Raises ValueError for a value that is not allowed."""
    return TrainingArgs(**asdict(args), keep_best=False, adapter_config=adapter_config)


class _Ahead(Iterator[Any]):
    """An iterator whose next item can be drawn before it is wanted."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items, self.drawn = items, []  # type: ignore[var-annotated]

    def draw(self) -> None:
        if not self.drawn:
            self.drawn += [next(self.items, None)]

    def __next__(self) -> Any:
        self.draw()
        item = self.drawn.pop()
        if item is None:
            raise StopIteration
        return item


class MlxRun(TrainingRun):
    """A `TrainingRun` that updates, validates and ends as mlx-lm's `train` does.

    A batch is drawn before the validation that precedes it, so that NumPy's random state, which
    shuffles both kinds of batches, gives mlx-lm's order.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        train_dataset: Any,
        val_dataset: Any,
        args: TrainingArgs,
        loss: Callable[..., Any],
        make_batches: Callable[..., Any],
    ) -> None:
        super().__init__(
            seen_as_mlx(model) if isinstance(model, Model) else model,
            optimizer,
            train_dataset,
            val_dataset,
            args,
            loss,
            make_batches,
            group_of(None),
        )

    def start(self, held: ExitStack) -> list[str]:
        notes = super().start(held)
        self.look_ahead()
        return notes

    def look_ahead(self) -> None:
        if not isinstance(self.batches, _Ahead):
            self.batches = self.ahead = _Ahead(self.batches)

    def batch_options(self, seed: int | None) -> dict[str, Any]:
        return super().batch_options(None)

    def open_folder(
        self, config: Any, place: Path | None, there: bool, held: ExitStack
    ) -> list[str]:
        if self.group.size() == 1 and self.args.iters:
            # What makes no batch is refused before an earlier adapter moves away.
            self.look_ahead()
            self.ahead.draw()
        folder = self.files.folder
        if self.args.adapter_config is None and folder is not None:
            # A script writes its own before it calls train.
            config = None if (folder / CONFIG_FILE).exists() else config
        return super().open_folder(config, place, there, held)

    def share(self, weight: float) -> float:
        # Parts of a batch on several ranks have different numbers of targets.
        return float(weight > 0) if self.group.size() == 1 else weight

    def validates_after(self, done: int) -> bool:
        args, coming = self.args, done + 1
        if coming > args.iters:
            return False
        due = coming == 1 or coming == args.iters
        return due or (args.steps_per_eval > 0 and coming % args.steps_per_eval == 0)

    def validate(self) -> None:
        if self.val_data is not None:
            self.ahead.draw()
        super().validate()

    def save_state(self) -> None:
        """Nothing: a script goes on from an adapter's weights."""

    def interrupted(self) -> str:
        done, file = self.progress.iteration, self.files.file
        if file is None or not done:
            return f"interrupted after iteration {done}; nothing is saved"
        self.files.save_adapter(self.parameters, self.progress, done)
        return f"interrupted after iteration {done}: the adapter is saved to {file}"

    def finish(self) -> None:
        """Save the last weights; gradients that wait for more batches are dropped."""
        p, say = self.progress, self.reports.say
        self.reports.ending = True
        self.reports.report(p, self.optimizer)
        self.files.save_adapter(self.parameters, p, p.iteration)
        if self.files.file is not None:
            say(f"saved the adapter to {self.files.file}")
        self.reports.say_curves()
