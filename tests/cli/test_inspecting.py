"""`data`: the report, and the files that it writes."""

import json

import pytest
from tiny_commands import fails

from pyloss.cli import main


@pytest.fixture
def mine(world, tmp_path):
    rows = [["q", "a"], *([f"say {i % 9}", f"hello {i % 9}"] for i in range(10))]
    (tmp_path / "mine.csv").write_text("".join(f"{q},{a}\n" for q, a in rows))
    return ["data", "mine.csv", "--map", "prompt=q,completion=a"]


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file(mine, capsys):
    assert main([*mine, "--mask-prompt", "--max-seq-length", "30"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "records: 10 (mapped to a pair: q, a)\ntokens: " in out
    assert "over the window of 30 tokens: " in out
    assert "duplicates: 1 record (10.0%); the first: mine.csv, record 10 (line 11)" in out
    assert "empty: 0 records" in out and "trained: " in out and "sample 0: 30 tokens" in out


def test_a_folder_has_a_report_for_each_split(world, capsys):
    assert main(["data", "data"]) == 0
    out, _ = capsys.readouterr()
    heads = [line for line in out.splitlines() if line in ("train:", "valid:", "test:")]
    assert heads == ["train:", "valid:", "test:"]
    assert out.count("prompts that train has, too: ") == 2
    assert "prompts that train has, too: 2 records" in out


def test_converting(mine, capsys, tmp_path):
    assert main([*mine, "--write", "pairs.jsonl"]) == 0
    assert "wrote 10 records to pairs.jsonl" in capsys.readouterr().err
    pairs = written(tmp_path / "pairs.jsonl")
    assert pairs[0] == {"prompt": "say 0", "completion": "hello 0"} and len(pairs) == 10
    assert main([*mine, "--write", "chat.jsonl", "--as", "messages"]) == 0
    turns = [{"role": "user", "content": "say 0"}, {"role": "assistant", "content": "hello 0"}]
    assert written(tmp_path / "chat.jsonl")[0] == {"messages": turns}
    assert main(["data", "chat.jsonl", "--write", "again.jsonl", "--as", "pairs"]) == 0
    assert written(tmp_path / "again.jsonl") == pairs
    assert main([*mine, "--write", "pairs.jsonl"]) == 0
    assert (tmp_path / "previous-1" / "pairs.jsonl").exists()


def test_what_cannot_be_converted(mine, capsys, tmp_path):
    three = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": three}))
    argv = ["data", "chat.jsonl", "--write", "out.jsonl", "--as", "pairs"]
    fails(capsys, argv, "chat.jsonl, line 1: a record of the roles system, user, assistant is no")
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "text.txt").write_text("some text")
    argv = ["data", "text.txt", "--write", "out.jsonl", "--as", "messages"]
    fails(capsys, argv, "a record of 'text' has no prompt")
    fails(capsys, [*mine, "--write", "out.csv"], "give the name of a .jsonl file")
    fails(capsys, ["data", "chat.jsonl", "--write", "chat.jsonl"], "is the file that is read")
    fails(capsys, ["data", "data", "--write", "out.jsonl"], "splits train, valid, test")
    fails(capsys, [*mine, "--as", "pairs"], "--as says the form of --write")


def test_unusable_data(mine, capsys, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    fails(capsys, ["data", "empty.jsonl"], "no records in 'empty.jsonl'")
    fails(capsys, ["data", "none.jsonl"], "none.jsonl: there is no such file")
    fails(capsys, ["data", "mine.csv"], "record 1 (line 2): the record's keys are 'q', 'a'")


def test_preference_pairs_are_described_and_not_trained_on(world, capsys, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": "no"} for i in range(4)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", str(pairs)]) == 0
    said = capsys.readouterr().out
    assert "records: 4 (preference pairs: prompt, chosen, rejected)" in said
    assert "with --map prompt=prompt,completion=chosen the chosen answers are trained on" in said
    train = ["train", "--data", str(pairs), "--iters", "2", "--batch-size", "1"]
    assert main(train) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "preference pairs: prompt, chosen, rejected: there is no training on" in error
    assert not (tmp_path / "adapters").exists()
    assert main([*train, "--map", "prompt=prompt,completion=chosen"]) == 0
    assert main(["data", str(pairs), "--write", str(tmp_path / "chosen.jsonl")]) == 0
    written = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    assert written[1] == {"prompt": "say 1", "completion": "it is 1"}
