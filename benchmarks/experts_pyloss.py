"""A mixture of experts and a dense layer with the same active work, with LoRA: HIDDEN INNER RUNS.

Prints milliseconds as JSON, forward and backward over 1024 tokens: 64 experts of the inner size, 8
active per token, and an MLP of 8 times the inner size.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from common import THREADS, best_of

import pyloss
from pyloss import nn
from pyloss.models.layers import MLP
from pyloss.models.moe import SparseMoe, SwitchGLU
from pyloss.tuner.adapters.registry import adapter_class

TOKENS, EXPERTS, ACTIVE, RANK = 1024, 64, 8, 8


def layers(hidden: int, inner: int):
    """The two layers; `lora_b` is random, as after some steps."""

    def adapted(layer):
        adapter = adapter_class(layer).from_base(layer, r=RANK, scale=2.0)
        adapter.lora_b[...] = np.random.default_rng(0).standard_normal(adapter.lora_b.shape) * 0.02
        return adapter

    def linear(rows, cols):
        return adapted(nn.Linear(cols, rows, bias=False))

    def switch(rows, cols):
        return adapted(nn.SwitchLinear(cols, rows, EXPERTS, bias=False))

    dense = MLP(
        linear(ACTIVE * inner, hidden),
        linear(ACTIVE * inner, hidden),
        linear(hidden, ACTIVE * inner),
    )
    experts = SwitchGLU(switch(inner, hidden), switch(inner, hidden), switch(hidden, inner))
    gate = nn.Linear(hidden, EXPERTS, bias=False)
    gate.freeze()
    return {"dense": dense, "experts": SparseMoe(gate, experts, ACTIVE, normalize=True)}


def main(hidden: int, inner: int, runs: int) -> None:
    pyloss.set_num_threads(THREADS)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((TOKENS, hidden), dtype=np.float32) for _ in range(2))
    before = nn.RMSNorm(hidden)  # trained, so that the layer's input needs a gradient

    def step(layer):
        model = nn.Module()
        model.before, model.layer = before, layer
        return lambda: nn.value_and_grad(model, lambda: (layer(before(x)) * dy).sum())()

    names, steps = zip(
        *((name, step(layer)) for name, layer in layers(hidden, inner).items()), strict=True
    )
    print(
        json.dumps(
            {
                name: 1e3 * seconds
                for name, seconds in zip(names, best_of(runs, *steps), strict=True)
            }
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
