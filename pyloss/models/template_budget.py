"""A sandbox for chat templates whose loops and texts have an end: templates are programs, and come with strangers' models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox

# Far more than templates take for conversations of thousands of turns: a second's work.
MAX_STEPS = 1_000_000
# Characters of a rendered conversation, and of a text or list that a template makes by multiplying.
MAX_SIZE = 100_000_000
_MAX_BITS = 1 << 16
# What the call of a macro takes longer than a round of a loop.
_CALL_STEPS = 10
# No name that a template could write.
_STEP = "count step"

_left: ContextVar[list[int]] = ContextVar("steps that the conversation may still take")


@jinja2.pass_context  # else Jinja would compute it once, while it compiles
def _count_step(context: Any, value: str, steps: int) -> str:
    left = _left.get()
    left[0] -= steps
    if left[0] < 0:
        raise jinja2.exceptions.SecurityError(f"its loops take more than {MAX_STEPS} steps")
    return value


class BoundedSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which each round of a loop and each call of a macro is counted."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters[_STEP] = _count_step

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products and powers, of which neither a text nor a number may become huge."""
        for count, value in ((left, right), (right, left)):
            if isinstance(count, int) and isinstance(value, str | list | tuple) and count * len(value) > MAX_SIZE:
                raise jinja2.exceptions.SecurityError(f"it repeats a value to more than {MAX_SIZE} items")
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise jinja2.exceptions.SecurityError(f"it computes an integer of more than {_MAX_BITS} bits")
        return super().call_binop(context, operator, left, right)


def bounded(environment: BoundedSandbox, source: str) -> jinja2.Template:
    """The template of `source`, its steps counted. Raises what Jinja raises for malformed ones."""
    tree = environment.parse(source)
    node: Any
    for node in tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
        if isinstance(node, jinja2.nodes.CallBlock) and isinstance(node.call.node, jinja2.nodes.ExtensionAttribute):
            continue  # the block of a tag, which is no macro of the template's
        steps = [jinja2.nodes.Const(1 if isinstance(node, jinja2.nodes.For) else _CALL_STEPS)]
        step = jinja2.nodes.Filter(jinja2.nodes.Const(""), _STEP, steps, [], None, None)
        step.set_environment(environment)
        node.body.insert(0, jinja2.nodes.Output([step]).set_environment(environment))
        if isinstance(node, jinja2.nodes.For) and node.test is not None:
            # An item that the condition passes over is a step, too; the empty text is false.
            node.test = jinja2.nodes.Or(step, node.test).set_environment(environment)
    return environment.from_string(tree)


@contextmanager
def budget() -> Iterator[None]:
    """What is rendered inside takes its steps from one budget."""
    token = _left.set([MAX_STEPS])
    try:
        yield
    finally:
        _left.reset(token)


def render(template: jinja2.Template, **variables: Any) -> str:
    """The text of a `bounded` template, inside of a `budget`.

    Raises SecurityError beyond the limits, and whatever the template raises.
    """
    pieces, size = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_SIZE:
            raise jinja2.exceptions.SecurityError(f"its text has more than {MAX_SIZE} characters")
    return "".join(pieces)
