"""The authors' checkpoints: state dicts of their classes, read and written under their names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyloss.checks.arrays import as_array
from pyloss.io.files import user_path
from pyloss.io.safetensors import read_safetensors
from pyloss.io.torch_file import read_state_dict
from pyloss.recursive.models import RecursiveModel

#: What precedes the names in a checkpoint: that of torch.compile, and of the loss head.
PREFIXES = ("_orig_mod.", "model.")
#: The authors' matrices that are several here, one above the other.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_TABLES = ("embed_tokens", "embed_pos")
_PUZZLES = "inner.puzzle_emb.weights"


def state_dict(model: RecursiveModel, prefix: str = "") -> dict[str, np.ndarray]:
    """The parameters and buffers under the authors' names, as arrays that do not share memory.

    `prefix` comes before each name: "model." as in checkpoints of the model in its loss head.
    """
    own = {**model.parameters(), **model.buffers()}
    return {
        prefix + name: np.concatenate([np.asarray(own[part]) for part in parts])
        for name, parts in _parts_of(own).items()
    }


def load_checkpoint(model: RecursiveModel, checkpoint: str | os.PathLike[str] | Mapping) -> None:
    """Copies a checkpoint of the authors' code into a model of the same architecture.

    `checkpoint` is a file of `torch.save`, which is read without executing anything, a
    `.safetensors` file, or a dict of arrays by name. As there, a table of puzzle embeddings of
    another length is replaced by the mean of its rows, with a warning.

    Raises FormatError for a file that holds more than tensors, ValueError, before any change, where
    names or shapes differ; the message lists them.
    """
    if isinstance(checkpoint, Mapping):
        given = {str(name): as_array(array, str(name)) for name, array in checkpoint.items()}
    else:
        safe = user_path(checkpoint).suffix == ".safetensors"
        tensors = (read_safetensors if safe else read_state_dict)(checkpoint).tensors
        given = {name: tensor.values() for name, tensor in tensors.items()}
    for prefix in PREFIXES:
        given = {name.removeprefix(prefix): array for name, array in given.items()}
    own = {**model.parameters(), **model.buffers()}
    names = _parts_of(own)
    other: tuple[int, int] | None = None
    if _PUZZLES in own and _PUZZLES in given and given[_PUZZLES].ndim == 2:
        table, found = own[_PUZZLES], given[_PUZZLES]
        if len(found) and found.shape[1] == table.shape[1] and found.shape != table.shape:
            given[_PUZZLES] = np.broadcast_to(found.mean(0, keepdims=True), table.shape)
            other = len(found), len(table)
    problems = [f"{name}: not in this architecture" for name in given if name not in names]
    arrays: dict[str, np.ndarray] = {}
    for name, parts in names.items():
        if name not in given:
            problems.append(f"{name}: missing")
            continue
        sizes = [own[part].shape[0] for part in parts]
        expected = (sum(sizes), *own[parts[0]].shape[1:])
        if given[name].shape != expected:
            problems.append(f"{name}: shape {given[name].shape}, expected {expected}")
            continue
        pieces = np.split(given[name], np.cumsum(sizes)[:-1])
        arrays |= dict(zip(parts, pieces, strict=True))
    if problems:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(problems))
    if other is not None:
        warnings.warn(
            f"the checkpoint has {other[0]} puzzle embeddings and the model {other[1]}: all of the "
            "model's become the mean of the checkpoint's",
            stacklevel=2,
        )
    model.load_weights({k: np.asarray(v, np.float32) for k, v in arrays.items()}, strict=False)


def _parts_of(own: Mapping[str, Any]) -> dict[str, list[str]]:
    """The authors' names, each with those of its parts here."""
    names: dict[str, list[str]] = {}
    for name in own:
        *path, module, kind = name.split(".")
        if kind == "local_weights":
            continue
        if module in _TABLES:
            kind = "embedding_weight"
        fused = next((whole for whole, parts in FUSED.items() if module in parts), module)
        names.setdefault(".".join((*path, fused, kind)), []).append(name)
    for name, parts in names.items():
        order = FUSED.get(name.split(".")[-2], ())
        parts.sort(key=lambda part: order.index(part.split(".")[-2]) if order else 0)
    return names
