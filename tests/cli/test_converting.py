"""`fuse`, `export` and `convert`."""

from pathlib import Path

from tiny_commands import fails

from pyloss.cli import main


def test_fuse_writes_the_model(world, capsys):
    assert main(["fuse", "--save-path", "out", "--dequantize"]) == 0
    assert world.loaded == [("smollm2-135m", "adapters")]
    assert world.model.calls == [
        ("fuse", True),
        ("dequantize", "float32"),
        ("save", Path("out")),
    ]
    assert Path("out/README.md").read_text().startswith("---\n")
    alone = "--gguf-path names the file of --export-gguf, which is not given"
    fails(capsys, ["fuse", "--save-path", "out", "--gguf-path", "m.gguf"], alone)


def test_fuse_writes_gguf_too_and_says_what_it_lost(world, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "pyloss.exporting.export", lambda model, *args, **options: seen.append((*args[:2], options))
    )
    assert main(["fuse", "--save-path", "out", "--export-gguf"]) == 0
    assert "keeps 95.0% of the adapter, 90.0% at worst (a)" in capsys.readouterr().err
    assert main(["fuse", "--save-path", "out", "--export-gguf", "--gguf-path", "m.gguf"]) == 0
    assert main(["fuse", "--save-path", "out", "--export-gguf", "q4_k_m"]) == 0
    assert [(str(path), options["type"]) for path, _, options in seen] == [
        ("out/ggml-model-f16.gguf", "f16"),
        ("out/m.gguf", "f16"),
        ("out/ggml-model-q4_k_m.gguf", "q4_k_m"),
    ]
    fails(capsys, ["fuse", "--export-gguf", "q9"], "type must be one of f32, f16", "got 'q9'")
    assert world.model.calls == [("fuse", False), ("save", Path("out"))]


def test_export_hands_over_what_it_is_asked_for(world, monkeypatch, capsys):
    seen = []

    def write(model, path, to, tokenizer, **options):
        seen.append((path, to, options))
        split = options["split_max_size"]
        return Path("m-00001-of-00002.gguf" if split else path)

    monkeypatch.setattr("pyloss.exporting.export", write)
    plain = {
        "split_max_size": None,
        "importance_data": None,
        "dtype": None,
        "shard_size": None,
        "adapter_only": False,
        "type": None,
        "dequantize": False,
        "name": None,
        "overwrite": False,
    }
    assert (
        main(["export", "--to", "gguf", "--output", "m.gguf", "--type", "q8_0", "--dequantize"])
        == 0
    )
    assert (
        main(
            [
                "export",
                "--to",
                "gguf",
                "--output",
                "l.gguf",
                "--adapter-path",
                "a",
                "--adapter-only",
                "--name",
                "n",
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "export",
                "--to",
                "peft",
                "--output",
                "p",
                "--adapter-path",
                "a",
                "--model",
                "owner/model",
            ]
        )
        == 0
    )
    assert world.loaded == [("smollm2-135m", None), ("smollm2-135m", "a"), ("owner/model", "a")]
    assert seen == [
        ("m.gguf", "gguf", {**plain, "type": "q8_0", "dequantize": True}),
        ("l.gguf", "gguf", {**plain, "adapter_only": True, "name": "n"}),
        ("p", "peft", {**plain, "name": "owner/model"}),
    ]
    assert capsys.readouterr().err == "wrote m.gguf\nwrote l.gguf\nwrote p\n"
    split = ["export", "--to", "gguf", "--output", "m.gguf", "--split-max-size", "2G"]
    assert main(split) == 0 and seen[-1][2]["split_max_size"] == "2G"
    assert capsys.readouterr().err == "wrote m-00001-of-00002.gguf\n"
    source = ["--model", "m-00002-of-00003.gguf"]
    fails(capsys, [*split, *source], "--output m.gguf is the model itself: give another place")
    for flags in (["--to", "mlx"], ["--to", "peft"], ["--to", "gguf", "--adapter-only"]):
        fails(capsys, ["export", *flags, "--output", "x"], "give its folder as --adapter-path")
    fails(capsys, ["export", "--to", "onnx", "--output", "x"], "invalid choice: 'onnx'")


def test_convert_quantizes_and_saves(world, monkeypatch, capsys):
    seen = []

    def quantise(model, *args, **options):
        seen.append((*args, options["double"]))
        return {"lm_head": "for a reason"}

    monkeypatch.setattr("pyloss.models.conversion.quantize_model", quantise)
    monkeypatch.setattr(
        "pyloss.models.conversion.dequantize_model", lambda model, dtype: seen.append(dtype)
    )
    monkeypatch.setattr(
        "pyloss.models.saving.save_model", lambda model, *args: seen.append((args[0], args[2]))
    )
    convert = ["convert", "--model", "m", "--output", "out"]
    assert main([*convert, "--quantize", "q8", "--group-size", "32"]) == 0
    assert main([*convert, "-q", "--q-bits", "3", "--dtype", "bfloat16"]) == 0
    assert (
        main(["convert", "-q", "nf4", "--single-quant", "--hf-path", "m", "--mlx-path", "out"]) == 0
    )
    assert main([*convert, "-q"]) == 0
    assert main([*convert, "-d"]) == 0
    assert main(convert) == 0
    assert seen == [
        ("q8", 32, None, True), ("out", None), ("q3", None, "bfloat16", True), ("out", "bfloat16"), ("nf4", None, None, False),
        ("out", None), ("q4", None, None, True), ("out", None), "float32", ("out", None), ("out", None),
    ]  # fmt: skip
    assert world.loaded == [("m", None)] * 6
    assert capsys.readouterr().err.startswith(
        "not quantized: lm_head (for a reason)\nsaved the model to out\n"
    )
    fails(capsys, [*convert, "--group-size", "32"], "belong to --quantize")
    fails(capsys, [*convert, "-q", "-d"], "choose either")
    fails(capsys, [*convert, "-q", "q8", "--q-bits", "4"], "say different things")
    fails(capsys, [*convert, "--dtype", "int8"], "invalid choice: 'int8'")
    fails(capsys, [*convert[:3], "--output", "./m"], "--output ./m is the model itself")
    fails(capsys, ["convert"], "--output")
