"""Files that are refused before the `tokenizers` library reads them."""

import base64
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from pyloss.errors import FormatError
from pyloss.models.text.tokenizer_library import read_backend


def charsmap(size=1024, text=b"b"):
    """A map in SentencePiece's layout: `size`, a double-array trie of 256 units, `text` for "a"."""
    trie = np.zeros(256, "<u4")
    # The root is at 0, so the unit of "a" is at ord("a"), and its value at ord("a") ^ its offset
    # (3).
    trie[ord("a")] = ord("a") | 1 << 8 | 3 << 10
    trie[ord("a") ^ 3] = 1 << 31
    return size.to_bytes(4, "little") + trie.tobytes() + text + b"\0"


def write(folder, text):
    """Write a tokenizer.json whose normalizer is the JSON `text`."""
    content = json.loads(Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).to_str())
    content["normalizer"] = "here"
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content).replace('"here"', text))
    return file


def precompiled(data):
    return json.dumps(
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}
    )


def nested(text):
    return f'{{"type": "Sequence", "normalizers": [{{"type": "NFC"}}, {text}]}}'


def escaped(text):
    return text.replace("precompiled_", "\\u0070recompiled\\u005F")


def twice(text):
    return f'{{"type": "NFC"}}, "normalizer": {text}, "normalizer": {{"type": "NFC"}}'


@pytest.mark.parametrize("around", [str, nested, escaped])
def test_a_charsmap_is_read(tmp_path, around):
    backend = read_backend(write(tmp_path, around(precompiled(charsmap()))))
    assert backend.encode("a").ids == [1]


@pytest.mark.parametrize("around", [str, nested, escaped, twice])
@pytest.mark.parametrize(
    "data",
    [
        charsmap(7_086_840_744 % 2**32),
        charsmap(2**32 - 4),
        charsmap(1028),  # beyond the texts, which have two bytes
        charsmap(1022),
        b"",
        b"\4\0\0",
    ],
)
def test_a_charsmap_whose_trie_is_not_there_is_refused(tmp_path, around, data):
    with pytest.raises(FormatError, match="precompiled_charsmap: its trie has .* multiple of 4"):
        read_backend(write(tmp_path, around(precompiled(data))))


def test_a_charsmap_that_multiplies_a_text_is_refused(tmp_path):
    read_backend(write(tmp_path, precompiled(charsmap(text=b"b" * 64))))
    with pytest.raises(
        FormatError, match="normalizer: its charsmap can make texts 65 times as long"
    ):
        read_backend(write(tmp_path, nested(precompiled(charsmap(text=b"b" * 65)))))


@pytest.mark.parametrize("text", ["?", "AAA", "ä"])
def test_a_charsmap_that_is_not_base64_is_refused(tmp_path, text):
    content = json.dumps({"type": "Precompiled", "precompiled_charsmap": text})
    with pytest.raises(FormatError, match="precompiled_charsmap: expected base64"):
        read_backend(write(tmp_path, content))


@pytest.mark.parametrize("value", [5, None, ["AAAA"]])
def test_a_charsmap_of_another_type_is_refused(tmp_path, value):
    content = json.dumps({"type": "Precompiled", "precompiled_charsmap": value})
    with pytest.raises(FormatError, match="not a tokenizer"):
        read_backend(write(tmp_path, content))
