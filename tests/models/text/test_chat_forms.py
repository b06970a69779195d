"""Contents, arguments and tools are converted to the form that a template takes."""

import json

import pytest
from tiny import byte_tokenizer

from pyloss.models.text.chat_forms import tools_of
from pyloss.models.text.chat_template import render_chat

AS_IT_IS = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
JOINED = "{% for m in messages %}{{ m.role + ': ' + m.content + ';' }}{% endfor %}"
PARTS = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %};{% endfor %}"
EITHER = "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %};{% endfor %}"


def part(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "template", [AS_IT_IS, JOINED, PARTS, EITHER, AS_IT_IS.replace("m.content", "m.content | trim")]
)
@pytest.mark.parametrize(
    "content", ["hi there", part("hi there"), part("hi ", "there"), ["hi ", "there"]]
)
def test_contents_in_either_form(template, content):
    if template in (PARTS, EITHER) and isinstance(content, list) and isinstance(content[0], str):
        pytest.skip("plain strings in a list are no parts that such templates know")
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    assert render_chat(template, messages) == "user: hi there;assistant: hi there;"


def test_contents_of_both_forms_in_one_conversation():
    messages = [{"role": "user", "content": part("a")}, {"role": "assistant", "content": "b"}]
    for template in (AS_IT_IS, JOINED, PARTS, EITHER):
        assert render_chat(template, messages) == "user: a;assistant: b;"


def test_parts_of_any_length_and_number_are_named_in_few_words():
    messages = [
        {
            "role": "user",
            "content": [*part("a"), *({"type": f"{i}9" + "9" * 5000} for i in range(100))],
        }
    ]
    with pytest.raises(ValueError, match="these parts are none: 09") as error:
        render_chat(AS_IT_IS, messages)
    assert len(str(error.value)) < 600


def test_parts_that_are_no_text_are_refused_where_they_would_be_printed():
    messages = [{"role": "user", "content": [*part("a"), {"type": "image", "image": "x.png"}]}]
    with pytest.raises(
        ValueError, match="takes text alone as content; these parts are none: image"
    ):
        render_chat(AS_IT_IS, messages)
    assert render_chat(PARTS, messages) == "user: a;"


OBJECTS = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}={{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
WHOLE = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
ITEMS = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}"
TEXT = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name + '=' + c.function.arguments }}{% endfor %}{% endfor %}"
PRINTED = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}={{ c.function.arguments }}{% endfor %}{% endfor %}"
FLAT = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.name }}={{ c.arguments | tojson }}{% endfor %}{% endfor %}"
ARGUMENTS = {"city": "Ålesund", "days": 2}
JSON = '{"city": "Ålesund", "days": 2}'


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (OBJECTS, "f=" + JSON),
        (WHOLE, '{"name": "f", "arguments": ' + JSON + "}"),
        (ITEMS, "city=Ålesund;days=2;"),
        (TEXT, "f=" + JSON),
        (PRINTED, "f=" + JSON),
        (FLAT, "f=" + JSON),
    ],
)
@pytest.mark.parametrize("arguments", [ARGUMENTS, JSON, json.dumps(ARGUMENTS)])
def test_arguments_in_either_form(template, expected, arguments):
    call = {"name": "f", "arguments": arguments}
    call = call if template == FLAT else {"type": "function", "function": call}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    found = render_chat(template, messages)
    assert found == "q" + expected.replace(
        "Å", "\\u00c5" if template in (TEXT, PRINTED) and "\\u" in str(arguments) else "Å"
    )


def test_arguments_that_are_no_object_stay():
    for arguments in ("not json", "[1]", "", "{", "[" * 100_000):
        call = {"function": {"name": "f", "arguments": arguments}}
        assert (
            render_chat(PRINTED, [{"role": "assistant", "content": "", "tool_calls": [call]}])
            == "f=" + arguments
        )


def test_a_template_that_refuses_everything_says_what_it_says_of_the_messages_as_given():
    template = "{{ raise_exception(messages[0].content is string) }}"
    with pytest.raises(ValueError, match="failed: True"):
        render_chat(template, [{"role": "user", "content": "a"}])


def test_tools_as_json_text():
    tools = [{"name": "a"}, {"name": "b"}]
    template = "{{ tools | length }}{{ tools[1].name }}"
    tokenizer = byte_tokenizer()
    for given in (tools, tuple(tools), json.dumps(tools), [json.dumps(tool) for tool in tools]):
        assert tools_of(given) == tools and render_chat(template, [{"role": "user"}], given) == "2b"
        assert (
            tokenizer.apply_chat_template(
                [{"role": "user"}], given, chat_template=template, tokenize=False
            )
            == "2b"
        )
    assert tools_of(None) is tools_of("null") is None
    for bad in ("none", "[", "[" * 100_000):
        with pytest.raises(ValueError, match="tools is .* not JSON"):
            tools_of(bad)
    for bad in ('{"name": "a"}', "3", ["f"], [[]], {"name": "a"}):
        with pytest.raises(TypeError, match="tools must be a list"):
            tools_of(bad)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_tool_calls_without_a_content(content):
    """OpenAI writes null; templates such as SmolLM2's read every content."""
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + '|' }}{% endfor %}"
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", **content, "tool_calls": [call]},
    ]
    assert render_chat(template, messages) == "<user>hello|<assistant>|"
    with pytest.raises(ValueError, match="no attribute 'content'"):
        render_chat(template, [{"role": "user"}])
