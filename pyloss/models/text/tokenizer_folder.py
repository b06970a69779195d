"""A tokenizer's folder: the backend, special tokens, tokens that end an answer, chat templates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from pyloss.checks.numbers import shown, whole
from pyloss.errors import FormatError
from pyloss.io.files import read_json, read_text
from pyloss.models.text.sentencepiece_model import read_sentencepiece
from pyloss.models.text.tokenizer_library import add_token, library, read_backend

# In transformers' order, which gives ids to tokens that the vocabulary lacks.
_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FURTHER = ("additional_special_tokens", "extra_special_tokens")
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def read_folder(
    folder: Path,
) -> tuple[tokenizers.Tokenizer, dict[str, str], set[int], str | dict[str, str] | None]:
    """The backend, the special tokens by name, the ids that end an answer, and the chat templates.

    Raises:
        FormatError: a file that cannot be understood.
        FileNotFoundError: there is neither tokenizer.json nor tokenizer.model.
        ImportError: there is only tokenizer.model, and the package that reads it is missing.
        ValueError: a kind of tokenizer.model that pyloss does not read.
    """
    file, model = folder / "tokenizer.json", folder / "tokenizer.model"
    config_file = folder / "tokenizer_config.json"
    config = _read_if_there(config_file)
    if file.exists():
        backend = read_backend(file)
        _add_missing_tokens(backend, config.get("added_tokens_decoder"), config_file)
        special = _special_tokens(backend, folder, config, config_file)
    elif model.exists():
        file = model
        backend, own = read_sentencepiece(file, config.get("legacy") is False)
        _add_listed_tokens(backend, folder / "added_tokens.json")
        _add_missing_tokens(backend, config.get("added_tokens_decoder"), config_file)
        special = {**own, **_special_tokens(backend, folder, config, config_file)}
        with library(file):
            _put_around(backend, special, config, config_file)
    else:
        raise FileNotFoundError(
            f"{folder}: there is neither tokenizer.json nor tokenizer.model, "
            "the kinds of vocabulary supported"
        )
    ends = _end_ids(folder)
    if "eos_token" not in special:
        # Texts are ended by the eos token, so there must be one wherever a file names an end.
        with library(file):
            texts = [backend.id_to_token(index) for index in ends]
        known = [text for text in texts if text is not None]
        if known:
            special["eos_token"] = known[0]
    return backend, special, set(ends), _read_templates(folder, config, config_file)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """What generation_config.json says; empty where there is none.

    Raises FormatError for one that is no JSON object.
    """
    return _read_if_there(folder / "generation_config.json")


def _add_listed_tokens(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Adds the tokens of added_tokens.json, which has the id of each text."""
    ids = _read_if_there(path)
    if not all(type(index) is int for index in ids.values()):
        raise FormatError(path, None, "expected an object of token ids")
    tokens = {str(index): text for text, index in ids.items()}
    _add_missing_tokens(backend, tokens, path, normalized=False)


def _put_around(
    backend: tokenizers.Tokenizer, special: dict[str, str], config: dict[str, Any], path: Path
) -> None:
    """Sets the tokens around a text; by default a bos token begins it, where there is one."""
    single = ["$A"]
    for name, default in (("bos_token", "bos_token" in special), ("eos_token", False)):
        wanted = config.get(f"add_{name}")
        if wanted is not None and type(wanted) is not bool:
            raise FormatError(path, f"add_{name}", f"expected true or false, got {shown(wanted)}")
        if default if wanted is None else wanted:
            if name not in special:
                raise FormatError(path, f"add_{name}", f"is true, and the files name no {name}")
            single.insert(0 if name == "bos_token" else len(single), special[name])
    if len(single) > 1:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=single,
            special_tokens=[(t, backend.token_to_id(t)) for t in single if t != "$A"],
        )


def _special_tokens(
    backend: tokenizers.Tokenizer, folder: Path, config: dict[str, Any], path: Path
) -> dict[str, str]:
    """The special tokens by name. As in transformers, tokens that the vocabulary lacks are added.

    The older special_tokens_map.json overrides a configuration that lists no added tokens.
    """
    older = {
        key: value
        for key, value in _read_if_there(folder / "special_tokens_map.json").items()
        if value is not None
    }
    said = {**older, **config} if "added_tokens_decoder" in config else {**config, **older}
    named = {name: said[name] for name in _SPECIAL if said.get(name)}
    for name, token in (*named.items(), *_further_tokens(said, path)):
        flags = (
            {flag: bool(token.get(flag)) for flag in _TOKEN_FLAGS}
            if isinstance(token, dict)
            else {}
        )
        text = _token_text(token, name, path)
        add_token(backend, tokenizers.AddedToken(text, **{**flags, "special": True}), path)
    return {name: _token_text(token, name, path) for name, token in named.items()}


def _further_tokens(said: dict[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """Special tokens that have no role: a list of them, or an object that names them."""
    for key in _FURTHER:
        tokens = said.get(key) or []
        if not isinstance(tokens, list | dict):
            raise FormatError(path, key, f"expected a list of tokens, got {shown(tokens)}")
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            yield key, token


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _token_text(token: Any, name: str, path: Path) -> str:
    """A token as files give it: its text, or an object with the text under "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise FormatError(path, name, f"expected a token's text, got {shown(token)}")
    return text


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, tokens: Any, path: Path, **flags_of_texts: bool
) -> None:
    """Adds tokens that only tokenizer_config.json has, with ids in transformers' order."""
    if tokens is None:
        return
    if not isinstance(tokens, dict) or not all(key.isdecimal() and len(key) < 20 for key in tokens):
        raise FormatError(path, "added_tokens_decoder", "expected an object of token ids")
    for key in sorted(tokens, key=int):
        text = _token_text(tokens[key], f"added_tokens_decoder {key}", path)
        if backend.token_to_id(text) is not None:
            continue
        given = tokens[key] if isinstance(tokens[key], dict) else flags_of_texts
        flags = {name: bool(given.get(name)) for name in _TOKEN_FLAGS}
        index = add_token(backend, tokenizers.AddedToken(text, **flags), path)
        if index != int(key):
            reason = f"{shown(text)} got the id {index}: it does not follow the vocabulary"
            raise FormatError(path, f"added_tokens_decoder {key}", reason)


def _end_ids(folder: Path) -> list[int]:
    """The ids that end an answer: config.json's, then generation_config.json's."""
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        content = _read_if_there(folder / name)
        text = content.get("text_config") if content.get("eos_token_id") is None else None
        ids = (text if isinstance(text, dict) else content).get("eos_token_id")
        if ids is None:
            continue
        try:
            found += [
                whole(item, "an end token") for item in (ids if isinstance(ids, list) else [ids])
            ]
        except (TypeError, ValueError):
            reason = f"expected an integer or a list of them, got {shown(ids)}"
            raise FormatError(folder / name, "eos_token_id", reason) from None
    # Some files say -1 for none.
    return [index for index in dict.fromkeys(found) if 0 <= index < 1 << 32]


def _read_templates(
    folder: Path, config: dict[str, Any], path: Path
) -> str | dict[str, str] | None:
    """The chat template, from the places of all versions of transformers, newest first."""
    file = folder / "chat_template.jinja"
    if file.exists():
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        sources = {"default": read_text(file), **{other.stem: read_text(other) for other in others}}
        return sources if others else sources["default"]
    file = folder / "chat_template.json"
    if file.exists():
        config, path = read_json(file), file
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    try:
        named = {entry["name"]: entry["template"] for entry in template}
    except (TypeError, KeyError):
        named = {"": None}
    if not all(isinstance(text, str) for entry in named.items() for text in entry):
        raise FormatError(
            path, "chat_template", "expected text, or a list of objects with name and template"
        )
    return named
