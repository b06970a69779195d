"""The commands mlx_lm.lora, fuse, convert and generate beside pyloss's, on the same files."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
from mlx_sides import Reports, Side, adapted, compare, refused, sides


@pytest.fixture
def initial(made, tmp_path):
    """A file of adapters to begin with: the libraries draw other numbers."""

    def write(**options):
        side = Side(True)
        model, _ = adapted(side, made, **options)
        file = tmp_path / "initial.safetensors"
        side.mx.save_safetensors(
            str(file), dict(side.tree.tree_flatten(model.trainable_parameters()))
        )
        return str(file)

    return write


def settings(side, made, tmp_path, **options):
    """The settings of a command, as its main makes them."""
    defaults = side("lora").CONFIG_DEFAULTS
    given = {
        "model": str(made / "base"),
        "data": str(made / "data"),
        "adapter_path": str(tmp_path / ("ours" if side.own else "theirs")),
        "train": True,
        "num_layers": 2,
        "batch_size": 2,
        "iters": 5,
        "learning_rate": 1e-3,
        "steps_per_report": 1,
        "steps_per_eval": 3,
        "save_every": 2,
        "lora_parameters": {"rank": 2, "dropout": 0.0, "scale": 2.0},
    }
    return types.SimpleNamespace(**{**defaults, **given, **options})


def run(side, made, tmp_path, capsys=None, **options):
    """`run` of mlx_lm.lora; the reports of its training, and the weights."""
    lora, reports = side("lora"), Reports()
    args = settings(side, made, tmp_path, **options)
    kept = lora.train_model
    # mlx-lm's run drops the callback that it is given.
    lora.train_model = lambda a, m, t, v, callback=None: kept(a, m, t, v, reports)
    try:
        lora.run(args)
    finally:
        lora.train_model = kept
    file = f"{args.adapter_path}/adapters.safetensors"
    weights = {name: np.array(value) for name, value in side.mx.load(file).items()}
    said = [] if capsys is None else lines_of_test(capsys)
    return {"train": reports.train, "val": reports.val, "weights": weights, "said": said}


def lines_of_test(capsys):
    """The loss of a test, as printed."""
    lines = capsys.readouterr().out.splitlines()
    return [
        line.partition(",")[0] for line in lines if "Test loss" in line and ", Test ppl" in line
    ]


VARIANTS = {
    "lora": {},
    "all layers": {"num_layers": -1},
    "masked": {"mask_prompt": True},
    "dora": {"fine_tune_type": "dora"},
    "adamw": {"optimizer": "adamw", "optimizer_config": {"adamw": {"weight_decay": 0.1}}},
    "sgd": {"optimizer": "sgd"},
    "accumulated": {"grad_accumulation_steps": 2},
    "schedule": {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 5], "warmup": 2}},
    "one part": {
        "lora_parameters": {"rank": 2, "dropout": 0.0, "scale": 2.0, "keys": ["self_attn.q_proj"]}
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_training(made, tmp_path, initial, name):
    options = dict(VARIANTS[name])
    extra = {"keys": options["lora_parameters"]["keys"]} if name == "one part" else {}
    begin = initial(num_layers=options.get("num_layers", 2), dora=name == "dora", **extra)
    compare(lambda side: run(side, made, tmp_path, resume_adapter_file=begin, **options), atol=5e-4)


def test_full_training(made, tmp_path):
    options = {"fine_tune_type": "full", "num_layers": 1, "optimizer": "sgd"}
    found = compare(lambda side: run(side, made, tmp_path, **options), atol=1e-3)
    assert all(name.startswith("model.layers.2.") for name in found["weights"])


def test_testing_after_training(made, tmp_path, initial, capsys):
    begin = initial(num_layers=2)
    options = {"test": True, "iters": 2, "batch_size": 1, "resume_adapter_file": begin}
    found = compare(lambda side: run(side, made, tmp_path, capsys, **options), atol=5e-4)
    assert len(found["said"]) == 1


@pytest.mark.parametrize("adapter", ["adapters", ""])
def test_testing_alone(made, tmp_path, capsys, adapter):
    place = str(made / adapter) if adapter else ""

    def case(side):
        options = {"train": False, "test": True, "batch_size": 1, "adapter_path": place}
        side("lora").run(settings(side, made, tmp_path, **options))
        return lines_of_test(capsys)

    assert len(compare(case)) == 1


def test_refused_settings(made, tmp_path):
    def case(side):
        lora = side("lora")
        each = [
            {"train": False},
            {"num_layers": 99},
            {"fine_tune_type": "other"},
            {"optimizer": "other"},
            {"batch_size": 100},
            {"data": str(tmp_path), "iters": 1},
        ]
        return [
            refused(lambda o=o: lora.run(settings(side, made, tmp_path, **o)), ValueError)
            for o in each
        ]

    assert set(compare(case)) == {"ValueError"}


def test_the_adapter_config_of_a_run(made, tmp_path, initial):
    begin = initial(num_layers=2)

    def case(side):
        run(side, made, tmp_path, resume_adapter_file=begin, iters=1)
        folder = tmp_path / ("ours" if side.own else "theirs")
        config = json.loads((folder / "adapter_config.json").read_text())
        # Paths of the machine: pyloss keeps their last part.
        places = {"model", "data", "adapter_path", "resume_adapter_file"}
        return {key: value for key, value in config.items() if key not in places}

    compare(case)


@pytest.mark.parametrize("writes", [0, 1])
def test_the_other_library_loads_a_run(made, tmp_path, initial, writes):
    both = sides()
    run(both[writes], made, tmp_path, resume_adapter_file=initial(num_layers=2), iters=3)
    place = str(tmp_path / ("ours" if both[writes].own else "theirs"))
    ids = np.arange(5, 30)[None]
    found = []
    for side in both:
        model, _ = side().load(str(made / "base"), adapter_path=place)
        found.append(np.array(model(side.mx.array(ids)), np.float32))
    np.testing.assert_allclose(*found, atol=1e-3)


# ---- command lines


def command(side, module, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [module, *map(str, words)])
    side(module).main()


def test_a_yaml_file_and_flags(made, tmp_path, initial, monkeypatch):
    file = tmp_path / "lora.yaml"
    file.write_text(
        "train: true\nbatch_size: 1\nlearning_rate: 1e-3\nnum_layers: 2\niters: 4\nunknown_key: 7\n"
        "lora_parameters: {rank: 2, scale: 2.0, dropout: 0.0}\n"
    )
    begin = initial(num_layers=2)

    def case(side):
        place = tmp_path / ("ours" if side.own else "theirs")
        words = ["-c", file, "--model", made / "base", "--data", made / "data", "--batch-size", 2]
        words += ["--adapter-path", place, "--resume-adapter-file", begin]
        command(side, "lora", monkeypatch, *words)
        loaded = side.mx.load(str(place / "adapters.safetensors"))
        return {name: np.array(value) for name, value in loaded.items()}

    compare(case, atol=5e-4)


@pytest.mark.parametrize("dequantize", [False, True])
def test_fuse(made, tmp_path, monkeypatch, dequantize):
    def case(side):
        place = tmp_path / str(side.own)
        words = [
            "--model",
            made / "base",
            "--adapter-path",
            made / "adapters",
            "--save-path",
            place,
        ]
        command(side, "fuse", monkeypatch, *words, *["--dequantize"] * dequantize)
        model, tokenizer = side().load(str(place))
        ids = side.mx.array(np.arange(5, 30)[None])
        return np.array(model(ids), np.float32), tokenizer.encode("hello")

    compare(case, atol=1e-3)


CONVERSIONS = {
    "as it is": [],
    "float16": ["--dtype", "float16"],
    "4 bits": ["-q", "--q-group-size", "32"],
    "8 bits": ["-q", "--q-bits", "8", "--q-group-size", "32"],
    "bfloat16, 4 bits": ["-q", "--q-group-size", "32", "--dtype", "bfloat16"],
    "mixed": ["-q", "--q-group-size", "32", "--quant-predicate", "mixed_3_6"],
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_convert(made, tmp_path, monkeypatch, name):
    def case(side):
        place = tmp_path / str(side.own)
        command(
            side,
            "convert",
            monkeypatch,
            "--hf-path",
            made / "base",
            "--mlx-path",
            place,
            *CONVERSIONS[name],
        )
        model, _ = Side(True)().load(str(place))
        config = json.loads((place / "config.json").read_text())
        ids = Side(True).mx.array(np.arange(5, 30)[None])
        # pyloss names the bits of most layers first, and then those of the others.
        told = config.get("quantization") if name != "mixed" else "quantization" in config or None
        return np.array(model(ids), np.float32), told

    found = compare(case, atol=5e-2 if "16" in name else 2e-2)
    assert (found[1] is None) == ("-q" not in CONVERSIONS[name])


def test_convert_back(made, tmp_path, monkeypatch):
    def case(side):
        small, large = (tmp_path / f"{side.own}{name}" for name in ("small", "large"))
        words = ["--hf-path", made / "base", "--mlx-path", small, "-q", "--q-group-size", 32]
        command(side, "convert", monkeypatch, *words)
        command(side, "convert", monkeypatch, "--hf-path", small, "--mlx-path", large, "-d")
        config = json.loads((large / "config.json").read_text())
        return "quantization" in config

    assert compare(case) is False


def test_refused_conversions(made, tmp_path):
    def case(side):
        convert, place = side().convert, str(tmp_path / "new")
        name = str(made / "base")
        return [
            refused(lambda: convert(name, str(tmp_path)), ValueError),
            refused(lambda: convert(name, place, quantize=True, dequantize=True), ValueError),
            refused(
                lambda: convert(name, place, quantize=True, quant_predicate="none"), ValueError
            ),
        ]

    assert set(compare(case)) == {"ValueError"}


def test_generate(made, monkeypatch, capsys):
    def case(side):
        words = ["--model", made / "base", "--adapter-path", made / "adapters", "-p", "hello 12"]
        command(side, "generate", monkeypatch, *words, "-m", 8, "--verbose", "F", "--top-p", "0.9")
        first = capsys.readouterr().out
        command(side, "generate", monkeypatch, *words, "-m", 4, "--ignore-chat-template")
        second = capsys.readouterr().out.splitlines()
        return (
            first.strip(),
            second[:3],
            [line.split(",")[0] for line in second if "tokens-per-sec" in line],
        )

    compare(case)


def test_earlier_files_are_kept(made, tmp_path):
    """pyloss alone: a second run, and a second fused model, move the first ones aside."""
    side = Side(True)
    for _ in range(2):
        run(side, made, tmp_path, iters=1)
    assert (tmp_path / "ours" / "previous-1" / "adapters.safetensors").exists()
    model, tokenizer, config = side().load(str(made / "base"), return_config=True)
    for _ in range(2):
        side("utils").save(tmp_path / "saved", str(made / "base"), model, tokenizer, config)
    assert (tmp_path / "saved" / "previous-1" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "saved")
