"""Conversations of very different lengths with masked prompts, made of this project's pages.

All libraries read the same token ids from one file.
"""

from __future__ import annotations

import numpy as np
from bases import MODEL, documents
from common import WORK

import pyloss
from pyloss.tuner.datasets import ChatDataset

SHORTEST, LONGEST = 20, 1000


def conversations(count: int, seed: int = 0) -> list[dict]:
    """Records of mlx-lm's chat format; their lengths in tokens are log-uniform in the bounds."""
    words, rng, place, records = documents().split(), np.random.default_rng(seed), 0, []
    for share in rng.permutation((np.arange(count) + 0.5) / count):
        tokens = SHORTEST * (LONGEST / SHORTEST) ** share
        # 12 tokens of the template, and 2.2 tokens per word of this text
        size = max(int((tokens - 12) / 2.2), 2)
        cut = min(max(round(size * rng.uniform(0.2, 0.8)), 1), size - 1)
        some = [words[(place + i) % len(words)] for i in range(size)]
        place += size
        turns = (
            ("system", ""),
            ("user", " ".join(some[:cut])),
            ("assistant", " ".join(some[cut:])),
        )
        records.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return records


def chat_file(count: int) -> str:
    """An .npz of `tokens`, the conversations end to end, and `lengths` int32 [count, 2].

    A row of `lengths` is (first target token, number of tokens).
    """
    _, tokenizer = pyloss.load(MODEL)
    data = ChatDataset(conversations(count), tokenizer, mask_prompt=True)
    samples = [data.sample(i).cut(LONGEST) for i in range(count)]
    path = WORK / f"chat-{count}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.array([(sample.offset, len(sample.tokens)) for sample in samples], np.int32)
    np.savez(
        path,
        tokens=np.concatenate([sample.tokens for sample in samples]).astype(np.int32),
        lengths=lengths,
    )
    return str(path)
