"""Folders of stored teachers: a damaged index, and shards whose arrays do not fit it."""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import tiny_files
from mutation import words_of
from running import put_files
from target_safetensors import broken

INDEX = "teacher.json"
WORDS = words_of("distillation/stored/folder", "distillation/stored/teacher")
SAMPLES = [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3], [5, 8, 9, 7, 9]]
CASES = []


def prepare():
    """Write the likeliest and drawn classes of a tiny model, in two shards each."""
    from pyloss.distillation.stored import write_teacher

    for options in ({"top_k": 4}, {"samples": 6}) if not CASES else ():
        with tempfile.TemporaryDirectory() as place, tiny_files.quiet():
            write_teacher(tiny_files.model("qwen2"), SAMPLES, place, shard_bytes=150, **options)
            files = {p.name: p.read_bytes() for p in sorted(Path(place).iterdir()) if p.is_file()}
        CASES.append(files)


def make(m):
    files = dict(m.pick(CASES))
    index = json.loads(files[INDEX])
    if m.chance(0.4):
        files[INDEX] = m.json(files[INDEX], WORDS)
        return files
    shard = m.pick(index["shards"])
    files[shard["file"]] = data = broken(m, files[shard["file"]])
    if m.pristine or m.chance(0.9):
        shard["nbytes"] = len(data)
    if m.pristine or m.chance(0.9):
        shard["crc32"] = zlib.crc32(data)
    files[INDEX] = json.dumps(index).encode()
    return files


def use(files, folder):
    from pyloss.distillation.stored import StoredTeacher
    from pyloss.distillation.stored.samples import targets_of
    from pyloss.tuner.losses import PackedTargets

    put_files(folder, files)
    stored = StoredTeacher(folder)
    for _, sample in targets_of(SAMPLES, 2048):
        n = len(sample.tokens)
        part = PackedTargets(
            sample.tokens, np.array([0, n]), np.array([0]), sample.labels, np.ones(n), 1 << 20
        )
        entries = stored.entries(part, stored.settings.classes)
        assert (entries.ids < stored.settings.classes).all()
        assert np.isfinite(entries.logprobs).all()
