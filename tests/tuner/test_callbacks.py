"""Reports to services, most of which need a package."""

import csv
import sys
import types

import pytest

from pyloss.tuner.callbacks import SERVICES, TrainingCallback, get_reporting_callbacks

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


def test_callbacks_do_nothing_unless_overridden():
    TrainingCallback().on_train_loss_report(TRAIN)
    TrainingCallback().on_val_loss_report(VAL)


def test_no_service_no_callback():
    assert get_reporting_callbacks() is None
    assert get_reporting_callbacks("") is None


def test_unknown_and_missing_services_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match="report_to: 'comet' is not known; allowed: tensorboard, trackio, wandb"
    ):
        get_reporting_callbacks("wandb,comet")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"wandb needs .*pyloss\[wandb\]"):
        get_reporting_callbacks("wandb")


def test_reports_reach_every_service(monkeypatch):
    said = []
    for name in ("wandb", "swanlab"):
        module = types.ModuleType(name)
        module.init = lambda name=name, **options: said.append((f"init {options['project']}",))
        module.log = lambda info, step, name=name: said.append((name, step, len(info)))
        module.finish = lambda name=name: said.append((name,))
        monkeypatch.setitem(sys.modules, name, module)
    callback = get_reporting_callbacks("WandB, swanlab", "mine", "runs/adapters", {"iters": 3})
    callback.on_train_loss_report(TRAIN | {"grad_norm": None})
    callback.on_val_loss_report(VAL)
    callback.close()
    assert said[:2] == [("init mine",)] * 2
    assert said[2:] == [
        ("swanlab", 10, 7),
        ("wandb", 10, 7),
        ("swanlab", 10, 3),
        ("wandb", 10, 3),
        ("swanlab",),
        ("wandb",),
    ]


def test_a_table_of_reports(tmp_path):
    def rows():
        with open(tmp_path / "metrics.csv", newline="") as file:
            return [(row["iteration"], row["train_loss"]) for row in csv.DictReader(file)]

    def report(*iterations):
        callback = get_reporting_callbacks("csv", None, str(tmp_path), {})
        for iteration in iterations:
            callback.on_train_loss_report(TRAIN | {"iteration": iteration, "grad_norm": None})
        callback.on_val_loss_report(VAL | {"iteration": iterations[-1]})
        callback.close()

    report(5, 10)
    assert rows() == [("5", "2.5"), ("10", "2.5"), ("10", "")]
    report(10, 15)  # resumed from a state before iteration 10
    assert rows() == [("5", "2.5"), ("10", "2.5"), ("15", "2.5"), ("15", "")]


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"csv", "wandb", "swanlab"}))
def test_missing_packages_name_their_extra(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, SERVICES[name].service, None)
    with pytest.raises(ImportError, match=rf"pip install \"pyloss\[{name}\]\""):
        get_reporting_callbacks(name, None, str(tmp_path))


def test_tensorboard_reads_its_events(tmp_path):
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    callback = get_reporting_callbacks("tensorboard", None, str(tmp_path), {"iters": 3})
    callback.on_train_loss_report(TRAIN)
    callback.on_val_loss_report(VAL)
    callback.close()
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    found = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in ("train_loss", "val_loss", "peak_memory")
    }
    assert found == {
        "train_loss": [(10, 2.5)],
        "val_loss": [(10, 2.25)],
        "peak_memory": [(10, 1.25)],
    }
