"""A user's project (tiny model, data, adapter), and a process that runs a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import tiny

import pyloss
from pyloss.models import load_model
from pyloss.tuner import linear_to_lora_layers, save_adapter


def make(folder):
    """Write `base`, `base.gguf` (4 bits), `data` and `adapters` into `folder`."""
    tiny.write_folder(folder / "plain", vocab_size=tiny.TOKENS)
    model, tokenizer = load_model(folder / "plain"), tiny.byte_tokenizer()
    model.save(folder / "base", tokenizer)
    pyloss.export(model, folder / "base.gguf", "gguf", tokenizer, type="q4_0")
    data = folder / "data"
    data.mkdir()
    for split, count in (("train", 6), ("valid", 2), ("test", 3)):
        rows = [{"prompt": f"say {i}", "completion": f"hello {i}"} for i in range(count)]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    linear_to_lora_layers(model, -1, {"rank": 2, "scale": 2.0})
    rng = np.random.default_rng(0)
    for array in model.trainable_parameters().values():
        array[...] = rng.normal(0, 0.05, array.shape)
    save_adapter(model, folder / "adapters")


TRAIN = [
    "train",
    "--model",
    "base",
    "--data",
    "data",
    "--iters",
    "2",
    "--batch-size",
    "2",
    "--num-layers",
    "1",
]


def command(*argv, redirect="", cwd=None, **environment):
    """Run `pyloss ARGV` in a new process, its streams redirected by a shell; return the process."""
    where = {
        "PYTHONPATH": str(Path(pyloss.__file__).parents[1]),
        "PATH": os.environ["PATH"],
        "PYLOSS_NUM_THREADS": "1",
    }
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "pyloss", *argv]
    return subprocess.run(shell, capture_output=True, cwd=cwd, env=where | environment, timeout=120)
