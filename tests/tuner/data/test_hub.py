"""Datasets of the hub: by its own package, on folders in its layout."""

import builtins
from types import SimpleNamespace

import pytest
from fake import END, targets

from pyloss.tuner import datasets as ds


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder with parquet splits as the hub stores them."""
    pytest.importorskip("datasets", reason="needs the package datasets")
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    for split, n in (("train", 10), ("validation", 2), ("test", 3)):
        rows = [{"prompt": f"{split} {i}", "completion": "yes"} for i in range(n)]
        pq.write_table(pa.Table.from_pylist(rows), data / f"{split}-00000-of-00001.parquet")
    return tmp_path / "hub"


def test_a_folder_in_the_hubs_layout(hub, tokenizer):
    train, valid, test = ds.load_dataset(hub, tokenizer, mask_prompt=True, test=True)
    assert (len(train), len(valid), len(test)) == (10, 2, 3)
    assert train[0]["prompt"] == "train 0" and targets(valid.sample(1), tokenizer) == [
        f"yes{END}\n"
    ]


def test_shares_of_the_hubs_training_data(hub, tokenizer):
    for split in ("valid", "test"):
        with pytest.raises(ValueError, match=f"{split}_split is 0.2, but the split '{split}"):
            ds.load_dataset(hub, tokenizer, **{f"{split}_split": 0.2})
    for path in (hub / "data").iterdir():
        if not path.name.startswith("train"):
            path.unlink()
    train, valid, test = ds.load_dataset(hub, tokenizer, valid_split=0.3)
    assert len(train) + len(valid) == 10 and len(valid) and test == []
    assert valid[0]["prompt"].startswith("train ")
    args = SimpleNamespace(hf_dataset={"path": str(hub)}, train=True, test=False, valid_split=0.3)
    with pytest.raises(ValueError, match="valid_split is given beside hf_dataset"):
        ds.load_dataset(args, tokenizer)


def test_hf_dataset_of_a_configuration(hub, tokenizer):
    one = {
        "path": str(hub),
        "train_split": "train[:4]",
        "valid_split": "train[-1:]",
        "test_split": "test",
    }
    args = SimpleNamespace(hf_dataset=one, mask_prompt=True, train=True, test=True)
    assert [len(d) for d in ds.load_dataset(args, tokenizer)] == [4, 1, 3]
    assert "mask_prompt" not in one
    args.hf_dataset = [one, {"path": str(hub), "test_split": "test[:1]"}]
    train, _, test = ds.load_dataset(args, tokenizer)
    assert len(train) == 4 + 8 and len(test) == 4 and train.sample(11).offset > 0
    args.hf_dataset = {"path": str(hub)}
    with pytest.raises(ValueError, match="no 'test_split'"):
        ds.load_dataset(args, tokenizer)
    args.hf_dataset = ["name"]
    with pytest.raises(ValueError, match="must be a mapping with a 'path'"):
        ds.load_dataset(args, tokenizer)


def test_a_folder_of_the_hub_with_a_file_that_is_ours(hub, tokenizer):
    (hub / "test.txt").write_text("notes")
    assert len(ds.load_dataset(hub, tokenizer)[0]) == 10
    (hub / "train.jsonl").write_text('{"text": "a"}')
    assert len(ds.load_dataset(hub, tokenizer)[0]) == 1


def test_hub_names_reach_the_hubs_call(monkeypatch, tokenizer):
    hub = pytest.importorskip("datasets", reason="needs the package datasets")
    asked = []

    def fake(name, **options):
        asked.append((name, options))
        raise hub.exceptions.DatasetNotFoundError("not there")

    monkeypatch.setattr(hub, "load_dataset", fake)
    with pytest.raises(ValueError, match="no such dataset from the Hugging Face hub: not there"):
        ds.load_dataset("owner/name", tokenizer)
    assert asked == [("owner/name", {})]


def test_without_the_hubs_package(monkeypatch, tokenizer, tmp_path):
    real = builtins.__import__

    def no_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    for name in ("owner/name", "nowhere"):
        message = rf"there is no folder '{name}'; if a dataset of the Hugging Face hub is meant, .* pip install \"pyloss\[hub\]\""
        with pytest.raises(ImportError, match=message):
            ds.load_dataset(name, tokenizer)
    (tmp_path / "data.parquet").write_bytes(b"")
    message = r"there is no train.jsonl, .* in this folder; if its files are data in the hub's layout, they are read with .* pip install"
    with pytest.raises(ImportError, match=message):
        ds.load_dataset(tmp_path, tokenizer)


def test_a_folder_of_other_files_is_said_to_lack_the_splits(tokenizer, tmp_path):
    pytest.importorskip("datasets", reason="needs the package datasets")
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n{"text": [1]}\n{broken\n')
    with pytest.raises(
        ValueError,
        match=r"there is no train.jsonl, valid.jsonl or test.jsonl in this folder, and as data .* fails: .+",
    ):
        ds.load_dataset(tmp_path, tokenizer)
