"""A chat template in Go's language, as Ollama has them, for one in Jinja.

The Jinja template is not translated: it is rendered for conversations with known words, and the
texts around the words become the Go template. It is then compared on further conversations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pyloss.models.tokenizer import Tokenizer

_WORDS = ("Sierra1", "Uniform2", "Alpha3", "Victor4", "Bravo5", "Whiskey6")


class Turns(NamedTuple):
    """The texts around the messages of a conversation of user and assistant in turn.

    Attributes:
        first: before the first question of a conversation without a system prompt.
        system: before and after a system prompt; None if the template refuses one.
        answer: between a question and its answer.
        question: between an answer and the next question.
        end: after the last question, with the beginning of the answer.
    """

    first: str
    system: tuple[str, str] | None
    answer: str
    question: str
    end: str

    def render(self, system: str | None, texts: Sequence[str]) -> str:
        """The prompt for questions and answers in turn, as the Go template renders it."""
        if system is None or self.system is None:
            found = self.first
        else:
            found = self.system[0] + system + self.system[1]
        between = (self.answer, self.question)
        for i, text in enumerate(texts):
            found += (between[(i - 1) % 2] if i else "") + text
        return found + self.end

    def go(self) -> str:
        """The template. Literal text is in quotes, so that white space is what it says."""
        parts = {
            "FIRST": self.first,
            "BEFORE": self.system[0] if self.system else "",
            "AFTER": self.system[1] if self.system else "",
            "ANSWER": self.answer,
            "QUESTION": self.question,
            "END": self.end,
        }
        template = _WITH_SYSTEM if self.system else _WITHOUT
        return re.sub(r"<([A-Z]+)>", lambda name: _literal(parts[name[1]]), template)


_WITH_SYSTEM = """\
{{- $first := true }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}
{{- if not $first }}<QUESTION>
{{- else if $.System }}<BEFORE>{{ $.System }}<AFTER>
{{- else }}<FIRST>
{{- end }}{{ $first = false }}{{ .Content }}{{ if $last }}<END>{{ end }}
{{- else if eq .Role "assistant" }}<ANSWER>{{ .Content }}
{{- end }}
{{- end }}"""
_WITHOUT = _WITH_SYSTEM.replace("{{- else if $.System }}<BEFORE>{{ $.System }}<AFTER>\n", "")


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def go_template(tokenizer: Tokenizer) -> str:
    """The Go template of a tokenizer's chat template; prompts alone if it has none.

    The begin token is left out where the tokenizer adds it to every text, as llama.cpp does.

    Raises ValueError for a template whose conversations are no texts around messages.
    """
    if not tokenizer.chat_template:
        return "{{ .Prompt }}"
    return find_turns(tokenizer).go()


def find_turns(tokenizer: Tokenizer) -> Turns:
    """See `go_template`."""
    s, u1, a1, u2, a2, u3 = _WORDS

    def rendered(system: str | None, *texts: str) -> str:
        messages = [] if system is None else [{"role": "system", "content": system}]
        roles = ("user", "assistant")
        messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert isinstance(text, str)
        begin = tokenizer.bos_token
        adds = begin and tokenizer.encode("x")[:1] == [tokenizer.bos_token_id]
        return text.removeprefix(begin) if adds and begin else text

    try:
        plain = _around(rendered(None, u1, a1, u2), (u1, a1, u2))
        system: tuple[str, str] | None = None
        try:
            before, after, *rest = _around(rendered(s, u1, a1, u2), (s, u1, a1, u2))
        except ValueError:
            pass  # a template that has no system prompt raises, or leaves it out
        else:
            system = before, after
            if rest != plain[1:]:
                raise ValueError("a system prompt changes the texts around later messages")
        turns = Turns(plain[0], system, *plain[1:])
        for prompt in (None, s) if system else (None,):
            for texts in ((u1,), (u1, a1, u2), (u1, a1, u2, a2, u3)):
                if turns.render(prompt, texts) != rendered(prompt, *texts):
                    raise ValueError("texts around a message depend on its place")
    except ValueError as error:
        raise ValueError(
            f"the chat template cannot be written in Ollama's language: {error}"
        ) from None
    return turns


def _around(text: str, words: Sequence[str]) -> list[str]:
    """The texts before, between and after words; ValueError unless each occurs once, in order."""
    parts = []
    for word in words:
        if text.count(word) != 1:
            raise ValueError("a message occurs not once in the prompt")
        before, _, text = text.partition(word)
        parts.append(before)
    return [*parts, text]
