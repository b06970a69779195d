"""LoRA layers of the script's own over a 4-bit base, merged in the end.

They take the sizes of a layer from its packed weight, as scripts for MLX do.
"""

import json
import math
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import load

RANK, SCALE = 4, 4.0


class LowRank(nn.Module):
    """A linear layer and a product of low rank beside it."""

    def __init__(self, linear, seed):
        super().__init__()
        outputs, inputs = linear.weight.shape
        if isinstance(linear, nn.QuantizedLinear):
            inputs *= 32 // linear.bits
        drawn = np.random.default_rng(seed).uniform(-1, 1, (inputs, RANK)) / math.sqrt(inputs)
        self.linear = linear
        self.lora_a = mx.array(drawn.astype(np.float32))
        self.lora_b = mx.zeros((RANK, outputs))

    def __call__(self, x):
        kind = self.linear.scales.dtype
        y = self.linear(x.astype(kind))
        return y + (SCALE * ((x @ self.lora_a) @ self.lora_b)).astype(kind)

    def merged(self):
        linear = self.linear
        groups = {"group_size": linear.group_size, "bits": linear.bits}
        weight = mx.dequantize(linear.weight, linear.scales, linear.biases, **groups)
        outputs, inputs = weight.shape
        found = nn.Linear(inputs, outputs, bias="bias" in linear)
        found.weight = weight + SCALE * self.lora_b.T @ self.lora_a.T
        return nn.QuantizedLinear.from_linear(found, **groups)


def batches(path, tokenizer, size=2):
    rows = [json.loads(line)["messages"] for line in Path(path).read_text().splitlines()]
    texts = ["\n".join(turn["content"] for turn in row) for row in rows]
    while True:
        for i in range(0, len(texts) - size + 1, size):
            ids = [tokenizer.encode(text)[:64] for text in texts[i : i + size]]
            width = max(map(len, ids))
            batch = mx.array([row + [0] * (width - len(row)) for row in ids])
            yield batch[:, :-1], batch[:, 1:], mx.array([len(row) - 1 for row in ids])


def loss(model, inputs, targets, lengths):
    logits = model(inputs).astype(mx.float32)
    mask = mx.arange(inputs.shape[1])[None, :] < lengths[:, None]
    entropy = nn.losses.cross_entropy(logits, targets) * mask
    return entropy.sum() / mask.sum(), mask.sum()


def main(model_path, out, iters=10):
    model, tokenizer = load(str(model_path))
    nn.quantize(model, group_size=32, bits=4)
    model.freeze()
    for i, layer in enumerate(model.layers):
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj, 2 * i)
        layer.self_attn.v_proj = LowRank(layer.self_attn.v_proj, 2 * i + 1)
    optimizer = optim.Adam(learning_rate=1e-3)
    step = nn.value_and_grad(model, loss)
    data = batches(Path(model_path).parent / "data" / "train.jsonl", tokenizer)
    losses, tokens = [], 0
    begin = time.perf_counter()
    for _ in range(iters):
        (value, count), grads = step(model, *next(data))
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state, value)
        losses.append(value.item())
        tokens += count.item()
    seconds = time.perf_counter() - begin
    Path(out).mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.savez(str(Path(out) / "adapters.npz"), **weights)
    merged = [(n, m.merged()) for n, m in model.named_modules() if isinstance(m, LowRank)]
    ids = mx.array([[5, 6, 7]])
    before = model(ids)
    model.update_modules(tree_unflatten(merged))
    near = mx.abs(model(ids) - before).max().item() < mx.abs(before).max().item() / 4
    more = {"trained": sum(w.size for w in weights.values()), "near": near}
    return {"losses": losses, "more": more, "tokens": tokens, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
