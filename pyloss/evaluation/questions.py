"""Questions with reference answers, from the records of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyloss.models.text.chat_forms import as_text
from pyloss.models.text.special import encode_text
from pyloss.tuner.data.turns import Conversation


@dataclass(frozen=True)
class Question:
    """A prompt, and the answer that the data give.

    Attributes:
        prompt: the text that the model reads.
        tokens: its token ids.
        reference: the last assistant turn.
    """

    prompt: str
    tokens: list[int]
    reference: str


def read_question(dataset: Any, index: int, tokenizer: Any) -> Question:
    """The question of record `index`: its last assistant turn, and what precedes it.

    The chat template renders the prompt, as for `pyloss generate`. A turn with tool calls is a
    reference as the template writes it, without special tokens. ValueError names the record if it
    has no assistant turn, or nothing before it.
    """
    if not hasattr(dataset, "conversation"):
        raise ValueError(
            f"{type(dataset).__name__} has no conversation(i), so its records have no reference "
            "answers: only loss and perplexity can be measured"
        )
    messages, tools = dataset.conversation(index)
    where = dataset.where(index)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or not answers[-1]:
        raise ValueError(
            f"{where}: the record has no assistant turn after a prompt, "
            "so it has no reference answer"
        )
    last = answers[-1]
    try:
        prompt, tokens = _prompt(messages[:last], tools, tokenizer)
        reference = _reference(messages[: last + 1], tools, tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not tokens:
        raise ValueError(f"{where}: the prompt has no tokens")
    return Question(prompt, tokens, reference)


def _prompt(messages: list[dict[str, Any]], tools: Any, tokenizer: Any) -> tuple[str, list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        content = as_text(messages[0].get("content"))
        if len(messages) > 1 or not isinstance(content, str):
            raise ValueError("a conversation of several messages needs a chat template")
        return content, encode_text(tokenizer, content)
    text = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False
    )
    return text, list(tokenizer.encode(text, add_special_tokens=False))


def _reference(messages: list[dict[str, Any]], tools: Any, tokenizer: Any) -> str:
    content = as_text(messages[-1].get("content"))
    if isinstance(content, str) and not messages[-1].get("tool_calls"):
        return content
    rendered = Conversation(tokenizer, messages, tools)
    first, end = rendered.turn(len(messages) - 1)
    return str(tokenizer.decode(rendered.tokens[first:end], skip_special_tokens=True))
