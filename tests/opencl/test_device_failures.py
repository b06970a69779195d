"""Training on a failing device: an exception, a usable process, and the last complete adapter."""

import pytest

TRAINING = """
import os, sys
import numpy as np, pyloss
from pathlib import Path
from pyloss import _core, optim
from pyloss.models.config import ModelConfig
from pyloss.io.safetensors import read_safetensors
from pyloss.models.synthetic import random_model
from pyloss.tuner import TrainingCallback

shape = ModelConfig("llama", vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
rows = np.random.default_rng(0).integers(0, 32, (4, 12)).tolist()

class Failing(TrainingCallback):
    # After an iteration the device fails as the environment says from then on.
    def __init__(self, after, failure):
        self.after, self.failure = after, failure

    def on_train_loss_report(self, info):
        if info["iteration"] == self.after:
            _core.opencl_trim()
            os.environ.update(self.failure)

def run(folder, callback=None, iters=8, **options):
    pyloss.random.seed(1)
    model = random_model(shape, "q4_1")
    pyloss.linear_to_lora_layers(model, -1, {"rank": 2, "scale": 2.0, "dropout": 0.1})
    pyloss.to_device(model, "opencl:0")
    arguments = pyloss.TrainingArgs(iters=iters, batch_size=2, steps_per_report=1, steps_per_save=2, progress=False, seed=3,
        adapter_file=Path(folder) / "adapters.safetensors", **options)
    pyloss.train(model, optim.AdamW(1e-2), rows, None, arguments, training_callback=callback)

def saved(folder):
    tensors = read_safetensors(Path(folder) / "adapters.safetensors").tensors
    return {name: tensor.array() for name, tensor in tensors.items()}

def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
"""


@pytest.mark.parametrize(
    ("failure", "error", "text"),
    [
        ({"SHIM_MOST_BYTES": "0"}, "MemoryError", "CL_MEM_OBJECT_ALLOCATION_FAILURE"),
        ({"SHIM_NO_KERNELS": "1"}, "DeviceError", "CL_INVALID_COMMAND_QUEUE"),
    ],
)
def test_training_that_fails_leaves_the_last_adapter_and_goes_on(
    python, shim, tmp_path, failure, error, text
):
    script = (
        TRAINING
        + f"""
os.chdir({str(tmp_path)!r})
run("whole")
run("four", iters=4)
try:
    run("broken", Failing(5, {failure!r}))
except (MemoryError, pyloss.DeviceError) as error:
    print(type(error).__name__, error)
assert same(saved("broken"), saved("four")), "the adapter is that of the last save"
for name in {list(failure)!r}:
    del os.environ[name]
x = np.ones((2, 5), np.float32)
assert np.allclose(pyloss.softmax_cross_entropy(pyloss.to_device(x), [0, 1]), np.log(5)), "the device works again"
run("broken", resume=True)
assert same(saved("broken"), saved("whole")), "resumed, as if nothing had been"
print("done")
"""
    )
    said = python(script, PYLOSS_OPENCL_LIBRARY=shim)
    assert said.startswith(error) and text in said and said.endswith("done")
