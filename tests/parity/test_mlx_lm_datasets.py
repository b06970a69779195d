"""mlx_lm.tuner.datasets beside pyloss's: tokens, offsets, and what is refused."""

import json
import types

import numpy as np
import pytest
from mlx_sides import compare, refused

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hell 12 w"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "12"},
]
RECORDS = {
    "text": [{"text": "hello w 12"}, {"text": "hell"}, {"text": ""}],
    "messages": [{"messages": CHAT[:2]}, {"messages": CHAT}, {"messages": CHAT[:3]}],
    "prompt": [{"prompt": "hello", "completion": "w 12"}, {"prompt": "", "completion": "x"}],
}


def tokenizer_of(side, made):
    return side().load(str(made / "base"))[1]


def processed(side, made, records, **config):
    data = side("tuner.datasets").create_dataset(
        records, tokenizer_of(side, made), types.SimpleNamespace(**config)
    )
    return type(data).__name__, [data.process(data[i]) for i in range(len(data))]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", ["messages", "prompt"])
def test_conversations(made, kind, mask):
    found = compare(lambda side: processed(side, made, RECORDS[kind], mask_prompt=mask))
    assert any(offset for _, offset in found[1]) == mask


def test_texts(made):
    compare(lambda side: processed(side, made, RECORDS["text"][:2]))


def test_other_keys(made):
    records = [{"q": "hello", "a": "12"}]
    names = {"prompt_feature": "q", "completion_feature": "a"}
    compare(lambda side: processed(side, made, records, mask_prompt=True, **names))
    records = [{"chat": CHAT}]
    compare(lambda side: processed(side, made, records, chat_feature="chat"))
    compare(lambda side: processed(side, made, [{"body": "hello"}], text_feature="body"))


def test_refused_records(made):
    def case(side):
        return [
            refused(lambda: processed(side, made, [{"other": 1}]), ValueError),
            refused(lambda: processed(side, made, RECORDS["text"], mask_prompt=True), ValueError),
            refused(
                lambda: processed(side, made, [{"messages": "x"}]),
                TypeError,
                ValueError,
                AttributeError,
            )
            != "nothing raised",
        ]

    assert compare(case) == ["ValueError", "ValueError", True]


def test_classes_by_their_arguments(made):
    def case(side):
        kinds, tokenizer = side("tuner.datasets"), tokenizer_of(side, made)
        text = kinds.TextDataset(RECORDS["text"], tokenizer)
        chat = kinds.ChatDataset(RECORDS["messages"], tokenizer, mask_prompt=True)
        pairs = kinds.CompletionsDataset(
            RECORDS["prompt"], tokenizer, "prompt", "completion", False
        )
        return (
            [len(d) for d in (text, chat, pairs)],
            text[0],
            chat.process(chat[1]),
            pairs.process(pairs[0]),
        )

    compare(case)


def test_datasets_in_a_row(made):
    def case(side):
        kinds, tokenizer = side("tuner.datasets"), tokenizer_of(side, made)
        parts = [
            kinds.TextDataset([dict(r) for r in RECORDS["text"][:2]], tokenizer),
            kinds.ChatDataset([dict(r) for r in RECORDS["messages"]], tokenizer, mask_prompt=True),
        ]
        whole = kinds.ConcatenatedDataset(parts)
        return (
            len(whole),
            [whole[i]["_dataset"] for i in range(5)],
            [whole.process(whole[i]) for i in range(5)],
        )

    compare(case)


def test_kept_samples(made):
    def case(side):
        kinds = side("tuner.datasets")
        calls = []

        class Counted(kinds.TextDataset):
            def process(self, d):
                calls.append(d)
                return super().process(d)

        cached = kinds.CacheDataset(Counted(RECORDS["text"][:2], tokenizer_of(side, made)))
        found = [cached[0], cached[0], cached[1]]
        return found, len(calls), len(cached), [cached.itemlen(i) for i in range(2)]

    compare(case)


def write(folder, **splits):
    folder.mkdir()
    for name, records in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


def loaded(side, made, folder, **options):
    args = types.SimpleNamespace(
        **{"data": str(folder), "train": True, "test": False, "hf_dataset": False} | options
    )
    splits = side("tuner.datasets").load_dataset(args, tokenizer_of(side, made))
    return [[split.process(split[i]) for i in range(len(split))] for split in splits]


def test_a_folder(made, tmp_path):
    folder = write(tmp_path / "data", train=RECORDS["prompt"], test=RECORDS["prompt"][:1])
    compare(lambda side: loaded(side, made, folder, test=True, mask_prompt=True))


def test_missing_splits(made, tmp_path):
    folder = write(tmp_path / "data", valid=RECORDS["prompt"])

    def case(side):
        return [
            refused(lambda: loaded(side, made, folder), ValueError),
            refused(lambda: loaded(side, made, folder, train=False, test=True), ValueError),
            loaded(side, made, folder, train=False),
        ]

    assert compare(case)[:2] == ["ValueError", "ValueError"]


def test_a_dataset_of_the_hubs_package(made, tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path / "data", train=RECORDS["prompt"] * 5)
    entry = {
        "path": str(tmp_path / "data"),
        "train_split": "train[:60%]",
        "valid_split": "train[-20%:]",
    }

    def case(side):
        return loaded(side, made, "", hf_dataset=dict(entry), mask_prompt=True)

    found = compare(case)
    assert [len(split) for split in found] == [6, 2, 0]


def test_several_datasets_of_the_hubs_package(made, tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path / "one", train=RECORDS["prompt"] * 2)
    write(tmp_path / "two", train=RECORDS["text"][:2])
    entries = [
        {"path": str(tmp_path / name), "train_split": "train", "valid_split": "train[:1]"}
        for name in ("one", "two")
    ]
    found = compare(lambda side: loaded(side, made, "", hf_dataset=[dict(e) for e in entries]))
    assert [len(split) for split in found] == [6, 2, 0]


def test_tools_are_given_to_the_template(made):
    record = {
        "messages": CHAT[:2],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }

    def case(side):
        tokenizer = tokenizer_of(side, made)
        tokenizer.chat_template = "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        data = side("tuner.datasets").ChatDataset([record], tokenizer)
        return np.array(data.process(record)[0])

    compare(case)
