"""The adapters that a run's folder stores, and their names: `adapters@400`, `@best`, `@last`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyloss.checks.numbers import real, whole
from pyloss.errors import FormatError
from pyloss.io.files import PathLike, user_path
from pyloss.io.safetensors import read_safetensors
from pyloss.tuner.run.run_folder import ADAPTER_FILE, BEST_FILE, run_files

#: key in the metadata of an adapter's file: JSON of `iteration` and losses
CHECKPOINT_KEY = "checkpoint"
#: the same in the file of the best adapter
VALIDATION_KEY = "validation"

_NAMED = re.compile(r"(.+)@(\d+|best|last)")


@dataclass(frozen=True)
class StoredCheckpoint:
    """An adapter that a run has stored.

    Attributes:
        name: what follows the folder, such as "@400".
        path: its file.
        iteration: the iterations that it was trained for; None where the file does not say it.
        train_loss: of the latest report before it; None where the file does not say it.
        val_loss: of its validation; None without one.
        saved: when the file was written, in seconds since 1970.
    """

    name: str
    path: Path
    iteration: int | None
    train_loss: float | None
    val_loss: float | None
    saved: float


def metadata_of(
    iteration: int, train_loss: float | None = None, val_loss: float | None = None
) -> dict[str, str]:
    """The metadata of an adapter's file."""
    told = {"iteration": iteration, "train_loss": train_loss, "val_loss": val_loss}
    known = {key: value for key, value in told.items() if value is not None}
    return {CHECKPOINT_KEY: json.dumps(known)}


def stored_checkpoints(folder: PathLike) -> list[StoredCheckpoint]:
    """The adapters in the folder of a run: the numbered ones in order, `@best` and `@last`.

    Raises:
        FileNotFoundError: there is no adapter.
        FormatError: a damaged file.
    """
    place = user_path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"no adapter in {place}: the folder does not exist")
    found, last = [], None
    for name in run_files(place):
        if name.endswith(f"_{ADAPTER_FILE}") and name != BEST_FILE and (place / name).is_file():
            number = int(name.removesuffix(f"_{ADAPTER_FILE}"))
            found.append(_read(f"@{number}", place / name, number))
    found.sort(key=lambda checkpoint: checkpoint.iteration or 0)
    if (place / ADAPTER_FILE).is_file():
        last = _read("@last", place / ADAPTER_FILE)
    # With keep_best, the adapter's file is the best one, and the last one has a number.
    if found and (last is None or (last.iteration is not None and _newer(found[-1], last))):
        last = replace(found[-1], name="@last")
    if (place / BEST_FILE).is_file():
        found.append(_read("@best", place / BEST_FILE))
    if last is not None:
        found.append(last)
    if not found:
        raise FileNotFoundError(f"no adapter in {place}: it has no {ADAPTER_FILE}")
    return found


def checkpoint_file(path: PathLike) -> Path | None:
    """The file that `folder@400`, `folder@best` or `folder@last` names; None for other paths.

    A path that exists means itself. Raises FileNotFoundError, with the names that there are, for
    one that the folder does not store.
    """
    place = user_path(path)
    named = _NAMED.fullmatch(str(place))
    if named is None or place.exists() or not Path(named[1]).is_dir():
        return None
    stored = stored_checkpoints(named[1])
    wanted = f"@{named[2] if not named[2].isdigit() else int(named[2])}"
    for checkpoint in stored:
        if wanted in (checkpoint.name, f"@{checkpoint.iteration}"):
            return checkpoint.path
    names = ", ".join(checkpoint.name for checkpoint in stored)
    raise FileNotFoundError(f"{named[1]} stores no adapter {wanted}; it has {names}")


def _newer(one: StoredCheckpoint, other: StoredCheckpoint) -> bool:
    return (one.iteration or 0) > (other.iteration or 0)


def _read(name: str, path: Path, iteration: int | None = None) -> StoredCheckpoint:
    metadata = read_safetensors(path).metadata
    told: Any = {}
    for key in (CHECKPOINT_KEY, VALIDATION_KEY):
        if key in metadata:
            try:
                told = json.loads(metadata[key])
                if not isinstance(told, Mapping):
                    raise TypeError("it is no JSON object")
                whole(told["iteration"], "iteration", 0)
                losses = {k: real(told[k], k) for k in ("train_loss", "val_loss") if k in told}
            except (KeyError, TypeError, ValueError) as error:
                raise FormatError(path, key, f"not a checkpoint's: {error}") from None
            iteration = told["iteration"] if iteration is None else iteration
            told = losses
            break
    return StoredCheckpoint(
        name, path, iteration, told.get("train_loss"), told.get("val_loss"), path.stat().st_mtime
    )
