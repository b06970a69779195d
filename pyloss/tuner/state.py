"""Checkpoints of a training run: what is written, in which order, and how a run comes back from it.

In the adapter's folder:

- `adapters.safetensors`, `adapter_config.json`: the adapter, as mlx-lm lays it out; what other programs load.
- `0000100_adapters.safetensors`: the adapter at iteration 100, as mlx-lm names it.
- `best_adapters.safetensors`: the adapter with the lowest validation loss so far.
- `trainer_state.safetensors`: all that a resumed run needs, its own copy of the adapter included.

A resumed run reads the last of these alone. One file, replaced as a whole, cannot disagree with itself: whenever the
process dies, there is one complete state of one iteration, and no order of several files to get right.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.device import DeviceArray
from pyloss.errors import FormatError
from pyloss.files import read_json, user_path, write_json, write_safetensors
from pyloss.tuner import adapters

ADAPTER_FILE = adapters.MLX_FILE
CONFIG_FILE = adapters.CONFIG_FILE
BEST_FILE = "best_adapters.safetensors"
STATE_FILE = "trainer_state.safetensors"
PROBE_FILE = ".pyloss_probe.json"
STATE_KEY = "pyloss_trainer_state_1"
#: what of the config decides whether an adapter fits it
ADAPTER_KEYS = ("fine_tune_type", "num_layers", "lora_parameters", "full_keys")

Arrays = dict[str, np.ndarray]


@dataclass
class Progress:
    """The counters of a run; all of them are saved, so that reports after a resume continue to the bit."""

    iteration: int = 0
    trained_tokens: int = 0
    grad_norm: float | None = None
    # since the last report
    reported_at: int = 0
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    # since the last update
    pending: int = 0
    pending_weight: float = 0.0
    # validation
    validated_at: int = -1
    best_loss: float | None = None
    best_iteration: int = -1
    not_improved: int = 0


@dataclass
class Checkpoint:
    """All that a run consists of between two iterations. `random` and `batches` are what `.state()` of each gave."""

    progress: Progress
    model: Arrays
    optimizer: dict[str, Any]
    optimizer_name: str
    accumulated: Arrays
    best: Arrays
    random: Any = None
    batches: Any = None
    settings: dict[str, Any] | None = None


def _pack(value: Any, path: str, tensors: Arrays) -> Any:
    """`value` as JSON, its arrays moved to `tensors` under their path."""
    if isinstance(value, np.ndarray | DeviceArray):
        tensors[path] = np.asarray(value)
        return {"__array__": path}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _pack(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _unpack(value: Any, tensors: Arrays) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__array__"}:
            return tensors[value["__array__"]]
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    return value


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Replace the state file `path` by `checkpoint`, wholly or not at all. Raises OSError naming the file."""
    tensors: Arrays = {}
    tree = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    tree["progress"] = asdict(checkpoint.progress)
    # One key: safetensors writes several in any order, and equal states should be equal files.
    write_safetensors(path, tensors, {STATE_KEY: json.dumps(_pack(tree, "", tensors))})


def state_path(path: str | os.PathLike[str]) -> Path:
    """`path` if it names a safetensors file, else the state file in the folder `path`."""
    path = user_path(path)
    return path if path.suffix == ".safetensors" else path / STATE_FILE


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in the file `path`, or in the `trainer_state.safetensors` of the folder `path`.

    Raises FileNotFoundError where there is none, FormatError for a damaged or foreign file.
    """
    from safetensors import SafetensorError, safe_open

    file = state_path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"nothing to resume: {file} does not exist (it is written by a run that saves); start without resume"
        )
    try:
        with safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get(STATE_KEY)
            if text is None:
                raise FormatError(file, "metadata", f"not a trainer state of this version: has no {STATE_KEY!r}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        tree = _unpack(json.loads(text), tensors)
        tree["progress"] = Progress(**tree["progress"])
        return Checkpoint(**tree)
    except FormatError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FormatError(file, None, f"not a readable trainer state: {error}") from error


def restore_arrays(target: Mapping[str, np.ndarray], saved: Mapping[str, np.ndarray], where: str) -> None:
    """Copy `saved` into the arrays of `target`; ValueError, before any is changed, unless names and shapes agree."""
    if missing := sorted(set(target) ^ set(saved)):
        raise ValueError(
            f"{where} is of another model or adapter: {len(missing)} parameters are in one only, first {missing[0]!r}"
        )
    for name, array in saved.items():
        if array.shape != target[name].shape:
            raise ValueError(f"{where}: {name!r} has shape {array.shape}, but {target[name].shape} in the model")
    for name, array in saved.items():
        target[name][...] = array


def prepare_folder(folder: Path, config: Mapping[str, Any] | None, resuming: bool) -> list[str]:
    """Make sure that `folder` can be written, and write `adapter_config.json` there. Gives notes for the user.

    What an earlier run left and a fresh one cannot go with is renamed to `previous_...` before anything new is written:
    its state and best adapter, and an adapter that the new config does not describe. The config thus never lies beside
    another config's adapter.
    Raises OSError naming the folder if it cannot be made or written, ValueError for a run to resume whose adapter is
    configured otherwise.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno or 0, f"cannot make the adapter folder: {error.strerror}", str(folder)) from error
    write_json(folder / PROBE_FILE, {})
    (folder / PROBE_FILE).unlink()
    config = None if config is None else json.loads(json.dumps(config))
    old: dict[str, Any] = {}
    with suppress(FileNotFoundError, FormatError):
        old = read_json(folder / CONFIG_FILE)
    differing = [key for key in ADAPTER_KEYS if config and old and old.get(key) != config.get(key)]
    if resuming and config and differing:
        was = ", ".join(f"{key} {old.get(key)!r} (now {config.get(key)!r})" for key in differing)
        raise ValueError(f"the run to resume in {folder} has {was}; give the same, or start without resume")
    notes = []
    if not resuming:
        moved = [name for name in (STATE_FILE, BEST_FILE) if _set_aside(folder, name)]
        if differing and _set_aside(folder, ADAPTER_FILE):
            write_json(folder / f"previous_{CONFIG_FILE}", old)
            moved.append(ADAPTER_FILE)
        if moved:
            notes.append(f"{folder} holds an earlier run: starting afresh, and keeping its {', '.join(moved)} as previous_*")
    if config is not None:
        write_json(folder / CONFIG_FILE, config, sort_keys=True)
    return notes


def _set_aside(folder: Path, name: str) -> bool:
    """Rename a file to `previous_<name>`; False if there is none."""
    with suppress(FileNotFoundError):
        os.replace(folder / name, folder / f"previous_{name}")
        return True
    return False


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off until the block has ended: for changes that are only right when made as a whole."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers Ctrl-C to the main thread alone
        return
    seen: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if seen:
        signal.raise_signal(signal.SIGINT)
