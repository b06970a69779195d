"""Updates of a recursive model with pyloss: CASE --precision NAME.

The flags are recursive_work's and --precision. --products also prints `gflop`, the matrix products
of an update.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import recursive_work
import step_limits
from common import THREADS

import pyloss
from pyloss import measuring, nn, optim
from pyloss.recursive import RecursiveConfig
from pyloss.recursive.puzzles import without_puzzles
from pyloss.runtime.precision import matmul_precision


def update_of(kind: str, config: RecursiveConfig) -> Callable[[], float]:
    """A function that does one update, from the carry that the last one left."""
    model = recursive_work.model_of(kind, config)
    head = pyloss.ACTLossHead(model, "stablemax_cross_entropy").train()
    optimizer = optim.AdamW(
        recursive_work.RATE, weight_decay=recursive_work.DECAY, bias_correction=True
    )
    signs = optim.SparseSignSGD(recursive_work.RATE, weight_decay=recursive_work.DECAY)
    batch = recursive_work.batch_of(config)
    carry = head.initial_carry(batch)

    def step(carry, batch):
        carry, loss, _, _, _ = head(carry=carry, batch=batch)
        return loss / config.batch_size, carry

    both = nn.value_and_grad(head, step, has_aux=True)

    def update() -> float:
        nonlocal carry
        (loss, carry), grads = both(carry, batch)
        grads, puzzles = without_puzzles(grads)
        optimizer.update(head, grads)
        for gradient in puzzles.values():
            model.puzzle_emb.update(signs, gradient)
        return float(loss)

    return update


def products_of(kind: str, config: RecursiveConfig) -> float:
    """The GFLOP of the matrix products of an update, without attention's.

    From then on the core's calls are counted, so nothing is measured in this process any more.
    """
    step_limits.count_work()
    step_limits.WORK = work = step_limits.Work()
    update_of(kind, config)()
    return sum(n for name, n in work.flop.items() if not name.startswith("attention")) / 1e9


def product_speeds(config: RecursiveConfig) -> dict[str, float]:
    """GFLOP/s of the fastest plain product of a layer's shape, by precision."""
    found = {}
    for precision in ("float32", "bfloat16"):
        with matmul_precision(precision):
            found[precision] = max(
                measuring.product_speed(np.ones((outputs, inputs), np.float32), rows) / 1e9
                for rows, inputs, outputs in recursive_work.layer_shapes(config)
            )
    return found


def main() -> None:
    parser = recursive_work.parser(__doc__)
    parser.add_argument(
        "--precision",
        default="float32",
        help="precision of products: float32, bfloat16 or mixed",
    )
    options = parser.parse_args()
    kind, config = recursive_work.config_of(options.case)
    pyloss.set_num_threads(THREADS)
    pyloss.set_matmul_precision(options.precision)
    if options.products:
        speeds = product_speeds(config)
        print(json.dumps({"gflops": speeds, "gflop": products_of(kind, config)}))
    else:
        recursive_work.measure(options, update_of(kind, config))


if __name__ == "__main__":
    main()
