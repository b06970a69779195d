"""Tokens that begin and end a text, each once, from the text, its template or the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def eos_ids(tokenizer: Any) -> set[int]:
    """The ids that end an answer."""
    # transformers derives eos_token_ids from eos_token_id, as a number.
    several = getattr(tokenizer, "eos_token_ids", None)
    ids = set(several) if isinstance(several, Iterable) else {several}
    return {i for i in ids | {getattr(tokenizer, "eos_token_id", None)} if i is not None}


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text with the tokenizer's special tokens, the first token once."""
    ids = list(tokenizer.encode(text))
    bos = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def is_ended(tokenizer: Any, ids: list[int]) -> bool:
    """Whether the tokens end in an end token, possibly followed by a template's white space."""
    ends = eos_ids(tokenizer)
    if ends.intersection(ids[-1:]):
        return True
    return bool(ends.intersection(ids[-2:-1])) and not tokenizer.decode(ids[-1:]).strip()


def end_id(tokenizer: Any) -> int | None:
    """The id that ends a text: the eos token, else the lowest id that ends an answer."""
    own: int | None = getattr(tokenizer, "eos_token_id", None)
    return own if own is not None else min(eos_ids(tokenizer), default=None)
