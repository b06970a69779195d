"""mlx_lm.tokenizer_utils: pyloss's tokenizer with the attributes that mlx-lm's scripts use."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.loading import configure, load_tokenizer
from pyloss.mlx_lm.arrays import array
from pyloss.mlx_lm.names import absent
from pyloss.models.text.special import eos_ids
from pyloss.models.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "BPEStreamingDetokenizer",
    "NaiveStreamingDetokenizer",
    "SPMStreamingDetokenizer",
    "StreamingDetokenizer",
    "TokenizerWrapper",
    "load",
    "no_bos_or_eos",
]

__getattr__ = absent(__name__)

#: pairs of tokens around a model's thoughts
_THOUGHTS = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
)


class StreamingDetokenizer:
    """The text of tokens that come one by one.

    Attributes:
        text: the text so far, without an unfinished character.
        tokens: the ids so far.
        offset: how much of the text `last_segment` has given.
    """

    text = ""
    #: whether the space before the first word is left out
    trims = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._decoder = StreamDecoder(self._tokenizer)
        self.text, self.tokens, self.offset = "", [], 0  # type: ignore[var-annotated]

    def add_token(self, token: Any) -> None:
        """Take the next token."""
        self.tokens.append(int(token))
        self._append(self._decoder.add(int(token)))

    def finalize(self) -> None:
        """Add what is left of the text: an unfinished character."""
        self._append(self._decoder.flush())

    def _append(self, piece: str) -> None:
        self.text += piece[1:] if self.trims and not self.text and piece[:1] == " " else piece

    @property
    def last_segment(self) -> str:
        """The text since this was last read."""
        segment = self.text[self.offset :]
        self.offset = len(self.text)
        return segment


class NaiveStreamingDetokenizer(StreamingDetokenizer):
    """The `StreamingDetokenizer` for any tokenizer."""


class BPEStreamingDetokenizer(StreamingDetokenizer):
    """The `StreamingDetokenizer` for byte-level tokenizers; it leaves the first space out.

    A token that is a space waits for the next one.
    """

    trims = True

    def reset(self) -> None:
        super().reset()
        self._spaces = ""

    def finalize(self) -> None:
        super().finalize()
        super()._append(self._spaces)
        self._spaces = ""

    def _append(self, piece: str) -> None:
        if piece == " ":
            self._spaces += piece
        elif piece:
            super()._append(self._spaces + piece)
            self._spaces = ""


class SPMStreamingDetokenizer(StreamingDetokenizer):
    """The `StreamingDetokenizer` for SentencePiece's tokenizers."""

    def __init__(self, tokenizer: Any, trim_space: bool = True) -> None:
        self.trims = trim_space
        super().__init__(tokenizer)


def _tensors(ids: list[int], kind: str | None) -> Any:
    """Token ids as a list, or as an array [1, N]. ValueError for another kind of arrays."""
    if kind is None:
        return ids
    if kind not in ("mlx", "np"):
        raise ValueError(f"return_tensors is {kind!r}; it must be 'mlx', 'np' or None")
    found = np.array([ids], np.int32)
    return found if kind == "np" else array(found)


class TokenizerWrapper:
    """A tokenizer with a detokenizer, end tokens and what its chat template knows.

    All other attributes are the tokenizer's own, which may be pyloss's or transformers'.
    """

    def __init__(
        self,
        tokenizer: Any,
        detokenizer_class: Any = NaiveStreamingDetokenizer,
        eos_token_ids: Iterable[int] | None = None,
        chat_template: Any = None,
        tool_call_start: str | None = None,
        tool_call_end: str | None = None,
        tool_parser: Any = None,
        response_format: dict[str, Any] | None = None,
    ):
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer_class(tokenizer)
        self._eos_token_ids = set(eos_token_ids or []) | eos_ids(tokenizer)
        self._chat_template = chat_template
        self._tool_call_start, self._tool_call_end = tool_call_start, tool_call_end
        self._tool_parser = tool_parser
        self._response_format = response_format or {}
        self.has_chat_template = tokenizer.chat_template is not None or chat_template is not None
        vocabulary = self.get_vocab()
        self._thoughts = next(
            (pair for pair in _THOUGHTS if all(token in vocabulary for token in pair)), None
        )

    def encode(self, text: str, return_tensors: str | None = None, **options: Any) -> Any:
        """The token ids of a text: a list, or [1, N] with `return_tensors` "mlx" or "np"."""
        return _tensors(self._tokenizer.encode(text, **options), return_tensors)

    def apply_chat_template(self, *args: Any, tokenize: bool = True, **kwargs: Any) -> Any:
        """A conversation as token ids, or with `tokenize=False` as text; see `encode`."""
        kind = kwargs.pop("return_tensors", None)
        if kind is not None and tokenize:
            return _tensors(self.apply_chat_template(*args, **kwargs), kind)
        kwargs.setdefault("enable_thinking", self.has_thinking)
        if self._chat_template is not None:
            text = self._chat_template(*args, **kwargs)
            return self.encode(text, add_special_tokens=False) if tokenize else text
        kwargs["return_dict"] = False
        if kwargs.pop("continue_final_message", False):
            return self._continued(*args, tokenize=tokenize, **kwargs)
        return self._tokenizer.apply_chat_template(*args, tokenize=tokenize, **kwargs)

    def _continued(self, messages: Any, *args: Any, tokenize: bool, **kwargs: Any) -> Any:
        """The conversation up to the end of its last message's text."""
        render = self._tokenizer.apply_chat_template
        text = render(messages, *args, tokenize=False, **kwargs)
        end = str(messages[-1]["content"]).strip()
        place = text.rfind(end)
        if place < 0:
            raise ValueError("the chat template changes the last message, so it cannot go on there")
        text = text[: place + len(end)]
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def add_eos_token(self, token: str) -> None:
        """Add a token, by its text or number, to those that end an answer.

        Raises ValueError for a text that is no token.
        """
        try:
            found: int | None = int(token)
        except ValueError:
            found = self.convert_tokens_to_ids(token)
        if found is None:
            raise ValueError(f"'{token}' is not a token for this tokenizer")
        self._eos_token_ids.add(found)

    @property
    def detokenizer(self) -> Any:
        """A new detokenizer."""
        found = copy.copy(self._detokenizer)
        found.reset()
        return found

    @property
    def eos_token_ids(self) -> set[int]:
        """The ids that end an answer."""
        return self._eos_token_ids

    @eos_token_ids.setter
    def eos_token_ids(self, value: Iterable[int] | None) -> None:
        self._eos_token_ids = set(value) if value is not None else set()

    @property
    def has_thinking(self) -> bool:
        """Whether the vocabulary has tokens around thoughts."""
        return self._thoughts is not None

    @property
    def think_start(self) -> str | None:
        """The token before thoughts."""
        return None if self._thoughts is None else self._thoughts[0]

    @property
    def think_end(self) -> str | None:
        """The token after thoughts."""
        return None if self._thoughts is None else self._thoughts[1]

    @property
    def think_start_id(self) -> int | None:
        """The id of `think_start`."""
        return None if self._thoughts is None else self.get_vocab()[self._thoughts[0]]

    @property
    def think_end_id(self) -> int | None:
        """The id of `think_end`."""
        return None if self._thoughts is None else self.get_vocab()[self._thoughts[1]]

    @property
    def think_start_tokens(self) -> tuple[int, ...] | None:
        """The ids of `think_start`."""
        return None if self._thoughts is None else (self.get_vocab()[self._thoughts[0]],)

    @property
    def think_end_tokens(self) -> tuple[int, ...] | None:
        """The ids of `think_end`."""
        return None if self._thoughts is None else (self.get_vocab()[self._thoughts[1]],)

    @staticmethod
    def _find(
        tokens: Any, sequence: Any, start: Any = None, end: Any = None, reverse: bool = False
    ) -> int:
        """The first or last place of the ids `sequence` in `tokens[start:end]`; -1 for none."""
        if sequence is None:
            return -1
        found = [
            i
            for i in range(max(start or 0, 0), (end or len(tokens)) - len(sequence) + 1)
            if tuple(tokens[i : i + len(sequence)]) == tuple(sequence)
        ]
        return (found[-1] if reverse else found[0]) if found else -1

    def find_think_start(self, tokens: Any, start: Any = None, end: Any = None) -> int:
        """The first place of `think_start` in token ids; -1 if there is none."""
        return self._find(tokens, self.think_start_tokens, start, end)

    def rfind_think_start(self, tokens: Any, start: Any = None, end: Any = None) -> int:
        """The last place of `think_start` in token ids; -1 if there is none."""
        return self._find(tokens, self.think_start_tokens, start, end, reverse=True)

    def find_think_end(self, tokens: Any, start: Any = None, end: Any = None) -> int:
        """The first place of `think_end` in token ids; -1 if there is none."""
        return self._find(tokens, self.think_end_tokens, start, end)

    def rfind_think_end(self, tokens: Any, start: Any = None, end: Any = None) -> int:
        """The last place of `think_end` in token ids; -1 if there is none."""
        return self._find(tokens, self.think_end_tokens, start, end, reverse=True)

    @property
    def has_tool_calling(self) -> bool:
        """Whether a parser of tool calls was given."""
        return self._tool_call_start is not None

    @property
    def tool_call_start(self) -> str | None:
        """The text before a tool call."""
        return self._tool_call_start

    @property
    def tool_call_end(self) -> str | None:
        """The text after a tool call."""
        return self._tool_call_end

    @property
    def tool_call_start_tokens(self) -> tuple[int, ...] | None:
        """The ids of `tool_call_start`."""
        return self._ids(self._tool_call_start)

    @property
    def tool_call_end_tokens(self) -> tuple[int, ...] | None:
        """The ids of `tool_call_end`."""
        return self._ids(self._tool_call_end)

    def _ids(self, text: str | None) -> tuple[int, ...] | None:
        return None if text is None else tuple(self.encode(text, add_special_tokens=False))

    @property
    def structural_markers(self) -> tuple[str, ...]:
        """Texts around a response: none."""
        return ()

    @property
    def response_transitions(self) -> dict[str, Any]:
        """The given format of responses: its transitions."""
        found: dict[str, Any] = self._response_format.get("transitions", {})
        return found

    @property
    def response_initial_state(self) -> str | None:
        """The given format of responses: its first state."""
        return self._response_format.get("initial_state")

    @property
    def tool_parser(self) -> Any:
        """The given parser of tool calls."""
        return self._tool_parser

    @property
    def clean_up_tokenization_spaces(self) -> bool:
        """False: pyloss's tokenizers change no spaces."""
        return False

    @property
    def name_or_path(self) -> str:
        """Where the tokenizer comes from."""
        return str(getattr(self._tokenizer, "name_or_path", None) or self._tokenizer.source)

    @property
    def plain(self) -> Any:
        """The wrapped tokenizer."""
        return self._tokenizer

    def get_vocab(self) -> dict[str, int]:
        """The ids of all tokens, by their texts."""
        own = self._tokenizer
        found: dict[str, int] = (
            own.backend.get_vocab(with_added_tokens=True)
            if isinstance(own, Tokenizer)
            else own.get_vocab()
        )
        return found

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or of each of several; None for what is no token."""
        if not isinstance(self._tokenizer, Tokenizer):
            return self._tokenizer.convert_tokens_to_ids(tokens)
        vocabulary = self.get_vocab()
        if isinstance(tokens, str):
            return vocabulary.get(tokens)
        return [vocabulary.get(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The text of a token by its id, or of each of several."""
        if not isinstance(self._tokenizer, Tokenizer):
            return self._tokenizer.convert_ids_to_tokens(ids)
        find = self._tokenizer.backend.id_to_token
        return find(int(ids)) if isinstance(ids, int) else [find(int(i)) for i in ids]

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        """Write the tokenizer's files into a folder."""
        if isinstance(self._tokenizer, Tokenizer):
            self._tokenizer.save(save_directory)
        else:
            self._tokenizer.save_pretrained(save_directory)

    save = save_pretrained

    def batch_decode(self, sequences: Iterable[Any], **options: Any) -> list[str]:
        """The texts of several sequences."""
        return [self._tokenizer.decode(ids, **options) for ids in sequences]

    def __call__(self, text: Any, **options: Any) -> dict[str, Any]:
        """`{"input_ids": ..., "attention_mask": ...}` of a text, or of each of several."""
        special = options.pop("add_special_tokens", True)
        if options:
            raise TypeError(
                f"the tokenizer's call takes add_special_tokens, not {', '.join(options)}: "
                "pad and cut the lists yourself"
            )
        if isinstance(text, str):
            ids: Any = self.encode(text, add_special_tokens=special)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        ids = [self.encode(one, add_special_tokens=special) for one in text]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, attr: str) -> Any:
        if attr.startswith("_") or hasattr(type(self), attr):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {attr!r}")
        return getattr(self._tokenizer, attr)

    def __setattr__(self, attr: str, value: Any) -> None:
        if attr.startswith("_") or hasattr(type(self), attr) or attr == "has_chat_template":
            super().__setattr__(attr, value)
        else:
            setattr(self._tokenizer, attr, value)


def load(
    model_path: Path,
    tokenizer_config_extra: Mapping[str, Any] | None = None,
    eos_token_ids: Any = None,
    defaults: Mapping[str, Any] | None = None,
) -> TokenizerWrapper:
    """The tokenizer of a model's folder or GGUF file.

    Raises as `pyloss.loading.load_tokenizer`, and ValueError for other keys of
    `tokenizer_config_extra` than eos_token, chat_template, trust_remote_code and use_fast.
    """
    tokenizer = load_tokenizer(model_path)
    configure(tokenizer, tokenizer_config_extra or {})
    ends = (defaults or {}).get("eos_token_ids") if eos_token_ids is None else eos_token_ids
    return wrapped(tokenizer, [ends] if isinstance(ends, int) else ends)


def wrapped(tokenizer: Tokenizer, eos_token_ids: Iterable[int] | None = None) -> TokenizerWrapper:
    """A tokenizer in a wrapper, with the detokenizer that mlx-lm has for its kind."""
    by_bytes = type(tokenizer.backend.decoder).__name__ == "ByteLevel"
    kind = BPEStreamingDetokenizer if by_bytes else NaiveStreamingDetokenizer
    return TokenizerWrapper(tokenizer, kind, eos_token_ids)


def no_bos_or_eos(sequence: list[int], bos: int, eos: int) -> list[int]:
    """The ids without a `bos` at their beginning and an `eos` at their end."""
    rest = sequence if sequence[0] != bos else sequence[1:]
    return rest[:-1] if rest[-1] == eos else rest
