"""`pyloss quantize`: the files that it writes, tuned or not, and its refusals."""

import json

import numpy as np
import pytest
import tiny_project

import pyloss
from pyloss.cli import main
from pyloss.io.gguf import read_gguf

TUNE = ["--tune", "--tune-data", "texts.jsonl", "--valid-split", "0.3", "--batch-size", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    tiny_project.make(folder)
    texts = [{"text": f"the {i} hens lay {i + 3} eggs before the week is over"} for i in range(30)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)) + "\n")
    return folder


@pytest.fixture(autouse=True)
def project(made, monkeypatch):
    monkeypatch.chdir(made)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def logits(path):
    model, _ = pyloss.load(path)
    return model(np.arange(5, 25).reshape(2, 10))


def table(text):
    """The printed rows: KL and perplexity by name."""
    header, original, before, after = text.splitlines()  # the log of the run goes elsewhere
    assert header.split() == ["KL", "from", "original", "perplexity"]
    assert original.startswith("original ")
    rows = [line.rsplit(maxsplit=2) for line in (before, after)]
    return {row[0].strip(): tuple(map(float, row[1:])) for row in rows}


def test_without_tuning_it_writes_what_convert_and_export_write(tmp_path):
    group = ["--group-size", "32"]
    assert main(["quantize", "base", "--to", "q4", *group, "--output", str(tmp_path / "a")]) == 0
    converted = ["convert", "--model", "base", "-q", "q4", *group, "--output", str(tmp_path / "b")]
    assert main(converted) == 0
    quantized = files(tmp_path / "a")
    assert b"quantized (q4)" in quantized.pop("README.md")
    assert quantized == files(tmp_path / "b")
    model = ["--model", "base"]
    assert main(["quantize", *model, "--to", "q5_1", "--output", str(tmp_path / "c.gguf")]) == 0
    exported = ["export", *model, "--to", "gguf", "--type", "q5_1"]
    (tmp_path / "other").mkdir()
    assert main([*exported, "--output", str(tmp_path / "other" / "c.gguf")]) == 0
    assert (tmp_path / "c.gguf").read_bytes() == (tmp_path / "other" / "c.gguf").read_bytes()


def test_a_tuned_folder_has_other_scales_and_a_report(tmp_path, capsys):
    base = ["quantize", "base", "--to", "q3", "--group-size", "32"]
    assert main([*base, "--output", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    more = [*TUNE, "--iters", "30", "--learning-rate", "4e-3"]
    assert main([*base, "--output", str(tmp_path / "tuned"), *more]) == 0
    out, err = capsys.readouterr()
    found = table(out)
    assert found["q3, tuned"][0] < found["q3"][0]
    assert "saved the model to" in err and "written untuned" not in err
    plain, tuned = pyloss.load_model(tmp_path / "plain"), pyloss.load_model(tmp_path / "tuned")
    for name, weight in tuned.stored().items():
        before = plain.stored()[name]
        assert (weight.format, weight.groups.size) == ("affine3", 32)
        assert np.array_equal(weight.raw, before.raw)
        assert not np.array_equal(weight.groups.scales, before.groups.scales)
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "tuned"}


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m"])
def test_a_tuned_gguf_file_has_the_formats_of_an_untuned_one(tmp_path, capsys, kind):
    base = ["quantize", "base", "--to", kind]
    assert main([*base, "--output", str(tmp_path / "plain.gguf")]) == 0
    capsys.readouterr()
    more = [*TUNE, "--iters", "30", "--learning-rate", "4e-3"]
    assert main([*base, "--output", str(tmp_path / "tuned.gguf"), *more]) == 0
    found = table(capsys.readouterr().out)
    assert found[f"{kind}, tuned"][0] < found[kind][0]
    plain, tuned = read_gguf(tmp_path / "plain.gguf"), read_gguf(tmp_path / "tuned.gguf")
    changed = 0
    for name, tensor in tuned.tensors.items():
        assert (tensor.dtype, tensor.shape) == (
            plain.tensors[name].dtype,
            plain.tensors[name].shape,
        )
        differing = np.flatnonzero(tensor.data != plain.tensors[name].data)
        changed += len(differing) > 0
        if tensor.dtype == "Q4_0":  # the scale is the first two bytes of 18
            assert set(differing % 18) <= {0, 1}
    assert changed > 10
    different = {
        key
        for key, value in tuned.metadata.items()
        if not np.array_equal(value, plain.metadata[key])
    }
    assert different <= {"general.name"}
    assert np.abs(logits(tmp_path / "tuned.gguf") - logits(tmp_path / "plain.gguf")).max() > 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"plain.gguf", "tuned.gguf"}


def test_a_card_has_no_qualities_that_its_files_lack(tmp_path, capsys):
    output = tmp_path / "q4"
    more = [*TUNE, "--iters", "2", "--learning-rate", "50"]
    assert main(["quantize", "base", "--to", "q4", "--output", str(output), *more]) == 1
    assert "it is written untuned" in capsys.readouterr().err
    card = (output / "README.md").read_text()
    assert "| q4 |" in card and "tuned |" not in card


def test_tuning_that_does_not_help_is_said(tmp_path, capsys):
    base = ["quantize", "base", "--to", "q4_0"]
    assert main([*base, "--output", str(tmp_path / "a.gguf")]) == 0
    more = [*TUNE, "--iters", "2", "--learning-rate", "50"]
    (tmp_path / "b").mkdir()
    assert main([*base, "--output", str(tmp_path / "b" / "a.gguf"), *more]) == 1
    assert "it is written untuned" in capsys.readouterr().err
    assert np.array_equal(logits(tmp_path / "a.gguf"), logits(tmp_path / "b" / "a.gguf"))


def test_what_cannot_be_quantized_is_refused(tmp_path, capsys):
    """All rows are shorter than a group: the result would be the model itself."""
    down = "model.layers.0.mlp.down_proj and 2 more (rows of 64 values are no whole number"
    for command in (["quantize", "base", "--to", "q4"], ["convert", "--model", "base", "-q", "q4"]):
        argv = [*command, "--group-size", "128", "--output", str(tmp_path / "new")]
        assert main(argv) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "nothing can be quantized to q4: model.embed_tokens and " in error
        assert "(rows of 32 values are no whole number of groups of 128)" in error
        assert down in error
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--to", "q9"], "to must be one of q2, q3, q4"),
        (["--to", "f16"], "to must be one of q2, q3, q4"),
        (["--to", "q4", "--tune"], "--tune needs text: give --tune-data"),
        (["--to", "q4", "--iters", "3"], "--iters belongs to --tune"),
        (["--to", "q4", "--tune-data", "texts.jsonl"], "--tune-data belongs to --tune"),
        (["--to", "nf4", *TUNE], "nf4 cannot be tuned"),
        (["--to", "q4_0", "--group-size", "32"], "group_size is for q2"),
        (["--to", "q4", "--importance-data", "texts.jsonl"], "importance_data is for GGUF's types"),
        (["--to", "q4_0", "--importance-data", "texts.jsonl"], "importance_data is for types"),
        (["--to", "q4", "--tune", "--tune-data", "no.jsonl"], "no.jsonl: there is no such file"),
        (["--to", "q4", *TUNE, "--iters", "0"], "iters is 0; it must be"),
    ],
)
def test_refusals_write_nothing(tmp_path, capsys, more, part):
    assert main(["quantize", "base", "--output", str(tmp_path / "new"), *more]) == 2
    assert part in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_model_itself_is_no_output(capsys):
    assert main(["quantize", "base.gguf", "--to", "q4_0", "--output", "base.gguf"]) == 2
    assert "--output base.gguf is the model itself" in capsys.readouterr().err


def test_an_interrupted_run_writes_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyloss.distillation.quantized.distill", interrupted)
    place = tmp_path / "new.gguf"
    assert main(["quantize", "base", "--to", "q4_0", "--output", str(place), *TUNE]) == 130
    assert "interrupted: nothing is written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
