"""Which tokens of a sample are trained: masks by position, found by rendering the chat template for message prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Message = Mapping[str, Any]

TRAIN_ON = ("last", "assistant", "all")


@dataclass(frozen=True)
class Sample:
    """One tokenised record. `tokens`: list of int, length n; `weights`: float32 [n], the weight of each token as a target.

    `weights[0]` is 0: the first token has nothing before it that could predict it.
    """

    tokens: list[int]
    weights: npt.NDArray[np.float32]

    @classmethod
    def from_spans(cls, tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> Sample:
        """A sample whose tokens `first <= i < end` of each span weigh 1, the others and the first token 0."""
        weights = np.zeros(len(tokens), np.float32)
        for first, end in spans:
            weights[first:end] = 1
        weights[:1] = 0
        return cls(list(tokens), weights)

    @property
    def offset(self) -> int:
        """The first target token; 0 where every token is trained, n where none is."""
        targets = np.flatnonzero(self.weights)
        if not len(targets):
            return len(self.tokens)
        return 0 if targets[0] == 1 else int(targets[0])

    @property
    def is_span(self) -> bool:
        """Whether the targets are all tokens from `offset` to the end, each of weight one."""
        return bool((self.weights[max(self.offset, 1) :] == 1).all())

    def cut(self, length: int) -> Sample:
        """The first `length` tokens, weights and all."""
        return self if len(self.tokens) <= length else Sample(self.tokens[:length], self.weights[:length])


def as_sample(item: Any) -> Sample:
    """A `Sample` from what datasets give: a `Sample`, a list of token ids, `(tokens, offset)` or `(tokens, weights)`.

    Raises `TypeError` for anything else (a record that was not tokenised), `ValueError` for weights of another length,
    negative or not finite.
    """
    if isinstance(item, Sample):
        return item
    if isinstance(item, (tuple, list)) and len(item) == 2 and np.ndim(item[0]) == 1:
        tokens, targets = item
    else:
        tokens, targets = item, 0
    if isinstance(tokens, (str, Mapping)) or np.ndim(tokens) != 1 or not all(_is_int(t) for t in tokens):
        raise TypeError(f"a sample is a list of token ids or (tokens, offset), not {type(item).__name__} {item!r:.80}")
    tokens = [int(t) for t in tokens]
    if np.ndim(targets) == 0:
        if not _is_int(targets) or targets < 0:
            raise ValueError(f"the offset of a sample is {targets!r}, and must be a whole number >= 0")
        return Sample.from_spans(tokens, [(int(targets), len(tokens))])
    weights = np.array(targets, np.float32)
    if weights.shape != (len(tokens),) or not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(
            f"weights must be {len(tokens)} finite numbers >= 0, one a token; their shape is {weights.shape}"
        )
    weights[:1] = 0
    return Sample(tokens, weights)


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def eos_ids(tokenizer: Any) -> set[int]:
    """The ids that end an answer."""
    several = getattr(tokenizer, "eos_token_ids", None)  # transformers makes it up from eos_token_id: a number
    ids = set(several) if isinstance(several, Iterable) else {several}
    return {i for i in ids | {getattr(tokenizer, "eos_token_id", None)} if i is not None}


def chat_sample(tokenizer: Any, messages: Sequence[Message], tools: Any, train_on: str) -> Sample:
    """The rendered conversation with its targets: all tokens, the last assistant turn or every assistant turn.

    A turn is trained from the first token after the generation prompt to the last token of its end marker. Tokens after
    the last target teach nothing and are left off. A conversation without an assistant turn has no targets.
    Raises `ValueError` where the turn cannot be found in the rendering.
    """
    template = _Template(tokenizer, messages, tools)
    if train_on == "all":
        return Sample.from_spans(template.full, [(0, len(template.full))])
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    spans = [template.turn(i) for i in (turns[-1:] if train_on == "last" else turns)]
    tokens = template.full[: spans[-1][1]] if spans else template.full
    return Sample.from_spans(tokens, spans)


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The length of the longest common prefix."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


class _Template:
    """One conversation under its chat template, and where its turns lie in the tokens of the whole.

    Templates may render a turn differently once other turns follow, or end the generation prompt in text that the whole
    does not hold. So a prefix counts only where it is verified to be one; else the same boundary is looked for in the text.
    """

    def __init__(self, tokenizer: Any, messages: Sequence[Message], tools: Any):
        if getattr(tokenizer, "chat_template", "?") is None:
            raise ValueError(
                "this tokenizer has no chat template: chat and completion records need one, {'text': ...} records do not"
            )
        self.tokenizer, self.messages, self.tools = tokenizer, messages, tools
        self.full: list[int] = self._ids(len(messages))
        self._text = ""

    def turn(self, i: int) -> tuple[int, int]:
        """The span (first, end) of message `i` in `full`."""
        first = self._first(i)
        return first, self._end(i, first)

    def _render(self, n: int, prompt: bool, tokenize: bool) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(self.messages[:n]), tools=self.tools, add_generation_prompt=prompt, tokenize=tokenize
            )
        except Exception as e:
            raise ValueError(f"the chat template refuses the first {n} of {len(self.messages)} messages: {e}") from e

    def _ids(self, n: int, prompt: bool = False) -> list[int]:
        out = self._render(n, prompt, True)
        return list(out["input_ids"] if isinstance(out, Mapping) else out)

    def _first(self, i: int) -> int:
        ids = self._ids(i, prompt=True) if i else self.full
        if len(ids) < len(self.full) and self.full[: len(ids)] == ids:
            return len(ids)
        return self._token_at(self._begin(i))

    def _begin(self, i: int) -> int:
        """The character of the whole text at which message `i` begins, behind the generation prompt."""
        start = self._render(i, True, False) if i else ""
        before = self._render(i, False, False) if i else ""
        same = _common(start, self.text)
        if same >= len(before.rstrip()) > 0:
            return same
        content = self._content(i)
        if content and self.text.count(content, same) == 1:
            return self.text.index(content, same)
        raise ValueError(self._differs(i, start, "the prompt before it"))

    def _end(self, i: int, first: int) -> int:
        if i == len(self.messages) - 1:
            return len(self.full)
        ids = self._ids(i + 1)
        if len(ids) > first and self.full[: len(ids)] == ids:
            return len(ids)
        turn, tail, begin = self._render(i + 1, False, False), self._content(i)[-16:], self._begin(i)
        # The turn may have lost its beginning (a thought, say) now that others follow: match what is left of it.
        for k in range(begin, len(turn)):
            if self.text.startswith(turn[k:], begin) and tail in turn[k:]:
                return self._token_at(begin + len(turn) - k)
        # Or it ends in another token than it does as the last turn.
        if tail and tail in self.text[begin : _common(turn, self.text)]:
            end = _common(ids, self.full)
            return end + (end < len(self.full) and self.full[end] in eos_ids(self.tokenizer))
        raise ValueError(self._differs(i, turn, "it"))

    def _content(self, i: int) -> str:
        content = self.messages[i].get("content")
        return content.strip() if isinstance(content, str) else ""

    @property
    def text(self) -> str:
        """The rendering of the whole as text, which must be what its tokens say."""
        if not self._text:
            text: str = self._render(len(self.messages), False, False)
            if list(self.tokenizer.encode(text, add_special_tokens=False)) != self.full:
                raise ValueError("the chat template's text and its tokens differ, so no answer can be found in it")
            self._text = text
        return self._text

    def _token_at(self, position: int) -> int:
        """The token that holds the character at `position`: one that straddles the boundary belongs to what follows."""
        return _common(self.tokenizer.encode(self.text[:position], add_special_tokens=False), self.full)

    def _differs(self, i: int, part: str, what: str) -> str:
        at = _common(part, self.text)
        return (
            f"the answer in message {i} of {len(self.messages)} cannot be found in the chat template's rendering: "
            f"{what}, rendered alone, goes on {part[at : at + 40]!r} at character {at} where the whole conversation "
            f"has {self.text[at : at + 40]!r}; train on all tokens instead, or change the template"
        )
