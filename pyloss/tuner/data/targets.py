"""`Sample`: tokens with their weights as targets.

In a conversation, `train_on` selects the targets by assistant turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyloss.tuner.data.turns import Conversation, Message

TRAIN_ON = ("last", "assistant", "all")


def resolve_train_on(train_on: str | None, mask_prompt: bool) -> str:
    """`train_on` if given, else "last" with `mask_prompt` and "all" without.

    Raises `ValueError` for an unknown `train_on`, or one that contradicts `mask_prompt`.
    """
    if train_on is None:
        return "last" if mask_prompt else "all"
    if train_on not in TRAIN_ON:
        raise ValueError(
            f"train_on is {train_on!r}, and must be one of {', '.join(map(repr, TRAIN_ON))}"
        )
    if mask_prompt and train_on == "all":
        raise ValueError(
            "mask_prompt=True leaves the prompt untrained, but train_on='all' trains it: give "
            "one of them"
        )
    return train_on


@dataclass(frozen=True)
class Sample:
    """One tokenized record.

    Attributes:
        tokens: list of int, length n.
        weights: float32 [n], each token's weight as a target. `weights[0]` is 0, because no token
            before the first could predict it.
    """

    tokens: list[int]
    weights: npt.NDArray[np.float32]

    @classmethod
    def from_spans(cls, tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> Sample:
        """A sample with weight 1 for the tokens `first <= i < end` of each span.

        All other tokens, and always the first token, have weight 0.
        """
        weights = np.zeros(len(tokens), np.float32)
        for first, end in spans:
            weights[first:end] = 1
        weights[:1] = 0
        return cls(list(tokens), weights)

    @property
    def offset(self) -> int:
        """Index of the first target; 0 if that is token 1 (all are trained), n if there is none."""
        targets = np.flatnonzero(self.weights)
        if not len(targets):
            return len(self.tokens)
        return 0 if targets[0] == 1 else int(targets[0])

    @property
    def is_span(self) -> bool:
        """Whether every token from `offset` to the end (except token 0) has weight 1."""
        return bool((self.weights[max(self.offset, 1) :] == 1).all())

    def cut(self, length: int) -> Sample:
        """The first `length` tokens with their weights."""
        return (
            self
            if len(self.tokens) <= length
            else Sample(self.tokens[:length], self.weights[:length])
        )


def as_sample(item: Any) -> Sample:
    """Converts a dataset's item to a `Sample`.

    `item` is a `Sample`, a list of token ids, `(tokens, offset)` or `(tokens, weights)`. Raises
    `TypeError` for anything else (such as a record that is not tokenized), and `ValueError` for an
    offset that is not a whole number >= 0, or weights that are negative, not finite or not one per
    token.
    """
    if isinstance(item, Sample):
        return item
    if isinstance(item, (tuple, list)) and len(item) == 2 and np.ndim(item[0]) == 1:
        tokens, targets = item
    else:
        tokens, targets = item, 0
    if (
        isinstance(tokens, (str, Mapping))
        or np.ndim(tokens) != 1
        or not all(_is_int(t) for t in tokens)
    ):
        raise TypeError(
            f"a sample is a list of token ids or (tokens, offset), not {type(item).__name__} "
            f"{item!r:.80}"
        )
    tokens = [int(t) for t in tokens]
    if np.ndim(targets) == 0:
        if not _is_int(targets) or targets < 0:
            raise ValueError(
                f"the offset of a sample is {targets!r}, and must be a whole number >= 0"
            )
        return Sample.from_spans(tokens, [(int(targets), len(tokens))])
    weights = np.array(targets, np.float32)
    if weights.shape != (len(tokens),) or not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(
            f"weights must be {len(tokens)} finite numbers >= 0, one a token; their shape is "
            f"{weights.shape}"
        )
    weights[:1] = 0
    return Sample(tokens, weights)


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def chat_sample(tokenizer: Any, messages: Sequence[Message], tools: Any, train_on: str) -> Sample:
    """The rendered conversation with its targets.

    `train_on` selects them: "all" tokens, the "last" assistant turn, or every "assistant" turn. A
    turn's targets run from the first token after the generation prompt to the last token of its
    end marker. If the template marks the assistant's text with `{% generation %}`, only marked
    tokens are targets. A turn that the template leaves out has no targets.

    Unless `train_on` is "all", a conversation without an assistant turn has no targets, and tokens
    after the last target are dropped, because they do not affect the loss. Raises `ValueError` if
    the template refuses the conversation.
    """
    conversation = Conversation(tokenizer, messages, tools)
    tokens = conversation.tokens
    if train_on == "all":
        return Sample.from_spans(tokens, [(0, len(tokens))])
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    marked = conversation.marked()
    if marked is not None and train_on == "assistant":
        weights = np.array(marked, np.float32)
    else:
        weights = Sample.from_spans(
            tokens, conversation.turns(turns[-1:] if train_on == "last" else turns)
        ).weights
        weights = weights if marked is None else weights * np.array(marked, np.float32)
    weights[:1] = 0
    used = int(np.flatnonzero(weights)[-1]) + 1 if weights.any() else len(tokens)
    return Sample(tokens[:used], weights[:used])
