"""The progress display, the stream of a run's log, and losses drawn in a line."""

import io
import sys
import types

import pytest

from pyloss.tuner import progress
from pyloss.tuner.progress import ProgressReporter, log_stream, sparkline

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

    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Bar))
    assert ProgressReporter(4, stream=io.StringIO()).bar is None
    reporter = ProgressReporter(4, done=1)
    bar = reporter.bar
    assert "file" not in bar.options and (bar.options["total"], bar.options["initial"]) == (4, 1)
    reporter.line("hello")
    reporter.close()
    assert bar == ["hello", "closed"]


def test_outside_of_notebooks_there_is_no_widget(monkeypatch):
    assert not progress._in_notebook()
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", types.ModuleType("zmqshell"))
    monkeypatch.setattr(progress, "find_spec", lambda name: None)  # no ipywidgets
    assert not progress._in_notebook() and ProgressReporter(4).bar is None


def test_the_log_goes_where_no_terminal_is(monkeypatch):
    assert log_stream() == "stdout"  # pytest's
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert log_stream() == "stderr"
    monkeypatch.setattr(sys, "stdout", None)
    assert log_stream() == "stderr"


def test_a_bar_beside_a_log_elsewhere(monkeypatch):
    pytest.importorskip("tqdm")
    terminal, piped = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", piped)
    reporter = ProgressReporter(4, stream=terminal, log="stdout")
    reporter.advance(2.0)
    reporter.on_val_loss_report(VAL)
    reporter.close()
    assert piped.getvalue() == "iteration 10/4: val loss 2.2500, took 3.0 s\n"
    assert "\r" in terminal.getvalue() and "val loss" not in terminal.getvalue()


def test_a_line_of_bars_between_the_lowest_and_the_highest_value():
    assert sparkline([1.0, 8.0, 4.5, 1.0]) == "▁█▅▁" and sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    many = sparkline([100.0 - i for i in range(100)])
    assert len(many) == 40 and many[0] == "█" and many[-1] == "▁"
    assert list(many) == sorted(many, reverse=True)
    assert sparkline([0.0, 2.0, 8.0, 8.0], 2) == "▁█"


def test_a_log_beside_results_goes_to_standard_error(monkeypatch):
    import io
    import sys

    from pyloss.tuner.progress import log_beside_results, log_stream

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert log_stream() == "stdout"
    with log_beside_results():
        assert log_stream() == "stderr"
    assert log_stream() == "stdout"
