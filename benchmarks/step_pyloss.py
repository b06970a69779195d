"""One training step of SmolLM2-135M with pyloss: MODEL BATCH TOKENS CHECKPOINT STEPS lora|dora; prints JSON."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from common import peak_gb

import pyloss


def main(path: str, batch: int, tokens: int, checkpoint: int, steps: int, kind: str) -> None:
    model = pyloss.load_model(path)
    base = sum(weight.nbytes for weight in model.stored().values())
    pyloss.linear_to_lora_layers(model, -1, {"rank": 8, "scale": 2.0}, use_dora=kind == "dora")
    model.train().set_grad_checkpoint(bool(checkpoint))
    optimizer = pyloss.optim.AdamW(1e-4)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (batch, tokens + 1)).astype(np.int32)
    lengths = np.full((batch, 2), (0, tokens + 1), np.int32)
    step = pyloss.nn.value_and_grad(model, pyloss.tuner.default_loss)
    best = float("inf")
    for _ in range(steps):
        begin = time.perf_counter()
        (loss, _), grads = step(model, ids, lengths)
        optimizer.update(model, grads)
        best = min(best, time.perf_counter() - begin)
    found = {"tokens_per_s": batch * tokens / best, "peak_gb": peak_gb(), "base_gb": base / 1e9, "loss": float(loss)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6])
