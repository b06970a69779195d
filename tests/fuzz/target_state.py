"""Trainer states to resume from: wrong types, impossible counters, missing and foreign arrays."""

import contextlib
import json
import re
import struct
import tempfile
from pathlib import Path

import tiny_files
import tiny_training
from mutation import words_of
from running import put_files
from target_safetensors import broken

from pyloss import nn, optim
from pyloss.tuner.run import checkpoints as state
from pyloss.tuner.run.metrics import METRICS_FILE

WORDS = words_of(
    "tuner/run/checkpoints",
    "tuner/run/restoring",
    "tuner/run/training_run",
    "tuner/data/batching",
    "optim/optimizer",
    "optim/state",
)
OPTIMIZERS = {
    "adamw": lambda: optim.AdamW(0.05),
    "sgd": lambda: optim.SGD(0.05, momentum=0.9),
    "adam_atan2": lambda: optim.AdamATan2(0.01),
    "lion": lambda: optim.Lion(0.01),
    "adafactor": lambda: optim.Adafactor(0.05),
    "muon": lambda: optim.Muon(0.02),
}
SETTINGS = {"iters": 3, "steps_per_eval": 2, "steps_per_save": 2}
ALLOWED = (FloatingPointError,)  # a run that resumes with infinite numbers says so and stops
CASES = []


def prepare():
    """Make folders of runs with each optimizer; one of them stops within an accumulation."""
    if CASES:
        return
    with _tiny():
        _make_cases()


@contextlib.contextmanager
def _tiny():
    """Use the tiny model's gradient instead of the tape's."""
    before = nn.value_and_grad
    tiny_training.install()
    try:
        yield
    finally:
        nn.value_and_grad = before


def _make_cases():
    for name, make_optimizer in OPTIMIZERS.items():
        for accumulation in (1, 2):
            with tempfile.TemporaryDirectory() as place, tiny_files.quiet():
                settings = {**SETTINGS, "grad_accumulation_steps": accumulation}
                tiny_training.run(Path(place), optimizer=make_optimizer(), **settings)
                files = {
                    file.name: _unmeasured(file)
                    for file in sorted(Path(place).iterdir())
                    if file.is_file()
                }
                CASES.append((name, accumulation, files))


def _unmeasured(file):
    """A file's bytes; measured times and memory are 1, so that a case is the same everywhere."""
    data = file.read_bytes()
    if file.name != METRICS_FILE:
        return data
    rows = [json.loads(line) for line in data.splitlines()]
    for row in rows:
        row.update({key: 1.0 for key in row if re.search("second|time|memory", key)})
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def make(m):
    name, accumulation, files = m.pick(CASES)
    files = dict(files)
    data = files[state.STATE_FILE]
    if m.chance(0.75) or m.pristine:
        size = struct.unpack_from("<Q", data)[0]
        header = json.loads(data[8 : 8 + size])
        key = next(iter(header["__metadata__"]))
        inner = m.json(header["__metadata__"][key], WORDS + list(header))
        header["__metadata__"] = {key: inner.decode("utf-8", "replace")}
        text = json.dumps(header).encode()
        files[state.STATE_FILE] = struct.pack("<Q", len(text)) + text + data[8 + size :]
    elif m.chance(0.7):
        files[state.STATE_FILE] = broken(m, data)
    else:
        files["adapter_config.json"] = m.json(files["adapter_config.json"], WORDS)
    return {"with": f"{name} {accumulation}".encode(), **files}


def use(files, folder):
    files = dict(files)
    name, accumulation = files.pop("with").decode().split()
    put_files(folder, files)
    with tiny_files.quiet(), _tiny():
        tiny_training.run(
            folder,
            optimizer=OPTIMIZERS[name](),
            resume=True,
            **SETTINGS | {"iters": 5},
            grad_accumulation_steps=int(accumulation),
        )
