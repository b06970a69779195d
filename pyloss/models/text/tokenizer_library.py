"""Calls of the `tokenizers` library: failures become FormatErrors, harmful files are refused."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tokenizers

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.files import read_text

# The charsmap of a Precompiled normalizer, at any depth; JSON may escape any letter of the key.
_KEY = "".join(rf"(?:{letter}|\\u00{ord(letter):02x})" for letter in "precompiled_charsmap")
_CHARSMAP = re.compile(rf'"(?i:{_KEY})"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")')

# The factor by which a tokenizer may lengthen a text. Published ones replace characters by
# characters, and once by bytes.
_MAX_GROWTH = 64


@contextmanager
def library(source: str | os.PathLike[str], failed: str = "the tokenizer failed") -> Iterator[None]:
    """Turns the library's errors in this context into a FormatError of the file or folder `source`.

    The library raises bare Exceptions, and panics, which are BaseExceptions. Other types pass.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise FormatError(source, None, f"{failed}: {str(error)[:200]}") from error


def read_backend(file: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, without its truncation and padding.

    Raises FormatError for a file that the library refuses, or fails with at the first text.
    """
    text = read_text(file)
    for found in _CHARSMAP.finditer(text):
        _check_charsmap(file, found.group(1))
    with library(file, "not a tokenizer"):
        backend = tokenizers.Tokenizer.from_str(text)
        # A saved tokenizer may cut or pad texts to any length; here a text is encoded as it is.
        backend.no_truncation()
        backend.no_padding()
    check_backend(file, backend)
    return backend


def check_backend(file: str | os.PathLike[str], backend: tokenizers.Tokenizer) -> None:
    """FormatError for a tokenizer that lengthens texts too much or fails at the first text."""
    with library(file, "not a tokenizer"):
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            _check_growth(file, part, getattr(backend, part))
        # Only the first use shows that a post-processor has a token that it does not list.
        backend.decode(backend.encode("a").ids)


def add_token(
    backend: tokenizers.Tokenizer, token: Any, source: str | os.PathLike[str]
) -> int | None:
    """Adds an AddedToken that the vocabulary lacks. Returns its id; None for an empty text."""
    with library(source):
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
        return backend.token_to_id(token.content)  # type: ignore[no-any-return]


def _check_charsmap(file: str | os.PathLike[str], quoted: str) -> None:
    """`check_charsmap` of base64 as JSON text."""
    try:
        data = base64.b64decode(json.loads(quoted), validate=True)
    except ValueError:
        raise FormatError(file, "precompiled_charsmap", "expected base64") from None
    check_charsmap(file, data)


def check_charsmap(file: str | os.PathLike[str], data: bytes) -> None:
    """Refuses a charsmap of SentencePiece whose trie is not in it.

    It is the trie's size in bytes, the trie, and the texts that characters become. The size is a
    little-endian uint32. The library allocates that much before it reads the trie, and a failed
    allocation ends the process.
    """
    size, held = int.from_bytes(data[:4], "little"), len(data) - 4
    if held < 0 or size % 4 or size > held:
        most = f"at most the {max(held, 0)} that follow"
        reason = f"its trie has {size} bytes; it must be a multiple of 4, {most}"
        raise FormatError(file, "precompiled_charsmap", reason)


def _check_growth(file: str | os.PathLike[str], part: str, component: Any) -> None:
    """Refuses a part whose steps lengthen a text too much: by the product of their factors."""
    if component is None:
        return
    growth = 1.0
    for step in _steps(json.loads(component.__getstate__())):
        factor, what = _growth_of(step, part)
        growth *= max(1.0, factor)
        if growth > _MAX_GROWTH:
            raise FormatError(
                file,
                part,
                f"its {what} can make texts {growth:.0f} times as long; "
                f"supported is up to {_MAX_GROWTH}",
            )


def _growth_of(step: dict[str, Any], part: str) -> tuple[float, str]:
    """The factor by which a step can lengthen a text, and the name of such steps."""
    kind = step.get("type")
    if kind == "Replace":
        pattern = step["pattern"]
        # A regular expression may match nothing, between any two characters.
        whole, content = pattern.get("String"), step["content"]
        factor = len(content) / len(whole) if whole else len(content) + 1
        return factor, f"replacements (such as {shown(pattern)} by {shown(content)})"
    if kind == "ByteLevel" and part != "decoder":
        # Two characters for one that is not ASCII, and a space before each piece.
        return 3.0 if part == "pre_tokenizer" else 2.0, "ByteLevel steps"
    if kind == "Precompiled":
        data = base64.b64decode(step["precompiled_charsmap"])
        texts = data[4 + int.from_bytes(data[:4], "little") :].decode().split("\0")
        return max(map(len, texts)), "charsmap"
    if kind == "TemplateProcessing":
        return sum("Sequence" in piece for piece in step["single"]), "template"
    return 1.0, "steps"


def _steps(node: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part of a tokenizer, first to last."""
    if not isinstance(node, dict):
        return
    inner = next(
        (
            node[key]
            for key in ("normalizers", "pretokenizers", "processors", "decoders")
            if node.get(key)
        ),
        None,
    )
    if inner is None:
        yield node
    else:
        for step in inner:
            yield from _steps(step)
