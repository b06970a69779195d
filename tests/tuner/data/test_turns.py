"""Conversations whose turns the template rewrites, refuses in part or omits."""

import pytest
from fake import END, FakeTokenizer
from tiny import byte_tokenizer

from pyloss.tuner.datasets import ChatDataset, CompletionsDataset

U, A = ({"role": role, "content": role[0]} for role in ("user", "assistant"))


def trained(template, messages, train_on="assistant", tools=None):
    """The trained runs of text, under a Jinja template or a Python function."""
    if callable(template):
        tokenizer = FakeTokenizer(template)
    else:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
    sample = ChatDataset(
        [{"messages": messages, "tools": tools}], tokenizer, train_on=train_on
    ).sample(0)
    runs, last = [], None
    for i, weight in enumerate(sample.weights):
        if weight:
            runs = runs if last == i - 1 else [*runs, []]
            runs[-1].append(sample.tokens[i])
            last = i
    return [tokenizer.decode(run) for run in runs]


def say(*contents):
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


ROLES = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def test_a_turn_of_which_nothing_is_left_is_not_trained():
    template = "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    assert trained(template, say("a", "b", "c", "d")) == ["d"]
    assert trained(template, say("a", "b", "c", "d", "e")) == []


def test_a_turn_whose_text_alone_is_left_out_is_trained_to_end():
    template = ROLES.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    assert trained(template, say("a", "<think>b</think>", "c", "<think>x</think>d")) == [
        "</s>",
        "d</s>",
    ]


def test_a_template_that_takes_no_conversation_ending_with_the_assistant_but_the_whole():
    template = (
        "{% if messages | length == 2 and not add_generation_prompt %}{{ raise_exception('too short') }}{% endif %}"
        + ROLES
    )
    assert trained("{{ messages | length }}" + template, say("a", "b", "c", "d")) == [
        "b</s>",
        "d</s>",
    ]


def test_a_template_that_takes_no_generation_prompt():
    template = "{% if add_generation_prompt %}{{ raise_exception('no prompt') }}{% endif %}" + ROLES
    assert trained(template, say("a", "b", "c", "d")) == ["b</s>", "d</s>"]


def test_the_same_words_everywhere():
    assert trained("{{ messages | length }}" + ROLES, say("x", "x", "x", "x")) == ["x</s>", "x</s>"]
    assert trained("{{ messages | length }}" + ROLES, say("", "", "", "")) == ["</s>", "</s>"]


def test_contents_that_begin_like_the_end_of_the_prompt():
    template = ROLES[: -len("[assistant]{% endif %}")] + "[assistant]<think>{% endif %}"
    assert trained("{{ messages | length }}" + template, say("a", "<b>", "c", "<think>d")) == [
        "<b></s>",
        "d</s>",
    ]


def test_turns_of_tool_calls_alone():
    template = ROLES.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls %}({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}",
    )
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    messages = [
        *say("a"),
        call,
        {"role": "tool", "content": "r"},
        *say("c", "d")[1:],
        *say("e", "f"),
    ]
    expected = ['(f {"a": 1})</s>', "d</s>", "f</s>"]
    assert trained(template, messages) == expected
    assert trained("{{ messages | length }}" + template, messages) == expected


def test_first_turn_of_the_assistant_with_a_header():
    assert trained(ROLES, [A, U, A]) == ["a</s>", "a</s>"]


def test_marks_of_the_template_are_the_targets():
    template = "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
    assert trained(template, say("a", "b", "c", "d")) == ["b", "d"]
    assert trained(template, say("a", "b", "c", "d"), "last") == ["d"]
    assert trained(template, say("a", "", "c", "d", "e")) == ["d"]
    # The text is kept before it is written, which transformers' tracker does not follow.
    prompt = "{% if add_generation_prompt %}[assistant]{% endif %}"
    kept = (
        "{% for m in messages %}{% set t %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endset %}[{{ m.role }}]{{ t }}{% endfor %}"
        + prompt
    )
    assert trained(kept, say("a", "bcd", "e", "f")) == ["bcd", "f"]
    # A template that computes with marked text is treated as if it had no marks.
    assert trained(
        "{{ messages | length }}" + kept.replace("{{ t }}", "{{ t[:2] }}"),
        say("a", "bcd", "e", "f"),
    ) == ["bc", "f"]


@pytest.mark.parametrize(
    "content", ["[{'x'}]", "\ue000", "\ue000\ue001", "{{ m }}", "\x00", "é" * 3, "👩‍🚀"]
)
def test_whatever_a_content_holds(content):
    assert (
        trained("{{ messages | length }}" + ROLES, say("a", content, "b", content))
        == [content + "</s>"] * 2
    )


def test_completions_get_one_end_token_where_only_others_than_the_tokenizers_own_are_known():
    tokenizer = FakeTokenizer(
        lambda messages, prompt=False, tools=None: "".join(m["content"] for m in messages)
    )
    tokenizer.eos_token_id = None
    sample = CompletionsDataset([{"prompt": "a", "completion": "b"}], tokenizer).sample(0)
    assert tokenizer.decode(sample.tokens) == "ab" + END


def test_a_template_that_refuses_says_why():
    with pytest.raises(
        ValueError,
        match=r"record 0: the chat template refuses this conversation: .*roles must alternate",
    ):
        trained("{{ raise_exception('roles must alternate') }}", say("a", "b"))


@pytest.mark.parametrize("make", [byte_tokenizer, FakeTokenizer])
def test_records_of_parts_and_of_json_text(make):
    def parts(text):
        return [{"type": "text", "text": text}]

    tokenizer = make()
    if make is byte_tokenizer:
        tokenizer.chat_template = "{% if tools %}{{ tools | length }}{% endif %}" + ROLES
    plain = say("a", "b", "c", "d")
    data = ChatDataset(
        [
            {"messages": plain, "tools": [{"name": "f"}, {"name": "g"}]},
            {
                "messages": [{**m, "content": parts(m["content"])} for m in plain],
                "tools": '[{"name": "f"}, {"name": "g"}]',
            },
            {
                "messages": [plain[0], {**plain[1], "content": parts("b")}, *plain[2:]],
                "tools": ['{"name": "f"}', '{"name": "g"}'],
            },
        ],
        tokenizer,
        train_on="assistant",
    )
    first, *others = map(data.sample, range(3))
    assert first.weights.any()
    for sample in others:
        assert sample.tokens == first.tokens and sample.weights.tolist() == first.weights.tolist()


def test_arguments_as_json_text_are_trained_as_the_template_means_them():
    template = ROLES.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}",
    )
    for arguments in ({"a": "é"}, '{"a": "é"}'):
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }
        assert trained(template, [*say("a"), call, *say("b", "c")]) == ['{"a": "é"}</s>', "c</s>"]
