"""`fuse`, `export`, `convert` and `eval`: refusals before anything is written, and messages."""

import sys
from pathlib import Path

import pytest

import pyloss
from pyloss.cli import main


@pytest.fixture
def project(made, monkeypatch):
    """The project; a test must leave exactly the files that it found."""
    monkeypatch.chdir(made)
    before = set(made.rglob("*"))
    yield made
    assert set(made.rglob("*")) == before


def refused(capsys, argv, *parts):
    assert main(argv) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
    return error


EXPORT = ["export", "--model", "base.gguf", "--adapter-path", "adapters", "--to"]


def test_an_adapter_that_would_be_lost_is_refused_with_the_ways_that_keep_it(
    project, tmp_path, capsys
):
    for more in ([], ["--type", "q4_0"]):
        refused(
            capsys,
            [*EXPORT, "gguf", "--output", "new.gguf", *more],
            "% of the adapter",
            "--dequantize --type q8_0",
            "--adapter-only",
        )
    assert (
        main(
            [
                *EXPORT,
                "gguf",
                "--output",
                str(tmp_path / "m.gguf"),
                "--dequantize",
                "--type",
                "q8_0",
            ]
        )
        == 0
    )
    assert main([*EXPORT, "gguf", "--output", str(tmp_path / "lora.gguf"), "--adapter-only"]) == 0
    assert main([*EXPORT, "hf", "--output", str(tmp_path / "hf")]) == 0  # a folder of floats
    base = ["--model", str(tmp_path / "q4")]
    assert (
        main(
            [
                "convert",
                "--model",
                "base",
                "-q",
                "q4",
                "--group-size",
                "32",
                "--output",
                str(tmp_path / "q4"),
            ]
        )
        == 0
    )
    capsys.readouterr()
    refused(
        capsys,
        ["fuse", *base, "--save-path", "new"],
        "% of the adapter",
        "--dequantize",
        "--to mlx",
    )
    refused(
        capsys,
        ["export", *base, "--adapter-path", "adapters", "--to", "hf", "--output", "new"],
        "--dequantize",
        "--to mlx",
    )
    assert main(["fuse", *base, "--save-path", str(tmp_path / "fused"), "--dequantize"]) == 0
    fused = pyloss.load_model(tmp_path / "fused")  # layers without an adapter are floats, too
    assert {weight.format for weight in fused.stored().values()} == {"f32"}


def test_a_missing_package_is_found_first(project, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    hint = "pip install 'pyloss[gguf]'"
    refused(capsys, ["fuse", "--model", "base", "--save-path", "new", "--export-gguf"], hint)
    refused(capsys, ["export", "--model", "none", "--to", "gguf", "--output", "new.gguf"], hint)
    refused(
        capsys,
        [
            "export",
            "--model",
            "none",
            "--adapter-path",
            "a",
            "--to",
            "gguf",
            "--adapter-only",
            "--output",
            "l.gguf",
        ],
        hint,
    )


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (
            ["fuse", "--save-path", "base.gguf"],
            ["base.gguf", "a file is there; a folder is needed"],
        ),
        (["fuse", "--save-path", "base.gguf/new"], ["base.gguf/new", "base.gguf is not a folder"]),
        (
            ["fuse", "--save-path", "new", "--export-gguf", "--gguf-path", "../base"],
            ["new/../base", "it is a folder"],
        ),
        (["export", "--to", "gguf", "--output", "base"], ["base", "it is a folder"]),
        (
            ["export", "--to", "hf", "--output", "base.gguf"],
            ["a file is there; a folder is needed"],
        ),
        (
            ["export", "--to", "gguf", "--output", "m.gguf", "--type", "q3_m"],
            ["type must be one of f32", "'q3_m'"],
        ),
        (
            ["export", "--to", "hf", "--output", "m", "--type", "q8_0"],
            ["type is for 'gguf' and 'ollama'"],
        ),
        (
            ["export", "--to", "peft", "--adapter-path", "a", "--output", "m", "--dequantize"],
            ["dequantize is for whole models"],
        ),
        (["convert", "--output", "base.gguf"], ["a file is there; a folder is needed"]),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_looked_for(project, capsys, argv, parts):
    refused(capsys, [*argv, "--model", "none"], *parts)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["fuse", "--model", "base", "--adapter-path", "adapters", "--save-path", "./base"],
            "--save-path ./base is the model",
        ),
        (
            ["fuse", "--model", "base", "--save-path", "adapters", "--overwrite"],
            "--save-path adapters is the adapter",
        ),
        (
            ["convert", "--model", "base", "--output", "../{name}/base", "-q", "q4"],
            "is the model itself",
        ),
        ([*EXPORT, "mlx", "--output", "adapters"], "--output adapters is the adapter itself"),
        (
            ["export", "--model", "base.gguf", "--to", "gguf", "--output", "base.gguf"],
            "--output base.gguf is the model itself",
        ),
        (
            [
                "export",
                "--adapter-path",
                "adapters/adapters.safetensors",
                "--to",
                "peft",
                "--output",
                "adapters",
            ],
            "--output adapters is the adapter itself",
        ),
        (
            [*EXPORT, "gguf", "--adapter-only", "--output", "adapters/adapters.safetensors"],
            "is named like a safetensors file, and a GGUF file is written",
        ),
        (
            [*EXPORT, "gguf", "--dequantize", "--output", "base/config.json"],
            "is named like a JSON file, and a GGUF file is written: give a name that ends in .gguf",
        ),
    ],
)
def test_no_command_writes_over_what_it_reads(project, capsys, argv, said):
    refused(capsys, [text.format(name=project.name) for text in argv], said)


@pytest.mark.parametrize(
    "argv",
    [
        ["fuse", "--model", "none", "--save-path", "x.gguf"],
        ["convert", "--model", "none", "--output", "x.gguf"],
        ["prune", "none", "--keep", "1", "--output", "x.GGUF"],
        ["quantize", "none", "--to", "q4", "--output", "new/x.gguf"],
        ["export", "--model", "none", "--to", "hf", "--output", "x.gguf"],
        ["export", "--model", "none", "--to", "ollama", "--output", "x.gguf"],
        [*EXPORT, "peft", "--output", "x.gguf"],
        ["train", "--model", "none", "--data", "data", "--adapter-path", "x.gguf"],
        ["distill", "--teacher", "none", "--data", "data", "--write-teacher", "x.gguf"],
    ],
)
def test_a_folder_is_not_named_like_a_file(project, capsys, argv):
    refused(
        capsys,
        argv,
        "is named like a GGUF file, and a folder is written: give a folder's name; "
        "`pyloss export --to gguf` and `pyloss quantize --to q4_k_m` write GGUF files",
    )
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["convert", "--model", "none", "--output", "x.safetensors"], "like a safetensors file"),
        ([*EXPORT, "gguf", "--dequantize", "--output", "new/"], "new/ is named like a folder"),
        (["quantize", "none", "--to", "q4_0", "--output", "new/"], "new/ is named like a folder"),
        (
            ["quantize", "none", "--to", "q4_0", "--output", "new"],
            "new: a GGUF file is written: give a name that ends in .gguf, such as new.gguf",
        ),
        (
            [*EXPORT, "gguf", "--adapter-only", "--output", "lora.v2"],
            "give a name that ends in .gguf, such as lora.v2.gguf",
        ),
        (
            ["fuse", "--model", "none", "--export-gguf", "q4_0", "--gguf-path", "new"],
            "new: a GGUF file is written: give a name that ends in .gguf",
        ),
        (
            ["eval", "--data", "data", "--metric", "f1", "--output", "answers.csv"],
            "is named like a table, and a file of JSON lines is written",
        ),
        (
            ["generate", "--prompts", "data/train.jsonl", "--output", "answers.json"],
            "is named like a JSON file, and a file of JSON lines is written",
        ),
    ],
)
def test_a_file_is_not_named_like_another_format(project, capsys, argv, said):
    refused(capsys, argv, said)


def test_a_folder_that_exists_has_proven_its_name(project, tmp_path):
    place = tmp_path / "x.gguf"
    place.mkdir()
    assert main(["convert", "--model", "base", "--output", str(place)]) == 0
    assert (place / "config.json").exists()


def test_a_folder_without_permission(project, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    refused(
        capsys,
        ["convert", "--model", "none", "--output", "new/folder"],
        "new/folder",
        "no permission to write into",
    )


def test_a_tokenizer_that_gguf_cannot_describe_is_found_before_the_folder_is_written(
    project, monkeypatch, capsys
):
    def refuse(tokenizer, vocab_size):
        raise ValueError("another model than BPE")

    monkeypatch.setattr("pyloss.models.files.gguf_writer.vocabulary_metadata", refuse)
    refused(
        capsys,
        ["fuse", "--model", "base", "--save-path", "new", "--export-gguf"],
        "another model than BPE",
    )


def test_eval_measures_what_the_file_of_the_run_says_and_says_so(project, tmp_path, capsys):
    file = tmp_path / "lora.yaml"
    file.write_text("model: base\ndata: data\nadapter_path: adapters\niters: 5\ntrain: true\n")
    plain = ["eval", "--model", "base", "--data", "data"]
    results = []
    for argv, said in [
        (plain, "model base, adapter none, data data, split test"),
        (["eval", "-c", str(file)], "model base, adapter adapters, data data, split test"),
        (
            [*plain, "--adapter-path", "adapters"],
            "model base, adapter adapters, data data, split test",
        ),
        (
            ["eval", "-c", str(file), "--split", "valid"],
            "model base, adapter adapters, data data, split valid",
        ),
    ]:
        assert main(argv) == 0
        streams = capsys.readouterr()
        assert streams.err.splitlines()[0] == said
        results.append(streams.out)
    assert results[0] != results[1] == results[2]
    file.write_text("model: base\ndata: data\nadapter_path: none\n")
    refused(capsys, ["eval", "-c", str(file)], "no adapter in none")


def test_what_is_no_adapter_is_said_to_be_so(project, tmp_path, capsys):
    generate = ["generate", "--model", "base", "--max-tokens", "1", "--adapter-path"]
    (tmp_path / "notes.txt").write_text("x")
    refused(capsys, [*generate, "none"], "no adapter in none: the folder does not exist")
    refused(
        capsys,
        [*generate, str(tmp_path / "notes.txt")],
        "notes.txt: it is neither a folder nor",
    )
    refused(capsys, [*generate, "data"], "no adapter in data: it has no adapter_config.json")
    peft = str(tmp_path / "peft")
    assert (
        main(
            [
                "export",
                "--model",
                "base",
                "--adapter-path",
                "adapters",
                "--to",
                "peft",
                "--output",
                peft,
            ]
        )
        == 0
    )
    capsys.readouterr()
    texts = []
    for path in (peft, "adapters"):
        assert main([*generate[:-3], "--max-tokens", "8", "--adapter-path", path]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_fuse_also_writes_a_gguf_file_of_a_type(project, tmp_path, capsys):
    """It is what `export` writes. A type that would lose the adapter is refused before that."""
    fuse = ["fuse", "--model", "base", "--adapter-path", "adapters", "--save-path"]
    place = tmp_path / "fused"
    assert main([*fuse, str(place), "--export-gguf", "q8_0", "--gguf-path", "m.gguf"]) == 0
    export = [*EXPORT, "gguf", "--type", "q8_0", "--output", str(tmp_path / "m.gguf")]
    export[export.index("base.gguf")] = "base"
    assert main(export) == 0
    assert (place / "m.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    model = pyloss.load_model(place)
    assert not model.trainable_parameters() and (place / "model.safetensors").exists()
    over = ["fuse", "--model", "base.gguf", "--adapter-path", "adapters", "--dequantize"]
    refused(
        capsys,
        [*over, "--save-path", str(tmp_path / "new"), "--export-gguf", "q4_0"],
        "% of the adapter",
    )
    assert not (tmp_path / "new").exists()
