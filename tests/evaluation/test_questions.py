"""Prompts and reference answers of records."""

import json

import pytest
from fake import END, START, FakeTokenizer
from tiny import byte_tokenizer

from pyloss.evaluation.questions import read_question
from pyloss.tuner import datasets as ds

SYSTEM = {"role": "system", "content": "be brief"}
TURNS = [
    SYSTEM,
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes one"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "yes two"},
]


def question(record, dataset=ds.ChatDataset, tokenizer=None):
    tokenizer = tokenizer or FakeTokenizer()
    return read_question(dataset([record], tokenizer), 0, tokenizer)


def test_the_reference_is_the_last_assistant_turn():
    found = question({"messages": TURNS})
    assert found.reference == "yes two"
    opened = (
        f"{START}system\nbe brief{END}\n{START}user\none?{END}\n{START}assistant\nyes one{END}\n"
    )
    assert found.prompt == opened + f"{START}user\ntwo?{END}\n{START}assistant\n"
    assert found.tokens == FakeTokenizer().encode(found.prompt)


def test_turns_after_the_last_assistant_turn_are_left_out():
    extra = {"role": "user", "content": "three?"}
    assert question({"messages": [*TURNS, extra]}) == question({"messages": TURNS})


def test_completions_are_one_turn_each():
    found = question({"prompt": "why", "completion": "because"}, ds.CompletionsDataset)
    assert found.reference == "because"
    assert found.prompt == f"{START}user\nwhy{END}\n{START}assistant\n"


def test_contents_of_parts():
    parts = [{"type": "text", "text": "yes "}, {"type": "text", "text": "two"}]
    messages = [TURNS[1], {"role": "assistant", "content": parts}]
    assert question({"messages": messages}).reference == "yes two"


def test_a_tool_call_is_what_the_template_writes():
    template = (
        "{% for m in messages %}<s>{{ m.role }}:{% if m.tool_calls %}"
        "{% for c in m.tool_calls %}<tool>{{ c.function | tojson }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    call = {"type": "function", "function": {"name": "light", "arguments": {"on": True}}}
    messages = [TURNS[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    found = question({"messages": messages}, tokenizer=tokenizer)
    assert found.prompt == "<s>user:one?</s><s>assistant:"
    # <tool> is a token of the user's own, so it is text; </s> is a special token.
    assert found.reference == "<tool>" + json.dumps(call["function"])


def test_without_a_template_a_single_message_is_the_prompt():
    tokenizer = byte_tokenizer(add_bos_token=True)
    tokenizer.chat_template = None
    found = question({"prompt": "hello", "completion": "x"}, ds.CompletionsDataset, tokenizer)
    assert found.prompt == "hello" and found.tokens == tokenizer.encode("hello")
    with pytest.raises(ValueError, match="record 0: a conversation of several messages needs"):
        question({"messages": TURNS}, tokenizer=tokenizer)


def test_wrapped_datasets_find_their_records():
    tokenizer = FakeTokenizer()
    parts = [
        ds.CompletionsDataset([{"prompt": "a", "completion": "b"}], tokenizer),
        ds.ChatDataset([{"messages": TURNS}], tokenizer),
    ]
    joined = ds.ConcatenatedDataset(parts)
    assert [read_question(joined, i, tokenizer).reference for i in (0, 1)] == ["b", "yes two"]
    assert read_question(ds.CacheDataset(joined), 1, tokenizer).reference == "yes two"


@pytest.mark.parametrize(
    "messages",
    [[SYSTEM, TURNS[1]], [TURNS[2]], [TURNS[2], TURNS[3]]],
    ids=["none", "first", "first, then user"],
)
def test_records_without_an_answer_to_a_prompt_are_refused(messages):
    with pytest.raises(
        ValueError, match="record 0: the record has no assistant turn after a prompt"
    ):
        question({"messages": messages})


def test_plain_text_is_refused():
    with pytest.raises(ValueError, match="record 0: a record of 'text' has no prompt and no ref"):
        question({"text": "once"}, ds.TextDataset)


def test_a_users_own_dataset_is_refused():
    with pytest.raises(ValueError, match=r"list has no conversation\(i\)"):
        read_question([([1, 2], 1)], 0, FakeTokenizer())


def test_errors_of_a_template_name_the_record():
    def refuse(*_):
        raise ValueError("no system turns")

    with pytest.raises(ValueError, match="record 0: no system turns"):
        question({"messages": TURNS}, tokenizer=FakeTokenizer(refuse))
