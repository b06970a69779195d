"""Generates many sequences at a time with llama.cpp: FILE PROMPT_TOKENS NEW_TOKENS SEQUENCES...

Its server decodes the parallel requests in one batch (n_parallel slots). Prints generated tokens/s
for each number of sequences as JSON, with the time of reading the prompts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xllamacpp
from common import THREADS
from generate_llama import VOCABULARY


def speed(path: str, prompt: int, new: int, count: int) -> float:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.verbosity = 2 * count * (prompt + new), count, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (count, prompt)).tolist()
    server = xllamacpp.Server(params)

    def answer(ids: list[int]) -> int:
        request = {
            "prompt": ids,
            "max_tokens": new,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        return int(server.handle_completions(request)["timings"]["predicted_n"])

    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            tokens = sum(pool.map(answer, prompts))
        best = max(best, tokens / (time.perf_counter() - begin))
    return best


def main(path: str, prompt: int, new: int, counts: list[int]) -> None:
    found = {count: {"with_prompts": speed(path, prompt, new, count)} for count in counts}
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # skips waiting for the servers' threads


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [int(n) for n in sys.argv[4:]])
