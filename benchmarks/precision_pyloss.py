"""The effect of a precision on training; prints JSON.

Trains on the example data or on running text in each precision and from each seed, with everything
else equal, and compares the gradients of the adapter that float32 trained. Without steps: the
validation losses before training alone. A config.json trains a whole model from random weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import step_work
from layer_errors import layers_of, relative

import pyloss
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.synthetic import random_model
from pyloss.runtime.precision import PRECISIONS, matmul_precision
from pyloss.tuner.adapters.full import unfreeze_layers
from pyloss.tuner.losses import default_loss

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from distill import chunks, running_text  # noqa: E402

REPORTS = 5
TEXT_LINES = {"train": 1600, "valid": 160}
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


def datasets(name: str, tokenizer) -> tuple:
    """Training and validation data."""
    if name == "requests":
        return pyloss.load_dataset(EXAMPLES / "data", tokenizer, mask_prompt=True)[:2]
    lines = running_text()
    train, valid = TEXT_LINES.values()
    return tuple(chunks(some, tokenizer) for some in (lines[:train], lines[train : train + valid]))


def trained(options: argparse.Namespace, precision: str, seed: int):
    """The model after the steps, its training data, and its losses."""
    pyloss.random.seed(seed)
    whole = options.model.endswith(".json")
    model, tokenizer = pyloss.load(options.tokenizer if whole else options.model)
    train, valid = datasets(options.data, tokenizer)
    if whole:
        model = random_model(ModelConfig.from_hf(Path(options.model)))
    if whole:
        unfreeze_layers(model, -1)
    else:
        config = {"rank": step_work.RANK, "scale": step_work.SCALE}
        pyloss.tuner.utils.add_adapters(model, options.kind, -1, config)
    steps = options.steps
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
    optimizer = pyloss.optim.AdamW(5e-4)
    pyloss.train(model, optimizer, train, valid, arguments, training_callback=losses)
    return model, train, losses


def compared(model, data) -> tuple[dict[str, list], list]:
    """The gradients of some batches in each precision, as layers' vectors, and the batches."""
    step, found = pyloss.nn.value_and_grad(model, default_loss), {}
    batches = list(
        islice(pyloss.iterate_batches(data, 4, 2048, loop=True, seed=1), BATCHES),
    )
    for precision in TRAINED:
        with matmul_precision(precision):
            found[precision] = [layers_of(step(model, *batch)[1]) for batch in batches]
    return found, batches


def first_losses(options: argparse.Namespace) -> dict[str, float]:
    """The mean loss of a target of the validation data in each precision, without an adapter."""
    model, tokenizer = pyloss.load(options.model)
    valid = datasets(options.data, tokenizer)[1]
    found = {}
    for precision in PRECISIONS:
        with matmul_precision(precision):
            found[precision] = float(pyloss.evaluate(model, valid, 4, -1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model")
    add("--steps", type=int, default=0)
    add("--seeds", type=int, default=1, help="number of runs in each precision")
    add("--kind", choices=("lora", "dora"), default="lora", help="kind of adapter")
    add("--data", choices=("requests", "text"), default="requests")
    add("--tokenizer", help="the model whose tokenizer a config.json is trained with")
    add("--save", metavar="FOLDER", help="write float32's adapter, as PEFT's, and the batches")
    options = parser.parse_args()
    if not options.steps:
        print(json.dumps(first_losses(options)))
        return
    answer: dict = {"steps": options.steps, "train": {}, "valid": {}}
    for precision in reversed(TRAINED):  # float32 last: its adapter is compared
        runs = [trained(options, precision, seed) for seed in range(options.seeds)]
        model, data, _ = runs[0]
        answer["train"][precision] = [losses.train for _, _, losses in runs]
        answer["valid"][precision] = [losses.valid for _, _, losses in runs]
        if precision != "float32":
            del runs, model
    found, batches = compared(model, data)
    exact = found.pop("float32")
    answer["errors"] = {name: relative(exact, other) for name, other in found.items()}
    answer["between_batches"] = float(
        np.mean([relative([a], [b]) for a, b in pairwise(exact)]),
    )
    if options.save:
        pyloss.export(model, options.save, to="peft", overwrite=True)
        arrays = {
            f"{name}{i}": a for i, b in enumerate(batches) for name, a in zip("xy", b, strict=True)
        }
        np.savez(Path(options.save) / "batches.npz", **arrays)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
