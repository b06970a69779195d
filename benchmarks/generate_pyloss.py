"""Reads a prompt and generates with pyloss: MODEL PROMPT_TOKENS NEW_TOKENS [PRECISION].

Prints tokens/s as JSON.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

import pyloss
from pyloss.generation import generate_tokens


def main(path: str, prompt: int, new: int, precision: str) -> None:
    pyloss.set_matmul_precision(precision)
    model = pyloss.load_model(path)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, prompt)
    best_prompt = best_token = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        tokens = generate_tokens(model, ids)
        next(tokens)
        best_prompt = min(best_prompt, time.perf_counter() - begin)
        begin = time.perf_counter()
        for _ in range(new):
            next(tokens)
        best_token = min(best_token, (time.perf_counter() - begin) / new)
    print(json.dumps({"prompt_tokens_per_s": prompt / best_prompt, "tokens_per_s": 1 / best_token}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *(sys.argv[4:] or ["float32"]))
