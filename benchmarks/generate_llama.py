"""Reads a prompt and generates with llama.cpp: FILE PROMPT_TOKENS NEW_TOKENS.

One sequence, from a GGUF file. Prints tokens/s as JSON.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import xllamacpp
from common import THREADS

VOCABULARY = 49152


def main(path: str, prompt: int, new: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.verbosity = 2 * (prompt + new), -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    ids = np.random.default_rng(0).integers(0, VOCABULARY, prompt).tolist()
    request = {
        "prompt": ids,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    server = xllamacpp.Server(params)
    times = [server.handle_completions(request)["timings"] for _ in range(3)]
    best = {ours: max(t[theirs] for t in times) for ours, theirs in NAMES.items()}
    print("\n" + json.dumps(best), flush=True)
    os._exit(0)  # skips waiting for the server's threads


NAMES = {"prompt_tokens_per_s": "prompt_per_second", "tokens_per_s": "predicted_per_second"}

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
