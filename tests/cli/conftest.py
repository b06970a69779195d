"""The fixture `world`: a folder with data and a model that takes no time."""

import json
import sys
import types

import pytest
from tiny_commands import Model, Tokenizer
from tiny_training import tiny_loss, tiny_value_and_grad

import pyloss
import pyloss.cli.commands  # before the patches, which modules imported later would keep
import pyloss.distillation.quantized
import pyloss.generation
import pyloss.quantizing
from pyloss import nn
from pyloss.models import conversion
from pyloss.tuner import trainer, utils
from pyloss.tuner.run import evaluation


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Replace the parts of the library that commands call by small ones that record their calls."""
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
        return evaluate(*args, **options | {"loss": tiny_loss})

    def run(*args, **options):
        return train(*args, **options | {"loss": tiny_loss})

    evaluate, train = evaluation.evaluate, trainer.train
    monkeypatch.setattr(utils, "add_adapters", add_adapters)
    monkeypatch.setattr(utils, "load_adapters", load_adapters)
    monkeypatch.setattr(utils, "fuse_adapters", fuse)
    monkeypatch.setattr(
        conversion,
        "dequantize_model",
        lambda model, dtype: model.calls.append(("dequantize", dtype)),
    )
    monkeypatch.setattr(sys.modules["pyloss.generation"], "stream_generate", stream_generate)
    monkeypatch.setattr("pyloss.exporting.becomes_floats", lambda model: False)
    monkeypatch.setattr(pyloss.models, "load", load)
    monkeypatch.setattr("pyloss.loading.load_tokenizer", lambda path: Tokenizer())
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
