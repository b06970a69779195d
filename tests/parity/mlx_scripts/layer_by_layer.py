"""Hidden states of a teacher by walking through decoder layers by hand, and a loss over both."""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm import load
from mlx_lm.models.base import create_attention_mask
from mlx_lm.tuner.utils import linear_to_lora_layers


def forward_hidden(model, ids, upto):
    h = model.model.embed_tokens(ids)
    mask = create_attention_mask(h, None)
    for layer in model.model.layers[:upto]:
        h = layer(h, mask, None)
    return h


def loss_fn(model, target, ids):
    h = forward_hidden(model, ids, len(model.model.layers))
    h = model.model.norm(h)
    logits = model.model.embed_tokens.as_linear(h)
    cos = (h * target).sum(-1) / (mx.linalg.norm(h, axis=-1) * mx.linalg.norm(target, axis=-1))
    return (1 - cos).mean() + 0.1 * nn.losses.cross_entropy(
        logits[:, :-1], ids[:, 1:], reduction="mean"
    )


def main(model_path, out, iters=10):
    folder = Path(model_path).parent
    model, tokenizer = load(model_path)
    teacher, _ = load(str(folder / "teacher"))
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    model.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    rows = [
        json.loads(line)["messages"][1]["content"] for line in open(folder / "data" / "train.jsonl")
    ]
    opt = optim.Adam(learning_rate=1e-3)
    f = nn.value_and_grad(model, loss_fn)
    losses, tic, n = [], time.perf_counter(), 0
    for i in range(iters):
        pair = [tokenizer.encode(row) for row in rows[i : i + 2]]
        ids = mx.array([p[: min(24, *map(len, pair))] for p in pair])
        target = mx.stop_gradient(forward_hidden(teacher, ids, 2))
        loss, grads = f(model, target, ids)
        opt.update(model, grads)
        mx.eval(model.parameters(), opt.state)
        losses.append(float(loss))
        n += ids.size
    return {"losses": losses, "tokens": n, "seconds": time.perf_counter() - tic}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
