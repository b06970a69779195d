"""Forms of a conversation: contents as text or parts, tool arguments as objects or JSON text.

Data have either form, and most chat templates take only one: they fail with the other, or print it
as Python or JSON writes it. So a conversation is rendered as given, and in other forms where the
rendering shows such a failure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

Messages = list[dict[str, Any]]


def settled(messages: Messages, render: Callable[[Messages], str]) -> tuple[Messages, str]:
    """The messages in the form that suits a template, and their rendering.

    Args:
        messages: dicts with "role" and "content".
        render: returns the text of messages, or raises if the template refuses them.

    Raises:
        ValueError: the template prints parts of a content as they are, and some are no text.
        Exception: that of `render` for the messages as given, if the template takes no form.
    """
    mixed = {_is_list(message["content"]) for message in messages if message.get("content")} == {
        True,
        False,
    }
    best: tuple[int, Messages, str] | None = None
    refusal: Exception | None = None
    for form in _forms(messages):
        try:
            text = render(form)
        except Exception as error:
            refusal = refusal or error
            continue
        wrong = _misprints(text, form) + (
            _missing(text, form) if mixed else _missing(text, form, "user")
        )
        if best is None or wrong < best[0]:
            best = wrong, form, text
        if not wrong:
            break
    if best is None:
        assert refusal is not None
        raise refusal
    for message in best[1] if best[0] else ():
        if _is_list(message.get("content")) and _printed(best[2], message["content"]):
            kinds = {
                str(p.get("type") if isinstance(p, Mapping) else p)[:40] for p in message["content"]
            } - {"text"}
            found = ", ".join(sorted(kinds)[:10])
            raise ValueError(
                f"the chat template takes text alone as content; these parts are none: {found}"
            )
    return best[1], best[2]


def has_forms(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the messages have anything but plain text that another form can express."""
    return any(_is_list(m.get("content")) or next(_calls(m), None) is not None for m in messages)


def tools_of(tools: Any) -> Any:
    """Tools as a list of JSON schemas; JSON text of the list or of a schema is parsed.

    Raises TypeError unless they are a list or None, ValueError for text that is not JSON.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tools is {tools!r:.80}, which is not JSON: {error}") from None
    if tools is None:
        return None
    if not _is_list(tools):
        raise TypeError(f"tools must be a list of JSON schemas (dicts) or None, got {tools!r:.200}")
    tools = [_as_object(tool) for tool in tools]
    if wrong := [tool for tool in tools if not isinstance(tool, Mapping)]:
        raise TypeError(
            f"tools must be a list of JSON schemas (dicts) or None, got {wrong[0]!r:.200} in it"
        )
    return tools


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _forms(messages: Messages) -> Iterator[Messages]:
    contents: list[Callable[[Any], Any]] = [_same, as_text, _as_parts]
    arguments: list[Callable[[Any], Any]] = [_same, _as_object, _as_json]
    tried: list[Messages] = []
    for given in (messages, [_with_content(message) for message in messages]):
        for content, argument in product(contents, arguments):
            form = [
                _with_arguments(
                    {**m, "content": content(m["content"])} if "content" in m else m, argument
                )
                for m in given
            ]
            if form not in tried:
                tried.append(form)
                yield form


def _with_content(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the empty content that its tool calls leave out, which some templates read."""
    return (
        message
        if "content" in message or not message.get("tool_calls")
        else {**message, "content": ""}
    )


def _same(value: Any) -> Any:
    return value


def as_text(content: Any) -> Any:
    """The texts of a content's parts in one; parts of other kinds stay."""
    if not _is_list(content):
        return content
    texts = [
        text
        for part in content
        if isinstance(text := part.get("text") if isinstance(part, Mapping) else part, str)
    ]
    return "".join(texts) if len(texts) == len(content) else content


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_object(arguments: Any) -> Any:
    """The object that a JSON text represents; anything else as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return (
        json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else arguments
    )


def _calls(message: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments of a message's tool calls."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, (list, tuple)) else ():
        inner = call.get("function") if isinstance(call, Mapping) else None
        owner = inner if isinstance(inner, Mapping) else call
        if isinstance(owner, Mapping) and isinstance(owner.get("arguments"), (str, Mapping)):
            yield owner["arguments"]


def _with_arguments(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    if change is _same or next(_calls(message), None) is None:
        return message

    def changed(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call

    return {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}


def _missing(text: str, messages: Messages, *roles: str) -> int:
    """How many texts of contents the rendering lacks: templates for parts omit plain text."""
    count = 0
    for message in messages:
        if message.get("role") in roles or not roles:
            content = message.get("content")
            parts = content if isinstance(content, (list, tuple)) else [content]
            texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
            count += sum(isinstance(part, str) and part.strip() not in text for part in texts)
    return count


def _misprints(text: str, messages: Messages) -> int:
    """How often the text has contents or arguments in Python's or JSON's notation, by mistake."""
    count = 0
    for message in messages:
        content = message.get("content")
        if _is_list(content):
            count += _printed(text, content)
        for arguments in _calls(message):
            if isinstance(arguments, str):
                count += 0 if _as_object(arguments) is arguments else _printed_json(text, arguments)
            elif arguments and str(arguments) != json.dumps(arguments, ensure_ascii=False):
                count += text.count(str(arguments))
    return count


def _printed(text: str, content: Any) -> int:
    return (text.count(str(content)) + _printed_json(text, content)) if content else 0


def _printed_json(text: str, value: Any) -> int:
    return sum(
        text.count(form) for form in {json.dumps(value), json.dumps(value, ensure_ascii=False)}
    )
