"""The progress of long work: a bar or plain lines, and losses drawn in a line of text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, TextIO

from pyloss.checks.durations import duration_text, precise_text
from pyloss.io.bars import terminal_bar
from pyloss.io.console import Console, is_quiet
from pyloss.tuner.callbacks import Info, TrainingCallback

#: the heights of a sparkline's columns
_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = 40
#: whether standard output is for results alone
_beside_results = False


def log_stream() -> str:
    """The standard stream of a run's log: "stdout" unless that is closed or a terminal.

    So `pyloss train > log` and a pipe get the log, and a terminal's bar is not torn by it. In a
    block of `log_beside_results` it is "stderr".
    """
    other = _beside_results or sys.stdout is None or Console("stdout").isatty()
    return "stderr" if other else "stdout"


@contextmanager
def log_beside_results() -> Iterator[None]:
    """Runs in the block log to standard error: the command's results go to standard output."""
    global _beside_results
    before, _beside_results = _beside_results, True
    try:
        yield
    finally:
        _beside_results = before


def sparkline(values: Sequence[float], columns: int = _COLUMNS) -> str:
    """The values as a line of bars between the lowest and the highest of them.

    More values than `columns` are averaged in groups of equal size.
    """
    count = min(len(values), columns)
    bounds = [len(values) * i // count for i in range(count + 1)] if count else []
    means = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(bounds)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((mean - low) / step)] for mean in means)


class ProgressReporter(TrainingCallback):
    """Shows a progress bar on a terminal and in a notebook that has ipywidgets.

    Prints plain lines elsewhere or without tqdm.
    """

    def __init__(
        self, total: int, done: int = 0, stream: TextIO | None = None, log: str = "stderr"
    ) -> None:
        """`log`: the standard stream of the lines, where it is another than that of the bar."""
        self.total = total
        self.stream: Any = Console(stream=stream)
        self.log: Any = self.stream if log == "stderr" else Console(log, log=True)
        self.bar: Any = None
        self.bar = terminal_bar(self.stream, total=total, initial=done, unit="it")
        # A notebook's bar is a widget: it goes into the page, not into a stream.
        if self.bar is None and stream is None and not is_quiet() and _in_notebook():
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total, initial=done, unit="it", dynamic_ncols=True, leave=False)

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if is_quiet():
            return
        if self.bar is not None and self.log is self.stream:
            self.bar.write(text, file=self.stream)
        else:
            self.log.write(text + "\n")
            self.log.flush()

    def advance(self, loss: float) -> None:
        """Advance the bar by one iteration and show `loss`, the loss of its batch."""
        self.step(f"loss {loss:.3f}")

    def step(self, text: str) -> None:
        """Advance the bar by one, with `text` behind it."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()

    def on_train_loss_report(self, train_info: Info) -> None:
        i = train_info
        self.line(
            f"iteration {i['iteration']}/{self.total}: train loss {i['train_loss']:.4f}, "
            f"learning rate {i['learning_rate']:.3e}, {i['iterations_per_second']:.3f} it/s, "
            f"{i['tokens_per_second']:.1f} tokens/s, {i['trained_tokens']} tokens trained, "
            f"peak memory {i['peak_memory']:.2f} GB"
            + (
                f", {duration_text(left)} left"
                if (left := i.get("seconds_left", 0.0)) >= 0.5
                else ""
            )
        )

    def on_val_loss_report(self, val_info: Info) -> None:
        i = val_info
        self.line(
            f"iteration {i['iteration']}/{self.total}: val loss {i['val_loss']:.4f}, took "
            f"{precise_text(i['val_time'])}"
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _in_notebook() -> bool:
    """Whether tqdm shows its bars as a notebook's widgets."""
    if "ipykernel.zmqshell" not in sys.modules or find_spec("ipywidgets") is None:
        return False
    try:
        from tqdm.auto import tqdm
        from tqdm.notebook import tqdm_notebook
    except ImportError:
        return False
    return issubclass(tqdm, tqdm_notebook)
