"""The training loop: `TrainingRun` is one call of `trainer.train`.

One iteration processes one batch. The parameters are updated every `grad_accumulation_steps`
iterations. A `checkpoints.Checkpoint` holds the complete state of a run between two iterations.
This state changes only inside `uninterrupted()` blocks, so Ctrl-C always finds the state after a
whole number of iterations in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import pyloss.random
from pyloss import nn
from pyloss.checks.durations import duration_text
from pyloss.distributed import Group
from pyloss.distributed.agreement import check_same
from pyloss.distributed.faults import Stop, stopping_together
from pyloss.errors import FormatError, counted
from pyloss.io.files import user_path
from pyloss.io.locks import locked
from pyloss.io.outputs import make_folder
from pyloss.tuner.adapters.adapter import fixed_arrays, storable_arrays
from pyloss.tuner.adapters.base import base_of
from pyloss.tuner.callbacks import TrainingCallback
from pyloss.tuner.data.batching import NoTargets, iterate_batches
from pyloss.tuner.data.dataset_classes import CacheDataset
from pyloss.tuner.data.system_prompt import remembered, system_prompt_of
from pyloss.tuner.losses import ModelAndLoss
from pyloss.tuner.progress import ProgressReporter, log_stream
from pyloss.tuner.run import checkpoints
from pyloss.tuner.run.args import TrainingArgs, TrainingResult
from pyloss.tuner.run.checkpoints import Checkpoint, Progress, uninterrupted
from pyloss.tuner.run.evaluation import batches_of, evaluate, has_rows, loss_and_weight, own_data
from pyloss.tuner.run.fingerprint import data_digest, fingerprint, values_digest
from pyloss.tuner.run.metrics import METRICS_FILE, read_metrics, rows_until
from pyloss.tuner.run.own_optimizer import WrappedOptimizer, optimizer_name, own_optimizer
from pyloss.tuner.run.plan import describe_plan
from pyloss.tuner.run.restoring import (
    check_same_run,
    kept_settings,
    notes_of_changes,
    skip_batches,
)
from pyloss.tuner.run.run_files import RunFiles
from pyloss.tuner.run.run_folder import prepare_folder
from pyloss.tuner.run.run_reports import RunReports
from pyloss.tuner.run.sharding import ShardedUpdates
from pyloss.tuner.run.updates import Updates


class TrainingRun:
    """One call of `train`."""

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        train_dataset: Any,
        val_dataset: Any,
        args: TrainingArgs,
        loss: Callable[..., Any],
        make_batches: Callable[..., Any],
        group: Group,
    ) -> None:
        self.model, self.optimizer, self.args = model, (optimizer := own_optimizer(optimizer)), args
        self.loss, self.make_batches, self.group = loss, make_batches, group
        if not model.trainable_parameters():
            raise ValueError(
                "the model has no trainable parameters: call linear_to_lora_layers or "
                "unfreeze() first"
            )
        both = ModelAndLoss(model, loss)
        self.of_loss = both.of_loss
        self.trained: Any = both if both.of_loss else model
        self.parameters: dict[str, np.ndarray] = self.trained.trainable_parameters()
        if not isinstance(optimizer, WrappedOptimizer):
            optimizer.check(self.parameters)
        # A model need not be an nn.Module to be trained.
        adapted = isinstance(model, nn.Module)
        self.fixed = fixed_arrays(model) if adapted else {}
        self.layout = partial(storable_arrays, model) if adapted else dict
        if args.loraplus_lr_ratio != 1:
            if not any(name.endswith("lora_b") for name in self.parameters):
                raise ValueError(
                    "loraplus_lr_ratio multiplies the learning rate of lora_b; the model "
                    "trains no such parameter"
                )
            if isinstance(optimizer, WrappedOptimizer):
                raise ValueError(
                    "loraplus_lr_ratio needs an optimizer of pyloss.optim; "
                    f"{optimizer.name} has one learning rate for all parameters"
                )
            optimizer.rate_scales = optimizer.rate_scales | {"lora_b": args.loraplus_lr_ratio}
        if train_dataset is None or (hasattr(train_dataset, "__len__") and not len(train_dataset)):
            raise ValueError("the training dataset is empty")
        empty = val_dataset is None or (hasattr(val_dataset, "__len__") and not len(val_dataset))
        self.val_data = (
            None if empty or args.val_batches == 0 else own_data(val_dataset, make_batches)
        )
        self.given = train_dataset
        self.data = own_data(train_dataset, make_batches)
        self.value_and_grad = nn.value_and_grad(self.trained, loss)
        saves = args.adapter_file is not None and bool(args.iters or args.epochs or args.resume)
        file = user_path(args.adapter_file) if saves and args.adapter_file is not None else None
        self.base: str | None = None
        self.made_for = base_of(model)
        of_base = {} if self.made_for is None else self.made_for.metadata()
        self.files = RunFiles(file, group.rank() == 0, self.on_disk, of_base)
        if args.shard_optimizer and isinstance(optimizer, WrappedOptimizer):
            raise ValueError(
                f"shard_optimizer needs an optimizer of pyloss.optim, not {optimizer.name}"
            )
        shards = args.shard_optimizer and group.size() > 1
        kind = ShardedUpdates if shards else Updates
        self.updates = kind(self.trained, optimizer, args, group)
        self.progress = Progress()
        self.best: dict[str, np.ndarray] = {}
        self.reports = RunReports(args, group)
        self.stop = Stop(group)

    def on_disk(self, arrays: Any) -> dict[str, np.ndarray]:
        """The adapter's file of these parameters, without those of the loss."""
        return self.layout(
            {name: array for name, array in arrays.items() if name not in self.of_loss}
        )

    # ---- the run

    def run(self, callback: TrainingCallback | None) -> TrainingResult:
        with ExitStack() as held:
            return self.run_locked(callback, held)

    def run_locked(self, callback: TrainingCallback | None, held: ExitStack) -> TrainingResult:
        self.stop = held.enter_context(stopping_together(self.group))
        notes = self.start(held)
        args, reports = self.args, self.reports
        if args.grad_checkpoint:
            self.model.set_grad_checkpoint(True)
        was_training = getattr(self.model, "training", False)
        leads = self.group.rank() == 0
        if args.progress and leads:
            display = ProgressReporter(args.iters, self.progress.iteration, log=log_stream())
            reports.display = display
            reports.reporters.append(display)
            for line in notes + self.plan():
                display.line(line)
        if callback is not None and leads:
            reports.reporters.append(callback)
        try:
            self.model.train()
            reports.begin()
            stopped = self.loop()
            self.finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.interrupted()) from None
        finally:
            self.model.train(was_training)
            if reports.display is not None:
                reports.display.close()
        p = self.progress
        best = None if p.best_loss is None else p.best_iteration
        return TrainingResult(
            p.iteration,
            self.optimizer.step,
            p.trained_tokens,
            p.best_loss,
            best,
            stopped,
            reports.history,
        )

    def start(self, held: ExitStack) -> list[str]:
        """Start a new run or restore a checkpoint; return notes for the user.

        All checks that can refuse the run come before the first write. `held` receives the lock of
        the folder, on rank 0, which alone reads and writes the folder.
        """
        args, group, notes, saved = self.args, self.group, [], None
        folder, place = self.files.folder, None
        # Lock before reading. A missing folder is created only after all checks have passed.
        there = group.first(lambda: _lock_existing(folder, held))
        if args.resume:
            place = folder if args.resume is True else user_path(args.resume)
            if place is None:
                raise ValueError(
                    "resume=True needs an adapter_file, beside which the trainer state lies"
                )
            state = place
            saved = group.first(lambda: checkpoints.load_checkpoint(state))
        seed = args.seed
        if saved is None:
            if seed is None:
                seed = group.broadcast(pyloss.random.next_seed())
            else:
                pyloss.random.seed(seed)
        options = self.batch_options(seed)
        try:
            self.batches = batches_of(self.make_batches, self.model, self.data, group, **options)
        except NoTargets as error:
            raise NoTargets(f"the training data: {error}") from None
        self.args = self.reports.args = args = args.in_iterations(self.batches)
        if folder is not None or group.size() > 1:
            self.base = fingerprint(self.model, {*self.parameters, *self.fixed})
        if group.size() > 1:
            self.check_ranks()
        if saved is not None and place is not None:
            notes = self.restore(saved, checkpoints.state_path(place))
        own = getattr(self.model, "adapter_config", None)
        config = remembered(args.adapter_config or own, self.given)
        if config is not None and args.epochs is not None and "iters" in config:
            config = {**config, "iters": args.iters}
        if own is not None:
            self.model.adapter_config = remembered(own, self.given)
        notes += group.first(lambda: self.open_folder(config, place, there, held))
        self.mark()
        if saved is None:
            self.save_state()
        return notes

    def batch_options(self, seed: int | None) -> dict[str, Any]:
        """The options of the iterator of the training batches."""
        options = {
            "batch_size": self.args.batch_size * self.group.size(),
            "max_seq_length": self.args.max_seq_length,
            "loop": True,
        }
        return options if seed is None else options | {"seed": seed}

    def open_folder(
        self, config: Any, place: Path | None, there: bool, held: ExitStack
    ) -> list[str]:
        """Make or prepare the folder of the run, with its metrics; return notes for the user."""
        notes: list[str] = []
        folder, file = self.files.folder, self.files.file
        if folder is not None and file is not None:
            if not there:
                make_folder(folder, "adapter folder")
                held.enter_context(locked(folder))
            here = (
                place is not None
                and checkpoints.state_path(place).parent.resolve() == folder.resolve()
            )
            notes += prepare_folder(folder, file.name, config, here, self.args.overwrite)
            if system_prompt_of(config) is not None:
                notes.append("the records share a system prompt, which is kept with the adapter")
        rows = []
        if place is not None:
            there_before = checkpoints.state_path(place).parent
            p = self.progress
            rows = rows_until(read_metrics(there_before), p.reported_at, p.validated_at)
        self.reports.open_metrics(folder and folder / METRICS_FILE, rows)
        return notes

    def check_ranks(self) -> None:
        """Raise ValueError, naming the ranks, unless all have the same model, data and settings."""
        args = self.args
        own = (self.make_batches is iterate_batches, args.max_seq_length)
        parts = {
            "version of pyloss": pyloss.__version__,
            "model": self.base,
            "trainable parameters": values_digest(self.parameters | self.fixed),
            "training data": data_digest(self.data, *own),
            "validation data": None if self.val_data is None else data_digest(self.val_data, *own),
            "optimizer": f"{optimizer_name(self.optimizer)} {self.optimizer!r:.500}",
            "random state": str(pyloss.random.state()),
        }
        names = (
            "iters",
            "steps_per_report",
            "steps_per_save",
            "patience",
            "max_time",
            "keep_best",
            "shard_optimizer",
        )
        settings = kept_settings(args, self.optimizer, self.group.size())
        settings |= {name: getattr(args, name) for name in names}
        check_same(self.group, parts | {name: repr(value) for name, value in settings.items()})

    def restore(self, saved: Checkpoint, file: Path) -> list[str]:
        """Restore the checkpoint `saved`, read from `file`; return notes for the user."""
        arrays = self.parameters | self.fixed
        check_same_run(saved, file, self.optimizer, self.made_for, arrays, self.base)
        try:
            checkpoints.check_arrays(
                self.parameters if saved.best else {}, saved.best, f"{file}: best"
            )
            targets = {name: self.parameters[name] for name in saved.accumulated}
            checkpoints.check_arrays(targets, saved.accumulated, f"{file}: accumulated")
            skip_batches(self.batches, saved, self.args.iters)
            pyloss.random.set_state(saved.random)
            self.updates.restore_optimizer(saved.optimizer)
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise FormatError(file, None, f"not a readable trainer state: {error}") from error
        checkpoints.restore_arrays(arrays, saved.model, "the run to resume")
        self.progress, self.best = saved.progress, saved.best
        self.updates.restore(saved.accumulated)
        notes = notes_of_changes(self.settings(), saved.settings or {})
        return [f"resuming after iteration {self.progress.iteration}", *notes]

    def settings(self) -> dict[str, Any]:
        return kept_settings(self.args, self.optimizer, self.group.size())

    def plan(self) -> list[str]:
        longest = self.args.max_seq_length
        if isinstance(self.data, CacheDataset) and self.make_batches is iterate_batches:
            longest = min(longest, max(self.data.itemlen(i) for i in range(len(self.data))))
        validates = self.val_data is not None
        return describe_plan(
            self.model,
            self.optimizer,
            self.args,
            self.batches,
            longest,
            self.progress.iteration,
            validates,
            self.loss,
            self.group,
        )

    def loop(self) -> bool:
        """Run the remaining iterations; return True if `patience` or `max_time` ends them early."""
        args, say = self.args, self.reports.say
        while True:
            done = self.progress.iteration
            # These steps are due after iteration `done`, in this order. A resumed run that starts
            # here does them too.
            if done % args.steps_per_report == 0:
                self.reports.report(self.progress, self.optimizer)
            if self.validates_after(done):
                self.validate()
            if done and done % args.steps_per_save == 0:
                self.save()
            if args.patience is not None and self.progress.not_improved >= args.patience:
                say(
                    f"stopped: {counted(self.progress.not_improved, 'validation')} in a row "
                    f"without a lower loss"
                )
                return True
            if done >= args.iters:
                return False
            if self.reports.time_left() <= 0:
                limit = duration_text(float(args.max_time or 0))
                say(f"stopped after iteration {done}: max_time is {limit}; resume goes on")
                return True
            batch = next(self.batches, None)
            # A user's iterators need not end together.
            if self.make_batches is not iterate_batches and self.group.any(batch is None):
                batch = None
            if batch is None:
                say(f"the batches ended after iteration {done}")
                return False
            self.step(batch)

    def validates_after(self, done: int) -> bool:
        """Whether the loop validates after this iteration; 0: before the first."""
        every = self.args.steps_per_eval
        return not done or (every > 0 and done % every == 0)

    def share(self, weight: float) -> float:
        """What a batch counts in the means of losses and gradients: the weight of its targets."""
        return weight

    def step(self, batch: Any) -> None:
        """Run one iteration; the checkpointed state changes only in the `uninterrupted()` block."""
        args, begun = self.args, time.perf_counter()
        iteration = self.progress.iteration + 1
        value, weight, grads = self.gradients(batch)
        own, votes = weight, [0.0, 0.0]
        if self.group.size() > 1:
            value, weight, votes = self.of_all(value, weight)
        if weight and not math.isfinite(value):
            raise FloatingPointError(self.not_finite(f"the loss is {value}", iteration))
        with uninterrupted():
            p, share = self.progress, self.share(weight)
            if own:
                self.updates.add(grads, self.share(own))
            if weight:
                p.loss_sum += value * share
                p.loss_weight += share
                p.pending_weight += share
            p.pending += 1
            if p.pending == args.grad_accumulation_steps:
                self.apply(iteration)
            p.iteration = iteration
            p.trained_tokens += round(weight)
            self.mark()
        self.reports.took(time.perf_counter() - begun, round(weight), value)
        self.stop.check(votes)

    def gradients(self, batch: Any) -> tuple[float, float, Any]:
        """The loss, its weight and the gradients of this rank's part of a batch."""
        if self.group.size() == 1:
            value, grads = self.value_and_grad(self.model, *batch)
            return *loss_and_weight(value), grads
        # Dropout must not repeat its masks on other ranks, whose states stay the same.
        with pyloss.random.branch(self.group.rank()):
            if not has_rows(batch):
                return 0.0, 0.0, {}
            value, grads = self.value_and_grad(self.model, *batch)
            return *loss_and_weight(value), grads

    def of_all(self, value: float, weight: float) -> tuple[float, float, list[float]]:
        """The mean loss and the weight of all ranks' parts, and the votes of `stop`."""
        own = [value * weight if weight else 0.0, weight, *self.stop.votes()]
        total, weights, *votes = self.group.all_sum(np.array(own)).tolist()
        return total / weights if weights else 0.0, weights, votes

    def apply(self, iteration: int) -> None:
        """Update the parameters with the accumulated gradients."""
        p = self.progress
        if p.pending_weight:
            p.grad_norm = self.updates.apply(
                p.pending_weight, lambda what: self.not_finite(what, iteration)
            )
        self.updates.clear()
        p.pending, p.pending_weight = 0, 0.0

    def not_finite(self, what: str, iteration: int) -> str:
        at = self.files.saved_at
        saved = "" if at is None else f"; the last good state is in {at}"
        return (
            f"iteration {iteration}: {what}; the parameters are those of iteration "
            f"{iteration - 1}{saved}. "
            "A lower learning rate, warm-up or max_grad_norm may help"
        )

    def finish(self) -> None:
        """Save the state, apply the remaining gradients, validate, and choose the final adapter.

        The state is saved before the steps that only the end of a run does. Resumed with more
        iterations, the run then trains exactly as one that had them from the start. Only the best
        adapter is added to the saved state later, so that a resumed run cannot replace it with a
        worse one.
        """
        p, files, say = self.progress, self.files, self.reports.say
        self.save_state()
        self.reports.ending = True
        self.reports.report(p, self.optimizer)
        with uninterrupted():
            if p.pending:
                self.apply(p.iteration)
                p.validated_at = -1
        before = p.best_loss
        self.validate()
        if p.best_loss != before and self.args.keep_best:
            files.remember_best(self.best, p)
        keeps = bool(self.args.keep_best and self.best)
        if keeps and p.best_iteration != p.iteration:
            last = (
                {name: array.copy() for name, array in self.parameters.items()}
                if files.writes
                else {}
            )
            with uninterrupted():
                checkpoints.restore_arrays(self.parameters, self.best, "the best adapter")
            say(
                f"kept the adapter of iteration {p.best_iteration}, val loss {p.best_loss:.4f} "
                f"(the lowest)"
            )
            if files.writes:
                say(f"the last one is in {files.save_numbered(last, p)}")
        if p.iteration == 0:
            say("nothing was trained, so no adapter is saved")
        elif files.file is not None:
            files.save_adapter(self.parameters, p, p.best_iteration if keeps else p.iteration)
            say(f"saved the adapter to {files.file}")
        self.reports.say_curves()

    def validate(self) -> None:
        p = self.progress
        if self.val_data is None or p.validated_at == p.iteration:
            return
        begun = time.perf_counter()
        args = self.args
        sizes = (args.batch_size, args.val_batches, args.max_seq_length)
        between = self.stop.agreed if self.group.size() > 1 else None
        try:
            value = evaluate(
                self.model,
                self.val_data,
                *sizes,
                self.loss,
                self.make_batches,
                progress_callback=between,
                group=self.group,
            )
        except NoTargets as error:
            raise NoTargets(f"the validation data: {error}") from None
        with uninterrupted():
            p.validated_at = p.iteration
            p.val_loss = float(value) if math.isfinite(value) else None
            if math.isfinite(value) and (p.best_loss is None or value < p.best_loss):
                p.best_loss, p.best_iteration, p.not_improved = value, p.iteration, 0
                if args.keep_best:
                    self.best = {name: array.copy() for name, array in self.parameters.items()}
                    self.files.save_best(self.best, p.iteration, value)
            else:
                p.not_improved += 1
            seconds = time.perf_counter() - begun
            info = self.reports.record_validation(p.iteration, value, seconds)
        self.reports.report_validation(info)

    # ---- saves

    def mark(self) -> None:
        """Record the random state and the position in the data between two iterations.

        `save_state` writes the recorded values, not the current ones.
        """
        batches = self.batches.state() if hasattr(self.batches, "state") else None
        self.marked = (pyloss.random.state(), batches)

    def save_state(self) -> None:
        """Save the state; the ranks of a group call this together, and rank 0 writes."""
        if self.files.folder is None:
            return
        random, batches = self.marked
        checkpoint = Checkpoint(
            self.progress,
            self.parameters | self.fixed,
            self.updates.optimizer_state(),
            optimizer_name(self.optimizer),
            self.updates.pending(),
            self.best,
            random,
            batches,
            self.settings(),
            self.base,
            None if self.made_for is None else asdict(self.made_for),
        )
        self.files.save_state(checkpoint)

    def save(self) -> None:
        """Save state and adapter. The state comes first, so it is never older than the adapter."""
        if self.files.folder is None:
            return
        p = self.progress
        self.save_state()
        self.files.save_adapter(self.parameters, p, p.iteration)
        saved = self.files.save_numbered(self.parameters, p)
        self.reports.say(f"iteration {p.iteration}: saved {saved}")

    def interrupted(self) -> str:
        """Save after Ctrl-C; return a message that says where."""
        done, folder = self.progress.iteration, self.files.folder
        if folder is None:
            return (
                f"interrupted after iteration {done}; "
                "nothing is saved (adapter_file is None, or no iterations)"
            )
        if self.group.size() > 1 and not self.stop.together:
            return f"interrupted after iteration {done}; the last saved state is in {folder}"
        # `finish` has saved the state already and then changed the one in memory.
        if not self.reports.ending:
            self.save_state()
            if done:
                self.files.save_adapter(self.parameters, self.progress, done)
        self.group.barrier()  # nobody ends the others while rank 0 writes
        return (
            f"interrupted after iteration {done}: saved to {folder}; "
            "resume=True (--resume) continues from there"
        )


def _lock_existing(folder: Path | None, held: ExitStack) -> bool:
    """Lock the folder of a run if it exists; return whether it does."""
    if folder is None or not folder.is_dir():
        return False
    held.enter_context(locked(folder))
    return True
