"""A loss of its own: cross entropy by `nn.losses`, weighted by position, over indexed logits.

The trainer calls it as it calls mlx-lm's `default_loss`.
"""

import json
import sys
import time
import types
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm import load
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

SMOOTHING = 0.1
ENTROPY = 0.01


def make_loss(ignored):
    """Later tokens weigh more, `ignored` ones nothing; a bonus for the entropy keeps it broad."""

    def loss(model, batch, lengths):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = model(inputs).astype(mx.float32)
        steps = mx.arange(1, targets.shape[1] + 1)
        mask = mx.logical_and(steps >= lengths[:, 0:1], steps < lengths[:, 1:])
        mask = mx.where(targets == ignored, False, mask)
        weights = mask * (1.0 + steps / steps.shape[0])

        ce = nn.losses.cross_entropy(logits, targets, label_smoothing=SMOOTHING, reduction="none")
        log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        entropy = -(mx.exp(log_probs) * log_probs).sum(axis=-1)
        rows = mx.arange(targets.shape[0])
        last = mx.maximum(lengths[:, 1] - 2, 0)
        # The end of each text counts once more.
        ends = -log_probs[rows, last, targets[rows, last]]

        ntoks = mask.sum()
        total = (ce * weights - ENTROPY * entropy * mask).sum() / weights.sum() + 0.1 * ends.mean()
        return total, ntoks

    return loss


class Reports:
    """Has the two methods of a callback, no base class."""

    def __init__(self):
        self.losses, self.tokens = [], 0

    def on_train_loss_report(self, info):
        self.losses.append(info["train_loss"])
        self.tokens = info["trained_tokens"]

    def on_val_loss_report(self, info):
        pass


def main(model_path, out, iters=10):
    folder, out = Path(model_path).parent, Path(out)
    np.random.seed(1)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(str(model_path), tokenizer_config={"trust_remote_code": True})
    model.freeze()
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 8.0, "dropout": 0.0, "keys": keys})
    model.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    data, _, _ = load_dataset(
        types.SimpleNamespace(data=str(folder / "data"), train=True, test=False, mask_prompt=True),
        tokenizer,
    )
    comma = tokenizer.encode(",")[-1]
    reports, begin = Reports(), time.perf_counter()
    train(
        model,
        optim.AdamW(learning_rate=3e-3, weight_decay=0.05),
        CacheDataset(data),
        args=TrainingArgs(
            batch_size=2,
            iters=iters,
            steps_per_report=1,
            adapter_file=str(out / "masked.safetensors"),
        ),
        loss=make_loss(comma),
        training_callback=reports,
    )
    seconds = time.perf_counter() - begin
    return {"losses": reports.losses, "tokens": reports.tokens, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
