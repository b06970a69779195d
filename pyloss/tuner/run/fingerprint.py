"""Fingerprints: whether a resumed run has its original weights, and all ranks the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pyloss.nn import plain_parameters
from pyloss.weights.stack import WeightStack

_PIECES, _PIECE = 16, 256


def fingerprint(model: Any, trained: Collection[str]) -> str:
    """Hash names, shapes, formats and bytes of the model's weights except the parameters `trained`.

    A large matrix contributes 16 evenly spaced pieces of 256 bytes, including its first and last
    bytes, so that only a few MB of a mapped model are read. This suffices: different weights of the
    same shapes, such as another fine-tuned version, differ nearly everywhere.
    """
    return _digest(_arrays(model, trained))


def values_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Hash names, shapes and values of arrays, of large ones the pieces of `fingerprint`."""
    hosts = ((name, np.asarray(array)) for name, array in arrays.items())
    return _digest((name, str(host.dtype), host) for name, host in hosts)


def data_digest(data: Any, tokenized: bool, max_seq_length: int) -> str | None:
    """Hash the tokens of a dataset and their weights; None for data of an iterator of a user's."""
    if not tokenized:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for index in range(len(data)):
        sample = data.sample(index).cut(max_seq_length)
        digest.update(np.asarray(sample.tokens, np.int64).tobytes())
        digest.update(np.asarray(sample.weights, np.float32).tobytes() + b"\n")
    return digest.hexdigest()


def _digest(arrays: Iterable[tuple[str, str, np.ndarray]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, kind, data in arrays:
        digest.update(f"{name} {kind} {data.shape}\n".encode())
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if flat.size <= _PIECES * _PIECE:
            digest.update(flat.tobytes())
            continue
        for piece in range(_PIECES):
            begin = (flat.size - _PIECE) * piece // (_PIECES - 1)
            digest.update(flat[begin : begin + _PIECE].tobytes())
    return digest.hexdigest()


def _arrays(model: Any, trained: Collection[str]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield name, format and bytes of every array that is not trained."""
    for name, array in plain_parameters(model).items():
        if name not in trained:
            host = np.asarray(array)
            yield name, str(host.dtype), host
    for name, weight in model.stored().items() if hasattr(model, "stored") else ():
        for matrix in weight.matrices if isinstance(weight, WeightStack) else (weight,):
            yield name, f"{matrix.format} {matrix.head_dim}", matrix.raw
