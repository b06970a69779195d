"""mx.load, mx.save, mx.savez and mx.save_safetensors. Files are written whole or not at all."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.io.files import user_path, write_bytes, write_safetensors
from pyloss.io.safetensors import read_safetensors
from pyloss.io.tensor_file import StoredTensor
from pyloss.mlx.core.arrays import array, of
from pyloss.mlx.core.dtypes import bfloat16, float16, float32

_FLOATS = {"F32": float32, "F16": float16, "BF16": bfloat16}


def _array(tensor: StoredTensor) -> array:
    kind = _FLOATS.get(tensor.dtype)
    if kind is None or tensor.data is None:
        return of(tensor.values())
    return of(np.asarray(tensor.data).reshape(-1).view(kind).reshape(tensor.shape))


def _of_safetensors(path: Path, return_metadata: bool, copy: bool = False) -> Any:
    found = read_safetensors(path)
    arrays = {name: _array(tensor) for name, tensor in found.tensors.items()}
    if copy:  # of a file that is about to be removed
        arrays = {name: array(value) for name, value in arrays.items()}
    return (arrays, dict(found.metadata)) if return_metadata else arrays


def load(
    file: Any, /, format: str | None = None, return_metadata: bool = False, *, stream: Any = None
) -> Any:
    """The arrays of a file: a dict of .safetensors or .npz, one array of .npy.

    `file` is a path or an open file, whose `format` is needed unless it is npy or npz. With
    `return_metadata`, of a .safetensors file, also its metadata.
    """
    is_path = isinstance(file, str | os.PathLike)
    ending = format or (os.fspath(file).rpartition(".")[2] if is_path else "npy")
    if ending == "gguf":
        raise ValueError("mx.load reads no GGUF here: pyloss.load reads a model from one")
    if ending not in ("safetensors", "npz", "npy"):
        raise ValueError(f"mx.load reads safetensors, npz and npy, not {ending!r} of {file}")
    if ending == "safetensors":
        if not is_path:
            with tempfile.TemporaryDirectory() as folder:
                copied = Path(folder) / "arrays.safetensors"
                copied.write_bytes(file.read())
                return _of_safetensors(copied, return_metadata, copy=True)
        return _of_safetensors(user_path(file), return_metadata)
    if return_metadata:
        raise ValueError(f"{ending} files have no metadata: return_metadata needs safetensors")
    content = np.load(user_path(file) if is_path else file, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return of(content)
    with content:
        return {name: of(content[name]) for name in content.files}


def _plain(value: Any) -> np.ndarray:
    found = value.data if isinstance(value, array) and not isinstance(value, np.ndarray) else value
    return np.asarray(found)


def _written(file: Any, content: bytes, ending: str) -> None:
    if isinstance(file, str | os.PathLike):
        path = os.fspath(file)
        write_bytes(path if path.endswith(ending) else path + ending, content)
    else:
        file.write(content)


def save(file: Any, arr: Any) -> None:
    """Writes one array as .npy; the ending is added where it is missing."""
    buffer = io.BytesIO()
    np.save(buffer, _storable(arr, "arr"), allow_pickle=False)
    _written(file, buffer.getvalue(), ".npy")


def _storable(value: Any, name: str) -> np.ndarray:
    found = _plain(value)
    if found.dtype == bfloat16:
        raise TypeError(
            f"{name} is bfloat16, which NumPy's files do not hold: mx.save_safetensors writes it, "
            "or save x.astype(mx.float32)"
        )
    return found


def _archive(file: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], compressed: bool) -> None:
    arrays = {f"arr_{i}": value for i, value in enumerate(args)}
    for name in kwargs:
        if name in arrays:
            raise ValueError(f"two arrays have the name {name!r}")
    arrays |= kwargs
    buffer = io.BytesIO()
    write: Any = np.savez_compressed if compressed else np.savez
    write(buffer, **{name: _storable(value, name) for name, value in arrays.items()})
    _written(file, buffer.getvalue(), ".npz")


def savez(file: Any, *args: Any, **kwargs: Any) -> None:
    """Writes arrays as .npz, named `arr_0` ... and by keyword."""
    _archive(file, args, kwargs, False)


def savez_compressed(file: Any, *args: Any, **kwargs: Any) -> None:
    """As `savez`, compressed."""
    _archive(file, args, kwargs, True)


def save_safetensors(file: Any, arrays: Mapping[str, Any], metadata: Any = None) -> None:
    """Writes a dict of arrays as .safetensors; the ending is added where it is missing.

    `file` is a path or a file opened for writing.
    """
    plain = {name: _plain(value) for name, value in arrays.items()}
    if isinstance(file, str | os.PathLike):
        path = os.fspath(file)
        path = path if path.endswith(".safetensors") else path + ".safetensors"
        write_safetensors(path, plain, metadata)
        return
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "arrays.safetensors"
        write_safetensors(written, plain, metadata)
        file.write(written.read_bytes())
