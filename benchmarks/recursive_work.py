"""Shared by the two sides of recursive.py: settings of the models, a batch, the loop of updates.

They print JSON: `update_s` (the best), `first_s` (the first update, which may compile kernels),
`peak_gb`, and `loss` of the first update, which both sides begin with the same weights. With
--products instead the speed of plain products of the layers' shapes, `gflops` by precision.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import peak_gb

import pyloss
from pyloss.recursive import HRM, TRM, RecursiveConfig

BATCH, RATE, DECAY = 32, 1e-4, 0.1
_SUDOKU = {"seq_len": 81, "vocab_size": 11, "batch_size": BATCH, "halt_exploration_prob": 0.0}
_HRM = _SUDOKU | {"H_cycles": 2, "L_cycles": 2, "H_layers": 4, "L_layers": 4}
_TRM = _SUDOKU | {"H_cycles": 3, "L_cycles": 6, "L_layers": 2}
#: the kind and the settings of the measured models
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hrm-256": ("hrm", _HRM | {"hidden_size": 256, "num_heads": 4}),
    "hrm-512": ("hrm", _HRM | {"hidden_size": 512, "num_heads": 8}),
    "trm-256": ("trm", _TRM | {"hidden_size": 256, "num_heads": 4}),
    "trm-512": ("trm", _TRM | {"hidden_size": 512, "num_heads": 8}),
    # the network of TRM's paper for Sudoku, with 16 tokens of its embedding of puzzles
    "trm-paper": (
        "trm",
        _TRM
        | {"hidden_size": 512, "num_heads": 8, "mlp_t": True, "pos_encodings": "none"}
        | {"puzzle_emb_ndim": 512, "puzzle_emb_len": 16},
    ),
}


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of a side."""
    found = argparse.ArgumentParser(description=description.split("\n")[0])
    found.add_argument("case", choices=CASES)
    found.add_argument("--passes", type=int, default=3, help="updates after the first")
    found.add_argument("--products", action="store_true", help="measure plain products instead")
    return found


def config_of(case: str, **changes: Any) -> tuple[str, RecursiveConfig]:
    """The kind of a model, and its settings."""
    kind, settings = CASES[case]
    return kind, RecursiveConfig(**settings | changes)


def model_of(kind: str, config: RecursiveConfig) -> HRM | TRM:
    """The model with its first weights, the same in every process."""
    pyloss.random.seed(0)
    return {"hrm": HRM, "trm": TRM}[kind](config)


def batch_of(config: RecursiveConfig) -> dict[str, np.ndarray]:
    """Random puzzles and answers; every cell is predicted."""
    rng, shape = np.random.default_rng(0), (config.batch_size, config.seq_len)
    names = ("inputs", "labels")
    batch = {name: rng.integers(0, config.vocab_size, shape).astype(np.int32) for name in names}
    if config.puzzle_emb_ndim:
        batch["puzzle_identifiers"] = np.zeros(config.batch_size, np.int32)
    return batch


def layer_shapes(config: RecursiveConfig) -> list[tuple[int, int, int]]:
    """The products of a block's MLP over hidden states: rows, inputs, outputs."""
    rows, size = config.batch_size * config.tokens, config.hidden_size
    inner = config.inner_size(size)
    return [(rows, size, 2 * inner), (rows, inner, size)]


def measure(options: argparse.Namespace, update: Callable[[], float]) -> None:
    """Runs the updates and prints the best of those after the first."""

    def seconds() -> tuple[float, float]:
        begin = time.perf_counter()
        loss = update()
        return time.perf_counter() - begin, loss

    first, loss = seconds()
    best = min(seconds()[0] for _ in range(options.passes))
    print(json.dumps({"update_s": best, "first_s": first, "peak_gb": peak_gb(), "loss": loss}))
