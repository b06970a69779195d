"""`Conversation`: a conversation under its chat template, and where its assistant's turns lie in
the tokens.

Templates rewrite earlier turns, end the generation prompt in text that the whole does not hold,
leave contents out. So a turn is looked for in the rendering of the whole conversation. Where the
rendering of the messages before it, generation
prompt included, is no prefix of that, both renderings are aligned at a point that they share: the
    end of an earlier
content, found by rendering the conversation once more with a mark behind that content. That is two
renderings a turn; of a conversation of many turns, two renderings of the whole give all of them,
where the template writes all turns alike.
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

#: from so many turns on they are looked for together first
MANY = 24

_REASONING = ("reasoning_content", "thinking", "reasoning")


class Conversation:
    """The tokens of a conversation, and the spans of its turns.

    Args:
        tokenizer: has `apply_chat_template` and `encode`, as pyloss's and transformers' have.
        messages: at least one dict with "role" and "content".
        tools: JSON schemas, or None.

    Raises:
        ValueError: no chat template, one that refuses the messages, or one whose text and tokens
            differ.
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
        """The tokens of the whole conversation."""
        return list(self._ids)

    def turns(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """`turn` of several messages, in their order."""
        together = self._alike(wanted) if len(wanted) >= MANY else None
        return [self.turn(i) for i in wanted] if together is None else together

    def turn(self, i: int) -> tuple[int, int]:
        """The tokens (first, end) of message `i`: from behind the generation prompt to the end of
        what the template writes for it. Empty where the template writes nothing for the message.
        """
        positions = self._located()
        begin = self._begin(i)
        end = None if begin is None else self._end(i)
        if begin is None or end is None or end <= begin:
            return 0, 0
        return positions.tokens(begin, end)

    def marked(self) -> list[int] | None:
        """1 for each token that the template itself marks as the assistant's with `{% generation
        %}`, else 0.

        None where the template has no such marks, or they cannot be followed.
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
        """The text of the whole with its tokens."""
        if self._positions is None:
            self._text = self._apply(self._messages, tokenize=False)
            self._positions = Positions(self._tokenizer, self._text)
            # pyloss's own tokens are those of the text.
            if not isinstance(self._tokenizer, Tokenizer) and self._positions.ids != self._ids:
                raise ValueError(
                    "the chat template's text and its tokens differ, so no answer can be found "
                    "in it"
                )
        return self._positions

    def _first(self, n: int, prompt: bool = False) -> str | None:
        """The rendering of the first `n` messages; None where the template refuses them."""
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
        """The character of the whole text at which message `i` begins; None where nothing of it is
        there.
        """
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
        # The whole holds a part of the generation prompt, or what stands before that is another
        # text there.
        plain = self._first(i) or ""
        beside = self._content_end(self._messages[:i], False, j, plain) if plain and j >= 0 else 0
        opens = len(before) if beside is None else there + common(plain[beside:], before[there:])
        if there + matched > opens:
            return min(here + matched, own)
        return self._behind(before[opens:], here, own)

    def _alike(self, wanted: Sequence[int]) -> list[tuple[int, int]] | None:
        """`turns` of a template that writes the generation prompt, the content and one end marker
        for each of them.

        None where that is not so. The marker, and that this is right, is taken from some of the
        turns looked for alone.
        """
        positions, prompt = self._located(), self._generation_prompt()
        marks = [c for c in map(chr, range(0xE000, 0xF8FF)) if c not in self._text][: len(wanted)]
        marked = self._marked_at(wanted, marks, keep=True)
        replaced = self._marked_at(wanted, marks, keep=False)
        if not prompt or marked is None or replaced is None or "".join(marked) != self._text:
            return None
        begins, ends, at = [], [], 0
        for piece, before in zip(marked[:-1], replaced[:-1], strict=True):
            # Between two contents stands the same with and without them, and the generation prompt
            # last.
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
        """The text with a mark at the end, or in place, of each content, split at the marks; None
        unless each is there once.
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
        """Behind the last `prompt` in these characters of the whole text, or `high` where there is
        none.
        """
        at = self._text.rfind(prompt, low, high) if prompt else -1
        return high if at < 0 else at + len(prompt)

    def _generation_prompt(self) -> str:
        asked = self._first(len(self._messages), prompt=True) or ""
        return asked[common(asked, self._text) :]

    def _shared(self, i: int, before: str) -> tuple[int, int, int]:
        """The last message before `i` whose content is found in the whole text and in `before`, and
        its end in both.

        -1, 0, 0 where there is none.
        """
        for j in range(i - 1, -1, -1):
            here = self._content_end(self._messages, False, j, self._text)
            there = None if here is None else self._content_end(self._messages[:i], True, j, before)
            if here is not None and there is not None:
                return j, here, there
        return -1, 0, 0

    def _end(self, i: int) -> int | None:
        """The character of the whole text at which message `i` ends; None where nothing of it is
        there.
        """
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
            # The template takes no conversation that ends here: what follows the last message's
            # content is the pattern.
            alone, there = self._text, self._content_end(self._messages, False, last, self._text)
            if there is None or self._messages[last]["role"] != self._messages[i]["role"]:
                return here
        matched = common(alone[there:], self._text[here:])
        if there + matched == len(alone):
            return here + matched
        # Two end tokens may begin with the same characters.
        there_end = Positions(self._tokenizer, alone).boundary(there + matched)
        end = here + max(there_end - there, 0)
        return end + self._other_end(alone[there_end:], end)

    def _other_end(self, alone: str, end: int) -> int:
        """The length of the end token at `end`, where the turn rendered alone ends in another end
        token.
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
        """The character at which the text begins that changes with message `i`; None where none
        does.
        """
        for varied in _varied(self._messages[i], mark := self._mark(), keep=False):
            text = self._try([*self._messages[:i], varied, *self._messages[i + 1 :]], False)
            if text is not None and mark in text:
                return common(text, self._text)
        return None

    def _content_end(
        self, messages: Sequence[Message], prompt: bool, j: int, text: str
    ) -> int | None:
        """The character of `text`, the rendering of `messages`, at which the content of message `j`
        ends.
        """
        mark = self._mark()
        # In its place where the template cuts the content's end off.
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
        """A character that the text does not have, and no template knows."""
        return next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in self._text)


def _varied(message: Message, mark: str, keep: bool) -> Iterator[dict[str, Any]]:
    """`message` with the mark in one of its texts, at their end (`keep`) or in their place; the
    content first.
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
