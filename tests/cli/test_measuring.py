"""`bench` and `info`."""

import json
import re

import pytest
from tiny import DENSE
from tiny_commands import fails

import pyloss
from pyloss import measuring
from pyloss.cli import main
from pyloss.models import synthetic
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.synthetic import random_model
from pyloss.runtime import precision

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY = ModelConfig("llama", tie_word_embeddings=True, **SIZES)


@pytest.fixture
def quick(monkeypatch):
    """Four steps of a quarter of a second of anything."""
    now = [0.0]

    def tick():
        now[0] += 0.25
        return now[0]

    monkeypatch.setattr(measuring.time, "perf_counter", tick)
    monkeypatch.setattr(measuring, "_repeats", lambda seconds: range(4))
    monkeypatch.setattr(measuring, "best_seconds", lambda function, seconds: (function(), 0.25)[1])


@pytest.mark.parametrize("form", ["emulated", "avx512_bf16"])
def test_bench_says_what_the_machine_gives(quick, monkeypatch, capsys, tmp_path, form):
    """Products as bfloat16 too, where the processor has instructions for them."""
    chosen = precision.Form("bfloat16-emulated", form, "the test says so")
    monkeypatch.setattr(precision, "bfloat16_form", lambda *_: chosen)
    also = "" if form == "emulated" else ", 0 as bfloat16"
    random_model(TINY, "bf16").save(tmp_path / "model")  # without a tokenizer
    flags = ["--model", str(tmp_path / "model"), "--batch-size", "2", "--max-seq-length", "5"]
    flags += ["--rank", "2", "--grad-checkpoint", "--train-tokens", "2400"]
    assert main(["bench", *flags, "--fine-tune-type", "dora"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"pyloss {pyloss.__version__}: ")
    assert lines[1] == f"model: {tmp_path / 'model'} (0 MB)"
    assert lines[2] == "with DoRA of rank 2, 2 x 5 tokens, checkpointing:"
    assert re.fullmatch(
        r"  training: 40 tokens/s \(median of 3 steps; best 40\), peak memory [\d.]+ [MG]B",
        lines[3],
    )
    assert lines[4:] == [
        "  2,400 tokens take about 1.0 minutes",
        "  evaluation: 40 tokens/s",
        "  reading a prompt of 5 tokens: 20 tokens/s",
        "  generation: 4.0 tokens/s",
        "memory: 1 GB/s",
        "products of 10 tokens with weights, forward and backward:",
        f"  f32, 64 to 128: 0 GFLOP/s{also}",
        f"  bf16, 64 to 128: 0 GFLOP/s{also}",
    ]


@pytest.mark.parametrize("family", [*DENSE, "mixtral"])
@pytest.mark.parametrize("stored", ["q4_1", "q4", "nf4", None])
def test_bench_of_a_configuration_alone(quick, capsys, tmp_path, family, stored):
    mixture = Mixture(4, 2, 64, True) if family == "mixtral" else None
    content = ModelConfig(family, mixture=mixture, **SIZES).to_hf()
    (tmp_path / "config.json").write_text(json.dumps(content | {"torch_dtype": "float16"}))
    flags = ["--model", str(tmp_path / "config.json"), "--max-seq-length", "5"]
    assert main(["bench", *flags, *(["--type", stored] if stored else [])]) == 0
    out, shown = capsys.readouterr().out, stored or "f16"
    title = f"model: random weights of the shape of {tmp_path / 'config.json'}, stored as {shown}"
    assert f"\n{title} (0 MB)\n" in out
    assert "with LoRA of rank 8, 4 x 5 tokens:\n  training: 80 tokens/s" in out
    assert f"\n  {shown}, 64 to " in out


def test_bench_measures_the_shape_of_a_model_in_another_type(quick, capsys, tmp_path):
    random_model(TINY, "bf16").save(tmp_path / "model")
    assert main(["bench", "--model", str(tmp_path / "model"), "--quantize", "q8_0"]) == 0
    assert "model, stored as q8_0" in capsys.readouterr().out


def test_bench_needs_no_model(quick, monkeypatch, capsys):
    def resolve_model(name, **options):
        raise FileNotFoundError(name)

    monkeypatch.setattr(pyloss.models, "resolve_model", resolve_model)
    monkeypatch.setattr(synthetic, "SMALL", TINY)
    assert main(["bench", "--max-seq-length", "5"]) == 0
    out = capsys.readouterr().out
    assert "model: random weights of the shape of SmolLM2-135M, stored as q4_1" in out


def test_bench_refuses_in_one_sentence(capsys, tmp_path):
    def refused(*argv, says):
        assert len(fails(capsys, ["bench", *argv], says)) == 1

    refused("--model", "missing", says="no model at 'missing': give a .gguf file")
    refused("--batch-size", "0", says="--batch-size is 0; it must be a whole number of at least 1")
    refused("--type", "q9", says="--type is 'q9'; it must be one of f32, bf16")
    file = tmp_path / "config.json"
    refused("--model", str(file), says="no model at")
    refused("--model", str(tmp_path), says="no config.json")
    file.write_text("{")
    refused("--model", str(file), says="config.json")
    file.write_text(json.dumps({"model_type": "mamba"}))
    refused("--model", str(file), says="'mamba' is not supported")
    file.write_text(json.dumps(TINY.to_hf()))
    refused("--model", str(file), "--type", "q4_k", says="rows of a multiple of 256 values, got 64")


def test_info_prints_what_is_in_use(world, capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "version: 0\nisa: avx2\n"
