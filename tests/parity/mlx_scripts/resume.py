"""Interrupts a run after half of its updates and goes on from files: weights and Adam's state."""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import load
from mlx_lm.tuner.trainer import default_loss, iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers

SETTINGS = {
    "fine_tune_type": "lora",
    "num_layers": -1,
    "lora_parameters": {"rank": 4, "scale": 6.0, "dropout": 0.0},
}


def prepare(model_path, weights):
    model, tokenizer = load(str(model_path))
    model.freeze()
    linear_to_lora_layers(model, SETTINGS["num_layers"], SETTINGS["lora_parameters"])
    model.load_weights(str(weights), strict=False)
    model.train()
    return model, tokenizer


def run(model, optimizer, batches):
    step, losses, tokens = nn.value_and_grad(model, default_loss), [], 0
    for batch, lengths in batches:
        (loss, ntoks), grads = step(model, batch, lengths)
        optimizer.update(model, grads)
        mx.eval(loss, ntoks, model.parameters(), optimizer.state)
        losses.append(loss.item())
        tokens += ntoks.item()
    return losses, tokens


def texts(path, tokenizer):
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [(tokenizer.apply_chat_template(row["messages"], return_dict=False), 0) for row in rows]


def main(model_path, out, iters=10):
    folder, out = Path(model_path).parent, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = prepare(model_path, folder / "start" / "adapters.safetensors")
    data = texts(folder / "data" / "train.jsonl", tokenizer)
    np.random.seed(21)
    stream = iterate_batches(data, batch_size=2, max_seq_length=128, loop=True)
    batches = [batch for _, batch in zip(range(iters), stream)]
    half = max(iters // 2, 1)

    begin = time.perf_counter()
    optimizer = optim.Adam(learning_rate=1e-3)
    losses, tokens = run(model, optimizer, batches[:half])
    adapter = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(out / "adapters.safetensors"), adapter, metadata={"format": "mlx"})
    mx.save_safetensors(str(out / "optimizer.safetensors"), dict(tree_flatten(optimizer.state)))
    (out / "adapter_config.json").write_text(json.dumps(SETTINGS, indent=4))
    del model, optimizer

    model, _ = prepare(model_path, out / "adapters.safetensors")
    optimizer = optim.Adam(learning_rate=1e-3)
    optimizer.init(model.trainable_parameters())
    optimizer.state = tree_unflatten(list(mx.load(str(out / "optimizer.safetensors")).items()))
    assert optimizer.step.item() == half
    more, counted = run(model, optimizer, batches[half:])
    seconds = time.perf_counter() - begin
    model.save_weights(str(out / "whole.npz"))

    # load() takes the folder as an adapter, too.
    again, _ = load(str(model_path), adapter_path=str(out))
    first = default_loss(again, *batches[0])[0].item()
    return {
        "losses": losses + more + [first],
        "tokens": tokens + counted,
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
