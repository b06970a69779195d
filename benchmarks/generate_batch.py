"""Generates many sequences at a time with pyloss: MODEL PROMPT_TOKENS NEW_TOKENS SEQUENCES...
[--precision NAME]

Prints generated tokens/s for each number of sequences as JSON: of generating alone, and with the
time of reading the prompts.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

import pyloss
from pyloss import BatchGenerator, SamplingParams


class NoTokenizer:
    """Never ends an answer, and has no text."""

    eos_token_ids = frozenset[int]()

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return ""


def main(path: str, prompt: int, new: int, counts: list[int], rounds: int = 2) -> None:
    model = pyloss.load_model(path)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.vocab_size, (max(counts), prompt))
    best = {count: [0.0, 0.0] for count in counts}
    for _ in range(rounds):
        for count in counts:
            generator = BatchGenerator(model, NoTokenizer(), batch_size=count)
            begin = time.perf_counter()
            for _ in generator.run(prompts[:count], SamplingParams(new)):
                pass
            with_prompts = count * new / (time.perf_counter() - begin)
            found = (generator.stats.generation_tps, with_prompts)
            best[count] = [max(pair) for pair in zip(best[count], found, strict=True)]
    print(json.dumps({count: dict(zip(NAMES, pair, strict=True)) for count, pair in best.items()}))


NAMES = ("generating", "with_prompts")

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for name in ("prompt", "new"):
        parser.add_argument(name, type=int)
    parser.add_argument("counts", type=int, nargs="+")
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    pyloss.set_matmul_precision(options.precision)
    main(options.model, options.prompt, options.new, options.counts)
