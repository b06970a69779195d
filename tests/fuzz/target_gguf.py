"""GGUF files with inconsistent keys, types, counts, shapes or offsets, or changed bytes."""

import struct
import tempfile
from functools import lru_cache
from pathlib import Path

import tiny_files
from mutation import words_of
from running import put_files

from pyloss.models.config.families import FAMILIES

SOURCES = (
    "models/config/model_config",
    "models/config/gguf_reader",
    "models/config/mixture",
    "models/config/rope_scaling",
    "models/config/families",
    "io/gguf",
    "models/text/gguf_tokenizer",
    "models/text/gguf_sentencepiece",
    "models/text/gguf_vocabulary",
    "models/files/names",
)
WORDS = words_of(*SOURCES)
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
KINDS = [(family, "f32") for family in FAMILIES] + [
    ("llama", "q8_0"),
    ("llama", "q4_0"),
    ("qwen3", "bf16"),
    ("spm", "f32"),
]
SETTINGS = [
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.original_context_length",
    "rope.freq_base",
]
SETTINGS += [
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.attn_factor",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
]
SETTINGS += [
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "attention.key_length",
    "attention.value_length",
]
SETTINGS += [
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "vocab_size",
]
SETTINGS += [
    "context_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "attention.sliding_window_pattern",
]


class Header:
    """A parsed GGUF file.

    `keys` are [name, type, element type, values], `tensors` are [name, dims, type, offset].
    """

    def __init__(self, data):
        self.data, self.at = data, 4
        self.version, tensors, keys = self.take("<IQQ")
        self.keys = [self.key() for _ in range(keys)]
        self.tensors = [self.tensor() for _ in range(tensors)]
        self.body = data[-(-self.at // 32) * 32 :]

    def take(self, layout):
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return values if len(values) > 1 else values[0]

    def string(self):
        size = self.take("<Q")
        self.at += size
        return self.data[self.at - size : self.at]

    def key(self):
        name, kind = self.string(), self.take("<I")
        if kind == 9:
            inner, count = self.take("<IQ")
            return [
                name,
                kind,
                inner,
                [
                    self.string() if inner == 8 else self.take("<" + SCALARS[inner])
                    for _ in range(count)
                ],
            ]
        return [name, kind, None, self.string() if kind == 8 else self.take("<" + SCALARS[kind])]

    def tensor(self):
        name, count = self.string(), self.take("<I")
        return [name, [self.take("<Q") for _ in range(count)], *self.take("<IQ")]


def _string(text, size=None):
    return struct.pack("<Q", len(text) if size is None else size) + text


def _scalar(kind, value):
    letter = SCALARS.get(kind, "I")
    if letter in "fd":
        try:
            return struct.pack("<" + letter, float(value))
        except (OverflowError, TypeError, ValueError):
            return struct.pack("<" + letter, float("inf"))
    size = struct.calcsize(letter)
    number = (
        int(value)
        if isinstance(value, (int, bool)) or (isinstance(value, float) and abs(value) < 1e300)
        else 1
    )
    return (number % (1 << 8 * size)).to_bytes(size, "little")


def _value(kind, inner, value, count=None):
    if kind == 9:
        items = value if isinstance(value, list) else [value]
        parts = [struct.pack("<IQ", inner or 4, len(items) if count is None else count)]
        parts += [
            _string(x if isinstance(x, bytes) else str(x).encode())
            if inner == 8
            else _scalar(inner, x)
            for x in items
        ]
        return b"".join(parts)
    if kind == 8:
        return _string(value if isinstance(value, bytes) else str(value).encode(), count)
    return _scalar(kind, value if isinstance(value, (int, float)) else 1)


@lru_cache(maxsize=16)
def base(family, format):
    """The bytes of a tiny file; "spm" is a llama with SentencePiece's vocabulary."""
    from pyloss.models.files.gguf_writer import write_gguf

    changes = {} if format == "f32" else {"hidden_size": 32, "head_dim": 16}
    model = tiny_files.model("llama" if family == "spm" else family, format, **changes)
    with tempfile.TemporaryDirectory() as place:
        write_gguf(model, Path(place) / "x.gguf", tiny_files.tokenizer())
        data = (Path(place) / "x.gguf").read_bytes()
    if family != "spm":
        return data
    file = Header(data)
    file.keys = [key for key in file.keys if not key[0].startswith(b"tokenizer.")]
    tokens = [
        b"<unk>",
        b"<s>",
        b"</s>",
        *(f"<0x{i:02X}>".encode() for i in range(256)),
        "▁".encode(),
        b"he",
        b"ll",
        b"hello",
        b"a",
        b"b",
        b"1",
        b"2",
    ]
    tokens = tokens[: len(tiny_files.tokens())]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    for name, kind, inner, value in (
        ("model", 8, None, b"llama"), ("tokens", 9, 8, tokens), ("scores", 9, 6, [-float(i) for i in range(len(tokens))]),
        ("token_type", 9, 5, kinds), ("bos_token_id", 4, None, 1), ("eos_token_id", 4, None, 2), ("unknown_token_id", 4, None, 0),
    ):  # fmt: skip
        file.keys.append([f"tokenizer.ggml.{name}".encode(), kind, inner, value])
    return written(file, {})


def written(file, lies):
    """The bytes of a parsed file; `lies` replace true counts and sizes."""
    out = [
        b"GGUF",
        struct.pack(
            "<IQQ",
            lies.get("version", file.version),
            lies.get("tensors", len(file.tensors)),
            lies.get("keys", len(file.keys)),
        ),
    ]
    for number, (name, kind, inner, value) in enumerate(file.keys):
        out += [
            _string(name, lies.get(("name", number))),
            struct.pack("<I", lies.get(("kind", number), kind)),
            _value(kind, inner, value, lies.get(("count", number))),
        ]
    for name, dims, kind, offset in file.tensors:
        out += [
            _string(name),
            struct.pack("<I", len(dims)),
            *(struct.pack("<Q", d % 2**64) for d in dims),
            struct.pack("<IQ", kind % 2**32, offset % 2**64),
        ]
    head = b"".join(out)
    return head + b"\0" * (-len(head) % 32) + file.body


def prepare():
    for kind in KINDS:
        base(*kind)


def make(m):
    data = base(*m.pick(KINDS))
    if m.pristine or m.chance(0.12):
        return {"x.gguf": m.bytes(data)}
    file, lies = Header(data), {}
    arch = next(
        value for name, _, _, value in file.keys if name == b"general.architecture"
    ).decode()
    for _ in range(m.count()):
        key, tensor, kind = m.pick(file.keys), m.pick(file.tensors), m.below(20)
        number = file.keys.index(key)
        if kind < 5:
            name = f"{arch}.{m.pick(SETTINGS)}".encode()
            old = next((k for k in file.keys if k[0] == name), None)
            new = m.pick(([name, 4, None, m.whole()], [name, 6, None, m.real()], [name, 10, None, m.whole()], [name, 12, None, m.real()],
                          [name, 8, None, m.text(WORDS).encode("utf-8", "surrogatepass")], [name, 9, m.pick((4, 5, 6, 8)), [m.whole() for _ in range(m.below(4))]],
                          [name, 4, None, m.below(9)]))  # fmt: skip
            if old:
                old[:] = new
            else:
                file.keys.append(new)
        elif kind == 5:
            key[3] = (
                m.text(WORDS).encode("utf-8", "surrogatepass")
                if key[1] == 8
                else m.pick((m.whole(), m.real()))
            )
        elif kind == 6:
            key[1:] = [
                m.pick((*SCALARS, 8, 9, 13, 2**32 - 1)),
                m.pick((*SCALARS, 8, 9)),
                key[3] if m.chance(0.5) else m.whole(),
            ]
            if isinstance(key[3], bytes) and key[1] not in (8, 9):
                key[3] = 1
        elif kind == 7:
            lies[m.pick((("name", number), ("count", number), "tensors", "keys"))] = (
                m.whole() % 2**64
            )
        elif kind == 8:
            lies[m.pick((("kind", number), "version"))] = m.whole() % 2**32
        elif kind == 9 and isinstance(key[3], list) and key[3]:
            at = m.below(len(key[3]))
            key[3] = list(key[3])
            key[3][at] = (
                key[3][m.below(len(key[3]))]
                if m.chance(0.4)
                else m.text(WORDS).encode("utf-8", "surrogatepass")
                if key[2] == 8
                else m.whole()
            )
        elif kind == 10 and isinstance(key[3], list):
            key[3] = m.pick((key[3][:-1], key[3][1:], key[3] * 2, [], key[3][::-1]))
        elif kind == 11:
            key[0] = m.text(WORDS).encode("utf-8", "surrogatepass")
        elif kind == 12:
            file.keys.append(
                [
                    f"{arch}.{m.text(WORDS)}".encode("utf-8", "surrogatepass"),
                    *m.pick(([4, None, m.whole()], [6, None, m.real()], [8, None, b"x"])),
                ]
            )
        elif kind == 13:
            file.keys.remove(key)
        elif kind == 14:
            tensor[1] = m.pick(
                (
                    tensor[1][::-1],
                    tensor[1][:-1],
                    [*tensor[1], 1],
                    [0] * len(tensor[1]),
                    [m.whole() for _ in tensor[1]],
                    [2**32, 2**32],
                    [],
                )
            )
        elif kind == 15:
            tensor[2] = m.below(45) if m.chance(0.8) else m.whole()
        elif kind == 16:
            tensor[3] = m.pick((tensor[3] + 32, tensor[3] - 32, m.whole(), m.pick(file.tensors)[3]))
        elif kind == 17:
            tensor[0] = (
                m.pick(file.tensors)[0]
                if m.chance(0.5)
                else m.text(WORDS).encode("utf-8", "surrogatepass")
            )
        elif kind == 18:
            at = m.below(len(file.body) // 4 + 1) * 4
            file.body = (
                file.body[:at] + struct.pack("<d", m.real())[:8] * 2 + file.body[at + 16 :]
                if m.chance(0.5)
                else m.bytes(file.body, 1)
            )
        elif len(file.tensors) > 1:
            if m.chance(0.5):
                file.tensors.remove(tensor)
            else:
                size = len(file.body)
                values = [m.real() for _ in range(4)]
                file.tensors.append([b"rope_freqs.weight", [4], 0, -(-size // 32) * 32])
                file.body += (
                    b"\0" * (-size % 32) + b"".join(_scalar(6, x) for x in values) + b"\0" * 16
                )
    data = written(file, lies)
    return {"x.gguf": m.bytes(data, 1) if m.chance(0.05) else data}


def use(files, folder):
    from pyloss.models import load

    put_files(folder, files)
    with tiny_files.quiet():
        model, tokenizer = load(folder / "x.gguf")
        tiny_files.exercise(model)
        tiny_files.exercise_tokenizer(tokenizer)
