"""YAML files and command lines: odd settings, malformed files, all flags of all but `bench`."""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import target_adapter
import tiny_files
from mutation import WHOLE, Mutator
from running import put_files

from pyloss.tuner.run.settings import LORA_SCHEMA, SCHEMA

BASE = """\
# settings of mlx_lm.lora
model: "model"
data: "data"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.01
seed: 0
num_layers: -1
batch_size: 2
iters: 1
val_batches: 1
learning_rate: 1e-5
steps_per_report: 1
steps_per_eval: 2
adapter_path: "adapters"
save_every: 2
test: false
max_seq_length: 64
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 2
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 10
  warmup_init: 1e-7
  arguments: [1e-5, 100, 1e-7]
"""
HEAVY = ["[" * 5000, "{" * 2000, "9" * 5000, "- " * 3000, "a: " * 500, "'" * 5000, "&x " * 1000]
ODD = [".inf", "-.inf", ".nan", "1e400", "0x" + "f" * 40, "2020-01-01", "!!binary aGk=", "!!set {a, b}", "~", "[]", "{}", "''",
       "&a [*a]", "{*x: 1}", "? [a]", "18446744073709551616", "1_000", "0b1", "1:30", "yes", "off", "null", "\t", "!!python/name:os.system", "1e-5", "- 1", "a: b: c",
       "&a [x,x,x,x,x,x,x,x]", "!!timestamp x", "!!int x", "!!float x", "2001-99-99", "0o9", "1e", "=", "<<: 1", "!!omap [1]"]  # fmt: skip
LAUGHS = (
    "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{c}: &{c} [{','.join(['*' + p] * 10)}]\n" for p, c in zip("abcdefgh", "bcdefghi"))
    + "model: *i\n"
)
# These settings decide how long a valid command takes, so they stay small.
WORK = {"iters", "max_tokens", "loftq_rounds", "rank", "batch_size", "loftq_rank", "train_tokens"}
VALUES = [
    "",
    " ",
    "x",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1e-320",
    "0.5",
    "1.5",
    "-1",
    "0",
    "1",
    "2",
    "true",
    "None",
    "é",
    "-",
    "--",
    "{",
    "[]",
    '{"a": 1}',
    "\udcff",
    "~",
    "a b",
    "9" * 5000,
]
VALUES += [str(n) for n in WHOLE]
PATHS = [
    "adapters",
    "data",
    "model",
    "nowhere",
    "",
    "~nobody",
    "x/y",
    "model/config.json",
    "out",
    "\udcff",
    "a" * 300,
    "data/train.jsonl",
    ".",
    "yaml",
    "/dev/null",
]
WORDS = [
    *SCHEMA,
    *LORA_SCHEMA,
    "adam",
    "adamw",
    "sgd",
    "adam_atan2",
    "adafactor",
    "lion",
    "muon",
    "dora",
    "full",
    "cosine_decay",
    "linear_schedule",
    "exponential_decay",
    "step_decay",
    "arguments",
    "warmup",
]
_COMMANDS, _FILES, _ADAPTER, _PARSER = {}, {}, {}, []
COMMANDS = ("train", "eval", "generate", "fuse", "export", "convert", "info")
RIGHT = {
    "train": [
        "--model",
        "model",
        "--data",
        "data",
        "--iters",
        "1",
        "--num-layers",
        "-1",
        "--rank",
        "2",
        "--batch-size",
        "1",
    ],
    "eval": ["--model", "model", "--data", "data", "--split", "train"],
    "generate": ["--model", "model", "--prompt", "hello", "--max-tokens", "2"],
    "fuse": ["--model", "model", "--adapter-path", "adapter", "--save-path", "out"],
    "export": ["--model", "model", "--to", "hf", "--output", "out"],
    "convert": ["--model", "model", "--output", "out"],
    "info": [],
}


def prepare():
    """Read each command's flags from the one parser; run each command once, for its imports."""
    from pyloss.cli.flags import build_parser

    if _COMMANDS:
        return
    parser = build_parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in COMMANDS:
                _COMMANDS[name] = [
                    a
                    for a in action.choices[name]._actions
                    if a.option_strings and a.dest != "help"
                ]
    _PARSER.append(parser)
    target_adapter.prepare()
    model = {f"model/{name}": data for name, data in tiny_files.folder("llama").items()}
    _FILES.update(model, **{"data/train.jsonl": b'{"text": "hello"}\n{"text": "he 12"}\n'})
    _ADAPTER.update({f"adapter/{name}": data for name, data in target_adapter.CASES[0][1].items()})
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        put_files(Path(place), {**_FILES, **_ADAPTER})
        os.chdir(place)
        try:
            for command, arguments in RIGHT.items():
                run([command, *arguments])
        finally:
            os.chdir(before)


def _flag(m, action):
    """A flag, often with as many values as it takes."""
    name = m.pick(action.option_strings)
    if action.nargs == 0 and not m.chance(0.05):
        return [name]
    dest = action.dest
    if dest in WORK:
        values = ["0", "1", "2", "-1", "x", "1.5", "nan", "", str(2**63), "9" * 400, "-" + "9" * 30]
    elif any(word in dest for word in ("path", "data", "model", "output", "config", "file")):
        values = PATHS if m.chance(0.7) else VALUES
    elif action.choices:
        values = [*map(str, action.choices), "x", ""]
    else:
        values = VALUES if m.chance(0.8) else [m.text(WORDS)]
    return [name, *(m.pick(values) for _ in range(1 if m.chance(0.95) else m.below(3)))]


def _yaml(m):
    if not m.pristine and m.chance(0.02):
        return LAUGHS.encode()
    parts = [
        part for part in re.split(r"\n(?! )", BASE.rstrip()) if m.pristine or m.chance(0.35)
    ] or ["iters: 1"]
    lines = "\n".join(parts).split("\n")
    for _ in range(m.count() if m.chance(0.8) else 0):
        at = m.below(len(lines))
        head, colon, _ = lines[at].partition(":")
        kind = m.below(8)
        if colon and kind < 5:
            key = head.strip()
            value = (
                m.pick(ODD)
                if m.chance(0.5)
                else m.pick(HEAVY)
                if m.chance(0.02)
                else m.pick(VALUES)
            )
            if key in WORK and (
                value.strip().lstrip("+").isdecimal() or value.startswith("0") or "e" in value
            ):
                value = m.pick(
                    ("0", "-1", "1.5", "9" * 400, "18446744073709551616", "x", "[]", "~")
                )
            lines[at] = f"{head}: {value}"
        elif kind == 5:
            lines.append(f"{m.text(WORDS)}: {m.pick(ODD)}")
        else:
            return m.lines("\n".join(lines), WORDS + ODD)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def make(m: Mutator):
    files = {"yaml": _yaml(m)}
    command = m.pick(COMMANDS)
    arguments = list(RIGHT[command])
    if m.chance(0.5):
        return {**files, "argv": b"null"}
    if command in ("train", "eval") and m.chance(0.5):
        arguments += ["-c", "yaml"]
    else:
        files.pop("yaml")
    for _ in range(m.count()):
        if _COMMANDS[command] and m.chance(0.9):
            arguments += _flag(m, m.pick(_COMMANDS[command]))
        elif arguments:
            at = m.below(len(arguments))
            works = at and arguments[at - 1].removeprefix("--").replace("-", "_") in WORK
            arguments[at] = (
                m.pick(VALUES + PATHS)
                if m.chance(0.5) and not works
                else m.pick(("--x", "-1", "--help", ""))
            )
    if m.pristine:
        arguments = arguments if "-c" not in arguments else RIGHT[command]
    return {**files, "argv": json.dumps([command, *arguments]).encode()}


def use(files, folder):
    from pyloss.cli import entry

    files = dict(files)
    arguments = json.loads(files.pop("argv"))
    if arguments is None:
        put_files(folder, files)
        return settings(folder / "yaml")
    put_files(folder, {**files, **_FILES, **(_ADAPTER if arguments[0] == "fuse" else {})})
    os.chdir(folder)
    # Only in this process: one parser for all cases, and no hub.
    entry.build_parser = lambda prog: _PARSER[0]
    sys.modules |= {"datasets": None, "huggingface_hub": None}
    run(arguments)


def settings(path):
    """Read a YAML file as a run does before it loads a model."""
    from pyloss.cli.commands.training import make_optimizer
    from pyloss.tuner.run.settings import merge_settings

    make_optimizer(merge_settings({}, path))


def run(arguments):
    """Run a command in this process: status 0, or one line that says what is wrong."""
    from pyloss import cli

    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        status = cli.main(arguments)
    if status == 0:
        return
    lines = said.getvalue().strip().splitlines()
    assert status in (1, 2), f"status {status} of {arguments}: {lines}"
    assert lines, f"nothing was said about {arguments}"
    raise ValueError(lines[-1].removeprefix("pyloss: error: "))
