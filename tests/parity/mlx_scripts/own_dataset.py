"""A dataset of its own, whose items are (tokens, offset, weight), and batches of its own.

The trainer passes whatever the batches have to the loss.
"""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm import load
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs, evaluate, train
from mlx_lm.tuner.utils import linear_to_lora_layers


class Weighted:
    """Instructions with a weight for each; `process` tokenizes one when it is first needed."""

    def __init__(self, path, tokenizer):
        self.rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        self.tokenizer = tokenizer
        self.calls = 0

    def process(self, row):
        self.calls += 1
        messages = row["messages"]
        prompt = self.tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        full = self.tokenizer.apply_chat_template(messages, return_dict=False)
        return full, len(prompt), row.get("weight", 1.0)

    def __getitem__(self, i):
        return self.rows[i]

    def __len__(self):
        return len(self.rows)


def weighted_batches(dataset, batch_size, max_seq_length, loop=False, seed=None, comm_group=None):
    """Three arrays a batch: ids, [offset, end], and the weight of each row."""
    order = np.arange(len(dataset))
    rng = np.random.default_rng(0 if seed is None else seed)
    while True:
        rng.shuffle(order)
        for i in range(0, len(order) - batch_size + 1, batch_size):
            items = [dataset[int(j)] for j in order[i : i + batch_size]]
            tokens, offsets, weights = zip(*items)
            ends = [min(len(row), max_seq_length) for row in tokens]
            ids = np.zeros((batch_size, max(ends)), np.int32)
            for row, kept, end in zip(ids, tokens, ends):
                row[:end] = kept[:end]
            yield mx.array(ids), mx.array(list(zip(offsets, ends))), mx.array(weights)
        if not loop:
            break


def weighted_loss(model, batch, lengths, weights):
    logits = model(batch[:, :-1])
    targets = batch[:, 1:]
    positions = mx.arange(1, targets.shape[1] + 1)
    mask = mx.logical_and(positions >= lengths[:, :1], positions < lengths[:, 1:])
    mask = mask * weights[:, None]
    ce = nn.losses.cross_entropy(logits, targets) * mask
    total = mask.sum()
    return ce.sum() / total, total


class Losses:
    def __init__(self):
        self.found, self.valid = [], []

    def on_train_loss_report(self, info):
        self.found.append(info["train_loss"])
        self.tokens = info["trained_tokens"]

    def on_val_loss_report(self, info):
        self.valid.append(info["val_loss"])


def main(model_path, out, iters=10):
    folder, out = Path(model_path).parent, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(str(model_path))
    model.freeze()
    # numpy's numbers as the beginning
    linear_to_lora_layers(
        model, 2, {"rank": 3, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.o_proj"]}
    )
    rng = np.random.default_rng(8)
    for layer in model.layers[-2:]:
        a = layer.self_attn.o_proj.lora_a
        layer.self_attn.o_proj.lora_a = mx.array(rng.uniform(-0.1, 0.1, a.shape).astype(np.float32))
    train_set, valid_set = (
        CacheDataset(Weighted(folder / "data" / f"{name}.jsonl", tokenizer))
        for name in ("train", "valid")
    )
    args = TrainingArgs(
        batch_size=2,
        iters=iters,
        steps_per_report=1,
        steps_per_eval=1000,
        val_batches=1,
        max_seq_length=90,
        adapter_file=str(out / "adapters.safetensors"),
    )
    losses, begin = Losses(), time.perf_counter()
    train(
        model,
        optim.Adam(learning_rate=1e-3),
        train_set,
        valid_set,
        args,
        loss=weighted_loss,
        iterate_batches=weighted_batches,
        training_callback=losses,
    )
    seconds = time.perf_counter() - begin
    final = evaluate(
        model,
        valid_set,
        batch_size=2,
        num_batches=-1,
        loss=weighted_loss,
        iterate_batches=weighted_batches,
    )
    assert valid_set._data.calls <= len(valid_set)
    return {
        "losses": losses.found + losses.valid + [float(final)],
        "tokens": float(losses.tokens),
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
