"""`Tokenizer`: text to token ids and back, and conversations to either, from a Hugging Face folder or GGUF metadata."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from pyloss.errors import FormatError
from pyloss.files import read_json, write_json, write_text
from pyloss.models.gguf_tokenizer import build_tokenizer
from pyloss.models.positions import Positions

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")

# Arguments of transformers' apply_chat_template that are not variables of the template.
_OTHER_ARGUMENTS = (
    "continue_final_message", "return_tensors", "padding", "truncation", "max_length", "tokenizer_kwargs",
    "sanitize_control_tokens",
)  # fmt: skip


class Tokenizer:
    """Over a `tokenizers.Tokenizer`, with the special tokens and chat templates around it.

    Args:
        backend: does the encoding.
        special_tokens: names like "bos_token" to the token's text.
        eos_token_ids: further ids that end a generation, beside the eos token's.
        chat_template: Jinja source, or several by name ("default", "tool_use"), or None.
        source: the file or folder that all this came from.

    Attributes: `special_tokens`, `chat_template`, `source`, and `eos_token_ids`, a set.

    Raises:
        FormatError: a special token that is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        eos_token_ids: Iterable[int] = (),
        chat_template: str | dict[str, str] | None = None,
        source: str | os.PathLike[str] = "tokenizer",
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.source = source
        for name, token in self.special_tokens.items():
            if backend.token_to_id(token) is None:
                raise FormatError(source, name, f"{token!r} is not in the vocabulary")
        self.eos_token_ids = set(eos_token_ids)
        if self.eos_token_id is not None:
            self.eos_token_ids.add(self.eos_token_id)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json and what lies beside it.

        Beside it: tokenizer_config.json, special_tokens_map.json, chat_template.jinja or chat_template.json, and the
        end tokens of generation_config.json (or else of config.json). All of these may be missing.

        Raises:
            FormatError: a file that cannot be understood.
            FileNotFoundError: there is no tokenizer.json.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder}: there is no tokenizer.json, the only kind of vocabulary supported")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_bytes().decode())
            # A post-processor with a token that it does not list is noticed by the library at the first use.
            backend.encode("a")
        except (KeyboardInterrupt, SystemExit, OSError):
            raise
        except BaseException as error:  # the library raises bare Exceptions, and panics that are not even that
            raise FormatError(file, None, f"not a tokenizer: {error}") from error
        # A saved tokenizer may cut or pad what it encodes; here a text is encoded as it is.
        backend.no_truncation()
        backend.no_padding()
        config_file = folder / "tokenizer_config.json"
        config = _read_if_there(config_file)
        special = {**_read_if_there(folder / "special_tokens_map.json"), **config}
        _add_missing_tokens(backend, config.get("added_tokens_decoder"), config_file)
        names = {name: _token_text(special[name], name, config_file) for name in _SPECIAL if special.get(name)}
        return cls(backend, names, _end_ids(folder), _read_templates(folder, config, config_file), folder)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: str | os.PathLike[str] = "GGUF") -> Tokenizer:
        """Build the tokenizer a GGUF file describes (byte-level BPE, or SentencePiece's); `path` is for errors.

        Raises:
            ValueError: a kind of tokenizer, or of pre-tokenizer, that pyloss does not have.
            FormatError: missing keys, or values that don't fit together.
        """
        backend, special, ends = build_tokenizer(metadata, path)
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise FormatError(path, "tokenizer.chat_template", f"expected text, got {type(template).__name__}")
        prefix = "tokenizer.chat_template."
        named = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        if named and template is not None:
            return cls(backend, special, ends, {"default": template, **named}, path)
        return cls(backend, special, ends, template, path)

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text, if there is one."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text, if there is one."""
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id of the padding token, if there is one."""
        return self._id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """The id of the token for what the vocabulary lacks, if there is one."""
        return self._id("unk_token")

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text, if there is one."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text, if there is one."""
        return self.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        """The padding token, if there is one."""
        return self.special_tokens.get("pad_token")

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones too. A model's output may be padded to more."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become themselves.

        Raises:
            TypeError: `text` is not str.
            ValueError: it holds half of a surrogate pair, which no UTF-8 text can.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be str, got {type(text).__name__}")
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            text.encode()  # raises UnicodeEncodeError, a ValueError which says where
            raise

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids` (ints or an integer array [n]).

        Broken UTF-8 becomes U+FFFD, and ids past the vocabulary become nothing. Raises ValueError for a negative id.
        """
        try:
            listed = [int(item) for item in ids] if isinstance(ids, Iterable) else [int(ids)]
            return self.backend.decode(listed, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            wrong = next(item for item in listed if not 0 <= item < 1 << 32)
            raise ValueError(f"ids must be token ids, which are not negative, got {wrong}") from None

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        chat_template: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> list[int] | str | dict[str, list[int]]:
        """A conversation as token ids, or with `tokenize=False` as text.

        Args:
            messages: dicts with "role" and "content", which is text or a list of parts.
            tools: JSON schemas (dicts), or JSON text of a list of them.
            add_generation_prompt: end with what makes the model answer.
            chat_template: Jinja source, or the name of one of several templates; default the tokenizer's.
            return_dict: give the ids as `{"input_ids": [...]}`.
            return_assistant_tokens_mask: with return_dict, also "assistant_masks": 1 for each token of the text that the
                template marks with `{% generation %}`, else 0.
            kwargs: variables for the template.

        Raises:
            TypeError: messages or tools of the wrong type.
            ValueError: no template, one that fails or refuses these messages, or an option that pyloss does not have.
        """
        for name in _OTHER_ARGUMENTS:
            if kwargs.pop(name, None):
                raise ValueError(f"apply_chat_template has no option {name!r}")
        # Jinja is imported by those alone who render.
        from pyloss.models.chat_template import render_chat, render_marked

        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise ValueError("return_assistant_tokens_mask needs return_dict=True and tokenize=True")
        template = self._template(chat_template, tools is not None)
        given = (template, messages, tools, add_generation_prompt)
        variables = {**self.special_tokens, **kwargs}
        if return_assistant_tokens_mask:
            text, spans = render_marked(*given, **variables)
            positions = Positions(self, text)
            mask = [0] * len(positions.ids)
            for span in spans:
                for k in range(*positions.tokens(*span)):
                    mask[k] = 1
            return {"input_ids": positions.ids, "assistant_masks": mask}
        text = render_chat(*given, **variables)
        if not tokenize:
            return text
        ids = self.encode(text, add_special_tokens=False)
        return {"input_ids": ids} if return_dict else ids

    def _template(self, chosen: str | None, with_tools: bool) -> str:
        own = self.chat_template
        if isinstance(own, dict):
            if chosen is None:
                chosen = "tool_use" if with_tools and "tool_use" in own else "default"
                if chosen not in own:
                    raise ValueError(f"chat_template must be one of {', '.join(own)}: this tokenizer has no default")
            return own.get(chosen, chosen)
        template = own if chosen is None else chosen
        if template is None:
            raise ValueError("this tokenizer has no chat template; give one as chat_template=, or set .chat_template")
        return template

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers reads them.

        Raises OSError naming the file that could not be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        template = self.chat_template
        config: dict[str, Any] = {
            # The class that takes tokenizer.json word for word; others build the pre-tokenizer anew.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**30,
            **self.special_tokens,
        }
        if isinstance(template, dict):
            config["chat_template"] = [{"name": name, "template": source} for name, source in template.items()]
        elif template is not None:
            config["chat_template"] = template
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", self.special_tokens)
        stale = folder / "chat_template.jinja"
        if stale.exists():  # readers prefer it to the configuration
            default = template.get("default") if isinstance(template, dict) else template
            write_text(stale, default) if default else stale.unlink()

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, eos {sorted(self.eos_token_ids)})"


class StreamDecoder:
    """Text of tokens as they come, in pieces that end between characters and together are the whole text."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._given = 0

    def add(self, id: int) -> str:
        """The text that became certain with token `id`; often "" within a character of several tokens."""
        self._ids.append(id)
        text = self._tokenizer.decode(self._ids, self._skip)
        # An unfinished character decodes to U+FFFD at the end, which the next token may turn into the character.
        certain = text.rstrip("\ufffd")
        piece = certain[self._given :]
        self._given += len(piece)
        if certain == text:
            # The last token stays as context for decoders that look at their left neighbour, unless it is part of a character.
            alone = self._tokenizer.decode([id], self._skip)
            if "\ufffd" not in alone:
                self._ids, self._given = [id], len(alone)
        return piece

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished, else "". The decoder starts anew."""
        rest = self._tokenizer.decode(self._ids, self._skip)[self._given :]
        self._ids, self._given = [], 0
        return rest


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_text(token: Any, name: str, path: Path) -> str:
    """A token as files give it: its text, or an object that has it under "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise FormatError(path, name, f"expected a token's text, got {token!r:.100}")
    return text


def _add_missing_tokens(backend: tokenizers.Tokenizer, tokens: Any, path: Path) -> None:
    """Tokens that only tokenizer_config.json has; they get their ids from their order, as in transformers."""
    if tokens is None:
        return
    if not isinstance(tokens, dict) or not all(key.isdecimal() for key in tokens):
        raise FormatError(path, "added_tokens_decoder", "expected an object of token ids")
    for key in sorted(tokens, key=int):
        text = _token_text(tokens[key], f"added_tokens_decoder {key}", path)
        if backend.token_to_id(text) is not None:
            continue
        given = tokens[key] if isinstance(tokens[key], dict) else {}
        flags = {name: bool(given.get(name)) for name in _TOKEN_FLAGS}
        backend.add_tokens([tokenizers.AddedToken(text, **flags)])
        if backend.token_to_id(text) != int(key):
            reason = f"{text!r} got the id {backend.token_to_id(text)}: it does not follow the vocabulary"
            raise FormatError(path, f"added_tokens_decoder {key}", reason)


def _end_ids(folder: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        ids = _read_if_there(folder / name).get("eos_token_id")
        if ids is None:
            continue
        listed = ids if isinstance(ids, list) else [ids]
        if not all(type(item) is int for item in listed):
            raise FormatError(folder / name, "eos_token_id", f"expected an integer or a list of them, got {ids!r:.100}")
        return listed
    return []


def _read_templates(folder: Path, config: dict[str, Any], path: Path) -> str | dict[str, str] | None:
    """The chat template from wherever the writer's version of transformers put it, newest place first."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        sources = {"default": _read_text(file), **{other.stem: _read_text(other) for other in others}}
        return sources if others else sources["default"]
    file = folder / "chat_template.json"
    if file.is_file():
        config, path = read_json(file), file
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    try:
        named = {str(entry["name"]): entry["template"] for entry in template}
    except (TypeError, KeyError):
        named = {"": None}
    if not all(isinstance(source, str) for source in named.values()):
        raise FormatError(path, "chat_template", "expected text, or a list of objects with name and template")
    return named


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise FormatError(path, f"byte {error.start}", "not UTF-8 text") from None
