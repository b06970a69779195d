"""Long runs of `pyloss.train`: growth MODEL ACCUMULATION... | steps COUNT; prints JSON.

growth: tokens/s of updates over ACCUMULATION batches of 4 x 256 tokens, [[batches, tokens/s], ...].
steps: resident memory after each tenth of COUNT steps of a tiny model, {"<steps>": MB}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np
from common import resident_gb

import pyloss
from pyloss.models.config import ModelConfig
from pyloss.models.synthetic import random_model


def run(model, iters: int, batch: np.ndarray, on_report, **settings) -> None:
    """Trains on one batch repeatedly; `on_report(info)` gets the reports of the run."""
    lengths = np.full((len(batch), 2), (0, batch.shape[1]), np.int32)

    class Report(pyloss.TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            on_report(info)

    def batches(
        dataset: list, batch_size: int, max_seq_length: int, loop: bool = False
    ) -> Iterator:
        while True:
            yield batch, lengths

    pyloss.linear_to_lora_layers(model, -1, {"rank": 8, "scale": 2.0})
    args = pyloss.TrainingArgs(
        iters=iters, adapter_file=None, progress=False, keep_best=False, **settings
    )
    pyloss.train(
        model,
        pyloss.optim.AdamW(1e-4),
        [0],
        None,
        args,
        iterate_batches=batches,
        training_callback=Report(),
    )


def tokens(model, rows: int, length: int) -> np.ndarray:
    return (
        np.random.default_rng(0).integers(0, model.vocab_size, (rows, length + 1)).astype(np.int32)
    )


def growth(path: str, accumulation: list[int]) -> list[tuple[int, float]]:
    found = []
    for count in accumulation:
        model, speeds = pyloss.load_model(path), []
        settings = {"grad_accumulation_steps": count, "steps_per_report": count}
        # With few batches the first update still allocates buffers, so three updates run.
        iters = count * (3 if count < 8 else 1)
        run(
            model,
            iters,
            tokens(model, 4, 256),
            lambda info: speeds.append(info["tokens_per_second"]),
            **settings,
        )
        found.append((count, max(speeds)))
    return found


def steps(count: int) -> dict[int, float]:
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model, resident = random_model(ModelConfig("llama", tie_word_embeddings=True, **sizes)), {}

    def note(info: dict) -> None:
        resident[info["iteration"]] = resident_gb() * 1e3

    run(model, count, tokens(model, 2, 16), note, steps_per_report=max(count // 10, 1))
    return resident


if __name__ == "__main__":
    work, *arguments = sys.argv[1:]
    print(
        json.dumps(
            growth(arguments[0], list(map(int, arguments[1:])))
            if work == "growth"
            else steps(int(arguments[0]))
        )
    )
