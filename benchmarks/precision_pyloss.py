"""The effect of a precision on training: MODEL STEPS SEEDS; prints JSON.

Trains LoRA on the example data in each precision and from each seed, with everything else equal,
and compares the gradients with the adapter that float32 trained. Without steps: the validation
losses before training alone.
"""

from __future__ import annotations

import json
import sys
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import step_work

import pyloss
from pyloss.runtime.precision import PRECISIONS, matmul_precision
from pyloss.tuner.losses import default_loss

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
REPORTS = 5
#: int8 is for what gets no gradients
TRAINED = [name for name in PRECISIONS if name != "int8"]
BATCHES = 8  # number of gradients compared


class Losses(pyloss.TrainingCallback):
    def __init__(self) -> None:
        self.train: list[float] = []
        self.valid: list[float] = []

    def on_train_loss_report(self, train_info: dict) -> None:
        self.train.append(float(train_info["train_loss"]))

    def on_val_loss_report(self, val_info: dict) -> None:
        self.valid.append(float(val_info["val_loss"]))


def trained(path: str, steps: int, precision: str, seed: int):
    """The model after `steps` steps, its training data, and its losses."""
    pyloss.random.seed(seed)
    model, tokenizer = pyloss.load(path)
    train, valid, _ = pyloss.load_dataset(DATA, tokenizer, mask_prompt=True)
    pyloss.linear_to_lora_layers(model, -1, {"rank": step_work.RANK, "scale": step_work.SCALE})
    every = max(steps // REPORTS, 1)
    run = {"iters": steps, "val_batches": -1, "steps_per_report": every, "steps_per_eval": steps}
    arguments = pyloss.TrainingArgs(
        **run,
        adapter_file=None,
        keep_best=False,
        seed=seed,
        progress=False,
        matmul_precision=precision,
    )
    losses = Losses()
    pyloss.train(model, pyloss.optim.AdamW(5e-4), train, valid, arguments, training_callback=losses)
    return model, train, losses


def gradient_errors(model, data) -> tuple[dict[str, float], float]:
    """The relative difference of gradients: others to float32, and one batch to the next."""
    step, found = pyloss.nn.value_and_grad(model, default_loss), {}
    for precision in TRAINED:
        with matmul_precision(precision):
            batches = islice(pyloss.iterate_batches(data, 4, 2048, loop=True, seed=1), BATCHES)
            found[precision] = [
                np.concatenate([g.ravel() for g in step(model, *batch)[1].values()])
                for batch in batches
            ]
    exact = found.pop("float32")

    def difference(pairs) -> float:
        return float(np.mean([np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in pairs]))

    errors = {name: difference(zip(exact, f, strict=True)) for name, f in found.items()}
    return errors, difference(pairwise(exact))


def first_losses(path: str) -> dict[str, float]:
    """The mean loss of a target of the validation data in each precision, without an adapter."""
    model, tokenizer = pyloss.load(path)
    _, valid, _ = pyloss.load_dataset(DATA, tokenizer, mask_prompt=True)
    found = {}
    for precision in PRECISIONS:
        with matmul_precision(precision):
            found[precision] = float(pyloss.evaluate(model, valid, 4, -1))
    return found


def main(path: str, steps: int, seeds: int = 1) -> None:
    if not steps:
        print(json.dumps(first_losses(path)))
        return
    answer: dict = {"steps": steps, "train": {}, "valid": {}}
    for precision in reversed(TRAINED):  # float32 last: its adapter is compared
        runs = [trained(path, steps, precision, seed) for seed in range(seeds)]
        model, data, _ = runs[0]
        answer["train"][precision] = [losses.train for _, _, losses in runs]
        answer["valid"][precision] = [losses.valid for _, _, losses in runs]
    answer["errors"], answer["between_batches"] = gradient_errors(model, data)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
