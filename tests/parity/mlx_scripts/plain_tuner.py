"""Fine-tunes a LoRA adapter on chats with mlx-lm's own trainer.

    python plain_tuner.py MODEL OUT

Prints JSON: the loss of every update.
"""

import json
import sys
import time
import types
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm import load
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers, print_trainable_parameters
from mlx_lm.utils import save_config

LORA = {"rank": 4, "scale": 10.0, "dropout": 0.0}


class Losses(TrainingCallback):
    def __init__(self):
        self.reports = []

    def on_train_loss_report(self, train_info: dict):
        self.reports.append(train_info)

    def on_val_loss_report(self, val_info: dict):
        print(f"validation {val_info['val_loss']:.3f}", file=sys.stderr)


def main(model_path, out, iters=10):
    folder, out = Path(model_path).parent, Path(out)
    np.random.seed(7)
    mx.random.seed(7)
    model, tokenizer = load(model_path)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), LORA)
    model.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    print_trainable_parameters(model)

    options = types.SimpleNamespace(data=str(folder / "data"), train=True, test=False)
    train_set, valid_set, _ = load_dataset(options, tokenizer)

    out.mkdir(parents=True, exist_ok=True)
    settings = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": LORA}
    save_config(settings, out / "adapter_config.json")
    args = TrainingArgs(
        batch_size=4,
        iters=iters,
        val_batches=1,
        steps_per_report=1,
        steps_per_eval=1000,
        steps_per_save=1000,
        max_seq_length=256,
        adapter_file=str(out / "adapters.safetensors"),
    )
    losses, begin = Losses(), time.perf_counter()
    train(
        model=model,
        optimizer=optim.Adam(learning_rate=2e-3),
        train_dataset=CacheDataset(train_set),
        val_dataset=CacheDataset(valid_set),
        args=args,
        training_callback=losses,
    )
    seconds = time.perf_counter() - begin
    assert (out / "adapters.safetensors").exists()
    return {
        "losses": [report["train_loss"] for report in losses.reports],
        "tokens": losses.reports[-1]["trained_tokens"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
