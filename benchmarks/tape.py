"""`make bench-tape`: measures the tape of experiments beside torch: attention, NumPy's functions,
optimizers, and the share of Python in a small model's step.

    python benchmarks/tape.py [--quick]

The libraries take turns, some calls each, and the best call counts. A library's threads spin for a
while after its last call, so each turn waits first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import THREADS, machine, table

import pyloss
from pyloss import _core, nn, optim

ATTENTION = [
    (32, 81, heads, size) for heads, size in ((4, 32), (8, 64), (16, 32))
] + [(8, 512, heads, size) for heads, size in ((4, 64), (8, 64), (16, 32))]  # fmt: skip
ROWS, VOCABULARY = 192, 49152
HIDDEN = 128
TURN_SECONDS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and runs")
    quick = parser.parse_args().quick
    pyloss.set_num_threads(THREADS)
    torch.set_num_threads(THREADS)
    print(machine(), flush=True)
    rounds = 1 if quick else 4
    rows = [attention(shape, rounds) for shape in (ATTENTION[:1] if quick else ATTENTION)]
    rows.append(composed(8 if quick else ROWS, rounds))
    header = ["forward and gradient", "pyloss, ms", "torch eager, ms", "torch / pyloss"]
    print(f"\n{table(header, rows)}\n", flush=True)
    print(table(["update of 10 M numbers", "ms", "time / AdamW"], updates(rounds)), flush=True)
    print(f"\n{table(['small model, a step', 'ms', 'outside of the core'], [small_step(rounds)])}")


def in_turns(rounds: int, *functions: Callable[[], Any]) -> list[float]:
    """The shortest time of each in milliseconds."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            time.sleep(0.3)
            function()
            turn, calls = time.perf_counter(), 0
            while calls < 3 or time.perf_counter() - turn < TURN_SECONDS:
                begin = time.perf_counter()
                function()
                best[i] = min(best[i], time.perf_counter() - begin)
                calls += 1
    return [1e3 * seconds for seconds in best]


def _row(name: str, ours: float, theirs: float) -> list[str]:
    return [name, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}"]


def attention(shape: tuple[int, int, int, int], rounds: int) -> list[str]:
    """Bidirectional attention beside torch's scaled_dot_product_attention."""
    batch, tokens, heads, size = shape
    rng = np.random.default_rng(0)
    q, k, v, upstream = (rng.standard_normal(shape).astype(np.float32) for _ in range(4))
    ours = pyloss.value_and_grad(
        lambda q, k, v: np.sum(pyloss.attention(q, k, v) * upstream), (0, 1, 2)
    )
    leaves = [torch.tensor(np.swapaxes(x, 1, 2).copy(), requires_grad=True) for x in (q, k, v)]
    weights = torch.tensor(np.swapaxes(upstream, 1, 2).copy())

    def theirs() -> None:
        for leaf in leaves:
            leaf.grad = None
        mixed = torch.nn.functional.scaled_dot_product_attention(*leaves)
        (mixed * weights).sum().backward()

    name = f"attention, {batch} x {tokens}, {heads} heads of {size}"
    return _row(name, *in_turns(rounds, lambda: ours(q, k, v), theirs))


def composed(rows: int, rounds: int, share: float = 0.1) -> list[str]:
    """The skewed KL divergence, written in NumPy's functions and in torch's."""
    rng = np.random.default_rng(0)
    q, p = (rng.standard_normal((rows, VOCABULARY)).astype(np.float32) for _ in range(2))

    def skewed(q: Any, p: Any) -> Any:
        log_p, log_q = pyloss.log_softmax(p), pyloss.log_softmax(q)
        mixed = np.log((1 - share) * np.exp(log_p) + share * np.exp(log_q))
        return np.mean(np.sum(np.exp(log_p) * (log_p - mixed), -1))

    leaf, known = torch.tensor(q, requires_grad=True), torch.tensor(p)

    def theirs() -> None:
        leaf.grad = None
        log_p, log_q = torch.log_softmax(known, -1), torch.log_softmax(leaf, -1)
        mixed = torch.log((1 - share) * log_p.exp() + share * log_q.exp())
        (log_p.exp() * (log_p - mixed)).sum(-1).mean().backward()

    ours = pyloss.value_and_grad(skewed)
    name = f"skewed KL of primitives, {rows} x {VOCABULARY}"
    return _row(name, *in_turns(rounds, lambda: ours(q, p), theirs))


def updates(rounds: int) -> list[list[str]]:
    """AdamW and AdamATan2 of the core."""
    rng = np.random.default_rng(0)
    lines, known = [], 0.0
    for kind in (optim.AdamW, optim.AdamATan2):
        module = nn.Linear(2500, 4000, bias=False)
        gradients = {"weight": rng.standard_normal((4000, 2500)).astype(np.float32)}
        optimizer = kind(1e-4)

        def update(optimizer=optimizer, module=module, gradients=gradients) -> None:
            optimizer.update(module, gradients)

        (ms,) = in_turns(rounds, update)
        known = known or ms
        lines.append([kind.__name__, f"{ms:.1f}", f"{ms / known:.2f}"])
    return lines


class Block(nn.Module):
    """A block of HRM's kind: attention over all tokens and a gated unit, each before its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.MultiHeadAttention(HIDDEN, 4, rope=nn.RoPE(HIDDEN // 4))
        self.gate, self.up = (nn.Linear(HIDDEN, 4 * HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * HIDDEN, HIDDEN, bias=False)
        self.norm = nn.RMSNorm(HIDDEN, affine=False)

    def __call__(self, x: Any) -> Any:
        x = self.norm(x + self.mixer(x))
        return self.norm(x + self.down(pyloss.ops.swiglu(self.gate(x), self.up(x))))


def small_step(rounds: int) -> list[str]:
    """A training step of four blocks over 32 sequences of 81 tokens."""
    model = nn.Sequential(
        nn.Embedding(11, HIDDEN), *(Block() for _ in range(4)), nn.Linear(HIDDEN, 11)
    )
    optimizer, rng = optim.AdamATan2(1e-4), np.random.default_rng(0)
    ids, labels = (rng.integers(0, 11, (32, 81)) for _ in range(2))
    gradients = nn.value_and_grad(
        model, lambda: pyloss.stablemax_cross_entropy(model(ids), labels).mean()
    )

    def step() -> None:
        optimizer.update(model, gradients()[1])

    (ms,) = in_turns(rounds, step)
    shares = []
    for _ in range(3 * rounds):
        _core.profile(True)
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
        shares.append(1 - sum(row[1] for row in _core.profile(False).values()) / seconds)
    return [f"hidden {HIDDEN}, 4 blocks, 32 x 81 tokens", f"{ms:.1f}", f"{min(shares):.1%}"]


if __name__ == "__main__":
    main()
