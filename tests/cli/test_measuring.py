"""`bench` and `info`."""

from tiny_commands import fails

import pyloss
import pyloss.generation
from pyloss import measuring
from pyloss.cli import main
from pyloss.models import synthetic
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.synthetic import random_model

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


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
