"""The mutation engine: changes to bytes, text, JSON trees and arguments, drawn from a case number.

One generator makes every draw. The target's name and the case's number seed it, and no draw depends
on the order of a set or a hash. So case N of a target is the same in every process.
"""

from __future__ import annotations

import ast
import json
import random
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyloss

#: Integers at the limits of types, and implausible sizes.
WHOLE = [
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    16,
    17,
    31,
    32,
    63,
    64,
    127,
    128,
    255,
    256,
    1000,
    65535,
    65536,
    10**6,
    10**9,
    -(10**9),
    10**12,
]
WHOLE += [
    s * 2**e + d for e in (15, 16, 31, 32, 53, 62, 63, 64) for s in (1, -1) for d in (-1, 0, 1)
] + [10**18, 10**30]
#: Numbers at the limits of arithmetic.
REAL = [
    0.0,
    -0.0,
    0.5,
    1.0,
    -1.0,
    1.5,
    2.0,
    3.0,
    1e-5,
    1e-30,
    1e-45,
    1e-300,
    5e-324,
    1e30,
    1e39,
    1e300,
    1.7e308,
    -1e300,
]
REAL += [float("inf"), float("-inf"), float("nan"), 0.1, 0.999, 1e9, 1e18, 9007199254740993.0]
#: Texts that break readers.
TEXTS = [
    "",
    " ",
    "a",
    "0",
    "-1",
    "1e999",
    "nan",
    "null",
    "true",
    "é",
    "日本語",
    "😀",
    "\x00",
    "\n",
    "\ufeff",
    "\ud800",
    "../x",
    "/etc/passwd",
]
TEXTS += [
    "%s%n",
    "{{ x }}",
    "{% for %}",
    "(a|aa)+$",
    "[",
    "\\",
    '"',
    "a" * 1000,
    "<s>",
    "</s>",
    "<|im_end|>",
    "<unk>",
    "▁",
    "Ġ",
]
#: JSON that Python's own types cannot represent.
RAW = [
    "1" + "0" * 400,
    "-1" + "0" * 400,
    "9" * 5000,
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    "1.0",
    "1E5",
    "-0",
]
RAW += [
    "[" * 500 + "]" * 500,
    "[" * 5000 + "]" * 5000,
    '{"a":' * 2000 + "1" + "}" * 2000,
    "[" + "0," * 20000 + "0]",
]
RAW += ["[" + ("9" * 4000 + ",") * 20 + "1]", '"\\ud800"', '"\\u0000"', "tru", "'a'", ""]


def words_of(*modules: str) -> list[str]:
    """Text constants of pyloss modules ("io/gguf") that look like keys: new keys are tried too."""
    found = set()
    package = Path(pyloss.__file__).parent
    for module in modules:
        for node in ast.walk(ast.parse((package / f"{module}.py").read_text())):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.fullmatch(r"[\w.|<>/-]{2,40}", node.value)
            ):
                found.add(node.value)
    return sorted(found)


class Mutator:
    """The draws of case `case` of the target `name`.

    `pristine` is true for one case in fifty, which stays as it was made.
    """

    def __init__(self, name: str, case: int) -> None:
        self.case = case
        self.random = random.Random(f"{name}:{case}")
        self.pristine = self.random.random() < 0.02
        self._raw: list[str] = []

    # -- draws

    def chance(self, share: float) -> bool:
        """Return True in this share of cases."""
        return self.random.random() < share

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return self.random.randrange(n)

    def pick(self, items: Sequence[Any]) -> Any:
        """One of `items`."""
        return items[self.random.randrange(len(items))]

    def count(self) -> int:
        """The number of changes to make: mostly 1; 0 in a pristine case."""
        return 0 if self.pristine else self.random.choices((1, 2, 3, 6), (60, 25, 10, 5))[0]

    def whole(self) -> int:
        """An extreme or a small whole number."""
        return self.pick(WHOLE) if self.chance(0.8) else self.random.randint(-300, 300)

    def real(self) -> float:
        """An extreme or a usual number."""
        return self.pick(REAL) if self.chance(0.8) else self.random.uniform(-10, 10)

    def text(self, words: Sequence[str] = ()) -> str:
        """One of `TEXTS`, or one of `words`."""
        return self.pick(words) if words and self.chance(0.5) else self.pick(TEXTS)

    # -- bytes

    def bytes(self, data: bytes, count: int | None = None) -> bytes:
        """Flip bits, cut, double, exchange, shorten or extend parts, or insert extreme integers."""
        out = bytearray(data)
        for _ in range(self.count() if count is None else count):
            self.pick(_ON_BYTES)(self, out)
        return bytes(out)

    def _span(self, out: bytearray) -> tuple[int, int]:
        begin = self.below(len(out) + 1)
        return begin, min(len(out), begin + self.pick((1, 2, 4, 8, 16, 64, 256, 4096)))

    # -- JSON

    def raw(self, text: str) -> str:
        """A stand-in for `text` in a tree; `dumps` writes the text unquoted."""
        self._raw.append(text)
        return f"@raw{len(self._raw) - 1}@"

    def value(self, words: Sequence[str] = ()) -> Any:
        """A JSON value of any type, mostly an unusual one."""
        kind = self.below(10)
        if kind < 3:
            return self.whole() if self.chance(0.9) else str(self.whole())
        if kind < 5:
            return self.real()
        if kind == 5:
            return self.pick((None, True, False, [], {}, [None], [[]], {"": None}, {"a": {}}))
        if kind == 6:
            return self.raw(self.pick(RAW))
        if kind == 7:
            return [self.value(words) for _ in range(self.below(4))]
        if kind == 8:
            return {self.text(words): self.value(words) for _ in range(self.below(3))}
        return self.text(words)

    def tree(self, tree: Any, words: Sequence[str] = (), count: int | None = None) -> Any:
        """Change `tree` in place, at places found by walking down from its root; return it."""
        for _ in range(self.count() if count is None else count):
            if not isinstance(tree, (dict, list)):
                return self.value(words)
            if self.chance(0.01):
                return self.value(words)
            self._change(*self._node(tree), words)
        return tree

    def _node(self, tree: Any) -> tuple[Any, Any]:
        """A container in the tree and one of its keys, or None if it is empty."""
        while True:
            keys = list(tree) if isinstance(tree, dict) else range(len(tree))
            if not keys:
                return tree, None
            # Rare names come first, so half of the draws avoid the long lists of a vocabulary.
            key = self.pick(keys) if self.chance(0.5) else self.pick(keys[:12])
            if not isinstance(tree[key], (dict, list)) or self.chance(0.25):
                return tree, key
            tree = tree[key]

    def _change(self, at: Any, key: Any, words: Sequence[str]) -> None:
        if key is None or self.chance(0.15):
            if isinstance(at, dict):
                at[self.text(words)] = self.value(words)
            else:
                at.insert(self.below(len(at) + 1), self.value(words))
            return
        kind, old = self.below(12), at[key]
        if kind < 4:
            at[key] = self.value(words)
        elif kind < 6:
            at[key] = self._near(old, words)
        elif kind == 6:
            del at[key]
        elif kind == 7:
            at[key] = self.pick(([old], {"a": old}, str(old)[:100], bool(old), None, [old] * 3))
        elif kind == 8 and isinstance(at, dict):
            at[self.text(words)] = at.pop(key)
        elif kind == 9 and len(at) > 1:
            other = self.pick(list(at) if isinstance(at, dict) else range(len(at)))
            at[key], at[other] = at[other], old
        elif isinstance(old, list) and old:
            at[key] = self.pick((old * 2, old[:-1], old[1:], old[::-1], old * 50, old + [old]))
        else:
            at[key] = self._near(old, words)

    def _near(self, old: Any, words: Sequence[str]) -> Any:
        """A value of the same type."""
        if isinstance(old, bool):
            return not old
        if isinstance(old, int):
            return self.pick(
                (old + 1, old - 1, -old, old * 2, old // 2, old * 1000, old + 2**32, self.whole())
            )
        if isinstance(old, float):
            return self.pick((-old, old * 2, old / 2, old * 1e10, old / 1e10, self.real()))
        if isinstance(old, str):
            if not old or self.chance(0.5):
                return self.text(words)
            at = self.below(len(old))
            return self.pick(
                (
                    old[:at],
                    old[:at] + self.text() + old[at:],
                    old * 2,
                    old.upper(),
                    old[at:],
                    old + "\n",
                )
            )
        return self.value(words)

    def dumps(self, tree: Any, ascii: bool = True) -> bytes:
        """The tree as JSON, with the texts of `raw` in place of their stand-ins."""
        text = json.dumps(tree, ensure_ascii=ascii)
        for number, raw in enumerate(self._raw):
            text = text.replace(f'"@raw{number}@"', raw)
        return text.encode("utf-8", "surrogatepass")

    def json(self, text: str | bytes, words: Sequence[str] = ()) -> bytes:
        """JSON text with changed values, and sometimes changed bytes."""
        if self.pristine:
            return text.encode() if isinstance(text, str) else text
        if self.chance(0.08):
            return self.bytes(text.encode() if isinstance(text, str) else text)
        data = self.dumps(self.tree(json.loads(text), words), self.chance(0.5))
        return self.bytes(data, 1) if self.chance(0.03) else data

    # -- text of lines

    def lines(self, text: str, words: Sequence[str] = ()) -> bytes:
        """Drop, double, move or cut lines, or insert words; sometimes change bytes."""
        lines = text.split("\n")
        for _ in range(self.count()):
            at, kind = self.below(len(lines)), self.below(7)
            if kind == 0 and len(lines) > 1:
                del lines[at]
            elif kind == 1:
                lines.insert(at, lines[at])
            elif kind == 2:
                lines.insert(self.below(len(lines)), lines.pop(at))
            elif kind == 3:
                lines[at] = lines[at][: self.below(len(lines[at]) + 1)]
            elif kind == 4:
                place = self.below(len(lines[at]) + 1)
                lines[at] = lines[at][:place] + self.text(words) + lines[at][place:]
            elif kind == 5:
                lines.insert(at, self.text(words))
            else:
                lines[at] = (
                    self.pick(
                        ("  ", "\t", "- ", "? ", "&a ", "*a ", "!!python/object:os.system ", "<<: ")
                    )
                    + lines[at]
                )
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        return self.bytes(data, 1) if not self.pristine and self.chance(0.15) else data


def _flip(m: Mutator, out: bytearray) -> None:
    if out:
        out[m.below(len(out))] ^= 1 << m.below(8)


def _byte(m: Mutator, out: bytearray) -> None:
    if out:
        out[m.below(len(out))] = m.pick((0, 1, 0x7F, 0x80, 0xFF, m.below(256)))


def _cut(m: Mutator, out: bytearray) -> None:
    del out[m.below(len(out) + 1) :]


def _extend(m: Mutator, out: bytearray) -> None:
    out += m.pick((b"\0", b"\xff" * 8, b" ", b"\0" * 4096, bytes(out[:64]), b"\xef\xbb\xbf"))


def _remove(m: Mutator, out: bytearray) -> None:
    begin, end = m._span(out)
    del out[begin:end]


def _double(m: Mutator, out: bytearray) -> None:
    begin, end = m._span(out)
    out[begin:begin] = out[begin:end]


def _swap(m: Mutator, out: bytearray) -> None:
    begin, end = m._span(out)
    other = m.below(len(out) + 1)
    part = bytes(out[begin:end])
    out[other : other + len(part)] = part


def _fill(m: Mutator, out: bytearray) -> None:
    begin, end = m._span(out)
    out[begin:end] = bytes([m.pick((0, 0xFF, 0x20, 0x7B))]) * (end - begin)


def _integer(m: Mutator, out: bytearray) -> None:
    size, letter = m.pick(((2, "<H"), (4, "<I"), (8, "<Q"), (4, ">I")))
    if len(out) < size:
        return
    # Files hold their counts in the first bytes.
    at = m.below(min(64, len(out) - size + 1)) if m.chance(0.3) else m.below(len(out) - size + 1)
    out[at : at + size] = struct.pack(letter, m.whole() % (1 << 8 * size))


_ON_BYTES: list[Callable[[Mutator, bytearray], None]] = [
    _flip, _byte, _cut, _extend, _remove, _double, _swap, _fill, _integer, _integer,
]  # fmt: skip
