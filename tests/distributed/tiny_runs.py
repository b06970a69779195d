"""Runs of tiny models, for one rank in the process of a test, or as a script for several ranks.

`python tiny_runs.py SPECS RESULTS`: SPECS is JSON of a list of `run`'s arguments, and rank 0 writes
what they return to RESULTS. `batch` is the number of samples of all ranks.
"""

import json
import sys
from pathlib import Path

import numpy as np
from drawn import Drawn

from pyloss import optim
from pyloss.distributed import init
from pyloss.models import load_model
from pyloss.models.building import build_model
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.tuner.callbacks import TrainingCallback
from pyloss.tuner.trainer import TrainingArgs, evaluate, train
from pyloss.tuner.utils import add_adapters, unfreeze_layers

MOE = ModelConfig(
    model_type="qwen2_moe",
    vocab_size=29,
    hidden_size=8,
    intermediate_size=12,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    num_hidden_layers=2,
    mixture=Mixture(4, 2, 6, False, shared_size=10),
)


class Reports(TrainingCallback):
    def __init__(self):
        self.losses, self.val_losses, self.norms, self.infos = [], [], [], []

    def on_train_loss_report(self, train_info):
        self.losses.append(train_info["train_loss"])
        self.norms.append(train_info["grad_norm"])
        self.infos.append(train_info)

    def on_val_loss_report(self, val_info):
        self.val_losses.append(val_info["val_loss"])


def samples(count, seed=5):
    """`(tokens, offset)` of rows of 3 to 40 tokens."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, 29, n).tolist(), int(rng.integers(0, 3)))
        for n in rng.integers(3, 41, count)
    ]


def model_of(kind, folder, dropout=0.0):
    import pyloss

    pyloss.random.seed(4)
    if kind.startswith("moe"):
        model = build_model(MOE, Drawn())
        kind = kind.removeprefix("moe ")
    else:
        model = load_model(folder)
    if kind == "full":
        unfreeze_layers(model, 2, None)
    else:
        add_adapters(model, kind, -1, {"rank": 2, "scale": 2.0, "dropout": dropout})
    return model


def run(
    folder, kind="lora", batch=4, count=21, group=None, out=None, optimizer="adamw", **settings
):
    """Train; return losses, norms, validation losses, the result, the parameters' sums."""
    group = group or init("off")
    dropout = settings.pop("dropout", 0.0)
    model = model_of(kind, folder, dropout)
    # With a Muon for matrices and an AdamW for norms: a `MultiOptimizer`.
    groups = {"groups": [{"match": "*norm*", "optimizer": "adamw"}]} if optimizer == "muon" else {}
    maker = optim.build_optimizer(optimizer, settings.pop("rate", 1e-3), groups)
    defaults = {
        "iters": 20,
        "steps_per_report": 1,
        "steps_per_eval": 7,
        "steps_per_save": 5,
        "val_batches": -1,
        "seed": 3,
        "max_seq_length": 64,
        "progress": False,
    }
    args = TrainingArgs(
        **defaults | {"adapter_file": out and Path(out) / "adapters.safetensors"} | settings,
        batch_size=batch // group.size(),
    )
    reports = Reports()
    sets = samples(count), samples(5, 9)
    result = train(model, maker, *sets, args, training_callback=reports, group=group)
    test = evaluate(model, samples(7, 11), max(batch // group.size(), 1), group=group)
    arrays = model.trainable_parameters()
    return {
        "losses": reports.losses,
        "norms": reports.norms,
        "val_losses": reports.val_losses,
        "test": test,
        "tokens": result.trained_tokens,
        "best": [result.best_iteration, result.best_loss],
        "stopped": result.stopped_early,
        "iterations": result.iterations,
        "bits": [array.tobytes().hex() for array in arrays.values()],
        "values": [array.ravel().tolist() for array in arrays.values()],
        "peak": [info["peak_memory"] for info in reports.infos],
    }


if __name__ == "__main__":
    ranks = init()
    results = [run(group=ranks, **spec) for spec in json.loads(sys.argv[1])]
    # What every rank ends with: the same bits.
    bits = ranks.all_gather([result["bits"] for result in results])
    assert all(one == bits[0] for one in bits)
    if ranks.rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
