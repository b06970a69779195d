"""The folder of a run: settings, weights, state and metrics; and models read back from it.

- `config.yaml`: the settings, as `read_settings` reads them, with the sizes of the data.
- `model.safetensors`: the weights under the authors' names; with `ema` the averages.
- `step_1000.safetensors`: the same of an evaluation, with `checkpoint_every_eval`.
- `trainer_state.safetensors`: all that a resumed run needs.
- `metrics.jsonl`: reports and evaluations; `evaluation.json`: the latest evaluation, by step.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pyloss.io.files import PathLike, user_path, write_json, write_safetensors, write_text
from pyloss.io.locks import locked
from pyloss.io.outputs import kept_note, make_folder, set_aside
from pyloss.recursive.checkpoints import load_checkpoint, state_dict
from pyloss.recursive.evaluation import RecursiveEvaluation
from pyloss.recursive.models import RecursiveModel
from pyloss.recursive.settings import FROM_DATA, make_head, read_settings
from pyloss.tuner.callbacks import CSV_FILE
from pyloss.tuner.run.checkpoints import uninterrupted, write_tree
from pyloss.tuner.run.metrics import METRICS_FILE
from pyloss.tuner.run.run_folder import STATE_FILE

CONFIG_FILE, MODEL_FILE = "config.yaml", "model.safetensors"
EVALUATION_FILE = "evaluation.json"
#: the kind of a state file, in its metadata
STATE_KEY = "pyloss_recursive_state_1"
_NUMBERED = re.compile(r"step_\d+\.safetensors")


class RunFolder:
    """The locked folder of a run; with None nothing is written."""

    def __init__(self, folder: PathLike | None) -> None:
        self.path: Path | None = None if folder is None else user_path(folder)
        self.saved_at: Path | None = None

    def open(
        self, config: Mapping[str, Any], resuming: bool, overwrite: bool, held: ExitStack
    ) -> list[str]:
        """Makes and locks the folder, and writes the settings; returns notes for the user.

        Files of an earlier run move to `previous-N`, or go with `overwrite`, unless it is resumed.
        """
        place, notes = self.path, []
        if place is None:
            return []
        make_folder(place, "folder of the run")
        held.enter_context(locked(place))
        text = yaml_text(config)
        if not resuming and overwrite:
            for name in run_files(place):
                (place / name).unlink(missing_ok=True)
        elif not resuming and (aside := set_aside(place, run_files(place))) is not None:
            notes.append(kept_note(aside))
        write_text(place / CONFIG_FILE, text)
        return notes

    def save_state(self, tree: Mapping[str, Any]) -> None:
        if self.path is not None:
            with uninterrupted():
                write_tree(self.path / STATE_FILE, STATE_KEY, tree)
            self.saved_at = self.path / STATE_FILE

    def save_model(self, model: RecursiveModel, name: str = MODEL_FILE) -> None:
        if self.path is not None:
            write_safetensors(self.path / name, state_dict(model, "model."))

    def save_evaluation(self, found: RecursiveEvaluation, update: int) -> None:
        if self.path is not None:
            write_json(self.path / EVALUATION_FILE, {"update": update, **found.as_mapping()})


def run_files(folder: Path) -> list[str]:
    """Names of the files of a run in `folder`; the state comes last."""
    found = sorted(name for name in os.listdir(folder) if _NUMBERED.fullmatch(name))
    return [*found, MODEL_FILE, CONFIG_FILE, EVALUATION_FILE, METRICS_FILE, CSV_FILE, STATE_FILE]


def load_recursive(path: PathLike, **changes: Any) -> Any:
    """The model of a run's folder, with its weights, in its `ACTLossHead` and in evaluation mode.

    `path` is a folder, or one of its files of weights. `changes` are settings of the architecture,
    such as `halt_max_steps=32`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights do not fit the settings; the message lists the differences.
    """
    place = user_path(path)
    folder, weights = (place, place / MODEL_FILE) if place.is_dir() else (place.parent, place)
    for needed in (folder / CONFIG_FILE, weights):
        if not needed.is_file():
            raise FileNotFoundError(f"no recursive model in {folder}: {needed.name} is missing")
    arch = {**read_settings(folder / CONFIG_FILE).arch, **changes}
    if missing := [name for name in FROM_DATA if name not in arch]:
        raise ValueError(f"{folder / CONFIG_FILE}: lacks {', '.join(missing)}")
    head = make_head(arch)
    load_checkpoint(head.model, weights)
    return head.eval()


def yaml_text(values: Mapping[str, Any], indent: str = "") -> str:
    """A mapping as YAML: scalars and lists as JSON, which is YAML, too."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key}:\n{yaml_text(value, indent + '  ')}")
        elif value is not None:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=os.fspath)
            lines.append(f"{indent}{key}: {text}\n")
    return "".join(lines)
