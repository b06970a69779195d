"""Training of one rank or of the ranks of mpirun with pyloss: prints the seconds of the best step.

    mpirun -n 2 python benchmarks/distributed_pyloss.py MODEL --samples 8 --tokens 256

`--samples` are those of all ranks in an update. Rank 0 prints JSON: `step_s`, `tokens_per_s`,
`peak_gb` of all ranks, `private_gb` of one, `exchanged_mb` of each update.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from bases import load

from pyloss import optim
from pyloss.distributed import init
from pyloss.runtime.memory import mapped_memory, peak_memory
from pyloss.runtime.precision import PRECISIONS
from pyloss.tuner.callbacks import TrainingCallback
from pyloss.tuner.trainer import TrainingArgs, train
from pyloss.tuner.utils import add_adapters, unfreeze_layers


class Steps(TrainingCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak = 0.0

    def on_train_loss_report(self, train_info: dict) -> None:
        self.seconds.append(1 / train_info["iterations_per_second"])
        self.peak = train_info["peak_memory"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="train all weights of the layers")
    parser.add_argument("--shard-optimizer", action="store_true")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    options = parser.parse_args()
    group = init()
    model = load(options.model)
    if options.full:
        unfreeze_layers(model, -1)
    else:
        add_adapters(model, "lora", -1, {"rank": 8, "scale": 2.0, "dropout": 0.0})
    rng = np.random.default_rng(0)
    rows = rng.integers(0, model.vocab_size, (options.samples, options.tokens + 1))
    args = TrainingArgs(
        batch_size=options.samples // group.size(),
        iters=options.iters,
        steps_per_report=1,
        val_batches=0,
        max_seq_length=options.tokens + 1,
        adapter_file=None,
        progress=False,
        shard_optimizer=options.shard_optimizer,
        matmul_precision=options.precision,
    )
    steps = Steps()
    data = [(row.tolist(), 1) for row in rows]
    train(model, optim.AdamW(1e-4), data, None, args, training_callback=steps, group=group)
    private = max(group.all_gather(peak_memory() - min(mapped_memory(), peak_memory())))
    if group.rank() == 0:
        best = min(steps.seconds[1:])
        trained = sum(array.nbytes for array in model.trainable_parameters().values())
        found = {
            "step_s": best,
            "tokens_per_s": options.samples * options.tokens / best,
            "peak_gb": steps.peak,
            "private_gb": private / 1e9,
            "exchanged_mb": trained / 1e6,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
