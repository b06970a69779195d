"""Chat templates: what they may use, and the errors of those that fail."""

import numpy as np
import pytest
from tiny_tokenizer import CHAT

from pyloss.models.text.chat_template import render_chat


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{% break %}{% endfor %}ok", "ok"),
        ("a{% generation %}\n  b{% endgeneration %}c", "a  bc"),
        ("{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=True) }}", '{"a": "<é>", "b": 1}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}", "2"),
        ("{{ dict(a=1).a }}{{ undefined_thing }}", "1"),
        ("{{ messages[0].thinking }}{{ messages[0].reasoning_content }}", "rr"),
        ("{{ messages[0].tool_calls is defined }}", "False"),
        ("{{ x }}", "1.5"),
        ("{{ documents }}", "[{'text': 'd'}]"),
    ],
)
def test_what_templates_may_use(template, expected):
    messages = [{"role": "user", "content": "c", "tool_calls": None, "reasoning": "r"}]
    assert render_chat(template, messages, x=np.float32(1.5), documents=[{"text": "d"}]) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "malformed at line 1"),
        ("a\n{{ }", "malformed at line 2"),
        ("{% nonsense %}", "malformed"),
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{{ messages.nothing.at.all }}", "failed: 'list object' has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{{ 1 + 'a' }}", "failed: unsupported operand"),
        ("{{ messages.append(1) }}", "failed: .*unsafe|failed: access"),
        ("{{ ''.__class__.__mro__ }}", "failed: .*unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "failed: a namespace must not"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "failed: a namespace must not"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed: maximum recursion"),
    ],
)
def test_templates_that_fail_say_why(template, message):
    with pytest.raises(ValueError, match=message):
        render_chat(template, CHAT)


def test_objects_reach_a_template_as_plain_values_only():
    class Sly(str):
        def delete(self):
            raise AssertionError("called from a template")

    with pytest.raises(ValueError, match="no attribute 'delete'"):
        render_chat("{{ messages[0].content.delete() }}", [{"role": "user", "content": Sly("x")}])
    assert render_chat("{{ messages[0].content }}", [{"content": object()}]) == "<object>"
