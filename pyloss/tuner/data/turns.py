"""`Conversation`: renders a conversation with its chat template and finds the tokens of each turn.

"The whole text" below is the rendering of all messages. A turn begins where the rendering of the
messages before it, generation prompt included, ends. Often that rendering is not a prefix of the
whole text: templates rewrite earlier turns, leave contents out, or end the generation prompt in
text that the whole text lacks. Then both renderings are aligned at the end of an earlier content
that they share. Rendering with a mark after that content finds its end. This costs two renderings
per turn. In a long conversation, two renderings of the whole locate all turns at once, if the
template writes all turns alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pyloss.models.text.chat_forms import has_forms, settled
from pyloss.models.text.positions import Positions, common
from pyloss.models.text.special import eos_ids
from pyloss.models.tokenizer import Tokenizer

Message = Mapping[str, Any]

#: from this number of turns on, `turns` first tries to locate all of them at once
MANY = 24

_REASONING = ("reasoning_content", "thinking", "reasoning")


class Conversation:
    """The tokens of a conversation, and the token ranges of its turns.

    Args:
        tokenizer: has `apply_chat_template` and `encode`, as in pyloss and transformers.
        messages: at least one dict with "role" and "content".
        tools: JSON schemas, or None.

    Raises:
        ValueError: the tokenizer has no chat template, the template refuses the messages, or the
            template's text and tokens differ.
    """

    def __init__(self, tokenizer: Any, messages: Sequence[Message], tools: Any):
        if getattr(tokenizer, "chat_template", "?") is None:
            raise ValueError(
                "this tokenizer has no chat template: chat and completion records need one, "
                "{'text': ...} records do not"
            )
        self._tokenizer, self._tools = tokenizer, tools
        self._messages = [dict(message) for message in messages]
        if has_forms(self._messages):
            try:
                self._messages = settled(
                    self._messages, lambda form: str(self._apply(form, tokenize=False))
                )[0]
            except RecursionError:
                raise ValueError("the arguments of a tool call are nested too deep") from None
        self._positions: Positions | None = None
        self._text = ""
        if isinstance(tokenizer, Tokenizer):
            self._ids = self._located().ids
        else:
            self._ids = self._apply(self._messages, tokenize=True)
        self._renderings: dict[tuple[int, bool], str | None] = {}

    @property
    def tokens(self) -> list[int]:
        """The token ids of the whole conversation."""
        return list(self._ids)

    def turns(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """`turn(i)` for each `i` in `wanted`, in that order."""
        together = self._alike(wanted) if len(wanted) >= MANY else None
        return [self.turn(i) for i in wanted] if together is None else together

    def turn(self, i: int) -> tuple[int, int]:
        """The token range (first, end) of message `i`; end is exclusive.

        It runs from the end of the generation prompt to the end of the text that the template
        writes for the message. It is empty if the template writes nothing for the message.
        """
        positions = self._located()
        begin = self._begin(i)
        end = None if begin is None else self._end(i)
        if begin is None or end is None or end <= begin:
            return 0, 0
        return positions.tokens(begin, end)

    def marked(self) -> list[int] | None:
        """For each token, 1 if the template marks it with `{% generation %}`, else 0.

        None if the template has no such marks, or the tokenizer cannot apply them.
        """
        if not _has_marks(getattr(self._tokenizer, "chat_template", None), bool(self._tools)):
            return None
        try:
            found = self._apply(
                self._messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except ValueError:
            return None
        return list(found["assistant_masks"])

    def _apply(
        self, messages: Sequence[Message], *, prompt: bool = False, tokenize: bool, **options: Any
    ) -> Any:
        try:
            out = self._tokenizer.apply_chat_template(
                list(messages),
                tools=self._tools,
                add_generation_prompt=prompt,
                tokenize=tokenize,
                **options,
            )
        except Exception as error:
            raise ValueError(
                f"the chat template refuses this conversation: {error or type(error).__name__}"
            ) from error
        return list(out["input_ids"]) if isinstance(out, Mapping) and not options else out

    def _located(self) -> Positions:
        """The whole text with its tokens; rendered on first use."""
        if self._positions is None:
            self._text = self._apply(self._messages, tokenize=False)
            self._positions = Positions(self._tokenizer, self._text)
            # pyloss's tokenizer takes its ids from this text, so it needs no check.
            if not isinstance(self._tokenizer, Tokenizer) and self._positions.ids != self._ids:
                raise ValueError(
                    "the chat template's text and its tokens differ, so no answer can be found "
                    "in it"
                )
        return self._positions

    def _first(self, n: int, prompt: bool = False) -> str | None:
        """The rendering of the first `n` messages; None if the template refuses them or n is 0."""
        if (n, prompt) not in self._renderings:
            self._renderings[n, prompt] = self._try(self._messages[:n], prompt) if n else None
        return self._renderings[n, prompt]

    def _try(self, messages: Sequence[Message], prompt: bool) -> str | None:
        try:
            text: str = self._apply(messages, prompt=prompt, tokenize=False)
        except ValueError:
            return None
        return text

    def _begin(self, i: int) -> int | None:
        """The character of the whole text where message `i` begins; None if it is left out."""
        before = self._first(i, prompt=True)
        if before is not None and self._text.startswith(before):
            return len(before)
        own = self._own(i)
        if own is None:
            return None
        if before is None:
            return self._behind(self._generation_prompt(), 0, own)
        j, here, there = self._shared(i, before)
        matched = common(before[there:], self._text[here:])
        if there + matched == len(before):
            return here + matched
        # The whole text has only a part of the generation prompt, or other text before it.
        plain = self._first(i) or ""
        beside = self._content_end(self._messages[:i], False, j, plain) if plain and j >= 0 else 0
        opens = len(before) if beside is None else there + common(plain[beside:], before[there:])
        if there + matched > opens:
            return min(here + matched, own)
        return self._behind(before[opens:], here, own)

    def _alike(self, wanted: Sequence[int]) -> list[tuple[int, int]] | None:
        """`turns` for a template that writes generation prompt, content and end marker per turn.

        None if the template writes turns in another way. A few turns are located one by one: the
        first of them gives the end marker, and all of them verify the result.
        """
        positions, prompt = self._located(), self._generation_prompt()
        marks = [c for c in map(chr, range(0xE000, 0xF8FF)) if c not in self._text][: len(wanted)]
        marked = self._marked_at(wanted, marks, keep=True)
        replaced = self._marked_at(wanted, marks, keep=False)
        if not prompt or marked is None or replaced is None or "".join(marked) != self._text:
            return None
        begins, ends, at = [], [], 0
        for piece, before in zip(marked[:-1], replaced[:-1], strict=True):
            # The text before a content must not depend on the contents, and must end in the
            # generation prompt.
            if not piece.startswith(before) or not before.endswith(prompt):
                return None
            begins.append(at + len(before))
            ends.append(at := at + len(piece))
        tried = {0, 1, len(wanted) // 2, len(wanted) - 2}
        alone = {k: (self._begin(wanted[k]), self._end(wanted[k])) for k in tried}
        marker = self._text[ends[0] : max(alone[0][1] or 0, ends[0])]
        if any(alone[k] != (begins[k], ends[k] + len(marker)) for k in tried):
            return None
        if not all(self._text.startswith(marker, end) for end in ends[:-1]):
            return None
        spans = [
            positions.tokens(b, e + len(marker))
            for b, e in zip(begins[:-1], ends[:-1], strict=True)
        ]
        return [*spans, self.turn(wanted[-1])]

    def _marked_at(
        self, wanted: Sequence[int], marks: Sequence[str], keep: bool
    ) -> list[str] | None:
        """The whole text, rendered with a mark per wanted content and split at the marks.

        The mark follows the content (`keep`) or replaces it. None unless every mark occurs exactly
        once and in order.
        """
        messages = list(self._messages)
        for i, mark in zip(wanted, marks, strict=False):
            messages[i] = next(_varied(messages[i], mark, keep))
        text = self._try(messages, False)
        if text is None or len(marks) < len(wanted):
            return None
        found = re.split("[" + "".join(marks) + "]", text)
        in_order = [c for c in text if c in set(marks)] == list(marks)
        return found if in_order else None

    def _behind(self, prompt: str, low: int, high: int) -> int:
        """The end of the last `prompt` in [low, high) of the whole text; `high` if not found."""
        at = self._text.rfind(prompt, low, high) if prompt else -1
        return high if at < 0 else at + len(prompt)

    def _generation_prompt(self) -> str:
        asked = self._first(len(self._messages), prompt=True) or ""
        return asked[common(asked, self._text) :]

    def _shared(self, i: int, before: str) -> tuple[int, int, int]:
        """The last message before `i` whose content is in both the whole text and `before`.

        Returns its index, the content's end in the whole text, and its end in `before`; (-1, 0, 0)
        if there is no such message.
        """
        for j in range(i - 1, -1, -1):
            here = self._content_end(self._messages, False, j, self._text)
            there = None if here is None else self._content_end(self._messages[:i], True, j, before)
            if here is not None and there is not None:
                return j, here, there
        return -1, 0, 0

    def _end(self, i: int) -> int | None:
        """The character of the whole text where message `i` ends; None if it is left out."""
        last = len(self._messages) - 1
        if i == last:
            return len(self._text)
        alone = self._first(i + 1)
        if alone is not None and self._text.startswith(alone):
            return len(alone)
        here = self._content_end(self._messages, False, i, self._text)
        if here is None:
            return None
        there = (
            None if alone is None else self._content_end(self._messages[: i + 1], False, i, alone)
        )
        if alone is None or there is None:
            # The template refuses a conversation that ends here, so the text after the last
            # message's content serves as the pattern for the end.
            alone, there = self._text, self._content_end(self._messages, False, last, self._text)
            if there is None or self._messages[last]["role"] != self._messages[i]["role"]:
                return here
        matched = common(alone[there:], self._text[here:])
        if there + matched == len(alone):
            return here + matched
        # Different end tokens may begin with the same characters: go back to a token boundary.
        there_end = Positions(self._tokenizer, alone).boundary(there + matched)
        end = here + max(there_end - there, 0)
        return end + self._other_end(alone[there_end:], end)

    def _other_end(self, alone: str, end: int) -> int:
        """The length in characters of the end token at `end` of the whole text.

        `alone` is the remaining text of the turn rendered alone. 0 unless both texts go on with an
        end token, which may be a different one in each.
        """
        ends = eos_ids(self._tokenizer)
        if not ends.intersection(Positions(self._tokenizer, alone).ids[:1]):
            return 0
        follows = Positions(self._tokenizer, self._text[end:])
        if not ends.intersection(follows.ids[:1]):
            return 0
        rest = self._text[end:]
        return next((n for n in range(1, len(rest) + 1) if follows.boundary(n) == n), 0)

    def _own(self, i: int) -> int | None:
        """The first character of the whole text that depends on message `i`; None if none does."""
        for varied in _varied(self._messages[i], mark := self._mark(), keep=False):
            text = self._try([*self._messages[:i], varied, *self._messages[i + 1 :]], False)
            if text is not None and mark in text:
                return common(text, self._text)
        return None

    def _content_end(
        self, messages: Sequence[Message], prompt: bool, j: int, text: str
    ) -> int | None:
        """The character of `text` where the content of message `j` ends; None if not found.

        `text` is the rendering of `messages`, with the generation prompt if `prompt`.
        """
        mark = self._mark()
        # A template may cut off the content's end; then only a mark in its place survives.
        for varied in (v for keep in (True, False) for v in _varied(messages[j], mark, keep)):
            other = self._try([*messages[:j], varied, *messages[j + 1 :]], prompt)
            if other is None or mark not in other:
                continue
            after = other[other.rfind(mark) + len(mark) :]
            if text.endswith(after):
                return len(text) - len(after)
            if text.startswith(before := other[: other.find(mark)]):
                return len(before)
        return None

    def _mark(self) -> str:
        """A private-use character that is not in the whole text and that no template knows."""
        return next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in self._text)


def _varied(message: Message, mark: str, keep: bool) -> Iterator[dict[str, Any]]:
    """Copies of `message` with the mark in its content, last tool call's name or reasoning.

    The mark follows the text (`keep`) or replaces it. Each copy marks one of them, the content
    first.
    """
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        texts = [
            k
            for k, part in enumerate(content)
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        ]
        parts = list(content)
        for k in texts[-1:] if keep else texts:
            parts[k] = {**parts[k], "text": parts[k]["text"] * keep + mark}
        if texts:
            yield {**message, "content": parts}
    else:
        yield {**message, "content": (content or "") * keep + mark}
    calls = message.get("tool_calls")
    if isinstance(calls, (list, tuple)) and calls and isinstance(calls[-1], Mapping):
        inner = calls[-1].get("function")
        call = inner if isinstance(inner, Mapping) else calls[-1]
        call = {**call, "name": str(call.get("name", "")) * keep + mark}
        call = {**calls[-1], "function": call} if isinstance(inner, Mapping) else call
        yield {**message, "tool_calls": [*calls[:-1], call]}
    for key in _REASONING:
        if isinstance(message.get(key), str):
            yield {**message, key: message[key] * keep + mark}


def _has_marks(template: Any, tools: bool) -> bool:
    if isinstance(template, Mapping):
        template = template.get("tool_use" if tools and "tool_use" in template else "default")
    return isinstance(template, str) and "generation" in template and "endgeneration" in template
