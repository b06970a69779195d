"""`Tokenizer`: text to token ids and back, and conversations to either.

It is read from a Hugging Face folder or from GGUF metadata.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import tokenizers

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError, choices
from pyloss.io.files import user_path, write_json, write_text
from pyloss.models.text.gguf_tokenizer import build_tokenizer
from pyloss.models.text.positions import Positions
from pyloss.models.text.tokenizer_folder import read_folder, read_generation_config
from pyloss.models.text.tokenizer_library import library

# Arguments of transformers' apply_chat_template that are not variables of the template.
_OTHER_ARGUMENTS = (
    "continue_final_message", "return_tensors", "padding", "truncation", "max_length",
    "tokenizer_kwargs", "sanitize_control_tokens",
)  # fmt: skip


class Tokenizer:
    """A `tokenizers.Tokenizer` with special tokens and chat templates.

    Args:
        backend: does the encoding.
        special_tokens: names like "bos_token" to the token's text.
        eos_token_ids: ids that end a generation; the eos token's is added.
        chat_template: Jinja source, or several by name ("default", "tool_use"), or None.
        source: the file or folder that all this came from.

    Attributes: `special_tokens`, `chat_template`, `source`, `eos_token_ids`, a set, and
    `generation_config`, what generation_config.json says of sampling and ends.

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
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.source = source
        self.generation_config = dict(generation_config or {})
        for name, token in self.special_tokens.items():
            if backend.token_to_id(token) is None:
                raise FormatError(source, name, f"{shown(token)} is not in the vocabulary")
        self.eos_token_ids = set(eos_token_ids)
        if self.eos_token_id is not None:
            self.eos_token_ids.add(self.eos_token_id)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json, or tokenizer.model where it is missing, and the files around it.

        These are tokenizer_config.json, special_tokens_map.json, chat_template.jinja or
        chat_template.json, and generation_config.json and config.json for their end tokens. All of
        them may be missing. Where the tokenizer's own files name no eos token, the first end token
        of the others is the eos token.

        Raises:
            FormatError: a file that cannot be understood.
            FileNotFoundError: there is neither of the two.
            ImportError: tokenizer.model needs the `sentencepiece` package.
            ValueError: a kind of tokenizer.model that pyloss does not read.
        """
        place = user_path(folder)
        return cls(*read_folder(place), folder, read_generation_config(place))

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], path: str | os.PathLike[str] = "GGUF"
    ) -> Tokenizer:
        """Build the tokenizer of a GGUF file: byte-level BPE or SentencePiece's.

        `path` is for errors.

        Raises:
            ValueError: a kind of tokenizer, or of pre-tokenizer, that pyloss does not have.
            FormatError: missing keys, or values that don't fit together.
        """
        with library(path):
            backend, special, ends = build_tokenizer(metadata, path)
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise FormatError(
                path, "tokenizer.chat_template", f"expected text, got {type(template).__name__}"
            )
        prefix = "tokenizer.chat_template."
        named = {
            key.removeprefix(prefix): value
            for key, value in metadata.items()
            if key.startswith(prefix)
        }
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
        """The id of the token for unknown text, if there is one."""
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

    @cached_property
    def highest_id(self) -> int:
        """The largest token id. A model's output may have rows past it, which are no tokens."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become themselves.

        Raises:
            TypeError: `text` is not str.
            ValueError: it holds half of a surrogate pair, which no UTF-8 text can.
            FormatError: the tokenizer's file makes the library fail at this text.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be str, got {type(text).__name__}")
        try:
            with library(self.source):
                return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            text.encode()  # raises UnicodeEncodeError, a ValueError which says where
            raise

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids` (ints or an integer array [n]).

        Broken UTF-8 becomes U+FFFD, and ids past the vocabulary become nothing. Raises ValueError
        for a negative id.
        """
        try:
            listed = [int(item) for item in ids] if isinstance(ids, Iterable) else [int(ids)]
            with library(self.source):
                return self.backend.decode(listed, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            wrong = next(item for item in listed if not 0 <= item < 1 << 32)
            raise ValueError(
                f"ids must be token ids, which are not negative, got {wrong}"
            ) from None

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
            add_generation_prompt: end with the template's beginning of an answer.
            chat_template: Jinja source, or the name of one of several templates; default: the
                tokenizer's.
            return_dict: return the ids as `{"input_ids": [...]}`.
            return_assistant_tokens_mask: with return_dict, also "assistant_masks": 1 for each token
                of the text that the template marks with `{% generation %}`, else 0.
            kwargs: variables for the template.

        Raises:
            TypeError: messages or tools of the wrong type.
            ValueError: no template, one that fails or refuses these messages, or an option that
                pyloss does not have.
        """
        for name in _OTHER_ARGUMENTS:
            if kwargs.pop(name, None):
                raise ValueError(f"apply_chat_template has no option {name!r}")
        # Imported here, as Jinja takes long to import.
        from pyloss.models.text.chat_template import render_chat, render_marked

        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise ValueError(
                "return_assistant_tokens_mask needs return_dict=True and tokenize=True"
            )
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
                    names = choices([shown(name) for name in own])
                    raise ValueError(
                        f"chat_template must be one of {names}: this tokenizer has no default"
                    )
            return own.get(chosen, chosen)
        template = own if chosen is None else chosen
        if template is None:
            raise ValueError(
                "this tokenizer has no chat template; "
                "give one as chat_template=, or set .chat_template"
            )
        return template

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json for transformers.

        generation_config.json comes with them if there was one, or if there are several end tokens.

        Raises OSError naming the file that could not be written.
        """
        folder = user_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        template = self.chat_template
        config: dict[str, Any] = {
            # This class takes tokenizer.json as it is; others build their own pre-tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**30,
            **self.special_tokens,
        }
        if isinstance(template, dict):
            config["chat_template"] = [
                {"name": name, "template": source} for name, source in template.items()
            ]
        elif template is not None:
            config["chat_template"] = template
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", self.special_tokens)
        if self.generation_config or len(self.eos_token_ids) > 1:
            ends = {"eos_token_id": sorted(self.eos_token_ids)}
            write_json(folder / "generation_config.json", {**self.generation_config, **ends})
        stale = folder / "chat_template.jinja"
        if stale.exists():  # readers prefer it to the configuration
            default = template.get("default") if isinstance(template, dict) else template
            write_text(stale, default) if default else stale.unlink()

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, eos {sorted(self.eos_token_ids)})"


class StreamDecoder:
    """The text of tokens one by one, in pieces of whole characters that add up to the text."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._given = 0

    def add(self, id: int) -> str:
        """The text that token `id` completes; "" if a character needs more tokens."""
        self._ids.append(id)
        text = self._tokenizer.decode(self._ids, self._skip)
        # An unfinished character decodes to U+FFFD at the end; the next token may complete it.
        certain = text.rstrip("\ufffd")
        piece = certain[self._given :]
        self._given += len(piece)
        if certain == text:
            # The last token with a text stays, since some decoders look at their left neighbor.
            # Part of a character, or a token that is skipped, has no text alone.
            alone = self._tokenizer.decode([id], self._skip)
            if alone and "\ufffd" not in alone:
                self._ids, self._given = [id], len(alone)
        return piece

    def flush(self) -> str:
        """The rest at the end: U+FFFD for an unfinished character, else "". Resets the decoder."""
        rest = self._tokenizer.decode(self._ids, self._skip)[self._given :]
        self._ids, self._given = [], 0
        return rest
