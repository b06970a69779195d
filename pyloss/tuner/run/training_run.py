"""The training loop: `TrainingRun` is one call of `trainer.train`.

One iteration processes one batch. The parameters are updated every `grad_accumulation_steps`
iterations. A `checkpoints.Checkpoint` holds the complete state of a run between two iterations.
This state changes only inside `uninterrupted()` blocks, so Ctrl-C always finds the state after a
whole number of iterations in memory.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import pyloss.random
from pyloss import _core, nn
from pyloss.checks.durations import duration_text
from pyloss.errors import FormatError, counted
from pyloss.io.files import user_path, write_safetensors
from pyloss.io.locks import locked
from pyloss.io.outputs import make_folder
from pyloss.ops.arrays import f32
from pyloss.optim import clip_scale, grad_norm
from pyloss.runtime.device import on_device_of
from pyloss.runtime.memory import peak_memory
from pyloss.runtime.precision import get_matmul_precision
from pyloss.tuner.adapters.adapter import fixed_arrays, storable_arrays
from pyloss.tuner.adapters.base import base_from, base_of
from pyloss.tuner.callbacks import TrainingCallback
from pyloss.tuner.data.batching import NoTargets, iterate_batches
from pyloss.tuner.data.dataset_classes import CacheDataset
from pyloss.tuner.data.system_prompt import remembered, system_prompt_of
from pyloss.tuner.losses import ModelAndLoss
from pyloss.tuner.progress import ProgressReporter, log_stream, sparkline
from pyloss.tuner.run import checkpoints
from pyloss.tuner.run.args import TrainingArgs, TrainingResult
from pyloss.tuner.run.checkpoints import Checkpoint, Progress, uninterrupted
from pyloss.tuner.run.evaluation import batches_of, evaluate, loss_and_weight, own_data
from pyloss.tuner.run.fingerprint import fingerprint
from pyloss.tuner.run.metrics import METRICS_FILE, MetricsLog, column, read_metrics, rows_until
from pyloss.tuner.run.own_optimizer import WrappedOptimizer, optimizer_name, own_optimizer
from pyloss.tuner.run.plan import describe_plan
from pyloss.tuner.run.run_folder import BEST_FILE, STATE_FILE, numbered, prepare_folder
from pyloss.tuner.run.stored import VALIDATION_KEY, metadata_of

OTHER_BASE = (
    "the run to resume was over another base model: {}: {}; give the model that it began with, or "
    "start a new run from its adapter (--resume-adapter-file)"
)


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
    ) -> None:
        self.model, self.optimizer, self.args = model, (optimizer := own_optimizer(optimizer)), args
        self.loss, self.make_batches = loss, make_batches
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
        self.file = (
            None
            if args.adapter_file is None or not (args.iters or args.epochs or args.resume)
            else user_path(args.adapter_file)
        )
        self.folder = None if self.file is None else self.file.parent
        self.base: str | None = None
        self.made_for = base_of(model)
        self.progress = Progress()
        self.accumulated: dict[str, np.ndarray] = {}
        self.best: dict[str, np.ndarray] = {}
        self.train_time, self.timed_steps, self.timed_tokens = 0.0, 0, 0
        self.begun, self.seconds_before = time.monotonic(), 0.0
        # of this process: steps and seconds of them, and seconds of the latest validation
        self.steps_taken, self.step_time, self.val_time = 0, 0.0, 0.0
        self.ending = False
        self.saved_at: Path | None = None
        self.reporters: list[TrainingCallback] = []
        self.display: ProgressReporter | None = None
        self.history: dict[str, list[Any]] = {}
        self.metrics = MetricsLog(None)

    # ---- the run

    def run(self, callback: TrainingCallback | None) -> TrainingResult:
        with ExitStack() as held:
            return self.run_locked(callback, held)

    def run_locked(self, callback: TrainingCallback | None, held: ExitStack) -> TrainingResult:
        notes = self.start(held)
        args = self.args
        if args.grad_checkpoint:
            self.model.set_grad_checkpoint(True)
        was_training = getattr(self.model, "training", False)
        if args.progress:
            self.display = ProgressReporter(args.iters, self.progress.iteration, log=log_stream())
            self.reporters.append(self.display)
            for line in notes + self.plan():
                self.display.line(line)
        if callback is not None:
            self.reporters.append(callback)
        try:
            self.model.train()
            self.begun = time.monotonic()
            stopped = self.loop()
            self.finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.interrupted()) from None
        finally:
            self.model.train(was_training)
            if self.display is not None:
                self.display.close()
        p = self.progress
        best = None if p.best_loss is None else p.best_iteration
        return TrainingResult(
            p.iteration,
            self.optimizer.step,
            p.trained_tokens,
            p.best_loss,
            best,
            stopped,
            self.history,
        )

    def start(self, held: ExitStack) -> list[str]:
        """Start a new run or restore a checkpoint; return notes for the user.

        All checks that can refuse the run come before the first write. `held` receives the lock of
        the folder.
        """
        args, notes, saved = self.args, [], None
        place = None
        # Lock before reading. A missing folder is created only after all checks have passed.
        if there := self.folder is not None and self.folder.is_dir():
            held.enter_context(locked(self.folder))
        if args.resume:
            place = self.folder if args.resume is True else user_path(args.resume)
            if place is None:
                raise ValueError(
                    "resume=True needs an adapter_file, beside which the trainer state lies"
                )
            saved = checkpoints.load_checkpoint(place)
        seed = args.seed
        if saved is None:
            if seed is None:
                seed = pyloss.random.next_seed()
            else:
                pyloss.random.seed(seed)
        options = {
            "batch_size": args.batch_size,
            "max_seq_length": args.max_seq_length,
            "loop": True,
        }
        options |= {} if seed is None else {"seed": seed}
        try:
            self.batches = batches_of(self.make_batches, self.model, self.data, **options)
        except NoTargets as error:
            raise NoTargets(f"the training data: {error}") from None
        self.args = args = args.in_iterations(self.batches)
        if self.folder is not None:
            self.base = fingerprint(self.model, {*self.parameters, *self.fixed})
        if saved is not None and place is not None:
            notes = self.restore(saved, checkpoints.state_path(place))
        own = getattr(self.model, "adapter_config", None)
        config = remembered(args.adapter_config or own, self.given)
        if config is not None and args.epochs is not None and "iters" in config:
            config = {**config, "iters": args.iters}
        if own is not None:
            self.model.adapter_config = remembered(own, self.given)
        if self.folder is not None and self.file is not None:
            if not there:
                make_folder(self.folder, "adapter folder")
                held.enter_context(locked(self.folder))
            here = (
                place is not None
                and checkpoints.state_path(place).parent.resolve() == self.folder.resolve()
            )
            notes += prepare_folder(self.folder, self.file.name, config, here, args.overwrite)
            if system_prompt_of(config) is not None:
                notes.append("the records share a system prompt, which is kept with the adapter")
        rows = []
        if place is not None:
            there_before = checkpoints.state_path(place).parent
            p = self.progress
            rows = rows_until(read_metrics(there_before), p.reported_at, p.validated_at)
        self.metrics = MetricsLog(self.folder and self.folder / METRICS_FILE, rows)
        self.seconds_before = self.metrics.seconds
        self.mark()
        if saved is None:
            self.save_state()
        return notes

    def restore(self, saved: Checkpoint, file: Path) -> list[str]:
        """Restore the checkpoint `saved`, read from `file`; return notes for the user."""
        name = optimizer_name(self.optimizer)
        if saved.optimizer_name != name:
            raise ValueError(
                f"the run to resume was trained with {saved.optimizer_name}, not with {name}"
            )
        was = None if saved.made_for is None else base_from(file, saved.made_for)
        differs = was and self.made_for and was.difference(self.made_for)
        if differs:
            raise ValueError(OTHER_BASE.format(f"{was}, and this one is {self.made_for}", differs))
        checkpoints.check_arrays(self.parameters | self.fixed, saved.model, "the run to resume")
        if saved.base is not None and self.base is not None and saved.base != self.base:
            what = "its weights are not those of this one"
            raise ValueError(OTHER_BASE.format(what, "the shapes agree"))
        try:
            checkpoints.check_arrays(
                self.parameters if saved.best else {}, saved.best, f"{file}: best"
            )
            targets = {name: self.parameters[name] for name in saved.accumulated}
            checkpoints.check_arrays(targets, saved.accumulated, f"{file}: accumulated")
            self.restore_place(saved)
            pyloss.random.set_state(saved.random)
            self.optimizer.load_state_dict(saved.optimizer)
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise FormatError(file, None, f"not a readable trainer state: {error}") from error
        checkpoints.restore_arrays(self.parameters | self.fixed, saved.model, "the run to resume")
        self.progress, self.best = saved.progress, saved.best
        self.accumulated = {name: np.array(array) for name, array in saved.accumulated.items()}
        now, before = self.settings(), saved.settings or {}
        return [f"resuming after iteration {self.progress.iteration}"] + [
            f"note: {key} is {now[key]!r}, and was {was!r:.80} before"
            for key, was in before.items()
            if key in now and now[key] != was
        ]

    def restore_place(self, saved: Checkpoint) -> None:
        """Advance the batches to where the run stopped: restore their state or skip used ones."""
        if saved.batches is not None and hasattr(self.batches, "set_state"):
            self.batches.set_state(saved.batches)
            return
        # A finished run needs no further batch, and a state may hold any number: skip <= iters.
        for taken in range(min(saved.progress.iteration, self.args.iters)):
            try:
                next(self.batches)
            except StopIteration:
                raise ValueError(
                    f"the run to resume had {saved.progress.iteration} batches, and here are "
                    f"{taken} in all"
                ) from None

    def settings(self) -> dict[str, Any]:
        """The settings whose change would make a resumed run differ from an uninterrupted one."""
        names = (
            "batch_size",
            "max_seq_length",
            "grad_accumulation_steps",
            "max_grad_norm",
            "steps_per_eval",
            "val_batches",
            "loraplus_lr_ratio",
        )
        fixed = (
            {}
            if self.optimizer.schedule is not None
            else {"learning_rate": self.optimizer.learning_rate}
        )
        return (
            {name: getattr(self.args, name) for name in names}
            | fixed
            | {"matmul_precision": get_matmul_precision()}
        )

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
        )

    def loop(self) -> bool:
        """Run the remaining iterations; return True if `patience` or `max_time` ends them early."""
        args = self.args
        while True:
            done = self.progress.iteration
            # These steps are due after iteration `done`, in this order. A resumed run that starts
            # here does them too.
            if done % args.steps_per_report == 0:
                self.report()
            if not done or (args.steps_per_eval and done % args.steps_per_eval == 0):
                self.validate()
            if done and done % args.steps_per_save == 0:
                self.save()
            if args.patience is not None and self.progress.not_improved >= args.patience:
                self.say(
                    f"stopped: {counted(self.progress.not_improved, 'validation')} in a row "
                    f"without a lower loss"
                )
                return True
            if done >= args.iters:
                return False
            if self.time_left() <= 0:
                limit = duration_text(float(args.max_time or 0))
                self.say(f"stopped after iteration {done}: max_time is {limit}; resume goes on")
                return True
            try:
                batch = next(self.batches)
            except StopIteration:
                self.say(f"the batches ended after iteration {done}")
                return False
            self.step(batch)

    def step(self, batch: Any) -> None:
        """Run one iteration; the checkpointed state changes only in the `uninterrupted()` block."""
        args, begun = self.args, time.perf_counter()
        iteration = self.progress.iteration + 1
        value, grads = self.value_and_grad(self.model, *batch)
        value, weight = loss_and_weight(value)
        if weight and not math.isfinite(value):
            raise FloatingPointError(self.not_finite(f"the loss is {value}", iteration))
        with uninterrupted():
            p = self.progress
            if weight:
                self.accumulate(grads, weight)
                p.loss_sum += value * weight
                p.loss_weight += weight
                p.pending_weight += weight
            p.pending += 1
            if p.pending == args.grad_accumulation_steps:
                self.apply(iteration)
            p.iteration = iteration
            p.trained_tokens += round(weight)
            self.mark()
        seconds = time.perf_counter() - begun
        self.train_time += seconds
        self.step_time += seconds
        self.timed_steps += 1
        self.steps_taken += 1
        self.timed_tokens += round(weight)
        if self.display is not None:
            self.display.advance(value)

    def accumulate(self, grads: Mapping[str, Any], weight: float) -> None:
        """Add the gradients times `weight`: each target token counts equally in every batch."""
        if self.args.grad_accumulation_steps == 1:
            self.accumulated = dict(grads)
            return
        for name, grad in grads.items():
            if name not in self.accumulated:
                self.accumulated[name] = np.zeros(grad.shape, np.float32)
            to = self.accumulated[name] = on_device_of(grad, self.accumulated[name])
            _core.axpy(weight, f32(grad).reshape(-1), to.reshape(-1))

    def apply(self, iteration: int) -> None:
        """Update the parameters with the accumulated gradients."""
        p = self.progress
        if p.pending_weight:
            scale = 1.0 if self.args.grad_accumulation_steps == 1 else 1.0 / p.pending_weight
            norm = grad_norm(self.accumulated) * scale
            if not math.isfinite(norm):
                raise FloatingPointError(
                    self.not_finite(f"the norm of the gradients is {norm}", iteration)
                )
            p.grad_norm = norm
            scale *= clip_scale(norm, self.args.max_grad_norm)
            self.optimizer.update(self.trained, self.accumulated, grad_scale=scale)
        self.accumulated, p.pending, p.pending_weight = {}, 0, 0.0

    def not_finite(self, what: str, iteration: int) -> str:
        saved = "" if self.saved_at is None else f"; the last good state is in {self.saved_at}"
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
        p = self.progress
        self.save_state()
        self.ending = True
        self.report()
        with uninterrupted():
            if p.pending:
                self.apply(p.iteration)
                p.validated_at = -1
        before = p.best_loss
        self.validate()
        if p.best_loss != before:
            self.remember_best()
        if self.args.keep_best and self.best and p.best_iteration != p.iteration:
            last = (
                {name: array.copy() for name, array in self.parameters.items()}
                if self.folder
                else {}
            )
            with uninterrupted():
                checkpoints.restore_arrays(self.parameters, self.best, "the best adapter")
            self.say(
                f"kept the adapter of iteration {p.best_iteration}, val loss {p.best_loss:.4f} "
                f"(the lowest)"
            )
            if self.folder is not None:
                write_safetensors(
                    self.folder / numbered(p.iteration), self.on_disk(last), self.told(p.iteration)
                )
                self.say(f"the last one is in {self.folder / numbered(p.iteration)}")
        if p.iteration == 0:
            self.say("nothing was trained, so no adapter is saved")
        elif self.folder is not None:
            kept_best = self.args.keep_best and self.best
            self.save_adapter(p.best_iteration if kept_best else p.iteration)
            self.say(f"saved the adapter to {self.file}")
        self.say_curves()

    # ---- reports

    def say(self, text: str) -> None:
        if self.display is not None:
            self.display.line(text)

    def report(self) -> None:
        """Report the iterations since the last report, if any."""
        p = self.progress
        if p.reported_at == p.iteration:
            return
        seconds = max(self.train_time, 1e-9)
        info = {
            "iteration": p.iteration,
            "train_loss": p.loss_sum / p.loss_weight if p.loss_weight else 0.0,
            "learning_rate": self.optimizer.learning_rate,
            "iterations_per_second": self.timed_steps / seconds,
            "tokens_per_second": self.timed_tokens / seconds,
            "trained_tokens": p.trained_tokens,
            "peak_memory": peak_memory() / 1e9,
            "updates": self.optimizer.step,
            "grad_norm": p.grad_norm,
            "seconds_left": self.seconds_left(),
        }
        with uninterrupted():
            p.loss_sum, p.loss_weight, p.reported_at = 0.0, 0.0, p.iteration
            p.train_loss = float(info["train_loss"])
            self.train_time, self.timed_steps, self.timed_tokens = 0.0, 0, 0
            self.record({k: v for k, v in info.items() if k != "seconds_left"})
        self.keep(info)
        for reporter in self.reporters:
            reporter.on_train_loss_report(dict(info))

    def time_left(self) -> float:
        """The seconds that `max_time` leaves."""
        if self.args.max_time is None:
            return math.inf
        return float(self.args.max_time) - (time.monotonic() - self.begun)

    def seconds_left(self) -> float:
        """An estimate for the rest of the run: its steps and validations, at most `max_time`."""
        args, done = self.args, self.progress.iteration
        if self.ending or not self.steps_taken:
            return 0.0
        steps = max(args.iters - done, 0) * self.step_time / self.steps_taken
        validations = 1  # at the end
        if args.steps_per_eval:
            validations = -(-args.iters // args.steps_per_eval) - (done - 1) // args.steps_per_eval
        rest = steps + max(validations, 0) * self.val_time
        return max(min(rest, self.time_left() + self.val_time), 0.0)

    def record(self, info: Mapping[str, Any]) -> None:
        """Append a report to `metrics.jsonl`, with the seconds of training until it."""
        seconds = self.seconds_before + time.monotonic() - self.begun
        self.metrics.add({**info, "seconds": round(seconds, 3)})

    def say_curves(self) -> None:
        """Show the course of the losses, where there are enough of them for one."""
        for name, kind in (("train_loss", "train"), ("val_loss", "val")):
            losses = [loss for _, loss in column(self.metrics.rows, name) if math.isfinite(loss)]
            if len(losses) > 2:
                line = sparkline(losses)
                self.say(f"{kind} loss {losses[0]:.4f} {line} {losses[-1]:.4f}")

    def keep(self, info: Mapping[str, Any]) -> None:
        """Append a report to the columns of the history."""
        for name, value in info.items():
            self.history.setdefault(name, []).append(value)

    def validate(self) -> None:
        p = self.progress
        if self.val_data is None or p.validated_at == p.iteration:
            return
        begun = time.perf_counter()
        args = self.args
        sizes = (args.batch_size, args.val_batches, args.max_seq_length)
        try:
            value = evaluate(self.model, self.val_data, *sizes, self.loss, self.make_batches)
        except NoTargets as error:
            raise NoTargets(f"the validation data: {error}") from None
        with uninterrupted():
            p.validated_at = p.iteration
            p.val_loss = float(value) if math.isfinite(value) else None
            if math.isfinite(value) and (p.best_loss is None or value < p.best_loss):
                p.best_loss, p.best_iteration, p.not_improved = value, p.iteration, 0
                if args.keep_best:
                    self.best = {name: array.copy() for name, array in self.parameters.items()}
                    if self.folder is not None:
                        told = json.dumps({"iteration": p.iteration, "val_loss": value})
                        write_safetensors(
                            self.folder / BEST_FILE,
                            self.on_disk(self.best),
                            {VALIDATION_KEY: told, **self.of_base()},
                        )
            else:
                p.not_improved += 1
            self.val_time = time.perf_counter() - begun
            info = {"iteration": p.iteration, "val_loss": value, "val_time": self.val_time}
            self.record(info)
        self.keep({"val_iteration": p.iteration} | {k: info[k] for k in ("val_loss", "val_time")})
        for reporter in self.reporters:
            reporter.on_val_loss_report(dict(info))

    # ---- saves

    def mark(self) -> None:
        """Record the random state and the position in the data between two iterations.

        `save_state` writes the recorded values, not the current ones.
        """
        batches = self.batches.state() if hasattr(self.batches, "state") else None
        self.marked = (pyloss.random.state(), batches)

    def save_state(self) -> None:
        if self.folder is None:
            return
        path = self.folder / STATE_FILE
        random, batches = self.marked
        checkpoint = Checkpoint(
            self.progress,
            self.parameters | self.fixed,
            self.optimizer.state_dict(copy=False),
            optimizer_name(self.optimizer),
            self.accumulated,
            self.best,
            random,
            batches,
            self.settings(),
            self.base,
            None if self.made_for is None else asdict(self.made_for),
        )
        with uninterrupted():
            checkpoints.save_checkpoint(path, checkpoint)
        self.saved_at = path

    def remember_best(self) -> None:
        """Add the best adapter, found by the final validation, to the saved state."""
        if self.saved_at is None or not self.args.keep_best:
            return
        saved = checkpoints.load_checkpoint(self.saved_at)
        saved.best = self.best
        saved.progress.best_loss, saved.progress.best_iteration = (
            self.progress.best_loss,
            self.progress.best_iteration,
        )
        with uninterrupted():
            checkpoints.save_checkpoint(self.saved_at, saved)

    def on_disk(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The adapter's file of these parameters, without those of the loss."""
        return self.layout(
            {name: array for name, array in arrays.items() if name not in self.of_loss}
        )

    def told(self, iteration: int) -> dict[str, str]:
        """The metadata of the adapter at `iteration`, this one or the best one."""
        p = self.progress
        if iteration != p.iteration:
            return metadata_of(iteration, val_loss=p.best_loss) | self.of_base()
        val_loss = p.val_loss if p.validated_at == iteration else None
        return metadata_of(iteration, p.train_loss, val_loss) | self.of_base()

    def of_base(self) -> dict[str, str]:
        """The metadata that say what the adapter is made for."""
        return {} if self.made_for is None else self.made_for.metadata()

    def save_adapter(self, iteration: int | None = None) -> None:
        """Save the parameters, which are those of `iteration`; None: the current one."""
        assert self.file is not None
        told = self.told(self.progress.iteration if iteration is None else iteration)
        write_safetensors(self.file, self.on_disk(self.parameters), told)

    def save(self) -> None:
        """Save state and adapter. The state comes first, so it is never older than the adapter."""
        if self.folder is None:
            return
        self.save_state()
        self.save_adapter()
        done = self.progress.iteration
        write_safetensors(
            self.folder / numbered(done), self.on_disk(self.parameters), self.told(done)
        )
        self.say(
            f"iteration {self.progress.iteration}: saved "
            f"{self.folder / numbered(self.progress.iteration)}"
        )

    def interrupted(self) -> str:
        """Save after Ctrl-C; return a message that says where."""
        done = self.progress.iteration
        if self.folder is None:
            return (
                f"interrupted after iteration {done}; "
                "nothing is saved (adapter_file is None, or no iterations)"
            )
        # `finish` has saved the state already and then changed the one in memory.
        if not self.ending:
            self.save_state()
            if done:
                self.save_adapter()
        return (
            f"interrupted after iteration {done}: saved to {self.folder}; "
            "resume=True (--resume) continues from there"
        )
