"""Reports by `logging` and a JSON-lines file, through callbacks that wrap each other."""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm import load
from mlx_lm.tuner import TrainingArgs, linear_to_lora_layers, train
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
from mlx_lm.tuner.utils import build_schedule

logger = logging.getLogger("finetune")


class JsonLines(TrainingCallback):
    def __init__(self, path, wrapped=None):
        self.path, self.wrapped = path, wrapped
        self.path.write_text("")

    def _write(self, kind, info):
        row = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in info.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"kind": kind, **row}) + "\n")

    def on_train_loss_report(self, train_info):
        self._write("train", train_info)
        if self.wrapped:
            self.wrapped.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info):
        self._write("valid", val_info)
        if self.wrapped:
            self.wrapped.on_val_loss_report(val_info)


class Log(TrainingCallback):
    """Logs, and remembers the best validation loss."""

    def __init__(self):
        self.best = float("inf")

    def on_train_loss_report(self, train_info):
        logger.info(
            "iter %d: loss %.4f, rate %.2e, %.1f tokens/s, peak %.2f GB",
            train_info["iteration"],
            train_info["train_loss"],
            train_info["learning_rate"],
            train_info["tokens_per_second"],
            train_info["peak_memory"],
        )

    def on_val_loss_report(self, val_info):
        self.best = min(self.best, val_info["val_loss"])
        logger.info("iter %d: validation loss %.4f", val_info["iteration"], val_info["val_loss"])


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def main(model_path, out, iters=10):
    folder, out = Path(model_path).parent, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = argparse.Namespace(
        learning_rate=2e-3,
        lr_schedule={"name": "cosine_decay", "warmup": 3, "arguments": [2e-3, iters, 1e-4]},
    )
    np.random.seed(0)
    model, tokenizer = load(str(model_path))
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    model.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    train_set, valid_set = (
        CacheDataset(
            ChatDataset(records(folder / "data" / f"{name}.jsonl"), tokenizer, mask_prompt=True)
        )
        for name in ("train", "valid")
    )
    schedule = (
        build_schedule(settings.lr_schedule) if settings.lr_schedule else settings.learning_rate
    )
    log = Log()
    args = TrainingArgs(
        batch_size=2,
        iters=iters,
        val_batches=2,
        steps_per_report=1,
        steps_per_eval=4,
        steps_per_save=5,
        adapter_file=str(out / "adapters.safetensors"),
    )
    mx.eval(model.parameters())
    begin = time.perf_counter()
    train(
        model,
        optim.Adam(learning_rate=schedule),
        train_set,
        valid_set,
        args=args,
        training_callback=JsonLines(out / "log.jsonl", wrapped=log),
    )
    seconds = time.perf_counter() - begin
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "valid")}
    return {
        "losses": [row["train_loss"] for row in by_kind["train"]],
        "more": {
            "rates": [row["learning_rate"] for row in by_kind["train"]],
            "validation": [[row["iteration"], row["val_loss"]] for row in by_kind["valid"]],
            "best": log.best,
            "files": sorted(p.name for p in out.glob("*_adapters.safetensors")),
        },
        "tokens": by_kind["train"][-1]["trained_tokens"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    print(json.dumps(main(*sys.argv[1:])))
