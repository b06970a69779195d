"""Full fine-tuning of chosen layers: freezing by name, counts by `tree_flatten`, rates by group."""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm import load


def count(tree):
    return sum(array.size for _, array in tree_flatten(tree))


def loss_fn(model, x, y):
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


def token_batches(path, tokenizer, rows, length, seed):
    ids = []
    for line in Path(path).read_text().splitlines():
        for message in json.loads(line)["messages"]:
            ids += tokenizer.encode(message["content"]) + [tokenizer.eos_token_id]
    ids = np.array(ids)
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(ids) - length - 1, rows)
        taken = np.stack([ids[s : s + length + 1] for s in starts])
        yield mx.array(taken[:, :-1]), mx.array(taken[:, 1:])


def main(model_path, out, iters=10):
    folder, out = Path(model_path).parent, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(str(model_path))

    # Everything but the last block, its norms included, and the final norm stays as it is.
    model.freeze()
    last = model.layers[-1]
    last.unfreeze()
    last.self_attn.freeze(keys=["weight"])
    for name, module in last.named_modules():
        if isinstance(module, nn.RMSNorm):
            print(f"trains the norm {name}", file=sys.stderr)
    model.model.norm.unfreeze()
    last.self_attn.o_proj.unfreeze(keys="weight", recurse=False)
    model.train()

    names = sorted(name for name, _ in tree_flatten(model.trainable_parameters()))
    total, trained = count(model.parameters()), count(model.trainable_parameters())
    # Norms get a tenth of the gradient.
    slower = {"weight": 0.1}

    def scaled(path, grad):
        return grad * slower["weight"] if "norm" in path else grad

    optimizer = optim.AdamW(learning_rate=1e-3, weight_decay=0.01, bias_correction=True)
    step = nn.value_and_grad(model, loss_fn)
    before = {k: mx.array(v) for k, v in tree_flatten(model.trainable_parameters())}
    losses, tokens = [], 0
    stream = token_batches(folder / "data" / "train.jsonl", tokenizer, 2, 48, seed=2)
    begin = time.perf_counter()
    for _, (x, y) in zip(range(iters), stream):
        loss, grads = step(model, x, y)
        grads = tree_map_with_path(scaled, grads)
        optimizer.update(model, grads)
        mx.eval(model.state, optimizer.state)
        losses.append(loss.item())
        tokens += x.size
    seconds = time.perf_counter() - begin

    after = dict(tree_flatten(model.trainable_parameters()))
    moved = {k: mx.linalg.norm((after[k] - before[k]).reshape(-1)).item() for k in names}
    assert all(value > 0 for value in moved.values())
    # Put the old weights back: the loss of the first batch is the first one again.
    model.update(tree_unflatten(list(before.items())))
    again = token_batches(folder / "data" / "train.jsonl", tokenizer, 2, 48, seed=2)
    losses.append(loss_fn(model, *next(again)).item())
    return {
        "losses": losses,
        "more": {"names": names, "counts": [total, trained], "moved": list(moved.values())},
        "tokens": tokens,
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
