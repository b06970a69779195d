"""Builds a `tokenizers.Tokenizer` from a GGUF file's vocabulary of byte-level BPE.

`gguf_sentencepiece` has SentencePiece's vocabularies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.gguf import CONTROL, UNKNOWN, USER_DEFINED
from pyloss.models.text.gguf_sentencepiece import sentencepiece_tokenizer

# Tokens that are matched in the text before it is split.
_ADDED = (UNKNOWN, CONTROL, USER_DEFINED)

# Keys tokenizer.ggml.*_token_id and the names of these tokens in transformers.

SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}

# Tokens that end a turn or a message to a tool; generation stops at them.
_ENDS = ("eos", "eot", "eom")
# Files often omit the key; llama.cpp then recognizes these tokens by their text.
_TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>")

#: Names of models whose special tokens strip white space, and the tokens that never do.
PHI3 = re.compile("phi-?3", re.IGNORECASE)
KEEPING_SPACE = ("<unk>", "<s>", "<|endoftext|>")

# llama.cpp's values for keys that a file with SentencePiece's vocabulary lacks.
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}


class _Pre(NamedTuple):
    """How text is split before merging; `pattern` None is GPT-2's, built into the library."""

    pattern: str | None
    digits: bool = False  # each digit is split off first
    ignore_merges: bool = False  # a piece in the vocabulary stays whole
    add_bos: bool = False  # unless the file says otherwise


def _llama3_pattern(numbers: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = _Pre(None)
# SmolLM's tokenizer.json splits off digits first, then splits as GPT-2 does, and llama.cpp agrees.
# transformers ignores `tokenizer.ggml.pre` of GGUF files and keeps digits together: "123" becomes
# tokens that the model was not trained with.
_SMOLLM = _Pre(None, digits=True)
_LLAMA3 = _Pre(_llama3_pattern(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
# OpenAI's cl100k and the vocabularies made like it: DBRX, OLMo 2 and 3. llama.cpp's converter also
# gives SmolLM3 such a name, smaug-bpe: Llama 3's pattern for a tokenizer that adds no bos token.
_CL100K = _Pre(_llama3_pattern(r"\p{N}{1,3}"))
_QWEN2 = _Pre(_llama3_pattern(r"\p{N}"))
# Qwen3.5's words keep marks, such as accents and vowel signs, with the letters before them.
_QWEN35 = _Pre(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Mistral's newer vocabularies also split words before a capital.
_TEKKEN = _Pre(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignore_merges=True,
    add_bos=True,
)
# OpenAI's o200k, Phi-4-mini's too: words are also split before a capital, and keep 's, 're ...
_O200K_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = _Pre(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + _O200K_END
    + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + _O200K_END
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# By tokenizer.ggml.pre. If several names mean one, the first is that of llama.cpp's converter.
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "refact": _SMOLLM,  # the name in published files of Granite 3
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "lfm2": _LLAMA3,
    "qwen2": _QWEN2,
    "qwen35": _QWEN35,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
    "olmo": _GPT2,
    "dbrx": _CL100K,
    "smaug-bpe": _CL100K,
    "gpt-4o": _O200K,
}


def build_tokenizer(
    metadata: Mapping[str, Any], path: str | os.PathLike[str]
) -> tuple[tokenizers.Tokenizer, dict[str, str], set[int]]:
    """The tokenizer, the special tokens by transformers' names, and the ids that end a generation.

    Raises:
        ValueError: an unsupported kind of vocabulary or pre-tokenizer.
        FormatError: missing or damaged keys.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{path}: tokenizer.ggml.model {shown(kind)} is not supported; supported are "
            "'gpt2', byte-level BPE, and 'llama', SentencePiece's BPE"
        )
    tokens = _texts(metadata, "tokens", path)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise FormatError(path, "tokenizer.ggml.tokens", f"the token {shown(twice)} occurs twice")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise FormatError(
            path,
            "tokenizer.ggml.token_type",
            f"expected a list of {len(tokens)} numbers, one per token",
        )
    ids = {key: _token_id(metadata, key, len(tokens), path) for key in {*SPECIAL, *_ENDS}}
    if kind == "llama":
        ids |= {
            key: index
            for key, index in _SENTENCEPIECE_IDS.items()
            if ids[key] is None and index < len(tokens)
        }
    special = {
        text: tokens[index] for key, text in SPECIAL.items() if (index := ids[key]) is not None
    }
    if kind == "llama":
        prefix, add_bos = _flag(metadata, "add_space_prefix", True, path), True
        scores = metadata.get("tokenizer.ggml.scores")
        backend = sentencepiece_tokenizer(
            tokens, scores, kinds, special.get("unk_token"), prefix, path
        )
    else:
        backend, add_bos = _byte_level(metadata, vocabulary, path)
    named = metadata.get("general.name")
    strips = isinstance(named, str) and strips_by_name(named, vocabulary)
    _add_tokens(backend, kinds, tokens, strips)
    around = _around(metadata, add_bos, special, vocabulary, path)
    if around is not None:
        backend.post_processor = around
    ends = {index for key in _ENDS if (index := ids[key]) is not None}
    if ids["eot"] is None:
        ends |= {
            vocabulary[text]
            for text in _TURN_ENDS
            if text in vocabulary and kinds[vocabulary[text]] in _ADDED
        }
    if "eos_token" not in special and ends:  # it ends texts
        special["eos_token"] = tokens[min(ends) if ids["eot"] is None else ids["eot"]]
    return backend, special, ends


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], path: str | os.PathLike[str]
) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether it adds a bos token to texts unless the file says otherwise."""
    name = metadata.get("tokenizer.ggml.pre")
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        supported = ", ".join(PRE_TOKENIZERS)
        raise ValueError(
            f"{path}: tokenizer.ggml.pre {shown(name)} is not supported; supported are {supported}"
        )
    # Neither side of a merge is empty, so a space as first character belongs to the left side.
    merges = [
        (merge[:cut], merge[cut + 1 :])
        for merge, cut in _cuts(_texts(metadata, "merges", path), path)
    ]
    try:
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=pre.ignore_merges
            )
        )
    except Exception as error:  # the library raises bare Exceptions
        raise FormatError(
            path, "tokenizer.ggml.merges", f"not the merges of this vocabulary: {error}"
        ) from error
    backend.pre_tokenizer = pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend, pre.add_bos


def _texts(metadata: Mapping[str, Any], key: str, path: str | os.PathLike[str]) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if (
        not isinstance(values, list)
        or not values
        or not all(type(value) is str for value in values)
    ):
        raise FormatError(path, f"tokenizer.ggml.{key}", "expected a list of texts")
    return values


def _cuts(merges: list[str], path: str | os.PathLike[str]) -> list[tuple[str, int]]:
    cuts = [(merge, merge.find(" ", 1)) for merge in merges]
    for merge, cut in cuts:
        if cut < 0:
            raise FormatError(
                path,
                "tokenizer.ggml.merges",
                f"expected two tokens with a space between, got {shown(merge)}",
            )
    return cuts


def pre_tokenizer(pre: _Pre) -> Any:
    """The pre-tokenizer that splits text as `pre` says."""
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.pattern is None:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    else:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(pre.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)


def strips_by_name(name: str, vocabulary: Mapping[str, int]) -> bool:
    """Whether special tokens take the white space after them away, in a model of this name.

    GGUF has no flag for it: llama.cpp goes by general.name, as Phi-3's special tokens do so.
    """
    return bool(PHI3.search(name)) and all(token in vocabulary for token in KEEPING_SPACE)


def _add_tokens(
    backend: tokenizers.Tokenizer, kinds: list[Any], tokens: list[str], strips: bool
) -> None:
    """Add the tokens that are matched in the text before it is split; see `strips_by_name`."""
    added = [
        tokenizers.AddedToken(
            token,
            special=kind != USER_DEFINED,
            normalized=False,
            rstrip=strips and token not in KEEPING_SPACE,
        )
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in _ADDED and token
    ]
    backend.add_tokens(added)


def _token_id(
    metadata: Mapping[str, Any], key: str, count: int, path: str | os.PathLike[str]
) -> int | None:
    name = f"tokenizer.ggml.{key}_token_id"
    value = metadata.get(name)
    # Files without such a token say so with -1, stored as unsigned.
    if value is None or value == 0xFFFFFFFF:
        return None
    if type(value) is not int or not 0 <= value < count:
        raise FormatError(path, name, f"expected a token id in [0, {count}), got {value!r:.100}")
    return value


def _flag(
    metadata: Mapping[str, Any], key: str, default: bool, path: str | os.PathLike[str]
) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if type(value) is not bool:
        raise FormatError(
            path, f"tokenizer.ggml.{key}", f"expected true or false, got {value!r:.100}"
        )
    return value


def _around(
    metadata: Mapping[str, Any],
    add_bos: bool,
    special: dict[str, str],
    vocabulary: dict[str, int],
    path: str | os.PathLike[str],
) -> Any:
    """The post-processor that adds bos and eos tokens to a text, or None."""
    single = ["$A"]
    for key, name, default in (
        ("add_bos_token", "bos_token", add_bos),
        ("add_eos_token", "eos_token", False),
    ):
        if not _flag(metadata, key, default, path):
            continue
        if name not in special:
            raise FormatError(
                path, f"tokenizer.ggml.{key}", f"is true, and the file names no {name}"
            )
        single.insert(0 if name == "bos_token" else len(single), special[name])
    if len(single) == 1:
        return None
    return processors.TemplateProcessing(
        single=single,
        special_tokens=[(token, vocabulary[token]) for token in single if token != "$A"],
    )
