"""The folder of a training run: which files are a run's, what its configuration says, and how a run
begins there.

`adapter_config.json` goes wherever the adapter goes. So it holds no place of this machine: of an
absolute path, or one in a home folder, the last name stays; names, names on the hub and relative
paths stay as they were given. It is not only ours: keys that neither pyloss nor mlx-lm writes are
    the user's, and stay when a run writes the file anew.
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
from pyloss.tuner.adapters.stored import CONFIG_FILE, MLX_FILE, PEFT_FILE

ADAPTER_FILE = MLX_FILE
BEST_FILE = "best_adapters.safetensors"
STATE_FILE = "trainer_state.safetensors"
#: what of the config decides whether an adapter fits it
ADAPTER_KEYS = ("fine_tune_type", "num_layers", "lora_parameters", "full_keys")

_NUMBERED = re.compile(r"\d{7,}_adapters\.safetensors")
#: keys whose values are places: a text of another key may begin with a slash and mean none
_PLACES = ("model", "data", "adapter_path", "resume_adapter_file", "config", "loftq_model", "path")


def numbered(iteration: int) -> str:
    """The name of the adapter of an iteration, which is mlx-lm's."""
    return f"{iteration:07d}_{ADAPTER_FILE}"


def run_files(folder: Path, adapter: str = ADAPTER_FILE) -> list[str]:
    """The names of what runs and exports of adapters leave in `folder`, but for the configuration;
    `adapter` is this run's.

    The state is the last: while anything is there to resume, it is.
    """
    found = sorted(name for name in os.listdir(folder) if _NUMBERED.fullmatch(name))
    found += [BEST_FILE, ADAPTER_FILE, PEFT_FILE, "adapter_model.bin", adapter, STATE_FILE]
    return list(dict.fromkeys(found))


def portable(value: Any, key: str = "") -> Any:
    """A configuration without places of this machine; see the top of this file."""
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
        return PurePath(value).name
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter configuration in `folder`; empty where there is none that can be read."""
    with suppress(FileNotFoundError, FormatError):
        return dict(read_json(folder / CONFIG_FILE))
    return {}


def with_own_keys(config: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, without places of this machine, and the keys of `old`, the file it replaces, that a
    user put there.

    Raises TypeError or ValueError for a value that JSON has no form for.
    """
    from pyloss.tuner.run.settings import SCHEMA

    # In PEFT's file, and for what follows one, every key is the library's.
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
    """Begin a run in `folder`, which exists and is locked, and write `adapter_config.json`. Gives
    notes for the user.

    The files of an earlier run move to `previous-N` (see `keeping`) before anything new is written,
    or with `overwrite` are removed. So the configuration never lies beside another one's adapter.
    `adapter` is the name of this run's adapter.

    Raises ValueError for a run to resume whose adapter is configured otherwise, OSError naming what
    cannot be written.
    """
    old, notes = read_config(folder), []
    # Before anything moves: this fails for what JSON cannot say.
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
        if aside is not None:
            notes.append(kept_note(aside))
    if new is not None:
        write_json(folder / CONFIG_FILE, new, sort_keys=True)
    return notes
