"""The folder of a training run: its files, its configuration, and the start of a run in it.

`adapter_config.json` travels with the adapter, so it holds no paths of this machine. Of an absolute
path, or one in a home folder, only the last name is kept. Hub names and relative paths are kept
unchanged. Users may add their own keys: keys that neither pyloss nor mlx-lm writes are kept when a
run rewrites the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from pyloss.errors import FormatError
from pyloss.io.files import read_json, write_json
from pyloss.io.outputs import kept_note, set_aside
from pyloss.tuner.adapters.layout import CONFIG_FILE, MLX_FILE, PEFT_FILE
from pyloss.tuner.callbacks import CSV_FILE
from pyloss.tuner.run.metrics import METRICS_FILE

ADAPTER_FILE = MLX_FILE
BEST_FILE = "best_adapters.safetensors"
STATE_FILE = "trainer_state.safetensors"
REPORT_FILE = "report.html"
#: config keys that must match for a saved adapter to fit
ADAPTER_KEYS = ("fine_tune_type", "num_layers", "lora_parameters", "full_keys")

_NUMBERED = re.compile(r"\d{7,}_adapters\.safetensors")
#: keys whose values are paths; values of other keys may start with a slash without being one
_PLACES = ("model", "data", "adapter_path", "resume_adapter_file", "config", "loftq_model", "path")


def numbered(iteration: int) -> str:
    """File name of the adapter at an iteration, as in mlx-lm."""
    return f"{iteration:07d}_{ADAPTER_FILE}"


def run_files(folder: Path, adapter: str = ADAPTER_FILE) -> list[str]:
    """Names of the files that runs and adapter exports write to `folder`, except the configuration.

    `adapter` is the file name of this run's adapter. The state comes last: a removal cut short
    leaves the run resumable.
    """
    found = sorted(name for name in os.listdir(folder) if _NUMBERED.fullmatch(name))
    found += [BEST_FILE, ADAPTER_FILE, PEFT_FILE, "adapter_model.bin", adapter]
    found += [METRICS_FILE, CSV_FILE, REPORT_FILE, STATE_FILE]
    return list(dict.fromkeys(found))


def portable(value: Any, key: str = "") -> Any:
    """Return a configuration without paths of this machine; see the module's docstring."""
    if isinstance(value, Mapping):
        return {name: portable(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item, key) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if (
        isinstance(value, str)
        and key in _PLACES
        and (os.path.isabs(value) or value.startswith("~"))
    ):
        name = PurePath(value).name
        # "./data" is no dataset's name on the hub.
        return f"./{name}" if key == "data" else name
    return value


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the adapter configuration in `folder`; empty if it is missing or unreadable."""
    with suppress(FileNotFoundError, FormatError):
        return dict(read_json(folder / CONFIG_FILE))
    return {}


def with_own_keys(config: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` without paths of this machine, plus the user's keys in the replaced `old`.

    Raises TypeError or ValueError for a value that JSON cannot represent.
    """
    from pyloss.tuner.run.settings import SCHEMA

    # PEFT writes every key of its files itself: if either file is PEFT's, no key is the user's.
    own = {} if "peft_type" in old or "peft_type" in config else old
    known = {*SCHEMA, *ADAPTER_KEYS, "system_prompt"}
    kept = {key: value for key, value in own.items() if key not in known}
    return kept | portable(json.loads(json.dumps(dict(config), allow_nan=False, default=os.fspath)))


def prepare_folder(
    folder: Path,
    adapter: str,
    config: Mapping[str, Any] | None,
    resuming: bool,
    overwrite: bool = False,
) -> list[str]:
    """Start a run in the existing, locked `folder`: write `adapter_config.json`, return user notes.

    The files of an earlier run first move to `previous-N` (see `io.outputs`), or are removed with
    `overwrite`, so the new configuration never lies next to another run's adapter. `adapter` is the
    file name of this run's adapter. A configuration without a run of which keys would change moves
    there, too.

    Raises:
        ValueError: the run to resume has another adapter configuration.
        OSError: a file cannot be written; the message names it.
    """
    old, notes = read_adapter_config(folder), []
    # This fails for values that JSON cannot represent, so it comes before any file moves.
    new = None if config is None else with_own_keys(config, old)
    if resuming:
        differing = [key for key in ADAPTER_KEYS if new and old and old.get(key) != new.get(key)]
        if new and differing:
            was = ", ".join(
                f"{key} {old.get(key)!r:.200} (now {new.get(key)!r:.200})" for key in differing
            )
            raise ValueError(
                f"the run to resume in {folder} has {was}; give the same, or start without resume"
            )
    elif overwrite:
        for name in run_files(folder, adapter):
            (folder / name).unlink(missing_ok=True)
    else:
        aside = set_aside(folder, run_files(folder, adapter), [CONFIG_FILE])
        if aside is None and new is not None and any(new.get(k) != v for k, v in old.items()):
            # No run wrote it: a script did, before it called train.
            aside = set_aside(folder, [CONFIG_FILE])
        if aside is not None:
            notes.append(kept_note(aside))
    if new is not None:
        write_json(folder / CONFIG_FILE, new, sort_keys=True)
    return notes
