"""Checkpoints of a training run: what is written, in which order, and how a run comes back from it.

In the adapter's folder:

- `adapters.safetensors`, `adapter_config.json`: the adapter, as mlx-lm lays it out; what other
  programs load.
- `0000100_adapters.safetensors`: the adapter at iteration 100, as mlx-lm names it.
- `best_adapters.safetensors`: the adapter with the lowest validation loss so far.
- `trainer_state.safetensors`: all that a resumed run needs, its own copy of the adapter included.

A resumed run reads the last of these alone. One file, replaced as a whole, cannot disagree with
    itself: whenever the
process dies, there is one complete state of one iteration, and no order of several files to get
right.

What a fresh run does with an earlier one's files is in `run_folder.py`.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.checks.numbers import real, shown, whole
from pyloss.errors import FormatError
from pyloss.io.files import user_path, write_safetensors
from pyloss.runtime.device import DeviceArray
from pyloss.tuner.run.run_folder import STATE_FILE

STATE_KEY = "pyloss_trainer_state_1"

Arrays = dict[str, np.ndarray]


@dataclass
class Progress:
    """The counters of a run; all of them are saved, so that reports after a resume continue to the
    bit.
    """

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
    """All that a run consists of between two iterations. `random` and `batches` are what `.state()`
    of each gave.
    """

    progress: Progress
    model: Arrays
    optimizer: dict[str, Any]
    optimizer_name: str
    accumulated: Arrays
    best: Arrays
    random: Any = None
    batches: Any = None
    settings: dict[str, Any] | None = None
    #: fingerprint of the frozen weights, see `base.py`; None in states of earlier versions
    base: str | None = None


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
            name = value["__array__"]
            if not isinstance(name, str) or name not in tensors:
                raise ValueError(f"it has no array {name!r:.80}")
            return tensors[name]
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    return value


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Replace the state file `path` by `checkpoint`, wholly or not at all. Raises OSError naming
    the file.
    """
    tensors: Arrays = {}
    tree = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    tree["progress"] = asdict(checkpoint.progress)
    # One key: safetensors writes several in any order, and equal states should be equal files.
    write_safetensors(path, tensors, {STATE_KEY: json.dumps(_pack(tree, "", tensors))})


def state_path(path: str | os.PathLike[str]) -> Path:
    """`path` if it names a safetensors file, else the state file in the folder `path`."""
    place = user_path(path)
    return place if place.suffix == ".safetensors" else place / STATE_FILE


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in the file `path`, or in the `trainer_state.safetensors` of the folder
    `path`.

    Raises FileNotFoundError where there is none, FormatError for a damaged or foreign file.
    """
    from safetensors import SafetensorError, safe_open

    file = state_path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"nothing to resume: {file} does not exist (it is written by a run that saves); "
            f"start without resume"
        )
    try:
        with safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get(STATE_KEY)
            if text is None:
                raise FormatError(
                    file, "metadata", f"not a trainer state of this version: has no {STATE_KEY!r}"
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        return _checkpoint(_unpack(json.loads(text), tensors))
    except FormatError:
        raise
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
        AttributeError,
    ) as error:
        raise FormatError(file, None, f"not a readable trainer state: {error}") from error


def _checkpoint(tree: Any) -> Checkpoint:
    """The checkpoint that the JSON of a state file says, every value of its type. TypeError or
    ValueError naming what is not.
    """
    known = {field.name for field in fields(Checkpoint)}
    if (
        not isinstance(tree, dict)
        or not {"progress", "model", "optimizer", "optimizer_name"} <= set(tree) <= known
    ):
        raise ValueError(f"its parts are not {', '.join(sorted(known))}")
    kinds = {"optimizer": dict, "optimizer_name": str, "settings": dict, "base": str}
    for name, kind in kinds.items():
        if not isinstance(tree.get(name), kind) and (
            tree.get(name) is not None or name not in ("settings", "base")
        ):
            raise TypeError(
                f"{name} is {shown(tree.get(name))}; it must be "
                f"{'text' if kind is str else 'a mapping'}"
            )
    for name in ("model", "accumulated", "best"):
        arrays = tree.setdefault(name, {})
        if not isinstance(arrays, dict) or not all(_is_floats(array) for array in arrays.values()):
            raise TypeError(f"{name} is not a mapping of names to arrays of floats")
    return Checkpoint(**{**tree, "progress": _progress(tree["progress"])})


def _is_floats(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _progress(said: Any) -> Progress:
    if not isinstance(said, dict) or not set(said) <= {field.name for field in fields(Progress)}:
        raise TypeError("progress is not a mapping of the counters of a run")
    found = Progress()
    for name, value in said.items():
        default = getattr(found, name)
        if isinstance(default, int):
            setattr(found, name, whole(value, name, min(default, 0)))
        elif value is not None or default is not None:
            setattr(found, name, real(value, name))
    for name in ("reported_at", "pending", "validated_at", "best_iteration"):
        if getattr(found, name) > found.iteration:
            raise ValueError(f"{name} is {getattr(found, name)}, after iteration {found.iteration}")
    return found


def check_arrays(
    target: Mapping[str, np.ndarray], saved: Mapping[str, np.ndarray], where: str
) -> None:
    """ValueError unless the names and shapes of `saved` are those of `target`."""
    if missing := sorted(set(target) ^ set(saved)):
        raise ValueError(
            f"{where} is of another model or adapter: {len(missing)} parameters are in one "
            f"only, first {missing[0]!r}"
        )
    for name, array in saved.items():
        if array.shape != target[name].shape:
            raise ValueError(
                f"{where}: {name!r} has shape {array.shape}, but {target[name].shape} in the model"
            )


def restore_arrays(
    target: Mapping[str, np.ndarray], saved: Mapping[str, np.ndarray], where: str
) -> None:
    """Copy `saved` into the arrays of `target`; ValueError, before any is changed, unless names and
    shapes agree.
    """
    check_arrays(target, saved, where)
    for name, array in saved.items():
        target[name][...] = array


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put Ctrl-C and SIGTERM off until the block has ended: for changes that are only right when
    made as a whole.

    Where Python does not handle them, in other threads and in programs that brought a handler of
    their own from outside Python, nothing can interrupt the block, and nothing is changed.
    """
    seen: list[int] = []
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for stop in (signal.SIGINT, signal.SIGTERM):
            if (handler := signal.getsignal(stop)) is None:
                continue
            try:
                signal.signal(stop, lambda number, frame: seen.append(number))
                previous[stop] = handler
            # not the main interpreter, or a thread that Python takes for the main one and is not
            except ValueError:
                break
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for number in dict.fromkeys(seen):
        signal.raise_signal(number)
