"""Shared by the programs that measure steps: flags, batches, and the loop around a library's step.

They print JSON: `tokens_per_s` (without padding), `first_s` (the first step, which may compile
kernels), `peak_gb`, `base_gb` (the base's weights), `loss`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from common import peak_gb

RANK, SCALE, RATE = 8, 2.0, 1e-4


class Batch(NamedTuple):
    """`ids` int32 [B, T], padded with 0; `lengths` int32 [B, 2], (first target, tokens)."""

    ids: np.ndarray
    lengths: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens that have a next token; padding does not count."""
        return int((self.lengths[:, 1] - 1).sum())

    @property
    def padded(self) -> bool:
        return bool((self.lengths[:, 1] < self.ids.shape[1]).any())


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of a step."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add = parser.add_argument
    add("model")
    add("--kind", choices=("lora", "dora"), default="lora", help="kind of adapter")
    add("--checkpoint", action="store_true", help="recompute activations")
    add("--teacher", help="a model whose probabilities are the targets: KL, both at temperature 1")
    add("--evaluate", action="store_true", help="compute the loss without gradients")
    add("--batch", type=int, default=4, help="sequences")
    add("--tokens", type=int, default=256, help="tokens of each sequence, drawn at random")
    add("--chat", help="a file of chat.py: its conversations, --batch of them at a time")
    add("--grouped", action="store_true", help="batch conversations of similar length")
    add(
        "--passes",
        type=int,
        default=5,
        help="steps, or passes over the conversations; the best counts",
    )
    add(
        "--most-seconds",
        type=float,
        default=120,
        help="no further pass begins after so long, for programs that take minutes a step",
    )
    return parser


def batches(options: argparse.Namespace, vocabulary: int) -> list[Batch]:
    """The batches of one pass."""
    if not options.chat:
        ids = (
            np.random.default_rng(0)
            .integers(0, vocabulary, (options.batch, options.tokens + 1))
            .astype(np.int32)
        )
        return [Batch(ids, np.full((options.batch, 2), (0, options.tokens + 1), np.int32))]
    stored = np.load(options.chat)
    lengths = stored["lengths"]
    rows = np.split(stored["tokens"], np.cumsum(lengths[:, 1])[:-1])
    order = np.argsort(lengths[:, 1], kind="stable") if options.grouped else np.arange(len(rows))
    found = []
    for begin in range(0, len(rows), options.batch):
        some = order[begin : begin + options.batch]
        ids = np.zeros((len(some), lengths[some, 1].max()), np.int32)
        for line, row in zip(ids, some, strict=True):
            line[: lengths[row, 1]] = rows[row]
        found.append(Batch(ids, lengths[some]))
    return found


def measure(
    options: argparse.Namespace, vocabulary: int, base_bytes: int, step: Callable[[Batch], float]
) -> None:
    """Runs the passes and prints the best. If there are several batches, the smallest warms up."""
    work = batches(options, vocabulary)

    def seconds(some: list[Batch]) -> tuple[float, float]:
        begin = time.perf_counter()
        for batch in some:
            loss = step(batch)
        return time.perf_counter() - begin, loss

    first = seconds([min(work, key=lambda batch: batch.ids.size)])[0] if len(work) > 1 else None
    begin, passes = time.perf_counter(), [seconds(work)]
    while len(passes) < options.passes and time.perf_counter() - begin < options.most_seconds:
        passes.append(seconds(work))
    best, loss = min(passes)[0], passes[-1][1]
    first = passes[0][0] if first is None else first
    speed = sum(batch.tokens for batch in work) / best
    print(
        json.dumps(
            {
                "tokens_per_s": speed,
                "first_s": first,
                "peak_gb": peak_gb(),
                "base_gb": base_bytes / 1e9,
                "loss": loss,
            }
        )
    )
