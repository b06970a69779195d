"""Direct preference optimization, written by hand, with a frozen copy as the reference."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load


@dataclass
class Options:
    beta: float = 0.1
    kind: str = "sigmoid"
    rate: float = 1e-3
    batch: int = 2


def pad(rows):
    width = max(len(row) for row in rows)
    ids = mx.array([row + [0] * (width - len(row)) for row in rows])
    return ids, mx.array([len(row) for row in rows])


def sequence_log_probs(model, ids, prompts, ends):
    """The sum of the log probabilities of each answer's tokens."""
    logits = model(ids[:, :-1]).astype(mx.float32)
    targets = ids[:, 1:]
    picked = mx.take_along_axis(logits, targets[:, :, None], axis=-1).squeeze(-1)
    log_probs = picked - mx.logsumexp(logits, axis=-1)
    at = mx.arange(1, ids.shape[1])[None]
    mask = (at >= prompts[:, None]) & (at < ends[:, None])
    return (log_probs * mask).sum(axis=1), mask.sum(axis=1)


def dpo_loss(model, options, chosen, rejected, reference):
    better, length = sequence_log_probs(model, *chosen)
    worse, _ = sequence_log_probs(model, *rejected)
    margins = (better - worse) - (reference[0] - reference[1])
    if options.kind == "sigmoid":
        losses = -nn.log_sigmoid(options.beta * margins)
    elif options.kind == "hinge":
        losses = nn.relu(1 - options.beta * margins)
    else:
        losses = mx.square(margins / length - 1 / (2 * options.beta))
    rewards = mx.stack([better - reference[0], worse - reference[1]]) * options.beta
    accuracy = (rewards[0] > rewards[1]).mean()
    return losses.mean(), accuracy, mx.stop_gradient(rewards)


def pairs(path, tokenizer):
    found = []
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.encode(row["prompt"])
        found.append(
            [(prompt + tokenizer.encode(row[key]), len(prompt)) for key in ("chosen", "rejected")]
        )
    return found


def main(model_path, out, iters=10):
    folder = Path(model_path).parent
    model, tokenizer = load(str(model_path))
    reference, _ = load(str(model_path))
    reference.freeze()
    model.freeze()
    linear_to_lora_layers(
        model, len(model.layers), {"rank": 4, "scale": 10.0, "dropout": 0.0}, use_dora=False
    )
    model.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    data = pairs(folder / "data" / "pairs.jsonl", tokenizer)
    results, more, tokens, seconds = [], [], 0, 0.0
    for kind in ("sigmoid", "hinge", "ipo"):
        options = Options(kind=kind)
        rng = np.random.default_rng(5)
        optimizer = optim.Adam(learning_rate=options.rate, betas=[0.9, 0.95])
        value_and_grad = nn.value_and_grad(
            model, lambda *given, options=options: dpo_loss(model, options, *given)
        )
        begin = time.perf_counter()
        for _ in range(iters if kind == "sigmoid" else max(iters // 2, 1)):
            chosen_rows = [data[i] for i in rng.permutation(len(data))[: options.batch]]
            sides = []
            for side in range(2):
                ids, ends = pad([row[side][0] for row in chosen_rows])
                sides.append((ids, mx.array([row[side][1] for row in chosen_rows]), ends))
                tokens += int(ends.sum().item())
            known = [mx.stop_gradient(sequence_log_probs(reference, *side)[0]) for side in sides]
            mx.eval(known)
            (loss, accuracy, rewards), grad = value_and_grad(*sides, known)
            optimizer.update(model, grad)
            mx.eval(model.parameters(), optimizer.state)
            results.append(float(loss))
            more.append([float(accuracy), rewards.tolist()])
        seconds += time.perf_counter() - begin
    return {"losses": results, "more": more, "tokens": tokens, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
