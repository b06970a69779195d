"""The result of a run: its history as columns, its plot, and how it is shown."""

import sys
import types

import pytest
from tiny_training import Tiny, run, tiny_value_and_grad

from pyloss import nn
from pyloss.tuner.run.args import TrainingResult


@pytest.fixture(autouse=True)
def numpy_gradients(monkeypatch):
    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)


def test_the_history_has_the_reports_as_columns(tmp_path):
    settings = {"steps_per_report": 2, "steps_per_eval": 3}
    _, seen, result = run(tmp_path, Tiny(), iters=6, **settings)
    history = result.history
    assert history["iteration"] == [2, 4, 6] == [info["iteration"] for info in seen.train]
    for name in seen.train[0]:
        assert history[name] == [info[name] for info in seen.train]
    assert len(seen.val) > 1
    for column, name in (
        ("val_iteration", "iteration"),
        ("val_loss", "val_loss"),
        ("val_time", "val_time"),
    ):
        assert history[column] == [info[name] for info in seen.val]

    _, seen, more = run(tmp_path, Tiny(), iters=10, resume=True, **settings)
    assert more.history["iteration"] == [8, 10]
    assert more.history["val_iteration"] == [info["iteration"] for info in seen.val]


class Axes:
    def __init__(self):
        self.drawn, self.said = [], []

    def plot(self, x, y, marker, label):
        self.drawn.append((x, y, label))

    def get_legend_handles_labels(self):
        return [label for *_, label in self.drawn], []

    def __getattr__(self, name):
        return lambda *args: self.said.append((name, *args))


RESULT = TrainingResult(
    4,
    4,
    1234,
    0.25,
    3,
    False,
    {
        "iteration": [2, 4],
        "train_loss": [1.0, 0.5],
        "val_iteration": [0, 3],
        "val_loss": [2.0, 0.25],
    },
)


def test_a_plot_has_both_losses(monkeypatch):
    axes = Axes()
    assert RESULT.plot(axes) is axes
    assert axes.drawn == [([2, 4], [1.0, 0.5], "training"), ([0, 3], [2.0, 0.25], "validation")]
    assert ("legend",) in axes.said
    pyplot = types.SimpleNamespace(subplots=lambda: (None, axes))
    monkeypatch.setitem(sys.modules, "matplotlib", types.SimpleNamespace(pyplot=pyplot))
    assert RESULT.plot() is axes
    empty = Axes()
    TrainingResult(0, 0, 0, None, None, False).plot(empty)
    assert not empty.drawn and ("legend",) not in empty.said


def test_a_plot_without_matplotlib_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        RESULT.plot()


def test_a_result_is_short():
    assert repr(RESULT) == (
        "TrainingResult(iterations=4, updates=4, trained_tokens=1234, best_loss=0.25, "
        "best_iteration=3, stopped_early=False)"
    )
    page = RESULT._repr_html_()
    assert "1,234" in page and "1.0000, 0.5000" in page and "0.2500 at iteration 3" in page
    assert "<table>" in TrainingResult(0, 0, 0, None, None, True)._repr_html_()
