"""A tokenizer's metadata for a GGUF file: its source file's, or made from its parts (BPE)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyloss.io.gguf import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_gguf
from pyloss.models.text.gguf_sentencepiece import refused, sentencepiece_metadata
from pyloss.models.text.gguf_tokenizer import (
    KEEPING_SPACE,
    PHI3,
    PRE_TOKENIZERS,
    SPECIAL,
    pre_tokenizer,
)

if TYPE_CHECKING:
    from pyloss.models.tokenizer import Tokenizer

_CHAT_TEMPLATE = "tokenizer.chat_template"


def vocabulary_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` keys of a model whose output has `vocab_size` tokens.

    Raises ValueError for a tokenizer that llama.cpp cannot follow: another model than BPE, a
    pre-tokenizer that has no name there, or more tokens than the model has.
    """
    source = Path(tokenizer.source)
    if source.suffix == ".gguf" and source.is_file():
        read = read_gguf(source).metadata
        metadata = {
            key: value
            for key, value in read.items()
            if key.startswith("tokenizer.") and _CHAT_TEMPLATE not in key
        }
        # Drop optional numbers that the source gives as -1, stored as unsigned.
        metadata = {key: value for key, value in metadata.items() if value != 0xFFFFFFFF}
    else:
        metadata = _convert(tokenizer, vocab_size)
    count = len(metadata["tokenizer.ggml.tokens"])
    if count != vocab_size:
        raise ValueError(f"the tokenizer has {count} tokens, and the model {vocab_size}")
    return {**metadata, **_chat_templates(tokenizer.chat_template)}


def _chat_templates(template: str | dict[str, str] | None) -> dict[str, Any]:
    if not isinstance(template, dict):
        return {_CHAT_TEMPLATE: template}
    others = {name: text for name, text in template.items() if name != "default"}
    named = {f"{_CHAT_TEMPLATE}.{name}": text for name, text in others.items()}
    return {f"{_CHAT_TEMPLATE}s": list(others), _CHAT_TEMPLATE: template.get("default"), **named}


def _convert(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    backend = tokenizer.backend
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise refused(f"its model is {model['type']}; supported is BPE")
    tokens, kinds = _tokens(tokenizer, vocab_size)
    if model.get("byte_fallback"):
        values = sentencepiece_metadata(content, tokens, kinds)
    else:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        values = {
            "model": "gpt2",
            "pre": _pre_name(content),
            "tokens": tokens,
            "token_type": kinds,
            "merges": merges,
        }
    if not model["merges"]:
        raise refused("its model has no merges")
    special = tokenizer.special_tokens
    ids = {
        key: backend.token_to_id(special[name]) for key, name in SPECIAL.items() if name in special
    }
    ids |= _further_ends(tokenizer)
    return {
        **{f"tokenizer.ggml.{key}": value for key, value in values.items()},
        **{
            f"tokenizer.ggml.{key}_token_id": value
            for key, value in ids.items()
            if value is None or value < vocab_size
        },
        **_added_around(content["post_processor"], tokenizer),
    }


def _pre_name(content: dict[str, Any]) -> str:
    """The name in `PRE_TOKENIZERS` of the way in which text is split."""
    model, normalizer = content["model"], content["normalizer"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise refused(f"{key} = {model[key]!r} is not supported")
    # llama.cpp leaves text as it is; almost all text is in NFC already.
    if normalizer is not None and normalizer["type"] != "NFC":
        raise refused(f"its normalizer is {normalizer['type']}; supported are none and NFC")
    steps, ignore_merges = _steps(content["pre_tokenizer"]), bool(model.get("ignore_merges"))
    for name, pre in PRE_TOKENIZERS.items():
        if (
            _steps(json.loads(pre_tokenizer(pre).__getstate__())) == steps
            and pre.ignore_merges == ignore_merges
        ):
            return name
    raise refused(f"its pre-tokenizer is none of {', '.join(PRE_TOKENIZERS)}: {steps}")


def _steps(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer that change tokens."""
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [step for inner in node["pretokenizers"] for step in _steps(inner)]
    step = {key: value for key, value in node.items() if key != "trim_offsets"}
    if step.get("behavior") == "Removed" and step["invert"]:
        # The patterns of `PRE_TOKENIZERS` match all of a text, so there is nothing to remove.
        step |= {"behavior": "Isolated", "invert": False}
    return [step]


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and kinds by id; an id without a token gets an unused one.

    Added tokens that the model has no row for are left out, as llama.cpp's converter does it.
    """
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    added = tokenizer.backend.get_added_tokens_decoder()
    largest = max(index for index in vocabulary.values() if index not in added)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {max(vocabulary.values())}, "
            f"and the model {vocab_size} tokens"
        )
    vocabulary = {text: index for text, index in vocabulary.items() if index < vocab_size}
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for text, index in vocabulary.items():
        tokens[index], kinds[index] = text, NORMAL
    strips = strips_space(tokenizer)
    for index, token in added.items():
        if index >= vocab_size:
            continue
        stripping = strips and token.content not in KEEPING_SPACE
        if token.lstrip or token.rstrip != stripping or token.single_word:
            raise refused(f"{token.content!r} takes the text around it into account")
        kinds[index] = CONTROL if token.special else USER_DEFINED
    return tokens, kinds


def strips_space(tokenizer: Tokenizer) -> bool:
    """Whether special tokens strip the white space after them, in the way that GGUF can have."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    known = all(tokenizer.backend.token_to_id(text) is not None for text in KEEPING_SPACE)
    return known and any(token.rstrip for token in added)


def model_name(name: str, tokenizer: Tokenizer) -> str:
    """A general.name by which llama.cpp strips white space exactly if the tokenizer does."""
    if strips_space(tokenizer):
        return name if PHI3.search(name) else f"{name} (Phi-3)"
    return PHI3.sub("Phi 3", name)


def _further_ends(tokenizer: Tokenizer) -> dict[str, int]:
    """Further tokens that end an answer, under GGUF's two names for them."""
    ends: dict[str, int] = {}
    for index in sorted(tokenizer.eos_token_ids - {tokenizer.eos_token_id}):
        text = tokenizer.backend.id_to_token(index) or ""
        key = "eom" if "eom" in text or "eot" in ends else "eot"
        if key in ends:
            warnings.warn(
                f"GGUF has no name for a further token that ends an answer, {text!r}", stacklevel=2
            )
        else:
            ends[key] = index
    return ends


def _added_around(processor: dict[str, Any] | None, tokenizer: Tokenizer) -> dict[str, bool]:
    """Whether bos and eos are put around a text."""
    around = {"bos": False, "eos": False}
    processors = [] if processor is None else processor.get("processors", [processor])
    for step in processors:
        if step["type"] == "ByteLevel":
            continue
        if step["type"] != "TemplateProcessing":
            raise refused(f"its post-processor is {step['type']}")
        pieces = [
            piece["SpecialToken"]["id"] if "SpecialToken" in piece else None
            for piece in step["single"]
        ]
        text = pieces.index(None)
        before, after = pieces[:text], pieces[text + 1 :]
        for key, found in (("bos", before), ("eos", after)):
            if found and found != [tokenizer.special_tokens.get(f"{key}_token")]:
                raise refused(f"it puts {found} around texts, not its {key} token")
            around[key] |= bool(found)
    return {f"tokenizer.ggml.add_{key}_token": value for key, value in around.items()}
