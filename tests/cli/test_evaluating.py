"""`eval`: metrics of answers, their file, and two models side by side."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_commands import fails

import pyloss
from pyloss import evaluation
from pyloss.cli import main


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")


EVAL = ["eval", "--model", "base", "--data", "data", "--mask-prompt"]
ANSWERS = ["--metric", "loss,contains,f1", "--max-tokens", "3"]


def measured(adapter=None, **options):
    model, tokenizer = pyloss.load("base", adapter_path=adapter)
    _, _, test = pyloss.load_dataset("data", tokenizer, mask_prompt=True)
    return evaluation.measure(model, tokenizer, test, "loss,contains,f1", max_tokens=3, **options)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_losses_with_and_without_answers_agree(project, capsys):
    assert main(EVAL) == 0
    before = capsys.readouterr().out
    assert re.fullmatch(r"loss [\d.]+, perplexity [\d.]+, 3 samples\n", before)
    assert main([*EVAL, "--metric", "loss,perplexity,exact-match", "--max-tokens", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    numbers = [re.findall(r"\d+\.\d+", line) for line in (before, out[0])]
    for a, b in zip(*numbers, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-4)
    assert out[1:] == ["exact-match 0.0000, 0 of 3"]


def test_metrics_are_printed_with_their_counts(project, capsys):
    # Every answer contains its reference, if the reference is a part of it.
    answers = [result.answer for result in measured().results]
    rows = [
        {"prompt": f"say {i}", "completion": answer if i else "not this"}
        for i, answer in enumerate(answers)
    ]
    Path("data/test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = measured()
    assert main([*EVAL, *ANSWERS]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"loss {found.scores['loss']:.4f}, 3 samples",
        "contains 0.6667, 2 of 3",
        f"f1 {found.scores['f1']:.4f}, mean of 3",
    ]
    assert f"note: --max-tokens cut {found.cut} answers" in err


def test_an_earlier_output_is_kept_or_replaced_as_asked(project):
    argv = [*EVAL, *ANSWERS, "--output", "out.jsonl"]
    Path("out.jsonl").write_text("mine")
    assert main(argv) == 0
    assert Path("previous-1/out.jsonl").read_text() == "mine"
    assert len(lines("out.jsonl")) == 3
    assert main([*argv, "--overwrite"]) == 0
    assert [str(path) for path in Path().glob("previous-*")] == ["previous-1"]


def test_output_holds_every_record(project, capsys):
    assert main([*EVAL, *ANSWERS, "--adapter-path", "adapters", "--output", "out.jsonl"]) == 0
    assert "wrote out.jsonl" in capsys.readouterr().err
    found = measured("adapters")
    for line, result in zip(lines("out.jsonl"), found.results, strict=True):
        assert (line["prompt"], line["reference"]) == (result.prompt, result.reference)
        assert (line["answer"], line["finish_reason"]) == (result.answer, result.finish_reason)
        assert line["scores"] == pytest.approx(result.scores)
    assert lines("out.jsonl")[2]["reference"] == "hello 2"


@pytest.mark.parametrize("base", ["none", "base", "adapters"])
def test_two_models_side_by_side(project, capsys, base):
    argv = [*EVAL, *ANSWERS, "--adapter-path", "adapters", "--output", "out.jsonl"]
    assert main([*argv, "--compare", base]) == 0
    out, err = capsys.readouterr()
    ours, other = measured("adapters"), measured("adapters" if base == "adapters" else None)
    expected = evaluation.compare(ours, other)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:4]}
    for name, d in expected.items():
        numbers = [float(text) for text in rows[name] if text != "to"]
        assert numbers == pytest.approx([d.score, d.base, d.difference, d.low, d.high], abs=1e-4)
    assert out.splitlines()[4] == "3 samples; paired bootstrap of 10000 resamples"
    assert ("adapter adapters" in err.split("compared with ")[1]) == (base == "adapters")
    assert lines("out.jsonl")[0]["base"]["answer"] == other.results[0].answer
    assert (rows["loss"][2] == "+0.0000") == (base == "adapters")


def test_the_number_of_records(project, capsys):
    argv = [*EVAL, *ANSWERS, "--output", "out.jsonl", "--test-batches", "1", "--batch-size", "2"]
    assert main(argv) == 0
    assert len(lines("out.jsonl")) == 2
    assert main([*EVAL, *ANSWERS, "--split", "train"]) == 0
    assert "contains 0.0000, 0 of 6" in capsys.readouterr().out


def test_losses_alone_of_plain_text(project, capsys):
    Path("data/test.jsonl").write_text('{"text": "hello"}\n')
    argv = ["eval", "--model", "base", "--data", "data"]
    assert main([*argv, "--output", "out.jsonl"]) == 0
    [line] = lines("out.jsonl")
    assert list(line) == ["record", "scores"] and set(line["scores"]) == {"loss", "perplexity"}
    said = fails(capsys, [*argv, "--metric", "exact-match", "--output", "none.jsonl"])
    assert "test.jsonl, line 1: a record of 'text' has no prompt and no reference" in said[-1]
    assert not Path("none.jsonl").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--metric", "accuracy"], "metric 'accuracy' is not known"),
        (["--metric", "f1", "--max-tokens", "0"], "--max-tokens is 0"),
        (["--metric", "f1", "--test-batches", "0"], "test_batches is 0"),
        (["--metric", "f1", "--batch-size", "0"], "batch_size is 0"),
        (["--compare", "none"], "--compare none is the model without its adapter, and no adapter"),
        (["--compare", "missing"], "missing"),
        (["--output", "data"], "data: cannot write: it is a folder"),
        (["--output", "data/test.jsonl/x"], "cannot write"),
    ],
)
def test_wrong_flags(project, capsys, more, message):
    fails(capsys, [*EVAL, *more], message)


def test_a_model_that_is_missing_fails_before_the_first_is_measured(project, capsys, monkeypatch):
    def measure(*_, **__):
        raise AssertionError("measured")

    monkeypatch.setattr("pyloss.cli.commands.evaluating.measure", measure)
    fails(capsys, [*EVAL, *ANSWERS, "--compare", "missing"], "missing")


def test_a_file_is_test_data_as_a_whole_or_by_its_share(world, capsys, tmp_path):
    rows = "".join(f"say {i},hello {i}\n" for i in range(40))
    (tmp_path / "mine.csv").write_text("question,answer\n" + rows)
    assert main(["eval", "--data", "mine.csv"]) == 0
    out, err = capsys.readouterr()
    assert "40 records, prompt and answer: question, answer" in err
    assert "All records are test data" in err and out.endswith(" 40 samples\n")
    counts = []
    for more in (["--test-split", "0.2"], ["--split", "train"], ["--split", "valid"]):
        assert main(["eval", "--data", "mine.csv", *more]) == 0
        out, err = capsys.readouterr()
        assert "Cut by a hash of the prompts" in err
        counts.append(int(out.split()[-2]))
    assert 0 < counts[0] < 20 and counts[1] + counts[2] == 40
