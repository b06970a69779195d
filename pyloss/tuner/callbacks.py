"""Reports of a training run: the callback interface, progress display and external services."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any, TextIO

from pyloss.checks.durations import duration_text
from pyloss.io.console import Console

Info = dict[str, Any]


class TrainingCallback:
    """Base class of callbacks: override methods and pass an instance as `training_callback`."""

    def on_train_loss_report(self, train_info: Info) -> None:
        """Called every `steps_per_report` iterations and after the last one.

        `train_info`: `iteration`, `train_loss` (mean over the target tokens since the last report),
        `learning_rate`, `iterations_per_second`, `tokens_per_second`, `trained_tokens`,
        `peak_memory` (GB), `updates`, `grad_norm` (of the latest update, before clipping; None
        before the first), `seconds_left` (an estimate for the rest of the run).
        """

    def on_val_loss_report(self, val_info: Info) -> None:
        """Called after each validation.

        `val_info`: `iteration` (iterations done), `val_loss`, `val_time` (s).
        """


class ProgressReporter(TrainingCallback):
    """Shows a progress bar on a terminal and in a notebook that has ipywidgets.

    Prints plain lines elsewhere or without tqdm.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self.total = total
        self.stream: Any = Console(stream=stream)
        self.bar: Any = None
        # A notebook's bar is a widget: it goes into the page, not into a stream.
        options = {"file": self.stream} if self.stream.isatty() else {}
        try:
            if options:
                from tqdm import tqdm
            elif stream is None and _in_notebook():
                from tqdm.auto import tqdm
            else:
                return
        except ImportError:
            return
        self.bar = tqdm(
            total=total, initial=done, unit="it", dynamic_ncols=True, leave=False, **options
        )

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

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
            f"{i['val_time']:.1f} s"
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


class _ServiceCallback(TrainingCallback):
    """Sends reports to one service, then passes them to `wrapped_callback`.

    Attributes:
        service: name of the service's Python package; subclasses set it.
        module: the imported package.
        wrapped_callback: the next callback, or None.
    """

    service = ""

    def __init__(
        self,
        project_name: str | None,
        log_dir: str | None,
        config: Info | None,
        wrapped_callback: TrainingCallback | None = None,
    ) -> None:
        import importlib

        try:
            self.module: Any = importlib.import_module(self.service)
        except ImportError as error:
            raise ImportError(
                f"reporting to {self.service} needs its package: pip install {self.service}"
            ) from error
        self.wrapped_callback = wrapped_callback
        self.start(project_name, log_dir or ".", config or {})

    def start(self, project_name: str | None, log_dir: str, config: Info) -> None:
        raise NotImplementedError

    def on_train_loss_report(self, train_info: Info) -> None:
        self.module.log(train_info, step=train_info["iteration"])
        if self.wrapped_callback is not None:
            self.wrapped_callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: Info) -> None:
        self.module.log(val_info, step=val_info["iteration"])
        if self.wrapped_callback is not None:
            self.wrapped_callback.on_val_loss_report(val_info)


class WandBCallback(_ServiceCallback):
    service = "wandb"

    def start(self, project_name: str | None, log_dir: str, config: Info) -> None:
        self.module.init(
            project=project_name, name=os.path.basename(log_dir), dir=log_dir, config=config
        )


class SwanLabCallback(_ServiceCallback):
    service = "swanlab"

    def start(self, project_name: str | None, log_dir: str, config: Info) -> None:
        logdir = os.path.join(log_dir, "swanlog")
        self.module.init(
            project=project_name,
            experiment_name=os.path.basename(log_dir),
            logdir=logdir,
            config=config,
        )


SERVICES: dict[str, type[_ServiceCallback]] = {"wandb": WandBCallback, "swanlab": SwanLabCallback}
SUPPORT_CALLBACK = SERVICES  # mlx-lm's name


def get_reporting_callbacks(
    report_to: str | None = None,
    project_name: str | None = None,
    log_dir: str | None = None,
    config: Info | None = None,
) -> TrainingCallback | None:
    """Return a callback for the services in `report_to`, or None if it names none.

    `report_to` is "wandb", "swanlab", or both separated by a comma.

    Raises:
        ValueError: unknown service name.
        ImportError: the service's package is missing; the message gives the install command.
    """
    names = [name.strip().lower() for name in (report_to or "").split(",") if name.strip()]
    for name in names:
        if name not in SERVICES:
            raise ValueError(
                f"report_to: {name!r} is not known; allowed: {', '.join(SERVICES)}, or several "
                f"with commas"
            )
    callback: TrainingCallback | None = None
    for name in names:
        callback = SERVICES[name](project_name, log_dir, config, callback)
    return callback
