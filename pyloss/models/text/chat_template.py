"""Chat templates: Jinja in a sandbox, with the same environment and inputs as in transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.utils

from pyloss.errors import said
from pyloss.models.text.chat_forms import settled, tools_of
from pyloss.models.text.template_budget import BoundedSandbox, bounded, budget, render

# Keys of applications for a message's reasoning. gpt-oss's template reads the second, others the
# first.
_REASONING = ("reasoning_content", "thinking", "reasoning")

# Marks around the assistant's text; see `render_marked`.
_marks: ContextVar[tuple[str, str]] = ContextVar("marks", default=("", ""))


def render_chat(
    template: str,
    messages: Any,
    tools: Any = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
        template: Jinja source.
        messages: a non-empty list of dicts with "role" and "content"; a value of None is a missing
            key. Contents are text or lists of parts, arguments of tool calls are objects or JSON
            text: the template gets the form that it takes.
        tools: a list of JSON schemas (dicts), JSON text of one, or None.
        variables: further variables of the template, such as `bos_token`.

    Raises:
        TypeError: messages or tools of the wrong type.
        ValueError: no messages, tools that are not JSON, or a template that is malformed, fails or
            refuses these messages.
    """
    if not isinstance(messages, (list, tuple)) or not all(
        isinstance(message, Mapping) for message in messages
    ):
        raise TypeError(
            f"messages must be a list of dicts with 'role' and 'content', got {messages!r:.200}"
        )
    if not messages:
        raise ValueError("messages is empty; a conversation has at least one")
    tools = tools_of(tools)
    compiled = _compile(template)
    try:
        documents = _plain(variables.pop("documents", None))
        inputs = {
            "tools": _plain(tools),
            "add_generation_prompt": add_generation_prompt,
            **_plain(variables),
        }
        plain = [_message(message) for message in messages]
        with budget():
            return settled(
                plain, lambda form: render(compiled, messages=form, documents=documents, **inputs)
            )[1]
    except Exception as error:  # a template may fail in any way that a program can
        raise ValueError(f"the chat template failed: {said(error)}") from error


def render_record(template: str, record: Mapping[str, Any], what: str) -> str:
    """The text of a Jinja template over a record, whose keys are its variables.

    A value of null is an empty text. Raises ValueError that begins with `what`, the template's
    name, for one that is malformed, fails, or reads a key that the record lacks.
    """
    compiled = _compile(template, what, strict=True)
    try:
        with budget():
            return str(render(compiled, **_plain(record)))
    except Exception as error:  # a template may fail in any way that a program can
        raise ValueError(f"{what} failed: {said(error)}") from error


def render_marked(
    template: str, messages: Any, *args: Any, **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the spans that `{% generation %}` marks in it.

    Spans are (begin, end) in characters, in order. Raises as `render_chat`, and ValueError for a
    template that computes with the marked text, so that its marks are lost.
    """
    text = render_chat(template, messages, *args, **variables)
    begin, end = [c for c in map(chr, range(0xE000, 0xF8FF)) if c not in text][:2]
    token = _marks.set((begin, end))
    try:
        parts = re.split(f"([{begin}{end}])", render_chat(template, messages, *args, **variables))
    finally:
        _marks.reset(token)
    position, opened = 0, 0
    starts: list[int] = []
    spans: list[tuple[int, int]] = []
    for part in parts:
        if part == begin:
            starts.append(position)
        elif part == end and starts:
            opened = starts.pop()
            if not starts and position > opened:
                spans.append((opened, position))
        elif part != end:
            position += len(part)
    if "".join(part for part in parts if part not in (begin, end)) != text:
        raise ValueError(
            "the chat template computes with the text that it marks as the assistant's, "
            "so the marks are lost"
        )
    return text, spans


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in _plain(message).items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return (
        plain
        if reasoning is None
        else {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    )


def _plain(value: Any) -> Any:
    """`value` in JSON's types: a template must not get objects with custom methods."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            type(value)(map(_plain, value))
            if type(value) in (list, tuple)
            else list(map(_plain, value))
        )
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    return (
        _plain(value.item())
        if callable(getattr(value, "item", None))
        else f"<{type(value).__name__}>"
    )


@lru_cache(maxsize=16)
def _compile(
    template: str, what: str = "the chat template", strict: bool = False
) -> jinja2.Template:
    """The template; a `strict` one fails for missing variables, and writes nothing for None."""
    environment = BoundedSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    if strict:
        environment.undefined = jinja2.StrictUndefined
        environment.finalize = lambda value: "" if value is None else value
    environment.add_filter("tojson", _tojson)
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_Dict(),
        namespace=_Namespace,
    )
    try:
        return bounded(environment, template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{what} is malformed at line {error.lineno}: {error.message}") from None
    except (RecursionError, MemoryError, SyntaxError, ValueError) as error:
        raise ValueError(f"{what} is malformed: {said(error)}") from None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: puts the assistant's text between `_marks`, unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    @staticmethod
    def _content(caller: Any) -> str:
        begin, end = _marks.get()
        return f"{begin}{caller()}{end}"


class _Dict:
    """`dict` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` that refuses the names which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        jinja2.utils.Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _refuse_private(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace must not have the attribute {name!r}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes characters for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    # fields have widths
    if not isinstance(format, str) or len(format) > 200 or re.search(r"\d{3}", format):
        raise jinja2.exceptions.SecurityError(
            "strftime_now takes texts of up to 200 characters, without wide fields"
        )
    return datetime.now().strftime(format)
