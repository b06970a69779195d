"""Training of recursive models: deep supervision over a carry, as in the authors' `pretrain.py`.

An update takes one step of the sequences in the carry. Sequences that have halted are replaced by
the next batch's, so that a batch holds puzzles at different steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

import pyloss.random
from pyloss import nn
from pyloss.checks.durations import duration_text, precise_text
from pyloss.distributed import Group
from pyloss.errors import counted
from pyloss.io.files import PathLike
from pyloss.optim import EMA, AdamATan2, SparseSignSGD, grad_norm
from pyloss.optim.schedules import Schedule, cosine_decay, join_schedules, linear_schedule
from pyloss.recursive import state
from pyloss.recursive.carry import Carry
from pyloss.recursive.data.arc_votes import ArcVotes
from pyloss.recursive.evaluation import RecursiveEvaluation, evaluate_recursive
from pyloss.recursive.puzzles import LOCAL, without_puzzles
from pyloss.recursive.run_files import RunFolder
from pyloss.recursive.settings import FROM_DATA, RecursiveArgs, make_head
from pyloss.runtime.precision import get_matmul_precision, matmul_precision
from pyloss.tuner.callbacks import Info, TrainingCallback
from pyloss.tuner.progress import ProgressReporter, log_stream
from pyloss.tuner.run.checkpoints import Progress, uninterrupted
from pyloss.tuner.run.metrics import METRICS_FILE, read_metrics, rows_until
from pyloss.tuner.run.run_reports import RunReports


@dataclass
class RecursiveProgress(Progress):
    """The counters of a run; an iteration is an update.

    Attributes:
        round: the rounds of `eval_interval` epochs that are done.
        taken: the batches taken in this round.
        sums: of the metrics since the last report.
    """

    round: int = 0
    taken: int = 0
    sums: dict[str, float] = field(default_factory=dict)


@dataclass
class RecursiveResult:
    """How a run ended.

    Attributes:
        updates: updates done.
        stopped_early: whether `max_time` ended it.
        evaluation: the latest evaluation; None without one.
        history: the reports as columns, those of evaluations with the prefix `val_`.
    """

    updates: int
    stopped_early: bool
    evaluation: RecursiveEvaluation | None
    history: dict[str, list[Any]] = field(default_factory=dict, repr=False)


def train_recursive(
    arch: Mapping[str, Any],
    train_data: Any,
    test_data: Any = None,
    args: RecursiveArgs | None = None,
    *,
    folder: PathLike | None = None,
    head: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    callback: TrainingCallback | None = None,
    votes: Callable[[], ArcVotes] | None = None,
    **settings: Any,
) -> tuple[Any, RecursiveResult]:
    """Trains HRM or TRM on puzzles; returns the model in its `ACTLossHead`, and how the run ended.

    The model that is returned has the trained weights, with `ema` the averages.

    Args:
        arch: the architecture, with the keys of the authors' YAML: `name` ("trm" or "hrm"),
            `loss`, and the settings of `RecursiveConfig` except the sizes of the data.
        train_data, test_data: `PuzzleDataset`s; without the latter nothing is evaluated.
        args: the settings; or give them as keywords.
        folder: for the files of the run (`run_files.py` lists them); None: nothing is saved.
        head: a model in its head to train on, of this architecture; None: a new one from the seed.
        resume: continue the run in `folder`, with the bits of an uninterrupted one.
        overwrite: remove the files of an earlier run; otherwise they move to `previous-N`.
        config: the keys of config.yaml beside `arch` and `args`.
        callback: gets the reports.
        votes: makes the `ArcVotes` of an evaluation.

    Raises:
        KeyboardInterrupt: after Ctrl-C; a run with a folder is saved, the message says where.
        FloatingPointError: loss or gradient is not finite; the parameters are not updated.
        ValueError: unusable settings or data, or the run to resume is of another architecture.
        FormatError: the state to resume is damaged.
        OSError: a file cannot be written.
    """
    if args is not None and settings:
        raise TypeError(f"give args or keywords, not both: {', '.join(settings)}")
    args = RecursiveArgs(**settings) if args is None else args
    with matmul_precision(args.matmul_precision):
        run = RecursiveRun(arch, train_data, test_data, args, folder, head, callback, votes)
        return run.head, run.run(resume, overwrite, config or {})


def schedule_of(rate: float, args: RecursiveArgs, updates: int) -> Schedule:
    """The learning rate of the authors' code, which counts updates from 1."""
    warmup = args.lr_warmup_steps
    fall = cosine_decay(rate, max(updates - warmup, 1), rate * args.lr_min_ratio)
    parts: list[Schedule] = [linear_schedule(0.0, rate, warmup), fall] if warmup else [fall]
    joined = join_schedules(parts, [warmup] if warmup else [])

    def schedule(step: int) -> float:
        return joined(step + 1)

    return schedule


class RecursiveRun:
    """One call of `train_recursive`. Its state changes only in `uninterrupted()` blocks."""

    def __init__(
        self,
        arch: Mapping[str, Any],
        train_data: Any,
        test_data: Any,
        args: RecursiveArgs,
        folder: PathLike | None,
        head: Any,
        callback: TrainingCallback | None = None,
        votes: Callable[[], ArcVotes] | None = None,
    ) -> None:
        size = args.global_batch_size
        sizes = {name: getattr(train_data, name) for name in FROM_DATA}
        self.sizes = sizes | {"batch_size": size}
        self.arch = {**arch, **sizes}
        if test_data is not None:
            for name in FROM_DATA:
                other = getattr(test_data, name)
                if other != sizes[name] and (name != FROM_DATA[-1] or other > sizes[name]):
                    raise ValueError(
                        f"the test data have {name} {other}, the training data {sizes[name]}"
                    )
        self.data, self.test_data, self.args = train_data, test_data, args
        examples = args.epochs * train_data.total_groups * train_data.mean_puzzle_examples
        self.updates = int(examples / size)
        if not self.updates:
            raise ValueError(
                f"{counted(args.epochs, 'epoch')} of {train_data.total_groups} groups of puzzles "
                f"give no batch of global_batch_size {size}: give more epochs or smaller batches"
            )
        pyloss.random.seed(args.seed)
        self.head = make_head(arch, **self.sizes) if head is None else head
        self.model = self.head.model
        self.embeds = bool(self.model.config.puzzle_emb_ndim)
        if args.freeze_weights:
            if not self.embeds:
                raise ValueError(
                    "freeze_weights trains the puzzle embeddings only, and puzzle_emb_ndim is 0"
                )
            self.head.freeze()
            self.model.puzzle_emb.unfreeze()
        self.weights = {
            name: array
            for name, array in self.head.trainable_parameters().items()
            if name.split(".")[-1] != LOCAL
        }
        self.optimizer = AdamATan2(
            schedule_of(args.lr, args, self.updates),
            betas=(args.beta1, args.beta2),
            weight_decay=args.weight_decay,
        )
        self.puzzle_optimizer = SparseSignSGD(
            schedule_of(args.puzzle_emb_lr, args, self.updates), args.puzzle_emb_weight_decay
        )
        self.average = EMA(self.weights, args.ema_rate) if args.ema and self.weights else None
        self.both = nn.value_and_grad(self.head, self._step, has_aux=True)
        self.carry: Carry | None = None
        self.progress = RecursiveProgress()
        self.evaluation: RecursiveEvaluation | None = None
        self.files = RunFolder(folder)
        self.callback, self.votes = callback, votes
        self.reports = _Reports(self)

    # ---- the run

    def run(self, resume: bool, overwrite: bool, config: Mapping[str, Any]) -> RecursiveResult:
        """Trains to the end, or to `max_time`, and leaves the result in the model."""
        reports, args = self.reports, self.args
        with ExitStack() as held:
            notes = self._start(resume, overwrite, config, held)
            if args.progress:
                display = _Lines(self.updates, self.progress.iteration, log=log_stream())
                reports.display = display
                reports.reporters.append(display)
                held.callback(display.close)
                for line in (*notes, self._plan()):
                    display.line(line)
                if self.progress.round >= args.rounds:
                    display.line("the run is finished: more epochs would train it further")
            if self.callback is not None:
                reports.reporters.append(self.callback)
            was_training = self.head.training
            held.callback(lambda: self.head.train(was_training))
            self.head.train()
            try:
                reports.begin()
                stopped = self._loop()
                if stopped:
                    self._save()
                    # Not in the saved state: the resumed run evaluates where it would have.
                    self._evaluate()
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self._interrupted()) from None
            reports.ending = True
            self._report()
            if self.average is not None:
                self.average.copy_to(self.weights)
            reports.say_curves()
            if self.files.path is not None:
                reports.say(f"saved the model to {self.files.path}")
        return RecursiveResult(self.progress.iteration, stopped, self.evaluation, reports.history)

    def _start(
        self, resume: bool, overwrite: bool, config: Mapping[str, Any], held: ExitStack
    ) -> list[str]:
        """Begins a run or restores one; all checks come before the first write."""
        folder, notes = self.files.path, []
        if resume:
            if folder is None:
                raise ValueError("resume=True needs the folder of a run")
            notes = state.restore(self, folder)
        self.marked = pyloss.random.state()
        own = {"progress": None, "max_time": None}  # of one call, not of the run
        settings = {"arch": self.arch, **config, **asdict(self.args), **own}
        notes += self.files.open(settings, resume, overwrite, held)
        rows = []
        if resume and folder is not None:
            p = self.progress
            rows = rows_until(read_metrics(folder), p.reported_at, p.validated_at)
        self.reports.open_metrics(folder and folder / METRICS_FILE, rows)
        return notes

    def _plan(self) -> str:
        p, args = self.progress, self.args
        _, numbers = nn.count_parameters(self.model)
        after = f", continuing after update {p.iteration}" if p.iteration else ""
        precision = get_matmul_precision()
        return (
            f"plan: {counted(self.updates, 'update')} of {args.global_batch_size} puzzles, "
            f"{numbers:,} parameters, products in {precision}{after}"
        )

    def _loop(self) -> bool:
        """Trains the remaining rounds; returns whether `max_time` ended them."""
        args, p = self.args, self.progress
        while p.round < args.rounds:
            for batch in self._batches():
                if p.iteration >= self.updates:  # the authors' bound of all rounds together
                    break
                if self.reports.time_left() <= 0:
                    limit = duration_text(float(args.max_time or 0))
                    self.reports.say(
                        f"stopped after update {p.iteration}: max_time is {limit}; resume goes on"
                    )
                    return True
                self._update(batch)
                if p.iteration % args.steps_per_report == 0:
                    self._report()
                if p.iteration % args.save_every == 0:
                    self._save_state()
            if p.round >= args.min_eval_interval:
                self._evaluate()
            with uninterrupted():
                p.round, p.taken = p.round + 1, 0
            if p.round == args.rounds:
                # Before the save: a finished run that is resumed has nothing left to report.
                self.reports.ending = True
                self._report()
            self._save()
        return False

    def _batches(self) -> Iterator[Mapping[str, np.ndarray]]:
        args, p = self.args, self.progress
        found: Iterator[Mapping[str, np.ndarray]] = self.data.batches(
            args.global_batch_size,
            seed=args.seed,
            epoch=p.round,
            epochs=args.eval_interval or args.epochs,
            train=True,
            start=p.taken,
        )
        return found

    def _step(self, carry: Carry, batch: Mapping[str, np.ndarray]) -> Any:
        carry, loss, metrics, _, _ = self.head(carry=carry, batch=batch)
        return loss / self.args.global_batch_size, (carry, metrics)

    def _update(self, batch: Mapping[str, np.ndarray]) -> None:
        begun, p = time.perf_counter(), self.progress
        carry = self.head.initial_carry(batch) if self.carry is None else self.carry
        (loss, (carry, metrics)), grads = self.both(carry, batch)
        value, norm = float(loss), grad_norm(grads)
        if not (math.isfinite(value) and math.isfinite(norm)):
            saved = f"; the last good state is in {self.files.saved_at}" * bool(self.files.saved_at)
            raise FloatingPointError(
                f"update {p.iteration + 1}: the loss is {value}, the norm of the gradients {norm}; "
                f"the parameters are those of update {p.iteration}{saved}. A lower learning rate "
                "or a longer warm-up may help"
            )
        grads, local = without_puzzles(grads)
        labels = int((carry.current_data["labels"] >= 0).sum())
        with uninterrupted():
            for gradient in local.values():
                self.model.puzzle_emb.update(self.puzzle_optimizer, gradient)
            if grads:
                self.optimizer.update(self.head, grads)
            if self.average is not None:
                self.average.update(self.weights)
            self.carry = carry
            p.iteration, p.taken = p.iteration + 1, p.taken + 1
            p.grad_norm = norm
            p.loss_sum, p.loss_weight = p.loss_sum + value, p.loss_weight + 1.0
            p.trained_tokens += labels
            for name, number in metrics.items():
                p.sums[name] = p.sums.get(name, 0.0) + number
            self.marked = pyloss.random.state()
        self.reports.took(time.perf_counter() - begun, labels, value)

    def _report(self) -> None:
        p = self.progress
        if p.reported_at == p.iteration:
            return
        ended = p.sums.get("count", 0.0)
        trained = p.loss_weight * self.args.global_batch_size
        more = {
            name: number / (trained if name.endswith("loss") else max(ended, 1.0))
            for name, number in p.sums.items()
            if name != "count"
        }
        more["puzzles"] = ended
        if self.args.freeze_weights:
            more["learning_rate"] = self.puzzle_optimizer.learning_rate
        p.sums = {}
        self.reports.report(p, self.optimizer, more)

    # ---- evaluation

    def averaged(self) -> Any:
        """A block in which the model has the averages, where there are any."""
        return nullcontext() if self.average is None else self.average.swapped(self.weights)

    def _evaluate(self) -> None:
        p, args = self.progress, self.args
        if self.test_data is None or p.validated_at == p.iteration:
            return
        begun = time.perf_counter()
        with self.averaged():
            batches = self.test_data.batches(args.global_batch_size, train=False)
            votes = None if self.votes is None else self.votes()
            found = evaluate_recursive(self.head, batches, votes)
        more = {f"val_{name}": number for name, number in found.metrics.items()}
        more |= {
            "val_exact_when_halting": found.exact_when_halting,
            "val_steps_when_halting": found.steps_when_halting,
        }
        with uninterrupted():
            p.validated_at, p.val_loss, self.evaluation = p.iteration, found.loss, found
            seconds = time.perf_counter() - begun
            info = self.reports.record_validation(p.iteration, found.loss, seconds, more)
            self.files.save_evaluation(found, p.iteration)
        self.reports.report_validation(info)

    # ---- saves

    def _save_state(self) -> None:
        self.files.save_state(state.of(self))

    def _save(self) -> None:
        """Saves state and model. The state comes first, so it is never older than the model."""
        self._save_state()
        if self.files.path is None:
            return
        keeps = self.args.checkpoint_every_eval and self.progress.taken == 0
        with uninterrupted(), self.averaged():
            self.files.save_model(self.model)
            if keeps:
                self.files.save_model(self.model, f"step_{self.progress.iteration}.safetensors")

    def _interrupted(self) -> str:
        """Saves after Ctrl-C; returns a message that says where."""
        done, folder = self.progress.iteration, self.files.path
        if folder is None:
            return f"interrupted after update {done}; nothing is saved (no folder was given)"
        self._save()
        return (
            f"interrupted after update {done}: saved to {folder}; resume=True (--resume) "
            "continues from there"
        )


class _Reports(RunReports):
    """The reports of a run, which has updates and rounds."""

    def __init__(self, run: RecursiveRun) -> None:
        super().__init__(run.args, Group())  # type: ignore[arg-type]
        self.run = run

    def seconds_left(self, done: int) -> float:
        """An estimate for the rest of the run: its updates and evaluations, at most `max_time`."""
        if self.ending or not self.steps_taken:
            return 0.0
        run = self.run
        updates = max(run.updates - done, 0) * self.step_time / self.steps_taken
        rest = updates + (run.args.rounds - run.progress.round) * self.val_time
        return max(min(rest, self.time_left() + self.val_time), 0.0)


class _Lines(ProgressReporter):
    """Lines about updates and evaluations."""

    def on_train_loss_report(self, train_info: Info) -> None:
        i = train_info
        left = i.get("seconds_left", 0.0)
        solved = f"exact {i.get('exact_accuracy', 0.0):.1%}, steps {i.get('steps', 0.0):.1f}"
        if not i.get("puzzles"):
            solved = "no puzzle has ended"
        self.line(
            f"update {i['iteration']}/{self.total}: train loss {i['train_loss']:.4f}, {solved}, "
            f"learning rate {i['learning_rate']:.3e}, "
            f"{1 / max(i['iterations_per_second'], 1e-9):.3f} s/update, "
            f"peak memory {i['peak_memory']:.2f} GB"
            + (f", {duration_text(left)} left" if left >= 0.5 else "")
        )

    def on_val_loss_report(self, val_info: Info) -> None:
        i = val_info
        self.line(
            f"update {i['iteration']}/{self.total}: test loss {i['val_loss']:.4f}, exact "
            f"{i['val_exact_accuracy']:.2%}, tokens {i['val_accuracy']:.2%}, halting by itself "
            f"{i['val_exact_when_halting']:.2%} after {i['val_steps_when_halting']:.1f} steps, "
            f"took {precise_text(i['val_time'])}"
        )
