"""Templates are programs: their work is limited, and counting it changes no result."""

import jinja2
import pytest

from pyloss.models.text.chat_template import render_chat

CHAT = [{"role": "user", "content": "hello"}]


def render(template, messages=CHAT):
    return render_chat(template, messages)


MADE = "it makes a text or list of more than 10000000 characters or items"
WIDE = "it formats a text with a width"
LONG = "{% for a in range(9999) %}{% for b in range(9999) %}BODY{% endfor %}{% endfor %}"
MANY = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LONG.replace("BODY", ""), "its loops take more than 500000 steps"),
        (
            LONG.replace("range(9999) %}BODY", "range(9999) if false %}"),
            "its loops take more than 500000 steps",
        ),
        (MANY, "its loops take more than 500000 steps"),
        (
            "{% for a in [[1] * 9] recursive %}{{ loop([[[1] * 9] * 9] * 9) }}{% endfor %}",
            "failed: ",
        ),
        ("{% set x = [1] * 1000000000000 %}", MADE),
        ("{{ 'ab' * (10 * 10 ** 9) }}", MADE),
        ("{{ 10 ** (10 ** 10) }}", "it computes an integer of more than 65536 bits"),
        (
            "{% set ns = namespace(x=7) %}{% for a in range(64) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
            "it computes an integer",
        ),
        ("{% set x = 'a' * 9000000 %}{{ x }}{{ x }}", MADE),
        (
            "{% set x = 'a' * 9000000 %}{% set y %}" + "{{ x }}" * 99 + "{% endset %}",
            "more than 100000000 characters together",
        ),
        (
            "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            MADE,
        ),
        (
            "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            MADE,
        ),
        (
            "{% set ns = namespace(x=[1]) %}{% for a in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
            MADE,
        ),
        (
            "{% set ns = namespace(x=[1]) %}{% for a in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
            MADE,
        ),
        (
            "{% set ns = namespace(x='a') %}{% for a in range(64) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
            MADE,
        ),
        (
            "{% set ns = namespace(x='a') %}{% for a in range(64) %}{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
            MADE,
        ),
        ("{{ 'a' | center(10 ** 9) }}", WIDE),
        ("{{ 'a'.ljust(1000000000) }}", WIDE),
        ("{{ ['a'] | map('center', 1000000000) | list }}", WIDE),
        ("{{ messages | tojson(indent=1000000000) }}", WIDE),
        ("{{ '%1000000000d' % 1 }}", WIDE),
        ("{{ '%*d' | format(1000000000, 1) }}", WIDE),
        ("{{ '{:1000000000}'.format(1) }}", WIDE),
        ("{{ '{:{}}'.format(1, 1000000000) }}", WIDE),
        ("{{ 4.5 | round(1000000000, 'floor') }}", WIDE),
        ("{{ strftime_now('%999999999d') }}", "without wide fields"),
        ("{{ lipsum(1000000000) }}", "'lipsum' is undefined"),
        (
            LONG.replace("BODY", "{{ ''|count_step(-9) }}"),
            "malformed at line 1: No filter named 'count_step'",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth"),
    ],
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
    template += "{{ (1 + 2) ~ 'x' ~ [1, 'a'] }}{{ '%s|%5d' % ('a', 3) }}{{ '{:>5}'.format('b') }}{{ none }}{{ missing }}{{ [1] + [2] }}{% set y %}q{{ 1 }}{% endset %}{{ y | upper | center(7) }}"
    for messages in (CHAT, [{"role": "system", "content": "a"}], [*CHAT, *CHAT]):
        assert render(template, messages) == environment.from_string(template).render(
            messages=messages
        )


def test_an_error_that_says_nothing_is_named(monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("pyloss.models.text.chat_template.render", fail)
    with pytest.raises(ValueError, match="the chat template failed: MemoryError"):
        render("x")
