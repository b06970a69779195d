"""A reward model: a linear head over the last hidden state, trained with an adapter below it."""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.lora import LoRALinear


class RewardModel(nn.Module):
    def __init__(self, base, hidden):
        super().__init__()
        self.base = base
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Sequential(nn.Linear(hidden, 16), nn.GELU(), nn.Linear(16, 1, bias=False))

    def __call__(self, ids, ends):
        states = self.base.model(ids)
        last = states[mx.arange(ids.shape[0]), ends - 1]
        return self.head(self.norm(last)).squeeze(-1)


def fill(module, seed):
    """Weights of a module by NumPy, for runs that can be repeated elsewhere."""
    rng = np.random.default_rng(seed)
    for name, array in sorted(tree_flatten(module.parameters())):
        values = rng.normal(0, 0.2, array.shape).astype(np.float32)
        module.load_weights([(name, mx.array(values))], strict=False)


def margin_loss(model, better, worse, ends_better, ends_worse):
    difference = model(better, ends_better) - model(worse, ends_worse)
    loss = nn.losses.binary_cross_entropy(difference, mx.ones_like(difference), with_logits=True)
    return loss, (difference > 0).mean()


def padded(rows):
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return mx.array(ids), mx.array([len(row) for row in rows])


def main(model_path, out, iters=10):
    folder, out = Path(model_path).parent, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load(str(model_path))
    base.freeze()
    rng = np.random.default_rng(12)
    for layer in base.layers:
        layer.self_attn.v_proj = LoRALinear.from_base(layer.self_attn.v_proj, r=4, scale=8.0)
        a = layer.self_attn.v_proj.lora_a
        layer.self_attn.v_proj.lora_a = mx.array(rng.normal(0, 0.1, a.shape), dtype=mx.float32)
    hidden = base.model.embed_tokens.weight.shape[1]
    model = RewardModel(base, hidden)
    fill(model.norm, 1)
    fill(model.head, 2)
    mx.eval(model.parameters())
    names = sorted(name for name, _ in tree_flatten(model.trainable_parameters()))

    rows = [json.loads(x) for x in (folder / "data" / "pairs.jsonl").read_text().splitlines()]
    encoded = [
        [tokenizer.encode(row["prompt"] + "\n" + row[key]) for key in ("chosen", "rejected")]
        for row in rows
    ]
    optimizer = optim.AdamW(learning_rate=2e-3, betas=[0.9, 0.98], eps=1e-6, weight_decay=0.1)
    step = nn.value_and_grad(model, margin_loss)
    losses, accuracies, tokens, begin = [], [], 0, time.perf_counter()
    for it in range(iters):
        batch = [encoded[(2 * it + j) % len(encoded)] for j in range(2)]
        better, ends_better = padded([pair[0] for pair in batch])
        worse, ends_worse = padded([pair[1] for pair in batch])
        (loss, accuracy), grads = step(model, better, worse, ends_better, ends_worse)
        optimizer.update(model, grads)
        mx.eval(model.state, optimizer.state, loss, accuracy)
        losses.append(loss.item())
        accuracies.append(accuracy.item())
        tokens += (ends_better.sum() + ends_worse.sum()).item()
    seconds = time.perf_counter() - begin
    weights = {k: v for k, v in tree_flatten(model.parameters()) if not k.startswith("base.")}
    mx.savez(str(out / "head.npz"), **weights)
    return {
        "losses": losses,
        "more": {"names": names, "accuracies": accuracies, "head": sorted(weights)},
        "tokens": tokens,
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
