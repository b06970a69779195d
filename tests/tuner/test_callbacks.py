"""The progress display, and reporters to services that need a package."""

import io
import sys
import types

import pytest

from pyloss.tuner import callbacks
from pyloss.tuner.callbacks import ProgressReporter, TrainingCallback, get_reporting_callbacks

TRAIN = {
    "iteration": 10,
    "train_loss": 2.5,
    "learning_rate": 1e-5,
    "iterations_per_second": 0.5,
    "tokens_per_second": 321.0,
    "trained_tokens": 4096,
    "peak_memory": 1.25,
}
VAL = {"iteration": 10, "val_loss": 2.25, "val_time": 3.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    reporter = ProgressReporter(100, stream=stream)
    reporter.advance(2.0)
    reporter.on_train_loss_report(TRAIN)
    reporter.on_val_loss_report(VAL)
    reporter.close()
    first, second = stream.getvalue().splitlines()
    for part in (
        "10/100",
        "2.5",
        "1.000e-05",
        "0.500 it/s",
        "321.0 tokens/s",
        "4096 tokens",
        "1.25 GB",
    ):
        assert part in first
    assert "val loss 2.25" in second and "left" not in first


def test_the_line_ends_with_the_time_that_is_left():
    stream = io.StringIO()
    reporter = ProgressReporter(100, stream=stream)
    reporter.on_train_loss_report(TRAIN | {"seconds_left": 4320.0})
    reporter.on_train_loss_report(TRAIN | {"seconds_left": 0.0})
    first, second = stream.getvalue().splitlines()
    assert first.endswith("peak memory 1.25 GB, 1 h 12 min left") and second.endswith(" GB")


def test_a_bar_on_a_terminal_with_the_lines_above_it():
    pytest.importorskip("tqdm")
    stream = Terminal()
    reporter = ProgressReporter(4, done=1, stream=stream)
    reporter.advance(2.0)
    reporter.on_val_loss_report(VAL)
    assert reporter.bar.n == 2
    reporter.close()
    reporter.close()
    assert "\r" in stream.getvalue()
    assert "val loss 2.25" in stream.getvalue()


def test_without_tqdm_a_terminal_gets_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    ProgressReporter(4, stream=stream).line("hello")
    assert stream.getvalue() == "hello\n"


def test_a_notebook_with_widgets_gets_their_bar(monkeypatch):
    class Bar(list):
        def __init__(self, **options):
            self.options = options

        def write(self, text, file):
            self.append(text)

        def close(self):
            self.append("closed")

    monkeypatch.setattr(callbacks, "_in_notebook", lambda: True)
    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Bar))
    assert ProgressReporter(4, stream=io.StringIO()).bar is None
    reporter = ProgressReporter(4, done=1)
    bar = reporter.bar
    assert "file" not in bar.options and (bar.options["total"], bar.options["initial"]) == (4, 1)
    reporter.line("hello")
    reporter.close()
    assert bar == ["hello", "closed"]


def test_outside_of_notebooks_there_is_no_widget(monkeypatch):
    assert not callbacks._in_notebook()
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", types.ModuleType("zmqshell"))
    monkeypatch.setattr(callbacks, "find_spec", lambda name: None)  # no ipywidgets
    assert not callbacks._in_notebook() and ProgressReporter(4).bar is None


def test_callbacks_do_nothing_unless_overridden():
    TrainingCallback().on_train_loss_report(TRAIN)
    TrainingCallback().on_val_loss_report(VAL)


def test_no_service_no_callback():
    assert get_reporting_callbacks() is None
    assert get_reporting_callbacks("") is None


def test_unknown_and_missing_services_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match="report_to: 'mlflow' is not known; allowed: wandb, swanlab"
    ):
        get_reporting_callbacks("wandb,mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        get_reporting_callbacks("wandb")


def test_reports_reach_every_service(monkeypatch):
    said = []
    for name in ("wandb", "swanlab"):
        module = types.ModuleType(name)
        module.init = lambda name=name, **options: said.append((f"init {options['project']}",))
        module.log = lambda info, step, name=name: said.append((name, step))
        monkeypatch.setitem(sys.modules, name, module)
    callback = get_reporting_callbacks("WandB, swanlab", "mine", "runs/adapters", {"iters": 3})
    callback.on_train_loss_report(TRAIN)
    callback.on_val_loss_report(VAL)
    assert said == [("init mine",)] * 2 + [("swanlab", 10), ("wandb", 10)] * 2
