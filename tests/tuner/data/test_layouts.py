"""Layouts of records: which are recognized, and what they are converted to."""

import json

import pytest

from pyloss.tuner.data.layouts import Converted, chat, continued, mapped, read_map, recognized


def converted(*records):
    """The layout as text, and the records after conversion."""
    layout = recognized(records[0], set().union(*records))
    return str(layout), list(Converted(list(records), layout))


def pair(prompt, completion, **more):
    return {"prompt": prompt, "completion": completion, **more}


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_alpaca():
    text, found = converted(
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"instruction": "sing", "input": "", "output": "la"},
        {"instruction": "sing", "output": "la"},
    )
    assert text == "Alpaca: instruction, input, output"
    assert found == [pair("add\n1 2", "3"), pair("sing", "la"), pair("sing", "la")]


def test_alpaca_with_a_system_prompt_and_a_history():
    text, found = converted(
        {"instruction": "b", "output": "d", "system": "s", "history": [["a", "c"]]},
        {"instruction": "b", "output": "d", "history": None},
    )
    assert text == "Alpaca: instruction, output, system, history"
    turns = [("user", "a"), ("assistant", "c"), ("user", "b"), ("assistant", "d")]
    assert found[0] == {"messages": messages(("system", "s"), *turns)}
    assert found[1] == {"messages": messages(*turns[2:])}


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("prompt", "response"),
        ("question", "answer"),
        ("input", "output"),
        ("instruction", "response"),
        ("query", "response"),
        ("problem", "solution"),
    ],
)
def test_pairs_under_their_usual_names(prompt, answer):
    text, found = converted({"id": 1, prompt: "a", answer: "b"})
    assert text == f"prompt and answer: {prompt}, {answer}" and found == [pair("a", "b")]


def test_questions_with_context():
    text, found = converted(
        {"question": "who?", "context": "Ada wrote it.", "answer": "Ada"},
        {"question": "who?", "context": "", "answer": "Bo"},
    )
    assert text == "question, answer and context: context, question, answer"
    assert found == [pair("Ada wrote it.\nwho?", "Ada"), pair("who?", "Bo")]
    _, found = converted(
        {"instruction": "who?", "context": "Ada.", "response": "Ada", "category": ""}
    )
    assert found == [pair("Ada.\nwho?", "Ada")]
    squad = {"id": "1", "title": "t", "context": "c", "question": "q"}
    squad["answers"] = {"text": ["first", "second"], "answer_start": [1, 2]}
    assert converted(squad)[1] == [pair("c\nq", "first")]


def test_sharegpt():
    call = {"name": "f", "arguments": {"x": 1}}
    record = {
        "id": "1",
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "two"},
        ],
        "system": "be brief",
        "tools": '[{"name": "f"}]',
    }
    text, found = converted(record)
    assert text == "ShareGPT: conversations, system, tools"
    expected = messages(("system", "be brief"), ("user", "hi"), ("assistant", ""), ("tool", "2"))
    expected[2]["tool_calls"] = [{"type": "function", "function": call}]
    assert found[0]["messages"] == [*expected, *messages(("assistant", "two"))]
    assert found[0]["tools"] == record["tools"]
    with_own = {"conversations": [{"from": "system", "value": "own"}], "system": "be brief"}
    assert converted(with_own)[1] == [{"messages": messages(("system", "own"))}]


def test_a_prompt_of_messages():
    asked, said = messages(("system", "s"), ("user", "a")), messages(("assistant", "b"))
    layout = continued("prompt", "completion")
    for completion in ("b", said):
        found = Converted([pair(asked, completion, tools=[])], layout)[0]
        assert found == {"messages": [*asked, *said], "tools": []}
    for record, message in (
        ({"prompt": asked}, "record 0: the record has no 'completion'"),
        (pair("a", "b"), "record 0: 'prompt' is a string, and must be a list"),
        (pair(asked, 3), "'completion' is a number, and must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            Converted([record], layout)[0]


def test_a_first_message_that_is_none_beside_a_system_prompt():
    found = converted({"conversations": ["x"], "system": "s"})[1]
    assert found == [{"messages": [{"role": "system", "content": "s"}, "x"]}]


def test_openais_messages_under_other_names_and_as_text():
    turns = messages(("user", [{"type": "text", "text": "a"}]), ("assistant", "b"))
    assert converted({"conversation": turns}) == ("OpenAI: conversation", [{"messages": turns}])
    cell = {"messages": json.dumps(turns)}
    layout = chat("messages", cell, {"messages"})
    assert Converted([cell], layout)[0] == {"messages": turns}
    plain = chat("messages", {"messages": turns, "tools": []}, {"messages", "tools"})
    assert str(plain) == "OpenAI: messages, tools" and plain.convert is None
    shared = {"messages": [{"from": "user", "value": "a"}]}
    assert str(chat("messages", shared, {"messages"})) == "ShareGPT: messages"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"q": "a", "reply": "b"}, "keys are 'q', 'reply'; expected one of these layouts: OpenAI"),
        ({"question": "a", "chosen": "b"}, "expected one of these layouts"),
        ({"problem": "a", "solution": "b", "answer": "c"}, "can be read in several ways; expected"),
        ({"question": "a", "query": "b", "answer": "c"}, "can be read in several ways; expected"),
        ({"conversations": [], "question": "a", "answer": "c"}, "can be read in several ways"),
    ],
)
def test_what_is_not_recognized_names_keys_and_layouts(record, message):
    with pytest.raises(ValueError, match=message + ".*plain text: text; for others --map"):
        recognized(record, set(record))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            {"question": "a"},
            "record 1: the record has no 'answer'",
        ),
        ({"question": "a", "answer": "b"}, {"question": None, "answer": "b"}, "'question' is null"),
        (
            {"instruction": "a", "output": "b", "input": ""},
            {"instruction": "a", "output": "b", "input": 3},
            "record 1: 'input' is a number",
        ),
        (
            {"instruction": "a", "output": "b", "history": []},
            {"instruction": "a", "output": "b", "history": ["x"]},
            r"'history' must be a list of \[question, answer\]",
        ),
        ({"conversations": []}, {"conversations": "x"}, "'conversations' is a string"),
        ({"conversations": []}, {}, "record 1: the record has no 'conversations'"),
        (
            {"conversations": []},
            {"conversations": [{"from": "narrator", "value": "a"}]},
            r"record 1: conversations\[0\]: 'from' is 'narrator', and must be one of human",
        ),
        ({"conversations": []}, {"conversations": [{"from": "gpt"}]}, "'value' is null"),
        ({"conversations": []}, {"conversations": [{"from": [], "value": ""}]}, "'from' is \\[\\]"),
        (
            {"conversations": []},
            {"conversations": [{"from": "function_call", "value": "f(x)"}]},
            "function_call must be JSON",
        ),
    ],
)
def test_an_unusable_record_is_named(first, second, message):
    with pytest.raises(ValueError, match=message):
        converted(first, second)


def test_maps():
    given = "prompt=q, completion = a,context=c"
    assert read_map(given) == {"prompt": "q", "completion": "a", "context": "c"}
    record = {"q": "who?", "a": "Ada", "c": "It was Ada.", "tools": "x"}
    layout = mapped(read_map(given), record)
    assert layout.convert(record, "") == pair("It was Ada.\nwho?", "Ada")
    assert str(layout) == "mapped to a pair: c, q, a"
    layout = mapped({"text": "q"}, record)
    assert layout.convert(record, "") == {"text": "who?"} and layout.form == "text"
    turns = {"dialog": [{"from": "human", "value": "a"}], "t": []}
    layout = mapped({"messages": "dialog", "tools": "t"}, turns)
    assert layout.convert(turns, "") == {"messages": messages(("user", "a")), "tools": []}


@pytest.mark.parametrize(
    "given",
    [
        "", "prompt", "prompt=a", "prompt=a,text=b", "text=a,system=b", "messages=a,context=b",
        "prompt=a,completion=", "prompt=a,prompt=b,completion=c", "reply=a", {"text": 3}, 3, [],
    ],
)  # fmt: skip
def test_maps_that_say_no_layout(given):
    with pytest.raises(ValueError, match="prompt=KEY,completion=KEY or messages=KEY or text=KEY"):
        read_map(given)


def templated(mapping, *records):
    layout = mapped(read_map(mapping), records[0])
    return list(Converted(list(records), layout))


def test_templates_make_texts_of_any_record():
    record = {"title": "Sky, blue", "body": {"lines": ["a", "b"]}, "label": 3, "note": None}
    given = "prompt={{ title }}: {{ body.lines | join(', ') }}{{ note }},completion=is {{ label }}"
    assert templated(given, record) == [pair("Sky, blue: a, b", "is 3")]
    assert templated({"text": "{% for l in body.lines %}<{{ l }}>{% endfor %}"}, record) == [
        {"text": "<a><b>"}
    ]
    mixed = {"prompt": "title", "completion": "{{ label }}", "system": "be {{ label }}"}
    turns = [("system", "be 3"), ("user", "Sky, blue"), ("assistant", "3")]
    assert templated(mixed, record) == [{"messages": messages(*turns)}]


def test_a_template_makes_messages():
    record = {"log": [["user", 'a "b"'], ["assistant", "c"]]}
    template = (
        "[{% for role, text in log %}"
        '{"role": {{ role | tojson }}, "content": {{ text | tojson }}}'
        "{% if not loop.last %},{% endif %}{% endfor %}]"
    )
    assert templated({"messages": template}, record) == [
        {"messages": messages(("user", 'a "b"'), ("assistant", "c"))}
    ]


@pytest.mark.parametrize(
    "template, said",
    [
        ("{{ title", "the template of prompt is malformed at line 1"),
        ("{{ tittle }}", "the template of prompt failed: 'tittle' is undefined"),
        ("{{ title.__class__.__mro__ }}", "the template of prompt failed: access to attribute"),
        ("{% for i in range(10**9) %}{% endfor %}", "the template of prompt failed: "),
    ],
)
def test_templates_that_fail(template, said):
    record = {"title": "a", "label": "b"}
    with pytest.raises(ValueError, match=said):
        templated({"prompt": template, "completion": "label"}, record)
    later = mapped({"prompt": "{{ x }}", "completion": "label"}, {"x": 1, "label": "b"})
    with pytest.raises(ValueError, match="record 1: the template of prompt failed: 'x' is undef"):
        Converted([{"x": 1, "label": "b"}, record], later)[1]


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("record", "keys", "chosen", "form"),
    [
        (
            {"prompt": "hi", "chosen": "hello", "rejected": "no"},
            ("prompt", "chosen", "rejected"),
            "prompt=prompt,completion=chosen",
            {"prompt": "hi", "completion": "hello"},
        ),
        (
            {"question": "hi", "chosen": "hello", "rejected": "no", "score": 3},
            ("question", "chosen", "rejected"),
            "prompt=question,completion=chosen",
            {"prompt": "hi", "completion": "hello"},
        ),
        (
            {"prompt": "hi", "chosen": MESSAGES, "rejected": []},
            ("prompt", "chosen", "rejected"),
            "messages=chosen",
            {"messages": MESSAGES},
        ),
        (
            {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": []},
            ("prompt", "chosen", "rejected"),
            "prompt=prompt,completion=chosen",
            {"messages": MESSAGES},
        ),
        (
            {"chosen": "Human: hi Assistant: hello", "rejected": "Human: hi"},
            ("chosen", "rejected"),
            "text=chosen",
            {"text": "Human: hi Assistant: hello"},
        ),
    ],
)
def test_preference_pairs_are_named_and_read_by_their_chosen_answers(record, keys, chosen, form):
    layout = recognized(record, set(record))
    assert str(layout) == f"preference pairs: {', '.join(keys)}"
    assert layout.convert(record, "line 1") == form
    assert layout.note == (
        f"there is no training on preferences; with --map {chosen} the chosen answers are trained on"
    )
    # what the note names does so
    again = mapped(read_map(chosen), record)
    assert again.convert(record, "line 1") == form and not again.note


def test_a_table_with_messages_beside_the_pairs_is_one_of_messages():
    record = {"messages": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}
    assert str(chat("messages", record, set(record))) == "OpenAI: messages"
