"""Model folders with a model.safetensors whose header and bytes do not fit together."""

import json
import struct

import tiny_files
from running import put_files

KINDS = [
    ("llama", "f32"),
    ("qwen2", "f32"),
    ("mixtral", "f32"),
    ("qwen3_moe", "f32"),
    ("gemma3_text", "f32"),
    ("granite", "f32"),
    ("phi3", "f32"),
    ("smollm3", "f32"),
    ("lfm2", "f32"),
    ("lfm2_moe", "f32"),
    ("qwen2_moe", "f32"),
    ("granitemoeshared", "f32"),
    ("granitemoehybrid", "f32"),
    ("ministral3", "f32"),
    ("qwen3_5_text", "f32"),
    ("qwen3_5_moe_text", "f32"),
    ("qwen3_next", "f32"),
    ("olmo3", "f32"),
    ("llama", "affine4"),
    ("llama", "nf4"),
    *(("llama", format) for format in tiny_files.PACKED),
]
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "U32",
    "U8",
    "I8",
    "BOOL",
    "F8_E4M3",
    "f32",
    "F4",
    "",
]
LARGE = [
    [2**31, 2**31],
    [2**62, 4],
    [0, 2**63],
    [10**30] * 8,
    [65536] * 3000,
    [10**400, 0],
    [0],
    [1] * 3000,
    [],
]


def prepare():
    for kind in KINDS:
        tiny_files.folder(*kind)


def broken(m, data):
    """The file with a changed header or changed bytes."""
    if m.chance(0.15):
        return m.bytes(data)
    size = struct.unpack_from("<Q", data)[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    changes = m.count()
    for _ in range(changes):
        entry, kind = header.get(m.pick(names)), m.below(12)
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            continue
        if kind == 0:
            entry["dtype"] = m.pick(DTYPES) if m.chance(0.9) else m.value()
        elif kind == 1:
            entry["shape"] = m.pick(LARGE)
        elif kind == 2:
            entry["shape"] = m.pick(
                (
                    entry["shape"][::-1],
                    entry["shape"] + [1],
                    [*entry["shape"], 0],
                    entry["shape"][1:],
                    m.value(),
                )
            )
        elif kind == 3:
            entry["data_offsets"] = (
                [m.whole(), m.whole()] if m.chance(0.5) else m.tree(entry["data_offsets"], count=1)
            )
        elif kind == 4:
            other = header.get(m.pick(names))
            if isinstance(other, dict):
                entry["data_offsets"], other["data_offsets"] = (
                    other.get("data_offsets"),
                    entry.get("data_offsets"),
                )
        elif kind == 5:
            del header[m.pick([name for name in names if name in header])]
        elif kind == 6:
            old = m.pick([name for name in names if name in header])
            header[m.text(names)] = header.pop(old)
        elif kind == 7:
            header["__metadata__"] = m.value()
        elif kind == 8:
            body = m.bytes(body, 1)
        elif kind == 9:  # NaN, infinity and the like
            at = m.below(len(body) // 4) * 4
            body = (
                body[:at]
                + struct.pack("<f", m.pick((0.0, -1.0, 3e38, float("inf"), float("nan")))) * 4
                + body[at + 16 :]
            )
        else:
            m.tree(header, names, 1)
        names = [name for name in names if isinstance(header.get(name), dict)] or ["x"]
        if names == ["x"]:
            break
    text = m.dumps(header)
    size = len(text)
    if changes and m.chance(0.06):
        size = m.pick((size - 1, size + 1, size + 8, 0, m.whole() % 2**64))
    return struct.pack("<Q", size) + text + body


def make(m):
    files = tiny_files.folder(*m.pick(KINDS))
    return {
        "config.json": files["config.json"],
        "model.safetensors": broken(m, files["model.safetensors"]),
    }


def use(files, folder):
    from pyloss.models import load_model

    put_files(folder, files)
    with tiny_files.quiet():
        tiny_files.exercise(load_model(folder))
