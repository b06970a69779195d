"""Datasets: caching, reading from disk, and messages about unusable records."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from fake import CHAT, END, QA, targets
from tiny import byte_tokenizer

from pyloss.errors import FormatError
from pyloss.tuner import datasets as ds
from pyloss.tuner.data.targets import Sample, as_sample

# Caching, concatenation, foreign datasets


def test_cache_tokenises_once_and_counts_tokens(tokenizer):
    cache = ds.CacheDataset(ds.TextDataset([{"text": "abc"}, {"text": "defgh"}], tokenizer))
    assert tokenizer.calls == 0 and len(cache) == 2
    assert (
        cache.itemlen(1) == 6
        and cache[1] == ([*b"defgh", 257], 0)
        and cache.sample(1).tokens[-1] == 257
    )
    assert tokenizer.calls == 1


def test_concatenation_leaves_the_records_alone(tokenizer):
    first, second = [{"text": "a"}], [QA]
    inner = ds.ConcatenatedDataset([ds.TextDataset(first, tokenizer)])
    both = ds.ConcatenatedDataset([inner, [], ds.CompletionsDataset(second, tokenizer)])
    assert len(both) == 2 and both[1]["prompt"] == "why" and second == [QA] and "_dataset" not in QA
    assert (
        both.process(both[0]) == ([97, 257], 0)
        and both.sample(-1).tokens == both.process(both[1])[0]
    )
    with pytest.raises(IndexError, match="index 2 of a dataset of 2"):
        both[2]


def test_other_datasets_items():
    assert as_sample([1, 2, 3]).weights.tolist() == [0, 1, 1]
    assert as_sample([1, 2]).tokens == [1, 2]
    assert as_sample(([1, 2, 3], 2)).weights.tolist() == [0, 0, 1]
    assert as_sample((np.array([1, 2, 3]), [1, 0, 0.5])).weights.tolist() == [0, 0, 0.5]
    assert not as_sample(([1, 2, 3], [1, 1, 0])).is_span and isinstance(
        as_sample(as_sample([1])), Sample
    )
    for bad in ({"text": "a"}, "text", [1.5], [[1], [2], [3]], 3):
        with pytest.raises(TypeError, match="list of token ids"):
            as_sample(bad)
    for bad in (-1, 1.5):
        with pytest.raises(ValueError, match="offset of a sample"):
            as_sample(([1, 2, 3], bad))
    for bad in ([1, 1], [np.nan, 1, 1], [1, -1, 1]):
        with pytest.raises(ValueError, match="3 finite numbers"):
            as_sample(([1, 2, 3], bad))


# Reading


def test_local_folder(folder, tokenizer):
    path = folder(train=[CHAT] * 3, valid=[CHAT])
    train, valid, test = ds.load_dataset(path, tokenizer, mask_prompt=True)
    assert (len(train), len(valid), len(test)) == (3, 1, 0)
    assert isinstance(train, ds.ChatDataset) and train.train_on == "last" and train[0] == CHAT
    assert ds.load_dataset(str(path), tokenizer, train_on="assistant")[0].train_on == "assistant"


def test_mlx_lms_namespace_and_own_keys(folder, tokenizer):
    path = folder(
        train=[{"q": "why", "a": "because"}],
        valid=[{"q": "a", "a": "b"}],
        test=[{"q": "c", "a": "d"}],
    )
    args = SimpleNamespace(
        data=str(path),
        hf_dataset=False,
        mask_prompt=True,
        prompt_feature="q",
        completion_feature="a",
        train=True,
        test=True,
    )
    train, _, test = ds.load_dataset(args, tokenizer)
    assert isinstance(train, ds.CompletionsDataset) and train.mask_prompt and len(test) == 1


def test_own_keys_as_keywords(folder, tokenizer):
    path = folder(train=[{"turns": CHAT["messages"]}])
    assert isinstance(ds.load_dataset(path, tokenizer, chat_feature="turns")[0], ds.ChatDataset)
    path = folder(train=[{"body": "x"}])
    assert isinstance(ds.load_dataset(path, tokenizer, text_feature="body")[0], ds.TextDataset)


def test_blank_lines_a_byte_order_mark_and_crlf_are_no_errors(folder, tokenizer):
    path = folder(train=b'\xef\xbb\xbf\r\n{"text": "a\xe2\x80\xa8b"}\r\n\n  \n{"text": "b"}')
    train, _, _ = ds.load_dataset(path, tokenizer)
    assert [r["text"] for r in train] == ["a\u2028b", "b"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut of', "not valid JSON"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON: Extra data"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'["text"]', "is a list, and must be an object"),
        (b"null", "is null"),
        (b"[" * 100_000, "not JSON that can be read: it is nested too deep"),
        (b'{"text": "a", "more": ' + b'{"a":' * 100_000, "it is nested too deep"),
        (
            b'{"text": "\\u0041", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "it is nested too deep",
        ),
        (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "a whole number of thousands of digits"),
        (b'{"text": "a\0b"}', "a NUL byte at column 12"),
        (b"\0\0\0\0", "a NUL byte at column 1"),
        ("\ufeff{'text': 'a'}".encode("utf-16-le"), "is UTF-16 text, and must be UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8: byte 0xed at byte 11"),
        (b'{"a\\udfff": 1}', "surrogate"),
        (b'{"text": "a\tb"}', "not valid JSON: Invalid control character at column 12"),
    ],
)
def test_a_line_that_is_no_record_names_file_and_line(folder, tokenizer, line, reason):
    path = folder(train=b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(FormatError, match=f"train.jsonl: line 3: .*{reason}"):
        ds.load_dataset(path, tokenizer)


def test_byte_order_marks_inside_of_a_file_are_no_errors(folder, tokenizer):
    path = folder(
        train=b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n\xef\xbb\xbf\n{"text": "c\\u0000"}'
    )
    assert [r["text"] for r in ds.load_dataset(path, tokenizer)[0]] == ["a", "b", "c\0"]


def test_a_pipe_is_not_waited_for(tmp_path, tokenizer):
    import os

    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(FormatError, match="train.jsonl: is not a file"):
        ds.load_dataset(tmp_path, tokenizer)
    os.unlink(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(FormatError, match="train.jsonl: is not a file"):
        ds.load_dataset(tmp_path, tokenizer)


def test_a_record_of_many_keys_names_the_first(folder, tokenizer):
    with pytest.raises(ValueError, match="'0', '1', '2', .*'9', ...; expected") as caught:
        ds.load_dataset(folder(train=[{str(i) if i else "0": i for i in range(10_000)}]), tokenizer)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("nested", ["tools", "arguments"])
def test_records_nested_deeper_than_a_template_goes_are_refused_by_line(folder, tokenizer, nested):
    deep = '{"a":' * 900 + "1" + "}" * 900
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    record = {"messages": turns, "tools": [{"x": "DEEP"}]}
    if nested == "arguments":
        record = {
            "messages": [
                turns[0],
                {**turns[1], "tool_calls": [{"function": {"name": "f", "arguments": "DEEP"}}]},
            ]
        }
    data = ds.load_dataset(
        folder(train=json.dumps(record).replace('"DEEP"', deep).encode()), byte_tokenizer()
    )[0]
    with pytest.raises(ValueError, match=r"train.jsonl, line 1: .*(refuses|nested too deep)"):
        deeper(data.sample, 0, 100)


def deeper(function, argument, calls):
    """Call the function with `calls` more frames on the stack, past the limit of reading."""
    return deeper(function, argument, calls - 1) if calls else function(argument)


@pytest.mark.parametrize(
    ("first", "record", "message"),
    [
        (
            None,
            {"wrong": "a", "reply": "b"},
            r"line 1: the record's keys are 'wrong', 'reply'; expected one of these layouts: .*--map",
        ),
        (
            QA,
            {"prompt": "a", "answer": "b"},
            r"line 2: the record has no 'completion'; its keys are 'prompt', 'answer'",
        ),
        (
            QA,
            {"prompt": "a", "completion": 3},
            "line 2: 'completion' is a number, and must be a string",
        ),
        ({"text": "a"}, {"text": None}, "line 2: 'text' is null, and must be a string"),
        (CHAT, {"messages": "hi"}, "line 2: 'messages' is a string, and must be a list"),
        (CHAT, {"messages": []}, "line 2: 'messages' is empty"),
        (CHAT, {"messages": ["hi"]}, r"line 2: messages\[0\] is a string, and must be an object"),
        (
            CHAT,
            {"messages": [{"content": "hi"}]},
            r"line 2: messages\[0\]: the record has no 'role'",
        ),
        (CHAT, {"messages": [{"role": "user"}]}, r"line 2: messages\[0\] has no 'content'"),
        (CHAT, {"messages": [{"role": "user", "content": 1}]}, "'content' is a number"),
        (CHAT, {**CHAT, "tools": "none"}, "line 2: 'tools' is a string, and must be a list"),
    ],
)
def test_a_record_without_what_is_expected(folder, tokenizer, first, record, message):
    path = folder(train=[first, record] if first else [record])
    with pytest.raises(ValueError, match=f"train.jsonl, .*{message}"):
        ds.load_dataset(path, tokenizer)


def test_missing_or_empty_splits(folder, tokenizer, caplog):
    path = folder(train=[QA], test=b"\n")
    assert ds.load_dataset(path, tokenizer)[1] == [] and "without validation" in caplog.text
    with pytest.raises(ValueError, match="no test data in .*test.jsonl .* missing or empty"):
        ds.load_dataset(path, tokenizer, test=True)
    folder(train=b"")
    with pytest.raises(ValueError, match="no train data in"):
        ds.load_dataset(path, tokenizer)
    assert ds.load_dataset(path, tokenizer, train=False) == ([], [], [])


def test_masking_text_is_refused(folder, tokenizer):
    with pytest.raises(ValueError, match="'text' have no prompt to mask"):
        ds.load_dataset(folder(train=[{"text": "a"}]), tokenizer, mask_prompt=True)


def test_paths_that_lead_nowhere(tmp_path, tokenizer):
    with pytest.raises(
        ValueError, match=r"no train.jsonl, valid.jsonl or test.jsonl in this folder"
    ):
        ds.load_dataset(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="there is no such folder or file"):
        ds.load_dataset(f"{tmp_path}/nothing/", tokenizer)
    for name in ("nothing.jsonl", "owner/name.csv.gz"):  # no name of the hub
        with pytest.raises(ValueError, match=f"{name}: there is no such file"):
            ds.load_dataset(name, tokenizer)
    (tmp_path / "data.xlsx").write_text("")
    with pytest.raises(FormatError, match=r"unknown kind; allowed are a folder and files .jsonl"):
        ds.load_dataset(tmp_path / "data.xlsx", tokenizer)
    with pytest.raises(ValueError, match="no data given"):
        ds.load_dataset(SimpleNamespace(train=True, test=False), tokenizer)
    with pytest.raises(TypeError, match="must be a path"):
        ds.load_dataset(7, tokenizer)


def test_a_prompt_of_messages_is_a_conversation(folder, tokenizer):
    record = {"prompt": CHAT["messages"][:-1], "completion": CHAT["messages"][-1:]}
    train = ds.load_dataset(folder(train=[record]), tokenizer, mask_prompt=True)[0]
    assert isinstance(train, ds.ChatDataset) and train[0] == CHAT
    assert targets(train.sample(0), tokenizer) == [f"yes two{END}\n"]


# Files, layouts and splits


def test_a_file_is_cut_for_validation_and_said(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO", "pyloss")
    rows = [{"instruction": f"add {i}", "input": "", "output": "done"} for i in range(200)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    train, valid, test = ds.load_dataset(tmp_path / "data.json", tokenizer, mask_prompt=True)
    assert len(train) + len(valid) == 200 and 1 <= len(valid) <= 25 and test == []
    assert isinstance(train, ds.CompletionsDataset) and valid.train_on == "last"
    assert "data.json: 200 records, Alpaca: instruction, input, output" in caplog.text
    assert (
        f"(valid_split 0.05): {len(train)} records to train on, {len(valid)} to val" in caplog.text
    )
    assert targets(valid.sample(0), tokenizer) == [f"done{END}\n"]
    again = ds.load_dataset(tmp_path / "data.json", tokenizer)
    assert list(again[1]) == list(valid)
    whole = ds.load_dataset(tmp_path / "data.json", tokenizer, valid_split=0)
    assert len(whole[0]) == 200 and whole[1] == []


def test_test_data_of_a_file(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({**QA, "prompt": f"why {i}"}) + "\n" for i in range(200)))
    train, valid, test = ds.load_dataset(path, tokenizer, test_split=0.2, test=True)
    assert len(train) + len(valid) + len(test) == 200 and len(test) > 20
    assert list(ds.load_dataset(path, tokenizer)[1]) == list(valid)  # whatever the test data
    alone = ds.load_dataset(path, tokenizer, test_split=0.2, test=True, train=False)
    assert list(alone[2]) == list(test)
    alone = ds.load_dataset(path, tokenizer, test=True, train=False)
    assert alone[:2] == ([], []) and len(alone[2]) == 200
    assert len(ds.load_dataset(path, tokenizer, test=True)[2]) > 0


def test_a_folder_is_cut_only_if_asked(folder, tokenizer):
    path = folder(train=[{"text": f"text {i}"} for i in range(100)])
    assert [len(d) for d in ds.load_dataset(path, tokenizer)] == [100, 0, 0]
    train, valid, test = ds.load_dataset(path, tokenizer, valid_split=0.2)
    assert len(train) + len(valid) == 100 and len(valid) > 5 and test == []
    folder(valid=[{"text": "a"}])
    with pytest.raises(ValueError, match=r"valid_split is 0.2, but .*valid.jsonl has the valid"):
        ds.load_dataset(path, tokenizer, valid_split=0.2)
    assert [len(d) for d in ds.load_dataset(path, tokenizer)] == [100, 1, 0]


def test_a_folder_of_other_kinds(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO", "pyloss")
    (tmp_path / "train.csv").write_text("question,answer\na,b\nc,d\n")
    (tmp_path / "test.csv").write_text("question,answer\ne,f\n")
    (tmp_path / "valid.txt").write_text("notes")
    train, valid, test = ds.load_dataset(tmp_path, tokenizer)
    assert list(train)[1] == {"prompt": "c", "completion": "d"} and len(test) == 1 and valid == []
    assert caplog.text.count(f"data {tmp_path}: prompt and answer: question, answer") == 1


def test_an_unusable_record_of_another_layout_is_named(tmp_path, tokenizer):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"question": "a", "answer": "b"}, {"question": "a", "answer": 3}]))
    with pytest.raises(ValueError, match=r"a.json, record 2: 'answer' is a number, and must be"):
        ds.load_dataset(path, tokenizer)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"no train data in .*a.json': the file has no records"):
        ds.load_dataset(path, tokenizer)
    path.write_text('[{"question": "a", "answer": "b"}]')
    assert [len(part) for part in ds.load_dataset(path, tokenizer)] == [1, 0, 0]


def test_a_map_of_keys(folder, tokenizer):
    path = folder(train=[{"q": "why", "reply": "so", "rules": "be brief", "text": "other"}])
    for given in ("prompt=q,completion=reply", {"prompt": "q", "completion": "reply"}):
        data = ds.load_dataset(path, tokenizer, map=given)[0]
        assert data[0] == {"prompt": "why", "completion": "so"} and data.given(0)["q"] == "why"
    data = ds.load_dataset(path, tokenizer, map="prompt=q,completion=reply,system=rules")[0]
    assert [m["content"] for m in data[0]["messages"]] == ["be brief", "why", "so"]
    with pytest.raises(ValueError, match="line 1: --map names the key 'a'; the record's keys are"):
        ds.load_dataset(path, tokenizer, map="prompt=q,completion=a")
    with pytest.raises(ValueError, match="line 1: prompt=KEY,completion=KEY or messages=KEY"):
        ds.load_dataset(path, tokenizer, map="prompt=q")
