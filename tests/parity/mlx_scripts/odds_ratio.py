"""Preferences without a reference, by ORPO's odds ratio; parts of a layer have two optimizers."""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers, print_trainable_parameters


def get_logps(model, tokens, mask):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs)
    ce = nn.losses.cross_entropy(logits, targets)
    m = mask[:, 1:].astype(ce.dtype)
    return -(ce * m).sum(-1) / m.sum(-1), logits.mean()


def orpo_loss(model, chosen, rejected, chosen_mask, rejected_mask, beta=0.1):
    pc, _lm = get_logps(model, chosen, chosen_mask)
    pr, _ = get_logps(model, rejected, rejected_mask)
    log_odds = (pc - pr) - (mx.log1p(-mx.exp(pc)) - mx.log1p(-mx.exp(pr)))
    ratio = nn.log_sigmoid(log_odds)
    loss = -pc - beta * ratio
    reward = mx.stack([beta * pc.mean(), beta * pr.mean()])
    return mx.mean(loss), reward, mx.array(chosen_mask.sum() + rejected_mask.sum())


def main(model_path, out, iters=10):
    np.random.seed(0)
    mx.random.seed(0)
    folder = Path(model_path).parent
    model, tokenizer = load(model_path)
    linear_to_lora_layers(model, -1, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    model.freeze()
    model.apply_to_modules(
        lambda _, m: (
            m.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
            if isinstance(m, LoRALinear)
            else None
        )
    )
    model.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    print_trainable_parameters(model)
    pairs = [json.loads(line) for line in open(folder / "data" / "pairs.jsonl")]

    def enc(rows):
        w = max(len(r) for r in rows)
        return (
            mx.array([r + [tokenizer.pad_token_id or 0] * (w - len(r)) for r in rows]),
            mx.array([[1] * len(r) + [0] * (w - len(r)) for r in rows]),
        )

    opt = optim.MultiOptimizer(
        [optim.AdamW(learning_rate=1e-3), optim.SGD(learning_rate=1e-2)],
        [lambda name, w: "self_attn" in name],
    )
    lvg = nn.value_and_grad(model, orpo_loss)

    def step(batch):
        (loss, reward, toks), grads = lvg(model, *batch)
        grads = average_gradients(grads)
        opt.update(model, grads)
        return loss, reward, toks

    losses, ntok, tic = [], 0, time.perf_counter()
    for _i in range(iters):
        idx = np.random.permutation(len(pairs))[:2]
        c = [tokenizer.encode(pairs[j]["prompt"] + pairs[j]["chosen"]) for j in idx]
        r = [tokenizer.encode(pairs[j]["prompt"] + pairs[j]["rejected"]) for j in idx]
        (ct, cm), (rt, rm) = enc(c), enc(r)
        loss, _reward, toks = step((ct, rt, cm, rm))
        mx.eval(model.state, opt.state, loss)
        losses.append(loss.item())
        ntok += toks.item()
    total = sum(v.size for _, v in tree_flatten(model.parameters()))
    train = sum(v.size for _, v in tree_flatten(model.trainable_parameters()))
    return {
        "losses": losses,
        "tokens": ntok,
        "seconds": time.perf_counter() - tic,
        "more": [total, train, mx.get_peak_memory() > 0],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
