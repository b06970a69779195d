"""Reports of a training run: the callback interface, and the services that take reports."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyloss.io.files import append_whole, read_text, write_text

Info = dict[str, Any]

CSV_FILE = "metrics.csv"


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


class ServiceCallback(TrainingCallback):
    """Sends reports to one service, then passes them to `wrapped_callback`.

    Attributes:
        service: name of the service's Python package, which an extra of pyloss may install;
            subclasses set it.
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
        self.module = self.imported()
        self.wrapped_callback = wrapped_callback
        self.start(project_name, log_dir or ".", config or {})

    def imported(self) -> Any:
        """The package. Raises ImportError that names the extra."""
        import importlib

        try:
            return importlib.import_module(self.service)
        except ImportError as error:
            name = self.service
            extra = next((key for key, kind in SERVICES.items() if kind.service == name), name)
            raise ImportError(
                f'reporting to {extra} needs the package {name}: pip install "pyloss[{extra}]"'
            ) from error

    def start(self, project_name: str | None, log_dir: str, config: Info) -> None:
        raise NotImplementedError

    def send(self, info: Info) -> None:
        """Sends a report."""
        known = {key: value for key, value in info.items() if value is not None}
        self.module.log(known, step=info["iteration"])

    def finish(self) -> None:
        """Ends the run at the service."""

    def on_train_loss_report(self, train_info: Info) -> None:
        self.send(train_info)
        if self.wrapped_callback is not None:
            self.wrapped_callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: Info) -> None:
        self.send(val_info)
        if self.wrapped_callback is not None:
            self.wrapped_callback.on_val_loss_report(val_info)

    def close(self) -> None:
        """Ends the run at this service and at those that it wraps."""
        self.finish()
        if isinstance(self.wrapped_callback, ServiceCallback):
            self.wrapped_callback.close()


def _numbers(info: Info) -> dict[str, float]:
    """The values of a report without its iteration and what is not known yet."""
    return {k: float(v) for k, v in info.items() if k != "iteration" and v is not None}


def _run_name(log_dir: str) -> str:
    return os.path.basename(os.path.abspath(log_dir))


class WandBCallback(ServiceCallback):
    service = "wandb"

    def start(self, project_name: str | None, log_dir: str, config: Info) -> None:
        self.module.init(
            project=project_name, name=os.path.basename(log_dir), dir=log_dir, config=config
        )

    def finish(self) -> None:
        self.module.finish()


class SwanLabCallback(ServiceCallback):
    service = "swanlab"

    def start(self, project_name: str | None, log_dir: str, config: Info) -> None:
        logdir = os.path.join(log_dir, "swanlog")
        self.module.init(
            project=project_name,
            experiment_name=_run_name(log_dir),
            logdir=logdir,
            config=config,
        )

    def finish(self) -> None:
        self.module.finish()


class TrackioCallback(ServiceCallback):
    service = "trackio"

    def start(self, project_name: str | None, log_dir: str, config: Info) -> None:
        self.module.init(
            project=project_name or "pyloss", name=_run_name(log_dir), config=_plain(config)
        )

    def send(self, info: Info) -> None:
        self.module.log(_numbers(info), step=info["iteration"])

    def finish(self) -> None:
        self.module.finish()


class MLflowCallback(ServiceCallback):
    service = "mlflow"
    #: the longest value of a parameter that MLflow takes
    longest = 500

    def start(self, project_name: str | None, log_dir: str, config: Info) -> None:
        self.module.set_experiment(project_name or "pyloss")
        self.module.start_run(run_name=_run_name(log_dir))
        self.module.log_params({k: str(v)[: self.longest] for k, v in _plain(config).items()})

    def send(self, info: Info) -> None:
        self.module.log_metrics(_numbers(info), step=info["iteration"])

    def finish(self) -> None:
        self.module.end_run()


class TensorBoardCallback(ServiceCallback):
    """Writes event files to a new folder in `log_dir/tensorboard`, named by the time."""

    service = "tensorboardX"

    def start(self, project_name: str | None, log_dir: str, config: Info) -> None:
        begun = time.strftime("%Y%m%d-%H%M%S")
        self.writer = self.module.SummaryWriter(os.path.join(log_dir, "tensorboard", begun))
        rows = "".join(f"| {key} | {value} |\n" for key, value in _plain(config).items())
        self.writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}")

    def send(self, info: Info) -> None:
        for name, value in _numbers(info).items():
            self.writer.add_scalar(name, value, info["iteration"])
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class CSVCallback(ServiceCallback):
    """Writes `log_dir/metrics.csv`: a row for each report and each validation.

    The file is begun at the first report, when the run has moved the file of an earlier one. A
    resumed run replaces the rows from there on.
    """

    service = "csv"
    columns = (
        *("iteration", "train_loss", "val_loss", "learning_rate", "grad_norm"),
        *("tokens_per_second", "iterations_per_second", "trained_tokens", "updates"),
        *("peak_memory", "val_time"),
    )

    def start(self, project_name: str | None, log_dir: str, config: Info) -> None:
        self.path, self.begun = Path(log_dir) / CSV_FILE, False

    def send(self, info: Info) -> None:
        if not self.begun:
            self.begin(info["iteration"])
        append_whole(self.path, self.text(info))

    def begin(self, iteration: int) -> None:
        rows: list[Mapping[str, Any]] = []
        if self.path.is_file():
            found = csv.DictReader(io.StringIO(read_text(self.path)))
            rows = [row for row in found if _is_before(row.get("iteration"), iteration)]
        head = self.text({name: name for name in self.columns})
        write_text(self.path, head + "".join(map(self.text, rows)))
        self.begun = True

    def text(self, row: Mapping[str, Any]) -> str:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([row.get(name) for name in self.columns])
        return line.getvalue()


def _is_before(text: str | None, iteration: int) -> bool:
    return text is not None and text.isdecimal() and int(text) < iteration


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have a value, as text where they are no number."""
    return {
        key: value if isinstance(value, int | float) else str(value)
        for key, value in config.items()
        if value is not None
    }


SERVICES: dict[str, type[ServiceCallback]] = {
    "tensorboard": TensorBoardCallback,
    "trackio": TrackioCallback,
    "wandb": WandBCallback,
    "swanlab": SwanLabCallback,
    "mlflow": MLflowCallback,
    "csv": CSVCallback,
}
SUPPORT_CALLBACK = SERVICES  # mlx-lm's name


def check_services(report_to: str | None) -> list[str]:
    """The names in `report_to`. Raises ValueError for an unknown one."""
    names = [name.strip().lower() for name in (report_to or "").split(",") if name.strip()]
    for name in names:
        if name not in SERVICES:
            raise ValueError(
                f"report_to: {name!r} is not known; allowed: {', '.join(SERVICES)}, or several "
                f"with commas"
            )
    return list(dict.fromkeys(names))


def get_reporting_callbacks(
    report_to: str | None = None,
    project_name: str | None = None,
    log_dir: str | None = None,
    config: Info | None = None,
) -> ServiceCallback | None:
    """Return a callback for the services in `report_to`, or None if it names none.

    `report_to` is a name of `SERVICES`, or several with commas. `close()` of the callback ends the
    run at all of them.

    Raises:
        ValueError: unknown service name.
        ImportError: the service's package is missing; the message gives the install command.
    """
    callback: ServiceCallback | None = None
    for name in check_services(report_to):
        callback = SERVICES[name](project_name, log_dir, config, callback)
    return callback
