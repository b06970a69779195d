"""The reports of a training run: their times and losses, lines, `metrics.jsonl`, callbacks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pyloss.distributed import Group
from pyloss.distributed.memory import peak_memory_of
from pyloss.tuner.callbacks import TrainingCallback
from pyloss.tuner.progress import ProgressReporter, sparkline
from pyloss.tuner.run.args import TrainingArgs
from pyloss.tuner.run.checkpoints import Progress, uninterrupted
from pyloss.tuner.run.metrics import MetricsLog, Row, column


class RunReports:
    """What a run reports, and where. In a group rank 0 reports, for all.

    Attributes:
        reporters: what gets the reports.
        display: the lines and the bar; None: no progress is shown.
        history: the reports as columns.
        metrics: `metrics.jsonl`.
        ending: whether the last iteration is done.
    """

    def __init__(self, args: TrainingArgs, group: Group) -> None:
        self.args, self.group = args, group
        self.reporters: list[TrainingCallback] = []
        self.display: ProgressReporter | None = None
        self.history: dict[str, list[Any]] = {}
        self.metrics = MetricsLog(None)
        self.ending = False
        self.train_time, self.timed_steps, self.timed_tokens = 0.0, 0, 0
        self.begun, self.seconds_before = time.monotonic(), 0.0
        # of this process: steps and seconds of them, and seconds of the latest validation
        self.steps_taken, self.step_time, self.val_time = 0, 0.0, 0.0

    def open_metrics(self, path: Path | None, rows: Iterable[Row]) -> None:
        """Start the file with the rows of the run before it was resumed."""
        self.metrics = MetricsLog(path, rows)
        self.seconds_before = self.metrics.seconds

    def begin(self) -> None:
        self.begun = time.monotonic()

    def say(self, text: str) -> None:
        if self.display is not None:
            self.display.line(text)

    def took(self, seconds: float, tokens: int, loss: float) -> None:
        """Count an iteration."""
        self.train_time += seconds
        self.step_time += seconds
        self.timed_steps += 1
        self.steps_taken += 1
        self.timed_tokens += tokens
        if self.display is not None:
            self.display.advance(loss)

    def report(self, p: Progress, optimizer: Any, more: Mapping[str, float] = {}) -> None:
        """Report the iterations since the last report, if any; `more` are further numbers."""
        if p.reported_at == p.iteration:
            return
        seconds = max(self.train_time, 1e-9)
        info = {
            "iteration": p.iteration,
            "train_loss": p.loss_sum / p.loss_weight if p.loss_weight else 0.0,
            "learning_rate": optimizer.learning_rate,
            "iterations_per_second": self.timed_steps / seconds,
            "tokens_per_second": self.timed_tokens / seconds,
            "trained_tokens": p.trained_tokens,
            "peak_memory": peak_memory_of(self.group) / 1e9,
            "updates": optimizer.step,
            "grad_norm": p.grad_norm,
            "seconds_left": self.seconds_left(p.iteration),
            **more,
        }
        with uninterrupted():
            p.loss_sum, p.loss_weight, p.reported_at = 0.0, 0.0, p.iteration
            p.train_loss = float(info["train_loss"])
            self.train_time, self.timed_steps, self.timed_tokens = 0.0, 0, 0
            self._record({k: v for k, v in info.items() if k != "seconds_left"})
        self._keep(info)
        for reporter in self.reporters:
            reporter.on_train_loss_report(dict(info))

    def record_validation(
        self, iteration: int, loss: float, seconds: float, more: Mapping[str, float] = {}
    ) -> dict[str, Any]:
        """Write a validation to `metrics.jsonl`; return what `report_validation` reports."""
        self.val_time = seconds
        info = {"iteration": iteration, "val_loss": loss, "val_time": seconds, **more}
        self._record(info)
        return info

    def report_validation(self, info: Mapping[str, Any]) -> None:
        rest = {name: value for name, value in info.items() if name != "iteration"}
        self._keep({"val_iteration": info["iteration"]} | rest)
        for reporter in self.reporters:
            reporter.on_val_loss_report(dict(info))

    def time_left(self) -> float:
        """The seconds that `max_time` leaves, by the clock of rank 0."""
        if self.args.max_time is None:
            return math.inf
        return self.group.broadcast(float(self.args.max_time) - (time.monotonic() - self.begun))

    def seconds_left(self, done: int) -> float:
        """An estimate for the rest of the run: its steps and validations, at most `max_time`."""
        args = self.args
        if self.ending or not self.steps_taken:
            return 0.0
        steps = max(args.iters - done, 0) * self.step_time / self.steps_taken
        validations = 1  # at the end
        if args.steps_per_eval:
            validations = -(-args.iters // args.steps_per_eval) - (done - 1) // args.steps_per_eval
        rest = steps + max(validations, 0) * self.val_time
        return max(min(rest, self.time_left() + self.val_time), 0.0)

    def say_curves(self) -> None:
        """Show the course of the losses, where there are enough of them for one."""
        for name, kind in (("train_loss", "train"), ("val_loss", "val")):
            losses = [loss for _, loss in column(self.metrics.rows, name) if math.isfinite(loss)]
            if len(losses) > 2:
                line = sparkline(losses)
                self.say(f"{kind} loss {losses[0]:.4f} {line} {losses[-1]:.4f}")

    def _record(self, info: Mapping[str, Any]) -> None:
        """Append a report to `metrics.jsonl`, with the seconds of training until it."""
        seconds = self.seconds_before + time.monotonic() - self.begun
        self.metrics.add({**info, "seconds": round(seconds, 3)})

    def _keep(self, info: Mapping[str, Any]) -> None:
        """Append a report to the columns of the history."""
        for name, value in info.items():
            self.history.setdefault(name, []).append(value)
