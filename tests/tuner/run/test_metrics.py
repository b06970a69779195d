"""`metrics.jsonl`: its lines, and that a stopped and resumed run has those of an unstopped one."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import Tiny, run, tiny_value_and_grad

import pyloss
from pyloss import nn
from pyloss.errors import FormatError
from pyloss.io import files
from pyloss.tuner.run.metrics import METRICS_FILE, MetricsLog, column, read_metrics

#: of the wall clock and the process
TIMES = ("seconds", "iterations_per_second", "tokens_per_second", "val_time", "peak_memory")


@pytest.fixture(autouse=True)
def numpy_gradients(monkeypatch):
    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)


def timeless(folder):
    return [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in read_metrics(folder)
    ]


def test_each_report_and_validation_is_a_line(tmp_path):
    _, seen, _ = run(tmp_path, iters=6, steps_per_report=2, steps_per_eval=3)
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert rows == read_metrics(tmp_path)
    trained = [row for row in rows if "train_loss" in row]
    assert column(rows, "train_loss") == list(seen.losses.items())
    assert column(rows, "val_loss") == list(seen.val_losses.items())
    assert [row["iteration"] for row in rows] == [0, 2, 3, 4, 6, 6]
    assert set(trained[0]) == set(seen.train[0]) - {"seconds_left"} | {"seconds"}
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    assert all(row["grad_norm"] > 0 and row["trained_tokens"] for row in trained)


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(None, iters=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stops", [(5,), (3, 7), (4, 4), (10,)])
def test_a_resumed_run_has_the_lines_of_one_that_was_not_stopped(tmp_path, stops):
    settings = {"steps_per_report": 2, "steps_per_eval": 4, "steps_per_save": 3}
    run(tmp_path / "whole", iters=12, **settings)
    for count, iters in enumerate((*stops, 12)):
        run(tmp_path / "parts", Tiny(seed=count), iters=iters, resume=count > 0, **settings)
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    seconds = [row["seconds"] for row in read_metrics(tmp_path / "parts")]
    assert seconds == sorted(seconds)


def test_lines_after_the_state_are_dropped_and_a_torn_one_too(tmp_path):
    run(tmp_path, iters=4)
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"iteration": 5, "train_loss": 1.0}\n{"iteration": 6, "val_lo')
    assert [row["iteration"] for row in read_metrics(tmp_path)][-1] == 5
    run(tmp_path, Tiny(seed=2), iters=6, resume=True)
    run(tmp_path / "whole", iters=6)
    assert timeless(tmp_path) == timeless(tmp_path / "whole")


def test_a_resume_into_another_folder_takes_the_lines_along(tmp_path):
    run(tmp_path / "a", iters=4)
    run(tmp_path / "b", Tiny(seed=2), iters=6, resume=tmp_path / "a")
    run(tmp_path / "whole", iters=6)
    assert timeless(tmp_path / "b") == timeless(tmp_path / "whole")


def test_a_new_run_moves_the_lines_of_the_earlier_one(tmp_path):
    run(tmp_path, iters=4)
    before = (tmp_path / METRICS_FILE).read_bytes()
    run(tmp_path, iters=2)
    assert (tmp_path / "previous-1" / METRICS_FILE).read_bytes() == before
    assert read_metrics(tmp_path)[-1]["iteration"] == 2


KILLED = """
import sys
from pathlib import Path
from tiny_training import install, run

install()
print("ready", flush=True)
run(Path(sys.argv[1]), iters=100000, steps_per_eval=7, steps_per_save=50)
"""


def test_a_killed_run_leaves_whole_lines(tmp_path):
    path = os.pathsep.join((str(Path(pyloss.__file__).parents[1]), *sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path, "PYLOSS_NUM_THREADS": "1"},
    )
    assert process.stdout is not None and process.stdout.readline()
    place = tmp_path / METRICS_FILE
    while not place.exists() or place.stat().st_size < 20000:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    text = place.read_text()
    assert text.endswith("}\n") and len(read_metrics(tmp_path)) == text.count("\n")


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / METRICS_FILE)
    log.add({"iteration": 1, "val_loss": float("inf")})
    before = (tmp_path / METRICS_FILE).read_bytes()
    assert json.loads(before) == {"iteration": 1, "val_loss": None}
    write = os.write
    monkeypatch.setattr(files.os, "write", lambda place, raw: write(place, raw[:5]))
    with pytest.raises(OSError, match=f"cannot write: No space.*{METRICS_FILE}") as raised:
        log.add({"iteration": 2, "val_loss": 1.0})
    assert raised.value.errno == errno.ENOSPC
    assert (tmp_path / METRICS_FILE).read_bytes() == before


@pytest.mark.parametrize(
    "text, said",
    [
        ("[1]\n", "line 1: is no object with an iteration"),
        ('{"iteration": true}\n', "line 1: is no object with an iteration"),
        ('{"iteration": 1}\n{"iteration": 2, "train_loss": "low"}\n', "line 2: train_loss is no"),
        ("{\n", "line 1: not JSON"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, text, said):
    (tmp_path / METRICS_FILE).write_text(text)
    with pytest.raises(FormatError, match=said):
        read_metrics(tmp_path)


def test_the_losses_are_drawn_at_the_end(tmp_path, capsys):
    run(tmp_path, iters=6, progress=True)
    run(tmp_path, Tiny(seed=3), iters=9, progress=True, resume=True)
    lines = capsys.readouterr().out.splitlines()
    train, val = lines[-2:]
    assert train.startswith("train loss ") and len(train.split()[3]) == 9
    assert val.startswith("val loss ") and len(val.split()[3]) == 4
    assert f"{read_metrics(tmp_path)[-1]['val_loss']:.4f}" == val.split()[-1]
