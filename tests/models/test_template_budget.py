"""Templates are programs: what they do has an end, and counting it changes nothing."""

import jinja2
import pytest

from pyloss.models.chat_template import render_chat

CHAT = [{"role": "user", "content": "hello"}]


def render(template, messages=CHAT):
    return render_chat(template, messages)


LONG = "{% for a in range(9999) %}{% for b in range(9999) %}BODY{% endfor %}{% endfor %}"
MANY = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LONG.replace("BODY", ""), "its loops take more than 1000000 steps"),
        (LONG.replace("range(9999) %}BODY", "range(9999) if false %}"), "its loops take more than 1000000 steps"),
        (MANY, "its loops take more than 1000000 steps"),
        ("{% for a in [[1] * 9] recursive %}{{ loop([[[1] * 9] * 9] * 9) }}{% endfor %}", "failed: "),
        ("{% set x = [1] * 1000000000000 %}", "it repeats a value to more than 100000000 items"),
        ("{{ 'ab' * (10 * 10 ** 9) }}", "it repeats a value"),
        ("{{ 10 ** (10 ** 10) }}", "it computes an integer of more than 65536 bits"),
        ("{% set ns = namespace(x=7) %}{% for a in range(64) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", "it computes an integer"),
        ("{% set x = 'a' * 90000000 %}{{ x }}{{ x }}", "its text has more than 100000000 characters"),
        (LONG.replace("BODY", "{{ ''|count_step(-9) }}"), "malformed at line 1: No filter named 'count_step'"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth"),
    ],
    ids=["loops", "a condition", "macros", "recursive", "list", "text", "power", "products", "long text", "own count", "depth"],
)
def test_a_template_s_work_has_an_end(template, message):
    with pytest.raises(ValueError, match=f"the chat template (failed: )?.*{message}"):
        render(template)


def test_counting_steps_changes_no_text():
    template = (
        "{%- macro part(x) %}\n  [{{ x }}]{% endmacro %}\n{% for m in messages if m.role != 'system' %}\n  {{ loop.index }}/{{ loop.length }}"
        "{{ part(m.content) }}{% if loop.last %}!{% endif %}\n{% else %}\nnone{% endfor %}{% macro twice() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call twice() %}x{% endcall %}"
    )
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    for messages in (CHAT, [{"role": "system", "content": "a"}], [*CHAT, *CHAT]):
        assert render(template, messages) == environment.from_string(template).render(messages=messages)


def test_an_error_that_says_nothing_is_named(monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("pyloss.models.chat_template.render", fail)
    with pytest.raises(ValueError, match="the chat template failed: MemoryError"):
        render("x")
