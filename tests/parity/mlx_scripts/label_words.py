"""Classifies by the logits of a few words, with a focal loss, clipping by hand, and Lion."""

import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load, save_config


class FocalTrainer:
    def __init__(self, model, lr, steps, gamma=2.0, clip=1.0):
        self.model, self.gamma, self.clip = model, gamma, clip
        warm = optim.linear_schedule(0.0, lr, max(steps // 5, 1))
        self.opt = optim.Lion(
            learning_rate=optim.join_schedules(
                [warm, optim.exponential_decay(lr, 0.9)], [max(steps // 5, 1)]
            ),
            weight_decay=0.01,
        )
        self.lg = nn.value_and_grad(model, self.loss)
        self.ema = None

    def loss(self, ids, last, labels, options):
        logits = self.model(ids)
        picked = logits[mx.arange(ids.shape[0]), last][:, options].astype(mx.float32)
        p = mx.softmax(picked, axis=-1)
        onehot = mx.eye(options.size)[labels]
        pt = (p * onehot).sum(axis=-1)
        w = mx.power(1 - pt, self.gamma)
        ce = nn.losses.cross_entropy(picked, labels, weights=mx.stop_gradient(w), reduction="none")
        acc = mx.argmax(picked, axis=-1) == labels
        return mx.mean(ce), acc.astype(mx.float32).mean()

    def __call__(self, *batch):
        (loss, acc), g = self.lg(*batch)
        norm = math.sqrt(sum(mx.sum(v * v).item() for _, v in tree_flatten(g)))
        if norm > self.clip:
            g = tree_map(lambda x: x * (self.clip / norm), g)
        self.opt.update(self.model, g)
        mx.eval(self.model.trainable_parameters(), self.opt.state)
        self.ema = loss if self.ema is None else 0.9 * self.ema + 0.1 * loss
        return loss.item(), acc.item(), norm


def main(model_path, out, iters=10):
    folder, out = Path(model_path).parent, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer, _config = mlx_lm_load(model_path)
    model.freeze()
    cfg = {
        "rank": 4,
        "scale": 10.0,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"],
    }
    linear_to_lora_layers(model, len(model.layers), cfg)
    model.load_weights(
        list(mx.load(str(folder / "start" / "adapters.safetensors")).items()), strict=False
    )
    rows = [json.loads(line)["messages"] for line in open(folder / "data" / "train.jsonl")]
    words = ["cats", "hens", "boats"]
    options = mx.array([tokenizer.encode(" " + w)[0 if i else -1] for i, w in enumerate(words)])
    texts, labels = [], []
    for m in rows:
        label = next(i for i, w in enumerate(words) if w in m[0]["content"])
        texts.append(tokenizer.encode(m[0]["content"].split(words[label])[0]))
        labels.append(label)
    trainer = FocalTrainer(model, 2e-3, iters)
    rng = np.random.RandomState(3)
    losses, more, n, tic = [], [], 0, time.perf_counter()
    for _it in range(iters):
        pick = rng.choice(len(texts), 4, replace=False)
        width = max(len(texts[i]) for i in pick)
        ids = np.full((4, width), tokenizer.eos_token_id, dtype=np.int32)
        for r, i in enumerate(pick):
            ids[r, : len(texts[i])] = texts[i]
        last = mx.array([len(texts[i]) - 1 for i in pick])
        value, a, norm = trainer(mx.array(ids), last, mx.array([labels[i] for i in pick]), options)
        losses.append(value)
        more.append([a, norm])
        n += ids.size
    sec = time.perf_counter() - tic
    lr = trainer.opt.learning_rate.item()
    mx.savez(str(out / "state.npz"), **dict(tree_flatten(trainer.opt.state)))
    mx.save_safetensors(
        str(out / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters()))
    )
    save_config(
        {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": cfg},
        out / "adapter_config.json",
    )
    fresh, _, _ = mlx_lm_load(model_path)
    fresh = load_adapters(fresh, str(out))
    x = mx.array([texts[0]])
    diff = mx.abs(fresh(x) - model(x)).max().item()
    assert diff < 1e-4, diff
    toks = [
        t if isinstance(t, int) else t.item()
        for (t, _), _ in zip(
            generate_step(mx.array(texts[0]), fresh, max_tokens=6, sampler=make_sampler(0.0)),
            range(6),
        )
    ]
    return {
        "losses": losses + [trainer.ema.item()],
        "more": [more, lr, toks],
        "tokens": n,
        "seconds": sec,
    }


mlx_lm_load = partial(load, return_config=True)

if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
