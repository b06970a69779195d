"""`--data`: what it names, and the mixture of several sources."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from fake import FakeTokenizer

import pyloss.tuner.data.hub as hub
from pyloss.tuner.data.sources import Source, check_data, read_sources
from pyloss.tuner.datasets import load_dataset, load_whole


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 40), ("b", 10)):
        rows = [{"prompt": f"{name} {i}", "completion": f"{i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.jsonl", Source("a.jsonl")),
        ("-", Source("-")),
        ("owner/name", Source("owner/name")),
        ("owner/name:main", Source("owner/name", None, "main")),
        ("owner/name:main:test", Source("owner/name", None, "main", "test")),
        ("owner/name::train[:80%]", Source("owner/name", None, None, "train[:80%]")),
        ("folder/here", Source("folder/here")),
        ("none.jsonl:x", Source("none.jsonl:x")),
    ],
)
def test_what_a_name_means(files, text, found):
    assert read_sources(text) == [found]


def test_weights_follow_a_colon(files):
    assert read_sources(["a.jsonl:0.7", "owner/name:main:test:3", "-:.5"]) == [
        Source("a.jsonl", 0.7),
        Source("owner/name", 3.0, "main", "test"),
        Source("-", 0.5),
    ]
    (files / "c.jsonl:2").write_text("")  # what exists is meant
    assert read_sources(["a.jsonl", "c.jsonl:2"]) == [Source("a.jsonl"), Source("c.jsonl:2")]
    (files / "owner" / "name:main").mkdir(parents=True)
    assert read_sources("owner/name:main") == [Source("owner/name:main")]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["a.jsonl:1"], "has a weight, which says a share beside other sources"),
        (["a.jsonl:1", "b.jsonl"], "'b.jsonl' has no weight, and others have one"),
        (["a.jsonl:0", "b.jsonl:1"], "a weight of the data is 0"),
        (["-", "-"], "standard input, '-', more than once"),
        ([], "must be a path"),
        ([1], "must be a path"),
        ([""], "must be a path"),
    ],
)
def test_wrong_sources(files, value, said):
    with pytest.raises((TypeError, ValueError), match=said):
        check_data(value)


def prompts(dataset):
    return [dataset.form(i)["prompt"] for i in range(len(dataset))]


def test_several_files_are_joined(files):
    train, valid, test = load_dataset(["a.jsonl", "b.jsonl"], FakeTokenizer(), valid_split=0.2)
    assert not test and len(train) + len(valid) == 50 and len(valid) > 2
    assert set(prompts(train)) | set(prompts(valid)) == {
        f"{name} {i}" for name, count in (("a", 40), ("b", 10)) for i in range(count)
    }
    assert train.sample(0).tokens and train.where(0).startswith("a.jsonl, line ")


def test_a_prompt_in_two_files_is_on_one_side(files):
    (files / "c.jsonl").write_text((files / "a.jsonl").read_text())
    train, valid, _ = load_dataset(["a.jsonl", "c.jsonl"], FakeTokenizer(), valid_split=0.3)
    assert valid and not set(prompts(train)) & set(prompts(valid))


def test_weights_are_shares_of_an_epoch(files, caplog):
    caplog.set_level("INFO", "pyloss")
    data = ["a.jsonl:0.3", "b.jsonl:0.7"]
    train, valid, _ = load_dataset(data, FakeTokenizer(), valid_split=0)
    counts = Counter(prompts(train))
    assert not valid and len(train) == 50
    of_a, of_b = ({p: n for p, n in counts.items() if p.startswith(name)} for name in "ab")
    assert sum(of_a.values()) == 15 and set(of_a.values()) == {1}
    assert sum(of_b.values()) == 35 and set(of_b.values()) == {3, 4} and len(of_b) == 10
    assert "a.jsonl 15 (30%, of 40), b.jsonl 35 (70%, of 10)" in caplog.text
    assert prompts(load_dataset(data, FakeTokenizer(), valid_split=0)[0]) == prompts(train)
    # Validation data are not weighted, and nothing of them is trained.
    train, valid, _ = load_dataset(data, FakeTokenizer(), valid_split=0.2)
    assert len(set(prompts(valid))) == len(valid) and not set(prompts(train)) & set(prompts(valid))


def test_a_folder_beside_a_file_keeps_its_splits(files):
    folder = files / "folder"
    folder.mkdir()
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": split}) + "\n")
    train, valid, _ = load_dataset(["a.jsonl:1", "folder:1"], FakeTokenizer())
    assert len(train) == 41 and len(valid) == 1
    assert Counter(part.layout.form for part in train.parts) == {"completion": 1, "text": 1}
    with pytest.raises(ValueError, match="valid_split is 0.1, but a folder or dataset has the val"):
        load_dataset(["a.jsonl", "folder"], FakeTokenizer(), valid_split=0.1)


def test_all_records_are_looked_at(files):
    found = load_whole(SimpleNamespace(data=["a.jsonl:1", "b.jsonl:9"]), FakeTokenizer())
    assert {name: len(dataset) for name, dataset in found.items()} == {"data": 50}
    assert str(found["data"].layout) == "prompt and answer: prompt, completion"


def test_a_missing_file_is_said_and_no_hub_is_asked(files, monkeypatch):
    monkeypatch.setattr(hub, "rows_of", lambda *a, **o: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=r"c\.jsonl: there is no such file"):
        load_dataset(["a.jsonl:1", "c.jsonl:2"], FakeTokenizer())
    (files / "owner").mkdir()
    (files / "owner" / "name").write_text("")
    with pytest.raises(ValueError, match="owner/name: is of an unknown kind"):
        load_dataset("owner/name", FakeTokenizer())


def test_configuration_and_split_reach_the_hubs_library(files, monkeypatch):
    asked = []

    class Rows(list):
        def select(self, indices):
            return Rows(self[i] for i in indices)

    def from_hub(name, /, **options):
        asked.append((name, options))
        rows = Rows({"prompt": f"p {i}", "completion": "c"} for i in range(30))
        return rows if "split" in options else {"train": rows, "validation": rows}

    monkeypatch.setattr(hub, "rows_of", from_hub)
    train, valid, _ = load_dataset("owner/name:main", FakeTokenizer())
    assert (len(train), len(valid)) == (30, 30)
    train, valid, _ = load_dataset("owner/name:main:train[:80%]", FakeTokenizer())
    assert len(train) + len(valid) == 30 and valid
    train, _, _ = load_dataset(["owner/name::test:3", "b.jsonl:1"], FakeTokenizer(), valid_split=0)
    assert [len(part) for part in train.parts] == [30, 10]
    assert asked == [
        ("owner/name", {"name": "main"}),
        ("owner/name", {"name": "main", "split": "train[:80%]"}),
        ("owner/name", {"split": "test"}),
    ]
