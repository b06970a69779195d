"""Checkpoints of a training run: their contents, the state file, and how a run is restored.

The adapter's folder holds:

- `adapters.safetensors`, `adapter_config.json`: the adapter in mlx-lm's layout, for other programs.
- `0000100_adapters.safetensors`: the adapter at iteration 100, named as in mlx-lm.
- `best_adapters.safetensors`: the adapter with the lowest validation loss so far.
- `trainer_state.safetensors`: all that a resumed run needs, with its own copy of the adapter.

A resumed run reads its state only from `trainer_state.safetensors`. This one file is replaced
atomically, so it is consistent: whenever the process dies, the file holds one complete state of one
iteration, and no write order of several files matters.

`run_folder.py` decides what a new run does with the files of an earlier one.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pyloss.checks.numbers import real, shown, whole
from pyloss.errors import FormatError
from pyloss.io.files import user_path, write_safetensors
from pyloss.runtime.device import DeviceArray
from pyloss.tuner.run.run_folder import STATE_FILE

STATE_KEY = "pyloss_trainer_state_1"

Arrays = dict[str, np.ndarray]
T = TypeVar("T")


@dataclass
class Progress:
    """The counters of a run. All are saved, so that reports after a resume match to the bit.

    Attributes:
        iteration: iterations done.
        trained_tokens: target tokens trained on.
        grad_norm: gradient norm of the latest update, before clipping; None before the first.
        reported_at: iteration of the last report.
        loss_sum: weighted sum of the losses since the last report.
        loss_weight: sum of their weights.
        pending: iterations since the last update.
        pending_weight: sum of the loss weights since the last update.
        validated_at: iteration of the last validation; -1 if the parameters need one.
        best_loss: lowest validation loss; None if there is none.
        best_iteration: iteration of `best_loss`; -1 if there is none.
        not_improved: validations in a row without a lower loss.
        train_loss: the latest report's; None before the first.
        val_loss: the latest validation's; None without one, or if it is not finite.
    """

    iteration: int = 0
    trained_tokens: int = 0
    grad_norm: float | None = None
    reported_at: int = 0
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    pending: int = 0
    pending_weight: float = 0.0
    validated_at: int = -1
    best_loss: float | None = None
    best_iteration: int = -1
    not_improved: int = 0
    train_loss: float | None = None
    val_loss: float | None = None


@dataclass
class Checkpoint:
    """The complete state of a run between two iterations.

    Attributes:
        progress: the counters.
        model: trainable parameters and the adapter's fixed arrays, by name.
        optimizer: `state_dict()` of the optimizer.
        optimizer_name: its name, see `own_optimizer.optimizer_name`.
        accumulated: gradients accumulated since the last update.
        best: parameters with the lowest validation loss; empty without any.
        random: `pyloss.random.state()`.
        batches: `state()` of the batch iterator; None if it has no such method.
        settings: settings that a resumed run should keep, see `TrainingRun.settings`.
        base: fingerprint of the frozen weights, see `fingerprint.py`; None in states of earlier
            versions.
        made_for: what is known of the base (`adapters.base.Base`), as a mapping; None in states of
            earlier versions, and for models of a user's own.
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
    base: str | None = None
    made_for: dict[str, Any] | None = None


def _pack(value: Any, path: str, tensors: Arrays) -> Any:
    """`value` as a JSON tree; its arrays go into `tensors`, keyed by their path in the tree."""
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
    """Replace the state file `path` with `checkpoint` atomically.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    tree = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    tree["progress"] = asdict(checkpoint.progress)
    write_tree(path, STATE_KEY, tree)


def write_tree(path: str | os.PathLike[str], key: str, tree: Mapping[str, Any]) -> None:
    """Replace the safetensors file `path` atomically with nested values and arrays.

    `key` names their kind in the file's metadata. Raises OSError naming the file.
    """
    tensors: Arrays = {}
    text = json.dumps(_pack(tree, "", tensors))
    # safetensors writes several keys in any order; one key makes equal states equal files.
    write_safetensors(path, tensors, {key: text})


def state_path(path: str | os.PathLike[str]) -> Path:
    """`path` if it names a safetensors file, else the state file in the folder `path`."""
    place = user_path(path)
    return place if place.suffix == ".safetensors" else place / STATE_FILE


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Load the checkpoint from `path`: a state file, or a folder with one.

    Raises:
        FileNotFoundError: there is no state file.
        FormatError: the file is damaged or not a trainer state.
    """
    return read_tree(state_path(path), STATE_KEY, _checkpoint)


def read_tree(file: Path, key: str, read: Callable[[Any], T]) -> T:
    """Read what `write_tree` wrote under `key`; `read` makes the result of the nested values.

    Raises:
        FileNotFoundError: there is no file.
        FormatError: the file is damaged or of another kind, or `read` raised an error of its input.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(
            f"nothing to resume: {file} does not exist (it is written by a run that saves); "
            f"start without resume"
        )
    try:
        with safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get(key)
            if text is None:
                raise FormatError(
                    file, "metadata", f"not a trainer state of this version: has no {key!r}"
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        return read(_unpack(json.loads(text), tensors))
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
    """Build a checkpoint from an unpacked state file, and check the type of every part.

    Raises TypeError or ValueError naming the invalid part.
    """
    known = {field.name for field in fields(Checkpoint)}
    if (
        not isinstance(tree, dict)
        or not {"progress", "model", "optimizer", "optimizer_name"} <= set(tree) <= known
    ):
        raise ValueError(f"its parts are not {', '.join(sorted(known))}")
    kinds = {
        "optimizer": dict,
        "optimizer_name": str,
        "settings": dict,
        "base": str,
        "made_for": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(tree.get(name), kind) and (
            tree.get(name) is not None or name not in ("settings", "base", "made_for")
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
    """Raise ValueError unless `saved` has the names and shapes of `target`."""
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
    """Copy `saved` into the arrays of `target`.

    Raises ValueError if names or shapes differ; `target` is then unchanged.
    """
    check_arrays(target, saved, where)
    for name, array in saved.items():
        target[name][...] = array


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM to the end of the block, for changes that must not be split.

    The handlers stay as they are in threads other than the main one, and for a signal whose handler
    was installed outside Python. There, no Python exception can interrupt the block.
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
            # A subinterpreter, or a thread that Python mistakes for the main one.
            except ValueError:
                break
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for number in dict.fromkeys(seen):
        signal.raise_signal(number)
