"""Distills a larger model into a smaller one: KL divergence at a temperature, and cross entropy.

Both models are in memory; the loop is written by hand.
"""

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
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import get_total_parameters

TEMPERATURE = 2.0
ALPHA = 0.7


def distillation_loss(student, teacher_logits, inputs, targets, mask):
    logits = student(inputs)
    student_log_probs = nn.log_softmax(logits / TEMPERATURE, axis=-1)
    teacher_log_probs = nn.log_softmax(teacher_logits / TEMPERATURE, axis=-1)
    kl = nn.losses.kl_div_loss(student_log_probs, teacher_log_probs, axis=-1, reduction="none")
    kl = (kl * mask).sum() / mask.sum() * TEMPERATURE**2
    ce = (nn.losses.cross_entropy(logits, targets) * mask).sum() / mask.sum()
    return ALPHA * kl + (1 - ALPHA) * ce, kl, ce


def batches(path, tokenizer, size, seed):
    """Random padded batches of the texts, for ever."""
    rows = [json.loads(line)["messages"] for line in Path(path).read_text().splitlines()]
    ids = [tokenizer.encode(" ".join(m["content"] for m in row)) for row in rows]
    rng = np.random.default_rng(seed)
    while True:
        chosen = [ids[i] for i in rng.choice(len(ids), size, replace=False)]
        width = max(map(len, chosen))
        padded = np.zeros((size, width), dtype=np.int32)
        mask = np.zeros((size, width), dtype=np.float32)
        for j, row in enumerate(chosen):
            padded[j, : len(row)] = row
            mask[j, : len(row)] = 1.0
        yield mx.array(padded), mx.array(mask[:, 1:])


def main(model_path, out, iters=10):
    folder, out = Path(model_path).parent, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    teacher, _ = load(str(folder / "teacher"))
    teacher.freeze()
    teacher.eval()
    student, tokenizer = load(str(model_path))
    student.freeze()
    linear_to_lora_layers(student, -1, {"rank": 4, "scale": 4.0, "dropout": 0.0})
    student.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    student.train()
    print(f"{get_total_parameters(teacher)} parameters teach", file=sys.stderr)

    optimizer = optim.AdamW(learning_rate=optim.cosine_decay(2e-3, iters))
    step = nn.value_and_grad(student, distillation_loss)
    losses, parts, tokens = [], [], 0
    stream = batches(folder / "data" / "train.jsonl", tokenizer, 3, seed=11)
    begin = time.perf_counter()
    for _, (batch, mask) in zip(range(iters), stream):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        teacher_logits = mx.stop_gradient(teacher(inputs))
        (loss, kl, ce), grads = step(student, teacher_logits, inputs, targets, mask)
        optimizer.update(student, grads)
        mx.eval(student.parameters(), optimizer.state, loss)
        losses.append(loss.item())
        parts.append([kl.item(), ce.item()])
        tokens += int(mask.sum().item())
    seconds = time.perf_counter() - begin
    mx.save_safetensors(
        str(out / "student.safetensors"), dict(tree_flatten(student.trainable_parameters()))
    )
    return {"losses": losses, "more": parts, "tokens": tokens, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
