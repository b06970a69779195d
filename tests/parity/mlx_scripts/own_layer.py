"""An adapter layer of its own: low rank with a learned gate for each output, put in by name."""

import json
import math
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.trainer import iterate_batches
from mlx_lm.utils import load


class GatedLoRA(nn.Module):
    def __init__(self, linear, rank, seed):
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.linear = linear
        rng = np.random.default_rng(seed)
        self.down = mx.array(rng.normal(0, 1 / math.sqrt(inputs), (inputs, rank)).astype("float32"))
        self.up = mx.zeros((rank, outputs))
        self.gate = mx.ones((outputs,))
        self._rank = rank

    def _extra_repr(self):
        return f"rank={self._rank}"

    def __call__(self, x):
        small = nn.silu(x @ self.down)
        return self.linear(x) + mx.sigmoid(self.gate) * mx.matmul(small, self.up) * 4.0


def smooth(logits, targets, mask, weight=1e-3):
    """Cross entropy with PaLM's penalty for the size of the logits' sum."""
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1)
    right = mx.take_along_axis(logits, mx.expand_dims(targets, -1), axis=-1)[..., 0]
    return ((total - right + weight * mx.square(total)) * mask).sum() / mask.sum()


def main(model_path, out, iters=10):
    folder, out = Path(model_path).parent, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(str(model_path))
    model.freeze()
    wanted = ("q_proj", "o_proj", "down_proj")
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in wanted
    }
    new = [(name, GatedLoRA(linears[name], 4, seed=i)) for i, name in enumerate(sorted(linears))]
    model.update_modules(tree_unflatten(new))
    model.train()
    trained = tree_flatten(model.trainable_parameters())
    count = sum(v.size for _, v in trained)
    rows = [json.loads(x) for x in (folder / "data" / "train.jsonl").read_text().splitlines()]
    data = [(tokenizer.encode(row["messages"][1]["content"]), 0) for row in rows]

    def loss_fn(ids, lengths):
        at = mx.arange(ids.shape[1] - 1)
        mask = (at < lengths[:, 1:] - 1).astype(mx.float32)
        return smooth(model(ids[:, :-1]), ids[:, 1:], mask)

    optimizer = optim.Adafactor(learning_rate=1e-2, relative_step=False, scale_parameter=False)
    step = nn.value_and_grad(model, loss_fn)
    np.random.seed(9)
    losses, tokens, begin = [], 0, time.perf_counter()
    for _, (ids, lengths) in zip(range(iters), iterate_batches(data, 2, 128, loop=True)):
        loss, grads = step(ids, lengths)
        optimizer.update(model, grads)
        mx.eval(loss, model.trainable_parameters(), optimizer.state)
        losses.append(float(loss.item()))
        tokens += int(lengths[:, 1].sum())
    seconds = time.perf_counter() - begin
    mx.save_safetensors(str(out / "gated"), dict(tree_flatten(model.trainable_parameters())))
    back = mx.load(str(out / "gated.safetensors"))
    assert sorted(back) == sorted(name for name, _ in trained)
    gates = [mx.mean(mx.abs(v - 1)).item() for k, v in sorted(back.items()) if k.endswith("gate")]
    return {
        "losses": losses,
        "more": {"count": count, "names": sorted(back), "gates": gates},
        "tokens": tokens,
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
