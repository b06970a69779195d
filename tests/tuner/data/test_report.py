"""Reports on data: numbers of records and tokens, and what is said of unusable ones."""

from types import SimpleNamespace

import pytest
from fake import FakeTokenizer, chatml

from pyloss.tuner.data.records import Records
from pyloss.tuner.data.report import describe, histogram, shared_prompts
from pyloss.tuner.datasets import create_dataset


def dataset(records, template=chatml, **config):
    found = Records("a.jsonl", [(f"line {i}", record) for i, record in enumerate(records, 1)])
    return create_dataset(found, FakeTokenizer(template), SimpleNamespace(**config))


def pair(prompt, completion):
    return {"question": prompt, "answer": completion}


def test_numbers_of_records_and_tokens():
    data = dataset(
        [pair("a", "b"), pair("a", "c"), pair("a", "b"), pair("d", " ")], mask_prompt=True
    )
    steps = []
    lines = list(describe(data, 1000, lambda: steps.append(1)))
    lengths = [len(data.sample(i).tokens) for i in range(4)]
    targets = sum(int(data.sample(i).weights.sum()) for i in range(4))
    assert len(steps) == 4
    assert lines[0] == "records: 4 (prompt and answer: question, answer)"
    assert lines[1].startswith(
        f"tokens: {sum(lengths)}; in a record {min(lengths)} to {max(lengths)},"
    )
    assert lines[-5:] == [
        "  " + lines[-5].strip(),
        "over the window of 1,000 tokens: 0 records",
        "duplicates: 1 record (25.0%); the first: a.jsonl, line 3; "
        "with the first prompt of another: 1 record (25.0%)",
        "empty: 1 record (25.0%); the first: a.jsonl, line 4",
        f"trained: {targets / sum(lengths):.1%} of the tokens (train_on last)",
    ]


def test_a_window_cuts_tokens_and_targets():
    data = dataset([pair("a" * 50, "b"), pair("a", "b")], mask_prompt=True)
    lengths = [len(data.sample(i).tokens) for i in range(2)]
    lines = list(describe(data, lengths[1]))
    cut = f"over the window of {lengths[1]} tokens: 1 record (50.0%)"
    assert f"{cut}; {lengths[0] - lengths[1]} tokens are cut" in lines
    assert lines[-1] == "nothing to train on: 1 record (50.0%); the first: a.jsonl, line 1"


def test_records_that_the_template_refuses_are_counted():
    def template(messages, add_generation_prompt=False, tools=None):
        if messages[0]["content"] == "bad":
            raise ValueError("no bad words")
        return chatml(messages, add_generation_prompt, tools)

    lines = list(describe(dataset([pair("a", "b"), pair("bad", "b")], template), 100))
    assert lines[1].startswith("unusable: 1 record; the first: a.jsonl, line 2: the chat template")
    lines = list(describe(dataset([pair("bad", "b")], template), 100))
    assert lines[2] == "over the window of 100 tokens: 0 records"
    assert "trained: 0.0% of the tokens (train_on all)" in lines


def test_empty_conversations_and_texts():
    def turns(**answer):
        return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]}

    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    records = [turns(content=""), turns(content="", tool_calls=[call]), turns(content=[])]
    records += [turns(content=[{"type": "text", "text": "a"}])]
    assert "empty: 2 records (50.0%); the first: a.jsonl, line 1" in describe(dataset(records), 100)
    texts = [{"text": "\n"}, {"text": "a"}]
    assert "empty: 1 record (50.0%); the first: a.jsonl, line 1" in describe(dataset(texts), 100)


def test_prompts_that_two_splits_share():
    train = dataset([pair("a", "b"), pair("c", "d")])
    assert shared_prompts(dataset([pair("a ", "x"), pair("e", "f")]), train) == 1


@pytest.mark.parametrize("lengths", [[0], [1, 1, 2], list(range(1000)), [10] * 99 + [5000], [7, 3]])
def test_a_histogram_counts_every_record_once(lengths):
    lines = list(histogram(lengths))
    assert len(lines) <= 12
    rows = [line.replace(",", "").split() for line in lines]
    assert sum(int(row[3]) for row in rows) == len(lengths)
    for row in rows:
        inside = sum(int(row[0]) <= length <= int(row[2]) for length in lengths)
        assert inside == int(row[3]) and (row[4:] != []) == (inside > 0)
