"""A loop written by hand: a compiled step with state, clipped gradients, and a schedule."""

import json
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.trainer import iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load


class Arguments:
    train = True
    test = False
    mask_prompt = False

    def __init__(self, data):
        self.data = data


def main(model_path, out, iters=10):
    folder = Path(model_path).parent
    np.random.seed(4)
    model, tokenizer = load(str(model_path))
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    model.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    mx.eval(model.parameters())
    data = load_dataset(Arguments(str(folder / "data")), tokenizer)[0]
    items = [data.process(data[i]) for i in range(len(data))]

    warmup = optim.linear_schedule(1e-5, 3e-3, steps=4)
    cosine = optim.cosine_decay(3e-3, decay_steps=max(iters - 4, 1), end=1e-4)
    optimizer = optim.AdamW(learning_rate=optim.join_schedules([warmup, cosine], [4]))

    def loss_fn(model, inputs, targets, mask):
        logits = model(inputs)
        losses = nn.losses.cross_entropy(logits, targets, reduction="none")
        count = mask.sum()
        return (losses * mask).sum() / count, count

    loss_and_grad = nn.value_and_grad(model, loss_fn)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(inputs, targets, mask):
        (loss, count), grads = loss_and_grad(model, inputs, targets, mask)
        grads, norm = optim.clip_grad_norm(grads, max_norm=0.5)
        optimizer.update(model, grads)
        return loss, count, norm

    model.train()
    losses, rates, norms, tokens = [], [], [], 0
    batches = iterate_batches(items, 2, 128, loop=True)
    begin = time.perf_counter()
    for _ in range(iters):
        batch, lengths = next(batches)
        at = mx.arange(1, batch.shape[1])
        mask = mx.where(at[None] < lengths[:, 1:2], 1.0, 0.0)
        loss, count, norm = step(batch[:, :-1], batch[:, 1:], mask)
        mx.eval(state)
        losses.append(loss.item())
        rates.append(optimizer.learning_rate.item())
        norms.append(norm.item())
        tokens += int(count.item())
    seconds = time.perf_counter() - begin
    final = {k: v.abs().max().item() for k, v in tree_flatten(model.trainable_parameters())}
    return {
        "losses": losses,
        "more": {"rates": rates, "norms": norms, "largest": max(final.values())},
        "tokens": tokens,
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
