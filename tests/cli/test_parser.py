"""The command line over a tiny model: what the commands do with their flags, and every error as one
line and a code.
"""

import json
import logging
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from fake import FakeTokenizer
from safetensors.numpy import load_file, save_file
from tiny_training import Tiny, tiny_loss, tiny_value_and_grad

import pyloss
import pyloss.generation
from pyloss import measuring, nn
from pyloss.cli import commands, main
from pyloss.models import synthetic
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.synthetic import random_model
from pyloss.tuner import trainer, utils
from pyloss.tuner.run import evaluation

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 8,
}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


class Tokenizer(FakeTokenizer):
    def __init__(self):
        super().__init__()
        self.eos_token_ids = set(self.eos_token_ids)


class Model(Tiny):
    adapter_config = None

    def __init__(self):
        super().__init__(vocabulary=Tokenizer.vocab_size)
        self.layers = [None] * 20
        self.calls = []

    def save(self, path, tokenizer, overwrite=False):
        self.calls.append(("save", path) + ("overwrite",) * overwrite)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """The parts of the library that the commands call, replaced by small ones that note how they
    were called.
    """
    seen = types.SimpleNamespace(
        model=None, loaded=[], lora=None, dora=None, adapters=None, generated=None
    )

    def load(path, adapter_path=None):
        if path == "missing":
            raise FileNotFoundError("no such model: missing")
        seen.loaded.append((path, adapter_path))
        seen.model = Model()
        return seen.model, Tokenizer()

    def add_adapters(model, kind, num_layers, config):
        seen.lora, seen.dora = (num_layers, config), kind == "dora"

    def fuse(model, dequantize=False, ways=None):
        model.calls.append(("fuse", dequantize))
        return {"a": 1.0 if dequantize else 0.9, "b": 1.0}

    def load_adapters(model, path):
        seen.adapters = path

    def stream_generate(model, tokenizer, prompt, **options):
        seen.generated = (tokenizer.decode(prompt), options, set(tokenizer.eos_token_ids))
        for text, reason in (("Hel", None), ("lo", "stop")):
            yield types.SimpleNamespace(
                text=text, token=1, finish_reason=reason, prompt_tps=9.0, generation_tps=8.0
            )

    def measure(*args, **options):
        return evaluate(*args, loss=tiny_loss, **options)

    def run(*args, **options):
        return train(*args, loss=tiny_loss, **options)

    evaluate, train = evaluation.evaluate, trainer.train
    monkeypatch.setattr(utils, "add_adapters", add_adapters)
    monkeypatch.setattr(utils, "load_adapters", load_adapters)
    monkeypatch.setattr(utils, "fuse_adapters", fuse)
    monkeypatch.setattr(sys.modules["pyloss.generation"], "stream_generate", stream_generate)
    monkeypatch.setattr(
        "pyloss.models.files.gguf_writer.refuse_model", lambda model, tokenizer: None
    )
    monkeypatch.setattr("pyloss.exporting.becomes_floats", lambda model: False)
    monkeypatch.setattr(pyloss.models, "load", load)
    monkeypatch.setattr(pyloss, "info", lambda: {"version": "0", "isa": "avx2"})
    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)
    monkeypatch.setattr(evaluation, "evaluate", measure)
    monkeypatch.setattr(trainer, "train", run)
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 6), ("valid", 2), ("test", 3)):
        rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(count)]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return seen


TRAIN = ["train", "--data", "data", "--iters", "4", "--batch-size", "2", "--learning-rate", "0.01"]


def fails(capsys, argv, *parts, code=2):
    assert main(argv) == code
    _, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[-1].startswith("pyloss: "), err
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[-1]
    return lines


def test_train_writes_an_adapter_as_mlx_lm_lays_it_out(world, capsys, tmp_path):
    assert (
        main([*TRAIN, "--mask-prompt", "--rank", "4", "--train", "--test", "--test-batches", "-1"])
        == 0
    )
    out, err = capsys.readouterr()
    assert "plan: 4 batches of 2, 4 updates" in err
    assert "iteration 4/4: train loss" in err
    assert out.startswith("loss ")
    assert world.loaded == [("smollm2-135m", None)]
    assert world.lora == (16, {"rank": 4, "dropout": 0.0, "scale": 20.0})
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    expected = {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "model": "smollm2-135m",
        "iters": 4,
        "mask_prompt": True,
    }
    assert config.items() >= expected.items()
    assert config["lora_parameters"]["rank"] == 4
    assert set(load_file(tmp_path / "adapters" / "adapters.safetensors")) == set(world.model.arrays)


def test_the_kind_of_fine_tuning(world, capsys, tmp_path, monkeypatch):
    assert (
        main(
            [
                *TRAIN,
                "--fine-tune-type",
                "dora",
                "--alpha",
                "16",
                "--rslora",
                "--lora-keys",
                "mlp.up_proj",
            ]
        )
        == 0
    )
    assert world.dora and world.lora[1] == {
        "rank": 8,
        "dropout": 0.0,
        "alpha": 16.0,
        "rslora": True,
        "keys": ["mlp.up_proj"],
    }

    def unfreeze(model, num_layers, keys):
        model.adapter_config = {
            "fine_tune_type": "full",
            "num_layers": num_layers,
            "lora_parameters": None,
            "full_keys": keys,
        }

    monkeypatch.setattr(utils, "unfreeze_layers", unfreeze)
    flags = [
        "--fine-tune-type",
        "full",
        "--num-layers",
        "2",
        "--full-keys",
        "mlp",
        "--adapter-path",
        "full",
    ]
    assert main([*TRAIN, *flags]) == 0
    config = json.loads((tmp_path / "full" / "adapter_config.json").read_text())
    assert (
        config.items() >= world.model.adapter_config.items() and config["lora_parameters"] is None
    )


def test_a_yaml_file_and_flags(world, tmp_path):
    Path("lora.yaml").write_text(
        "data: data\niters: 2\nbatch_size: 2\nlearning_rate: 1e-2\nnum_layers: -1\nadapter_path: out\n"
        "lr_schedule: {name: cosine_decay, arguments: [1e-2, 10], warmup: 1}\noptimizer: sgd\n"
        "optimizer_config: {sgd: {momentum: 0.9}}\n"
    )
    assert main(["train", "-c", "lora.yaml", "--iters", "3"]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["iters"] == 3
    assert world.lora[0] == -1


def test_resume_continues_where_the_run_stopped(world, capsys):
    assert main([*TRAIN, "--iters", "6", "--adapter-path", "whole", "--keep-last"]) == 0
    assert main([*TRAIN, "--iters", "3", "--adapter-path", "parts", "--keep-last"]) == 0
    assert main([*TRAIN, "--iters", "6", "--adapter-path", "parts", "--keep-last", "--resume"]) == 0
    assert "resuming after iteration 3" in capsys.readouterr().err
    whole, parts = (load_file(f"{name}/adapters.safetensors") for name in ("whole", "parts"))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])


def test_a_resumed_run_has_the_settings_of_the_run(world, capsys):
    settings = [
        "--keep-last",
        "--learning-rate",
        "1e-3",
        "--mask-prompt",
        "--rank",
        "3",
        "--optimizer",
        "adamw",
    ]
    assert main([*TRAIN, *settings, "--iters", "6", "--adapter-path", "whole"]) == 0
    assert main([*TRAIN, *settings, "--iters", "3", "--adapter-path", "parts"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--adapter-path", "parts", "--iters", "6"]) == 0
    err = capsys.readouterr().err
    assert "resuming after iteration 3" in err and "note:" not in err
    whole, parts = (load_file(f"{name}/adapters.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])
    config = json.loads(Path("parts/adapter_config.json").read_text())
    assert config["mask_prompt"] and config["iters"] == 6 and config["lora_parameters"]["rank"] == 3
    # Losses of other targets would be compared with those of the run.
    other = ["train", "--resume", "--adapter-path", "parts", "--train-on", "assistant"]
    fails(
        capsys,
        other,
        "trains on 'last' tokens",
        "'assistant'",
        "--train-on last",
        "--resume-adapter-file",
    )
    # A setting that somebody changed is not passed over.
    Path("parts/adapter_config.json").write_text(json.dumps(config | {"batch_size": -1}))
    fails(
        capsys,
        ["train", "--resume", "--adapter-path", "parts"],
        "the run to resume: batch_size is -1",
    )


def test_a_loss_of_other_targets_than_the_run_had_is_said_to_be_one(world, capsys):
    assert main([*TRAIN, "--mask-prompt"]) == 0
    for argv in (
        [*TRAIN, "--test"],
        ["eval", "--model", "tiny", "--data", "data", "--adapter-path", "adapters"],
    ):
        capsys.readouterr()
        assert main(argv) == 0
        assert (
            "trained on 'last' tokens, and this loss is that of 'all' (--train-on last)"
            in capsys.readouterr().err
        )
        assert main([*argv, "--mask-prompt"]) == 0
        assert "note:" not in capsys.readouterr().err


def test_a_run_can_start_from_an_adapter(world, capsys):
    start = {name: np.full_like(array, 0.25) for name, array in Model().arrays.items()}
    save_file(start, "start.safetensors")
    argv = [*TRAIN, "--iters", "1", "--learning-rate", "0", "--val-batches", "0"]
    assert main([*argv, "--resume-adapter-file", "start.safetensors"]) == 0
    for name, array in load_file("adapters/adapters.safetensors").items():
        np.testing.assert_array_equal(array, start[name])
    # A folder stands for the adapter in it, which the new run sets aside.
    assert main([*argv, "--resume-adapter-file", "adapters"]) == 0
    assert "starting from the adapter in adapters/adapters.safetensors" in capsys.readouterr().err
    for folder in ("adapters", "adapters/previous-1"):
        for name, array in load_file(f"{folder}/adapters.safetensors").items():
            np.testing.assert_array_equal(array, start[name])
    fails(
        capsys,
        [*argv, "--resume-adapter-file", "data"],
        "data: the folder has no adapters.safetensors; give an adapters",
    )
    Path("start.safetensors").write_bytes(b"broken")
    fails(capsys, [*TRAIN, "--resume-adapter-file", "start.safetensors"], "start.safetensors")


def test_preview_shows_targets_and_trains_nothing(world, capsys, tmp_path):
    assert main([*TRAIN, "--mask-prompt", "--preview", "2"]) == 0
    out, _ = capsys.readouterr()
    assert "[+it is 0" in out
    assert "[+it is 1" in out
    assert "it is 2" not in out
    assert not (tmp_path / "adapters").exists()


def test_train_and_test_of_a_file_that_only_tests(world, capsys):
    Path("lora.yaml").write_text("train: false\ntest: true\ndata: data\nadapter_path: mine\n")
    assert main(["train", "-c", "lora.yaml"]) == 0
    assert world.adapters == "mine" and not Path("mine").exists()
    assert capsys.readouterr().out.startswith("loss ")
    Path("lora.yaml").write_text("train: false\ndata: data\n")
    fails(capsys, ["train", "-c", "lora.yaml"], "train and test are both false")


def test_a_test_alone_touches_no_adapter(world, capsys):
    """The command of mlx-lm's page on evaluating an adapter, and a file that says test: true
    alone.
    """
    assert main(TRAIN) == 0 and capsys.readouterr().err
    before = {path: path.read_bytes() for path in Path("adapters").rglob("*") if path.is_file()}
    Path("test.yaml").write_text("data: data\ntest: true\n")
    for argv in (
        ["train", "--adapter-path", "adapters", "--data", "data", "--test"],
        ["train", "-c", "test.yaml"],
    ):
        world.adapters = None
        assert main(argv) == 0
        out, err = capsys.readouterr()
        assert (
            out.startswith("loss ")
            and "testing smollm2-135m with the adapter in adapters" in err
            and "plan:" not in err
        )
        assert world.adapters == "adapters"
    assert {
        path: path.read_bytes() for path in Path("adapters").rglob("*") if path.is_file()
    } == before


def test_overwrite_is_handed_on(world, tmp_path):
    assert main([*TRAIN, "--overwrite"]) == main([*TRAIN, "--overwrite"]) == 0
    assert not (tmp_path / "adapters" / "previous-1").exists()
    assert main(TRAIN) == 0 and (tmp_path / "adapters" / "previous-1").is_dir()
    assert main(["fuse", "--save-path", "out", "--dequantize", "--overwrite"]) == 0
    assert world.model.calls[-1] == ("save", Path("out"), "overwrite")


def test_eval_measures_a_split(world, capsys):
    assert main(["eval", "--data", "data", "--adapter-path", "mine", "--split", "valid"]) == 0
    assert world.loaded == [("smollm2-135m", "mine")]
    out = capsys.readouterr().out
    assert out.startswith("loss ")
    assert "2 samples" in out


def test_generate_streams_the_answer(world, capsys, monkeypatch):
    argv = [
        "generate",
        "--prompt",
        "Hi\\nyou",
        "--system-prompt",
        "Be",
        "--prefill-response",
        "Well",
        "--temp",
        "0.5",
    ]
    assert (
        main([*argv, "--seed", "3", "-m", "7", "--extra-eos-token", "<|im_start|>", "--top-k", "4"])
        == 0
    )
    out, err = capsys.readouterr()
    assert out == "Hello\n"
    assert "generation 8.0 tokens/s, ended by stop" in err
    prompt, options, ends = world.generated
    assert prompt.startswith(
        "<|im_start|>system\nBe<|im_end|>\n<|im_start|>user\nHi\nyou<|im_end|>"
    )
    assert prompt.endswith("<|im_start|>assistant\nWell")
    expected = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 1.0,
        "min_p": 0.0,
        "top_k": 4,
        "seed": 3,
    }
    assert options == expected
    assert ends == {256, 257}
    monkeypatch.setattr(sys, "stdin", __import__("io").StringIO("from a pipe"))
    assert main(["generate", "--prompt", "-", "--ignore-chat-template", "--verbose", "F"]) == 0
    assert world.generated[0] == "from a pipe"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("argv", [TRAIN, ["eval", "--data", "data"], ["generate"]])
def test_the_model_is_moved_to_the_device(world, capsys, monkeypatch, argv):
    moved = []
    monkeypatch.setattr(pyloss, "to_device", lambda model, device: moved.append((model, device)))
    assert main(argv) == 0 and not moved
    assert main([*argv, "--device", "opencl:1"]) == 0
    assert moved == [(world.model, "opencl:1")]

    def missing(model, device):
        raise pyloss.DeviceError("there is no OpenCL device")

    monkeypatch.setattr(pyloss, "to_device", missing)
    fails(capsys, [*argv, "--device", "opencl:1"], "there is no OpenCL device")


def test_fuse_writes_the_model(world, capsys):
    assert main(["fuse", "--save-path", "out", "--dequantize"]) == 0
    assert world.loaded == [("smollm2-135m", "adapters")]
    assert world.model.calls == [("fuse", True), ("save", Path("out"))]
    fails(capsys, ["fuse", "--upload-repo", "me/mine"], "--upload-repo is not available")


def test_fuse_writes_gguf_too_and_says_what_it_lost(world, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "pyloss.exporting.export", lambda model, *args, **options: seen.append((*args[:2], options))
    )
    assert main(["fuse", "--save-path", "out", "--export-gguf"]) == 0
    assert "keeps 95.0% of the adapter, 90.0% at worst (a)" in capsys.readouterr().err
    assert main(["fuse", "--save-path", "out", "--export-gguf", "--gguf-path", "m.gguf"]) == 0
    assert [str(path) for path, *_ in seen] == ["out/ggml-model-f16.gguf", "out/m.gguf"]
    assert {(to, options["type"]) for _, to, options in seen} == {("gguf", "f16")}
    assert world.model.calls == [("fuse", False), ("save", Path("out"))]


def test_export_hands_over_what_it_is_asked_for(world, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "pyloss.exporting.export", lambda model, *args, **options: seen.append((*args[:2], options))
    )
    plain = {
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
    for flags in (["--to", "mlx"], ["--to", "peft"], ["--to", "gguf", "--adapter-only"]):
        fails(capsys, ["export", *flags, "--output", "x"], "give its folder as --adapter-path")
    fails(capsys, ["export", "--to", "onnx", "--output", "x"], "invalid choice: 'onnx'")


def test_convert_quantises_and_saves(world, monkeypatch, capsys):
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


def test_the_precision_of_products_is_a_flag_and_a_key(world, capsys, tmp_path, monkeypatch):
    assert main([*TRAIN, "--matmul-precision", "bfloat16"]) == 0
    assert "plan: layers multiply in bfloat16" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("matmul_precision: bfloat16\n")
    assert main([*TRAIN, "-c", "c.yaml"]) == 0
    assert "plan: layers multiply in bfloat16" in capsys.readouterr().err
    assert main(TRAIN) == 0
    assert "layers multiply" not in capsys.readouterr().err
    measured = []
    monkeypatch.setattr(
        evaluation,
        "evaluate",
        lambda *arguments: measured.append(pyloss.get_matmul_precision()) or 1.0,
    )
    assert main(["eval", "--data", "data", "-c", "c.yaml"]) == main(["eval", "--data", "data"]) == 0
    assert measured == ["bfloat16", "float32"]
    assert pyloss.get_matmul_precision() == "float32"


def test_bench_says_what_the_machine_gives(monkeypatch, capsys):
    model = random_model(ModelConfig("llama", tie_word_embeddings=True, **SIZES), "q4_1")
    asked = []

    def load_model(name):
        asked.append(name)
        if name == "missing":
            raise FileNotFoundError("no such model: missing")
        return model

    monkeypatch.setattr(pyloss.models, "load_model", load_model)
    monkeypatch.setattr(measuring, "best_seconds", lambda function, seconds: (function(), 0.25)[1])
    flags = [
        "--batch-size",
        "2",
        "--max-seq-length",
        "5",
        "--rank",
        "2",
        "--grad-checkpoint",
        "--train-tokens",
        "2400",
    ]
    assert main(["bench", *flags, "--fine-tune-type", "dora"]) == 0
    out = capsys.readouterr().out
    assert asked == ["smollm2-135m"]
    assert "memory: 1 GB/s" in out
    assert (
        "products of 10 tokens" in out
        and "\n  f32, 32 to 64: 0 GFLOP/s" in out
        and "\n  q4_1, 32 to 64: 0 GFLOP/s" in out
    )
    assert (
        "DoRA step of smollm2-135m, rank 2, 2 x 5 tokens, checkpointing:\n  40 tokens/s, peak memory "
        in out
    )
    assert "2,400 tokens take about 1.0 minutes" in out
    assert model.layers[0].mlp.up_proj.lora_b.any() and model.grad_checkpoint
    fails(capsys, ["bench", "--model", "missing"], "no such model: missing")
    fails(
        capsys,
        ["bench", "--batch-size", "0"],
        "--batch-size is 0; it must be a whole number of at least 1",
    )


def test_bench_needs_no_model(monkeypatch, capsys):
    def load_model(name):
        raise FileNotFoundError(name)

    tiny = ModelConfig("llama", tie_word_embeddings=True, **SIZES)
    monkeypatch.setattr(pyloss.models, "load_model", load_model)
    monkeypatch.setattr(synthetic, "random_model", lambda format: random_model(tiny, format))
    monkeypatch.setattr(measuring, "best_seconds", lambda function, seconds: (function(), 1.0)[1])
    assert main(["bench", "--max-seq-length", "5"]) == 0
    assert (
        "LoRA step of random weights of SmolLM2-135M's shape, rank 8, 4 x 5 tokens:\n  20 tokens/s"
        in capsys.readouterr().out
    )


def test_info_prints_what_is_in_use(world, capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "version: 0\nisa: avx2\n"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["COMMAND", "pyloss --help"]),
        ([*TRAIN, "--zzz"], ["unrecognized arguments: --zzz (see pyloss train --help)"]),
        (
            ["generate", "--max-token=3", "--promt", "a"],
            ["--promt a; did you mean --prompt? (see pyloss generate --help)"],
        ),
        (["info", "extra"], ["unrecognized arguments: extra (see pyloss info --help)"]),
        (["trian"], ["invalid choice: 'trian'"]),
        (
            [*TRAIN, "--itres", "4"],
            ["unrecognized arguments: --itres 4; did you mean --iters? (see pyloss train --help)"],
        ),
        ([*TRAIN, "--iters", "four"], ["--iters: 'four' is not a whole number"]),
        ([*TRAIN, "--batch-size", "0"], ["command line: batch_size is 0"]),
        (
            [*TRAIN, "--fine-tune-type", "ia3"],
            ["fine_tune_type is 'ia3'; allowed: lora, dora, full"],
        ),
        ([*TRAIN, "--full-keys", "mlp"], ["full_keys says what fine_tune_type full trains"]),
        (
            [*TRAIN, "--loraplus-lr-ratio", "0"],
            ["loraplus_lr_ratio is 0.0; allowed: a finite number above 0"],
        ),
        (
            [*TRAIN, "--matmul-precision", "bf16"],
            ["matmul_precision is 'bf16'; allowed: float32, bfloat16"],
        ),
        ([*TRAIN, "--optimizer", "muon"], ["muon is not available yet"]),
        ([*TRAIN, "--model", "missing"], ["no such model: missing"]),
        ([*TRAIN, "--data", "./nowhere"], ["nowhere", "no such folder"]),
        (["train"], ["no data given"]),
        ([*TRAIN, "-c", "none.yaml"], ["none.yaml: No such file"]),
        ([*TRAIN, "--resume"], ["nothing to resume", "adapters/trainer_state.safetensors"]),
        ([*TRAIN, "--resume", "--resume-adapter-file", "x"], ["give one of them"]),
        ([*TRAIN, "--report-to", "mlflow"], ["'mlflow' is not known"]),
        (
            [*TRAIN, "--adapter-path", "data/train.jsonl/x"],
            ["data/train.jsonl/x", "cannot make the adapter folder"],
        ),
        (
            ["generate", "--max-tokens", "0"],
            ["--max-tokens is 0; it must be a whole number of at least 1"],
        ),
        (
            ["generate", "--top-p", "2"],
            ["--top-p is 2.0; it must be a finite number of at least 0 and of at most 1"],
        ),
        (["generate", "--temp", "nan"], ["--temp is nan"]),
        (["generate", "--seed", "9" * 30], ["--seed is 999"]),
        (["generate", "--top-k", "-1"], ["--top-k is -1"]),
        (["generate", "--chat-template-config", "{"], ["--chat-template-config", "not JSON"]),
        (["generate", "--extra-eos-token", "two"], ["'two' is 3 tokens"]),
        (["eval", "--data", "data", "--split", "nope"], ["invalid choice: 'nope'"]),
    ],
)
def test_bad_input_is_one_line_and_code_2(world, capsys, argv, parts):
    lines = fails(capsys, argv, *parts)
    assert len(lines) == 1


def test_bad_data_names_the_line(world, capsys):
    Path("data/train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    fails(capsys, TRAIN, "train.jsonl", "line 2")


def test_a_loss_that_is_not_finite_ends_with_code_1(world, capsys, monkeypatch):
    monkeypatch.setattr(
        nn, "value_and_grad", lambda model, loss: lambda *a: ((float("nan"), 3), {})
    )
    fails(capsys, TRAIN, "error: iteration 1: the loss is nan", code=1)


def test_ctrl_c_ends_with_code_130_and_says_where_it_saved(world, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(nn, "value_and_grad", lambda model, loss: interrupted)
    fails(capsys, TRAIN, "interrupted after iteration 0: saved to adapters", "--resume", code=130)
    assert (
        Path("adapters/trainer_state.safetensors").exists()
        and not Path("adapters/adapters.safetensors").exists()
    )


def test_sigterm_saves_as_ctrl_c_does(world, capsys, monkeypatch):
    def terminated(*arguments):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(nn, "value_and_grad", lambda model, loss: terminated)
    before = signal.getsignal(signal.SIGTERM)
    fails(capsys, TRAIN, "interrupted after iteration 0: saved to adapters", "--resume", code=143)
    assert Path("adapters/trainer_state.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_debugging_shows_the_traceback(world, capsys, monkeypatch):
    monkeypatch.setenv("PYLOSS_DEBUG", "1")
    assert main([*TRAIN, "--model", "missing"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_is_not_disguised_as_bad_input(world, monkeypatch):
    monkeypatch.setattr(pyloss.models, "load", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(TRAIN)


def test_help_is_there_for_every_command(world, capsys):
    for command in commands.COMMANDS:
        assert main([command, "--help"]) == 0
        assert f"pyloss {command}" in capsys.readouterr().out
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "a first run:" in out
    assert "--resume" not in out


def test_every_flag_of_mlx_lms_trainer_is_accepted(world, capsys):
    flags = [
        "--train",
        "--num-layers",
        "4",
        "--val-batches",
        "1",
        "--steps-per-report",
        "1",
        "--steps-per-eval",
        "2",
    ]
    flags += [
        "--grad-accumulation-steps",
        "2",
        "--save-every",
        "2",
        "--max-seq-length",
        "64",
        "--grad-checkpoint",
    ]
    flags += [
        "--seed",
        "1",
        "--trust-remote-code",
        "--clear-cache-threshold",
        "2GB",
        "--optimizer",
        "adamw",
    ]
    assert (
        main(
            [
                *TRAIN,
                *flags,
                "--project-name",
                "p",
                "--adapter-path",
                "a",
                "--fine-tune-type",
                "lora",
            ]
        )
        == 0
    )
    assert Path("a/0000002_adapters.safetensors").exists()


def test_the_log_is_left_as_it_was(world):
    log = logging.getLogger("pyloss")
    before = (list(log.handlers), log.level)
    main(["info"])
    assert (log.handlers, log.level) == before


def test_warnings_are_lines_without_places_in_the_code(monkeypatch, capsys):
    def command(flags):
        warnings.warn("something\n  was lost", stacklevel=2)
        return 0

    monkeypatch.setitem(commands.COMMANDS, "info", command)
    shown = warnings.showwarning
    assert main(["info"]) == 0
    assert capsys.readouterr().err == "pyloss: warning: something was lost\n"
    assert warnings.showwarning is shown


def test_python_m_pyloss_runs_the_command_line():
    paths = {"PYTHONPATH": str(Path(pyloss.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "pyloss", "nope"], capture_output=True, text=True, env=paths
    )
    assert done.returncode == 2
    assert (
        done.stderr.startswith("pyloss: error: ") and "(see python -m pyloss --help)" in done.stderr
    )
    done = subprocess.run(
        [sys.executable, "-m", "pyloss", "eval", "--help"],
        capture_output=True,
        text=True,
        env=paths,
    )
    assert done.stdout.startswith("usage: python -m pyloss eval [options]\n")


def test_arguments_of_any_length_are_cut_in_errors(capsys):
    for argv in (["eval", "-c", "9" * 5000], ["eval", "9" * 5000], ["info", "--" + "x" * 5000]):
        lines = fails(capsys, argv, " … ")
        assert len(lines[-1]) < 1200


def test_errors_of_any_length_are_cut(capsys, monkeypatch):
    def command(flags):
        raise ValueError("--prompt " + "9" * 100_000 + " is no prompt")

    monkeypatch.setitem(commands.COMMANDS, "info", command)
    lines = fails(capsys, ["info"], "--prompt 999", "999 is no prompt")
    assert len(lines[-1]) < 3200


def test_too_little_memory_says_what_needs_less_of_it(world, capsys, monkeypatch):
    def load(*arguments, **options):
        raise MemoryError("Unable to allocate 7 GiB")

    monkeypatch.setattr(pyloss.models, "load", load)
    fails(
        capsys,
        TRAIN,
        "error: out of memory; a smaller --batch-size",
        "--grad-checkpoint, needs less (Unable to allocate 7 GiB)",
    )
    lines = fails(capsys, ["generate"], "error: out of memory (Unable to allocate 7 GiB)")
    assert "batch-size" not in lines[-1]
