"""An adapter over a base that the script quantizes itself, once with LoRA and once with DoRA."""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import default_loss, evaluate, iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers


def quantizable(path, module):
    return isinstance(module, nn.Linear) and "lm_head" not in path


def set_start(model, seed):
    """LoRA's first factors by NumPy, in the order of their names."""
    rng = np.random.default_rng(seed)
    weights = []
    for name, array in sorted(tree_flatten(model.trainable_parameters())):
        if name.endswith("lora_a"):
            weights.append((name, mx.array(rng.uniform(-0.1, 0.1, array.shape).astype(np.float32))))
    model.load_weights(weights, strict=False)


def main(model_path, out, iters=10):
    folder = Path(model_path).parent
    rows = [json.loads(x) for x in (folder / "data" / "train.jsonl").read_text().splitlines()]
    texts = [{"text": row["messages"][1]["content"]} for row in rows]
    losses, counts, tokens, seconds = [], [], 0, 0.0
    for use_dora in (False, True):
        model, tokenizer = load(str(model_path))
        nn.quantize(model, group_size=32, bits=4, class_predicate=quantizable)
        layers = [m for m in model.modules() if isinstance(m, nn.QuantizedLinear)]
        counts.append(len(layers))
        model.freeze()
        linear_to_lora_layers(
            model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0}, use_dora=use_dora
        )
        set_start(model, 3)
        data = CacheDataset(TextDataset(texts, tokenizer))
        optimizer = optim.AdamW(learning_rate=1e-3)
        step = nn.value_and_grad(model, default_loss)
        np.random.seed(2)
        model.train()
        begin = time.perf_counter()
        for _, batch in zip(range(iters), iterate_batches(data, 2, 128, loop=True)):
            (loss, ntoks), grads = step(model, *batch)
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state, loss)
            losses.append(loss.item())
            tokens += ntoks.item()
        seconds += time.perf_counter() - begin
        losses.append(evaluate(model, data, 2, 3, max_seq_length=128))
    return {"losses": losses, "more": counts, "tokens": tokens, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
