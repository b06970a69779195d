"""A sandbox that bounds the work of chat templates: they are programs from unknown sources.

Loops and macros count steps, expressions count characters, and no value may be larger than a
conversation can be. The counts belong to one `budget`, in which a conversation is rendered.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import jinja2
import jinja2.nodes as n
import jinja2.sandbox
from jinja2.visitor import NodeTransformer

# Far more than templates take for conversations of thousands of turns: about a second.
MAX_STEPS = 500_000
# Characters of a text or items of a list; and the sum of all that one conversation makes.
MAX_SIZE = 10_000_000
MAX_TOTAL = 100_000_000
# Limit of widths, counts and precisions in formats.
_MAX_WIDTH = 10_000
_MAX_BITS = 1 << 16
# Steps of a macro's call, which takes longer than a round of a loop.
_CALL_STEPS = 10
# Characters that an item of a list or dict counts as.
_ITEM = 64

# Filters of `bounded`, under names that no template can write.
_STEP, _MADE, _JOIN = "count step", "count made", "join made"
_WIDTHS = ("center", "indent", "wordwrap", "truncate", "batch", "slice", "tojson", "round")
_WRITTEN_OUT = (
    "tojson",
    "string",
    "pprint",
    "format",
    "join",
    "urlencode",
    "xmlattr",
    "center",
    "indent",
    "upper",
    "lower",
)
_LONG_WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{5,}|\*)|\{[^{}]*(\d{5,}|\{)")

# Steps and characters that are left.
_left: ContextVar[list[int]] = ContextVar("what a conversation may still take")


@contextmanager
def budget() -> Iterator[None]:
    """Rendering within this context takes steps and characters from one budget."""
    token = _left.set([MAX_STEPS, MAX_TOTAL])
    try:
        yield
    finally:
        _left.reset(token)


def _refuse(reason: str) -> NoReturn:
    raise jinja2.exceptions.SecurityError(reason)


def _take(steps: int) -> None:
    left = _left.get()
    left[0] -= steps
    if left[0] < 0:
        _refuse(f"its loops take more than {MAX_STEPS} steps")


def _check(size: int) -> None:
    if size > MAX_SIZE:
        _refuse(f"it makes a text or list of more than {MAX_SIZE} characters or items")


def _made(value: Any) -> Any:
    """`value`, its size checked and counted."""
    if isinstance(value, str | list | tuple):
        _check(len(value))
        left = _left.get()
        left[1] -= len(value)
        if left[1] < 0:
            _refuse(f"it makes texts of more than {MAX_TOTAL} characters together")
    return value


def _check_written(value: Any) -> None:
    """Refuses a list or dict whose text would be huge, for example by repeating an item."""
    if not isinstance(value, list | tuple | dict):
        return
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        size += len(item) if isinstance(item, str) else _ITEM
        _check(size)
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            _check(size + _ITEM * len(item))
            waiting += item


def _check_widths(values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_WIDTH:
            _refuse(f"it formats a text with a width or count of more than {_MAX_WIDTH}")


def _check_format(text: Any) -> None:
    if isinstance(text, str) and _LONG_WIDTH.search(text):
        _refuse("it formats a text with a width of five digits, or one that is computed")


def _check_call(name: str, text: str, args: tuple[Any, ...]) -> None:
    """Refuses a call of the method or filter `name` of a text before it makes a huge result."""
    if (
        name == "replace"
        and len(args) >= 2
        and isinstance(args[0], str)
        and isinstance(args[1], str)
    ):
        _check(len(text) + text.count(args[0]) * max(0, len(args[1]) - len(args[0])))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        _check(sum(len(item) + len(text) for item in args[0] if isinstance(item, str)))
    elif name == "format":
        _check_format(text)
    elif name not in ("count", "find", "index", "startswith", "endswith", "split", "rsplit"):
        _check_widths(args)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `name`; it refuses huge results and counts what it makes."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        value = args[first] if len(args) > first else None
        given = (*args[first + 1 :], *kwargs.values())
        if name in _WRITTEN_OUT:
            _check_written(value)
        if name in _WIDTHS:
            _check_widths(given)
        elif name == "format":
            _check_format(value)
        elif name == "replace" and isinstance(value, str):
            _check_call(name, value, given)
        return _made(function(*args, **kwargs))

    return guarded


@jinja2.pass_context  # else Jinja would compute these once, while it compiles
def _count_step(context: Any, value: str, steps: int) -> str:
    _take(steps)
    return value


@jinja2.pass_context
def _count_made(context: Any, value: Any) -> Any:
    _check_written(value)
    return _made(value)


@jinja2.pass_context
def _join_made(context: Any, values: tuple[Any, ...]) -> str:
    for value in values:
        _check_written(value)
    texts = [str(value) for value in values]
    _check(sum(map(len, texts)))
    return str(_made("".join(texts)))


class BoundedSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which counts the work of `bounded` templates."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.globals.pop("lipsum")  # made-up text of any length
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.filters |= {_STEP: _count_step, _MADE: _count_made, _JOIN: _join_made}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """A filter of this name, counted like Jinja's own."""
        self.filters[name] = _guarded(name, function)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Sums, products, powers and formats; neither texts nor numbers may become huge."""
        if operator == "%":
            _check_format(left)
        for count, value in ((left, right), (right, left)):
            if operator == "*" and isinstance(count, int) and isinstance(value, str | list | tuple):
                _check(count * len(value))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * right
                if operator == "**"
                else left.bit_length() + right.bit_length()
            )
            if bits > _MAX_BITS:
                _refuse(f"it computes an integer of more than {_MAX_BITS} bits")
        return _made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Replaces `str.format` in newer versions of Jinja; older ones use `call`."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__)
            _check_written([*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return formatted

    def call(  # type: ignore[override]
        self, context: Any, called: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls a function or method for a template."""
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str):
            _check_call(getattr(called, "__name__", ""), owner, (*args, *kwargs.values()))
        return _made(super().call(context, called, *args, **kwargs))


class _Counting(NodeTransformer):
    """Adds counts of steps to loops and macros, and of characters to printed or joined values."""

    def _stepping(self, node: Any, steps: int) -> Any:
        self.generic_visit(node)
        step = n.Filter(n.Const(""), _STEP, [n.Const(steps)], [], None, None)
        node.body.insert(0, n.Output([step]))
        if isinstance(node, n.For) and node.test is not None:
            # An item that the condition skips is a step too; the empty text is false.
            node.test = n.Or(step, node.test)
        return node

    def visit_For(self, node: n.For) -> Any:
        return self._stepping(node, 1)

    def visit_Macro(self, node: n.Macro) -> Any:
        return self._stepping(node, _CALL_STEPS)

    def visit_CallBlock(self, node: n.CallBlock) -> Any:
        # the block of a tag, not a macro of the template
        if isinstance(node.call.node, n.ExtensionAttribute):
            return self.generic_visit(node)
        return self._stepping(node, _CALL_STEPS)

    def visit_Output(self, node: n.Output) -> Any:
        self.generic_visit(node)
        node.nodes = [
            item if isinstance(item, n.TemplateData) else n.Filter(item, _MADE, [], [], None, None)
            for item in node.nodes
        ]
        return node

    def visit_Concat(self, node: n.Concat) -> Any:
        self.generic_visit(node)
        return n.Filter(n.Tuple(node.nodes, "load"), _JOIN, [], [], None, None)


def bounded(environment: BoundedSandbox, source: str) -> jinja2.Template:
    """The template of `source`, its work counted. Raises Jinja's errors for malformed templates."""
    tree = _Counting().visit(environment.parse(source))
    return environment.from_string(tree.set_environment(environment))


def render(template: jinja2.Template, **variables: Any) -> str:
    """The text of a `bounded` template, inside of a `budget`.

    Raises SecurityError beyond the limits, and the template's own errors.
    """
    pieces, size = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        size += len(piece)
        _check(size)
    return "".join(pieces)
