"""Folders of shards whose index names wrong files or tensors."""

import json
import struct

import tiny_files
from mutation import words_of
from running import put_files
from target_safetensors import broken

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WORDS = [
    *words_of("io/safetensors"),
    *SHARDS,
    "../model.safetensors",
    "config.json",
    ".",
    "..",
    "/",
    INDEX,
    "sub/x.safetensors",
]
_PARTS = {}


def prepare():
    """Split a tiny model's tensors into two shards."""
    files = tiny_files.folder("qwen2")
    data = files["model.safetensors"]
    size = struct.unpack_from("<Q", data)[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    names = list(header)
    index = {"metadata": {"total_size": len(body)}, "weight_map": {}}
    for shard, own in zip(SHARDS, (names[: len(names) // 2], names[len(names) // 2 :])):
        parts, part = {}, b""
        for name in own:
            begin, end = header[name]["data_offsets"]
            parts[name] = {**header[name], "data_offsets": [len(part), len(part) + end - begin]}
            part += body[begin:end]
            index["weight_map"][name] = shard
        text = json.dumps(parts).encode()
        _PARTS[shard] = struct.pack("<Q", len(text)) + text + part
    _PARTS[INDEX] = json.dumps(index).encode()
    _PARTS["config.json"] = files["config.json"]


def make(m):
    files = dict(_PARTS)
    if m.chance(0.8) or m.pristine:
        files[INDEX] = m.json(files[INDEX], WORDS + list(json.loads(files[INDEX])["weight_map"]))
    elif m.chance(0.5):
        shard = m.pick(SHARDS)
        files[shard] = broken(m, files[shard])
    else:
        files.pop(m.pick((*SHARDS, INDEX)))
    if not m.pristine and m.chance(0.1):
        files["model.safetensors"] = m.pick((files.get(SHARDS[0], b""), b"", b"\0" * 8))
    return files


def use(files, folder):
    from pyloss.models import load_model

    put_files(folder, files)
    with tiny_files.quiet():
        tiny_files.exercise(load_model(folder))
