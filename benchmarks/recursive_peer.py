"""Updates of a recursive model with torch: CASE [--dtype NAME] [--compile].

The flags are recursive_work's, --dtype and --compile. The model is that of tests/parity, which is
written from the papers. In bfloat16 its parameters are, too: the authors keep them in float32 and
convert them at each use, which takes longer. --compile compiles a level, which the recursion
repeats: the whole step, some 40 blocks in a row, compiles for many minutes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial

import recursive_work
import torch
from common import HERE, THREADS, best_of

from pyloss.recursive import RecursiveConfig, state_dict

sys.path.insert(0, str(HERE.parent / "tests" / "parity"))

from recursive_torch import Recursive, as_torch


def update_of(
    kind: str, config: RecursiveConfig, dtype: torch.dtype, compiled: bool
) -> Callable[[], float]:
    """A function that does one update, from the carry that the last one left."""
    theirs = Recursive(config, kind, dtype=dtype)
    first = state_dict(recursive_work.model_of(kind, config), "model.")
    with torch.no_grad():
        for name, array in first.items():
            theirs.p[name].copy_(torch.from_numpy(array))
    # first states are buffers
    trained = [p for name, p in theirs.p.named_parameters() if not name.endswith("_init")]
    optimizer = torch.optim.AdamW(
        trained, recursive_work.RATE, weight_decay=recursive_work.DECAY, fused=True
    )
    batch = as_torch(recursive_work.batch_of(config))
    carry = theirs.begin(batch)
    if compiled:
        theirs.level = torch.compile(theirs.level, dynamic=False)

    def update() -> float:
        nonlocal carry
        carry, loss = theirs.step(carry, batch)
        loss = loss / config.batch_size
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return update


def product_speeds(config: RecursiveConfig, calls: int = 10) -> dict[str, float]:
    """GFLOP/s of the fastest torch.mm of a layer's shape, by precision."""
    found = {}
    for name in ("float32", "bfloat16"):
        speeds = []
        for rows, inputs, outputs in recursive_work.layer_shapes(config):
            x, w = (
                torch.randn(size, dtype=getattr(torch, name))
                for size in ((rows, inputs), (outputs, inputs))
            )
            y = torch.empty(rows, outputs, dtype=x.dtype)
            (seconds,) = best_of(calls, partial(torch.mm, x, w.t(), out=y))
            speeds.append(2 * rows * inputs * outputs / seconds / 1e9)
        found[name] = max(speeds)
    return found


def main() -> None:
    parser = recursive_work.parser(__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    options = parser.parse_args()
    kind, config = recursive_work.config_of(options.case)
    torch.set_num_threads(THREADS)
    if options.products:
        print(json.dumps({"gflops": product_speeds(config)}))
        return
    dtype = getattr(torch, options.dtype)
    recursive_work.measure(options, update_of(kind, config, dtype, options.compile))


if __name__ == "__main__":
    main()
