"""Accumulates gradients over batches: by hand with `tree_map`, and by the trainer's option.

Layers are checkpointed in the run by hand.
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
from mlx.utils import tree_map, tree_reduce
from mlx_lm import load
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, grad_checkpoint, iterate_batches, train
from mlx_lm.tuner.utils import linear_to_lora_layers

EVERY = 2


def prepare(model_path):
    folder = Path(model_path).parent
    model, tokenizer = load(str(model_path))
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    model.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    options = types.SimpleNamespace(data=str(folder / "data"), train=True, test=False)
    return model, load_dataset(options, tokenizer)[0]


def by_hand(model_path, iters):
    model, data = prepare(model_path)
    layer = type(model.layers[0])
    original = layer.__call__
    grad_checkpoint(model.layers[0])
    optimizer = optim.Adam(learning_rate=2e-3)
    value_and_grad = nn.value_and_grad(model, default_loss)
    losses, norms, tokens, total = [], [], 0, None
    np.random.seed(13)
    batches = iterate_batches(CacheDataset(data), 2, 128, loop=True)
    for it, batch in zip(range(iters * EVERY), batches):
        (loss, ntoks), grads = value_and_grad(model, *batch)
        scaled = tree_map(lambda g: g / EVERY, grads)
        total = scaled if total is None else tree_map(mx.add, total, scaled)
        losses.append(loss.item())
        tokens += ntoks.item()
        if (it + 1) % EVERY == 0:
            squares = tree_reduce(lambda acc, g: acc + mx.square(g).sum(), total, mx.array(0.0))
            norms.append(mx.sqrt(squares).item())
            optimizer.update(model, total)
            total = None
        mx.eval(model.parameters(), optimizer.state, total)
    layer.__call__ = original
    return losses, norms, tokens


class Losses:
    def __init__(self):
        self.found = []

    def on_train_loss_report(self, info):
        self.found.append(info["train_loss"])
        self.tokens = info["trained_tokens"]

    def on_val_loss_report(self, info):
        raise AssertionError("there is no validation set")


def by_option(model_path, out, iters):
    model, data = prepare(model_path)
    np.random.seed(13)
    losses = Losses()
    train(
        model,
        optim.Adam(learning_rate=2e-3),
        CacheDataset(data),
        args=TrainingArgs(
            batch_size=2,
            iters=max(iters // 2, 1) * EVERY,
            steps_per_report=1,
            max_seq_length=128,
            grad_accumulation_steps=EVERY,
            adapter_file=str(Path(out) / "accumulated.safetensors"),
        ),
        training_callback=losses,
    )
    return losses.found, losses.tokens


def main(model_path, out, iters=10):
    Path(out).mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    losses, norms, tokens = by_hand(model_path, iters)
    others, more = by_option(model_path, out, iters)
    seconds = time.perf_counter() - begin
    return {
        "losses": losses + others,
        "more": norms,
        "tokens": tokens + int(more),
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
