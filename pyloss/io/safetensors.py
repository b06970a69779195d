"""Reading safetensors files, and folders of them, over a memory map."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.files import kind_of, map_file, read_json, user_path
from pyloss.io.tensor_file import StoredTensor, TensorFile

_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
    "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

# The reference implementation's limit of the header.
_MAX_HEADER = 100_000_000

# NumPy's limit; of more sizes even the product takes long.
_MAX_DIMENSIONS = 32

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_safetensors(path: str | os.PathLike[str]) -> TensorFile:
    """Map a safetensors file, or a folder with one file or with shards.

    A folder has `model.safetensors` or the shards of `model.safetensors.index.json`. As in
    transformers, the single file is preferred to an index, and shards are read whole, including
    tensors that the index does not name. Tensors are views of the mapped files. `metadata` is the
    header's `__metadata__`, or the index's `metadata` for shards.

    Raises:
        FormatError: a file that is truncated or damaged, or an index that does not fit its shards.
        OSError: a file cannot be opened; FileNotFoundError when a folder has neither of the two.
    """
    path = user_path(path)
    if not path.is_dir():
        return _read_file(path)
    if (path / _SINGLE).exists():
        return _read_file(path / _SINGLE)
    if (path / _INDEX).exists():
        return _read_shards(path)
    raise FileNotFoundError(f"{path}: this folder has neither {_SINGLE} nor {_INDEX}")


def _read_shards(folder: Path) -> TensorFile:
    index = folder / _INDEX
    content = read_json(index)
    names = content.get("weight_map")
    metadata = content.get("metadata") or {}
    if not isinstance(names, dict) or not isinstance(metadata, dict):
        raise FormatError(index, "weight_map", "expected objects under weight_map and metadata")
    shards: dict[str, TensorFile] = {}
    tensors = {}
    for name, shard in names.items():
        # Names with a folder in them could lead out of the model's.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise FormatError(
                index, name, f"expected the name of a file in this folder, got {shown(shard)}"
            )
        if shard not in shards:
            if not (folder / shard).is_file():
                raise FormatError(
                    index, name, f"it is said to be in {shard}, and there is no such file"
                )
            shards[shard] = _read_file(folder / shard)
        tensors[name] = shards[shard].tensor(name)
    for file in shards.values():
        tensors = {**file.tensors, **tensors}
    return TensorFile(os.fspath(folder), metadata, tensors)


def _read_file(path: Path) -> TensorFile:
    data = map_file(path)
    if data.size < 8:
        raise FormatError(path, "header", f"truncated: the file has {data.size} bytes")
    header_size = int(data[:8].view("<u8")[0])
    if header_size > data.size - 8:
        reason = (
            "truncated, or not a safetensors file: "
            f"a header of {header_size} bytes in a file of {data.size}"
        )
        raise FormatError(path, "header", reason)
    if header_size > _MAX_HEADER:
        reason = f"a header of {header_size} bytes; safetensors files have at most {_MAX_HEADER}"
        raise FormatError(path, "header", reason)
    try:
        header = json.loads(data[8 : 8 + header_size].tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise FormatError(path, "header", f"damaged, or not a safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise FormatError(path, "header", f"holds {kind_of(header)}, expected an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise FormatError(path, "__metadata__", "expected an object of strings")
    body = data[8 + header_size :]
    tensors = {name: _tensor(path, name, entry, body) for name, entry in header.items()}
    _check_cover(path, header, body.size)
    return TensorFile(os.fspath(path), metadata, tensors)


def _tensor(path: Path, name: str, entry: Any, body: np.ndarray) -> StoredTensor:
    if not isinstance(entry, dict):
        raise FormatError(
            path, name, f"expected an object with dtype, shape and data_offsets, got {shown(entry)}"
        )
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise FormatError(
            path, name, f"dtype must be one of {', '.join(_ITEM_BYTES)}, got {shown(dtype)}"
        )
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise FormatError(
            path,
            name,
            f"shape must be a list of at most {_MAX_DIMENSIONS} sizes, got {shown(shape)}",
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(path, name, f"data_offsets must be [start, end], got {shown(offsets)}")
    start, end = offsets
    if end > body.size:
        raise FormatError(
            path, name, f"truncated: it ends at byte {end} of the data, which has {body.size}"
        )
    expected = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - start != expected:
        raise FormatError(
            path, name, f"{dtype} of shape {shape} takes {expected} bytes, and it has {end - start}"
        )
    return StoredTensor(os.fspath(path), name, dtype, tuple(shape), body[start:end])


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 63 for item in value
    )


def _check_cover(path: Path, header: dict[str, Any], size: int) -> None:
    """Refuses tensors that overlap or leave holes: their header is damaged."""
    position = 0
    for start, end, name in sorted(
        (*entry["data_offsets"], name) for name, entry in header.items()
    ):
        if start != position:
            raise FormatError(
                path, name, f"it starts at byte {start} of the data, expected {position}"
            )
        position = end
    if position != size:
        raise FormatError(
            path, None, f"damaged: the tensors take {position} bytes, and the data has {size}"
        )
