"""The speed and the error of the fused losses' `gradient_filter`: MODEL TOKENS RUNS FILTER...

Prints JSON, {"<text>": {"<filter>": {"kept", "speedup", "error", "cosine"}}}: the share of classes
kept, the speedup of loss and hidden gradient, and that gradient's relative error and cosine against
the exact one. The hidden states are the model's over TOKENS tokens of chats (the examples' data)
and of documentation (this project's pages).
"""

from __future__ import annotations

import json
import sys

import numpy as np
from bases import documents
from common import HERE, THREADS, best_of

import pyloss
from pyloss import _core


def texts(tokenizer) -> dict[str, list[int]]:
    """Token ids of each kind of text."""
    lines = (
        (HERE.parent / "examples" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    )
    chats = (tokenizer.apply_chat_template(json.loads(line)["messages"]) for line in lines[:100])
    return {
        "chat": [token for chat in chats for token in chat],
        "documentation": tokenizer.encode(documents()),
    }


def kept_share(function) -> float:
    """The share of classes that a call keeps; rows that need half or more of them keep all."""
    seen, counted = [], _core.columns_above

    def noted(x, bound, above) -> None:
        counted(x, bound, above)
        share = float(np.count_nonzero(above)) / len(above)
        seen.append(share if share < 0.5 else 1.0)

    _core.columns_above = noted
    try:
        function()
    finally:
        _core.columns_above = counted
    return float(np.mean(seen))


def measure(
    hidden: np.ndarray, weight, labels: np.ndarray, filters: list[float], runs: int
) -> dict[str, dict[str, float]]:
    def gradient(gradient_filter: float) -> np.ndarray:
        def loss(x):
            return pyloss.linear_cross_entropy(
                x, weight, labels, gradient_filter=gradient_filter, reduction="mean"
            )

        return pyloss.value_and_grad(loss)(hidden)[1]

    exact = gradient(0.0).astype(np.float64)
    times = best_of(runs, *(lambda value=value: gradient(value) for value in (0.0, *filters)))
    found = {}
    for value, seconds in zip(filters, times[1:], strict=True):
        near = gradient(value).astype(np.float64)
        found[str(value)] = {
            "kept": kept_share(lambda: gradient(value)),
            "speedup": times[0] / seconds,
            "error": float(np.linalg.norm(near - exact) / np.linalg.norm(exact)),
            "cosine": float((near * exact).sum() / np.linalg.norm(near) / np.linalg.norm(exact)),
        }
    return found


def main(path: str, tokens: int, runs: int, filters: list[float]) -> None:
    pyloss.set_num_threads(THREADS)
    model, tokenizer = pyloss.load(path)
    found = {}
    for kind, ids in texts(tokenizer).items():
        some = np.array(ids[: tokens + 1], np.int32)
        hidden = np.asarray(model.hidden(some[:-1], np.array([0, tokens], np.int32)))
        found[kind] = measure(hidden, model.head_weight, some[1:], filters, runs)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), list(map(float, sys.argv[4:])))
