"""Optimizers of its own: a subclass of `optim.Optimizer`, and a wrapper with an average of weights.

The wrapper gives the trainer the three things that it reads: `state`, `learning_rate`, `update`.
"""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm import load
from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
from mlx_lm.tuner.utils import linear_to_lora_layers


class SignMomentum(optim.Optimizer):
    """The sign of a momentum, with a decay of the weights: Lion with one beta."""

    def __init__(self, learning_rate, beta=0.9, weight_decay=0.0):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.beta = beta
        self.weight_decay = weight_decay

    def init_single(self, parameter, state):
        state["m"] = mx.zeros_like(parameter)

    def apply_single(self, gradient, parameter, state):
        rate = self.learning_rate.astype(gradient.dtype)
        state["m"] = self.beta * state["m"] + (1 - self.beta) * gradient
        parameter = parameter * (1 - rate * self.weight_decay)
        return parameter - rate * mx.tanh(50 * state["m"])


class Averaging:
    """Clips gradients by their norm, updates by another optimizer, and averages what it makes."""

    def __init__(self, inner, decay=0.8, max_norm=1.0):
        self.inner, self.decay, self.max_norm = inner, decay, max_norm
        self.average, self.norms = None, []

    @property
    def state(self):
        return self.inner.state

    @property
    def learning_rate(self):
        return self.inner.learning_rate

    def update(self, model, gradients):
        gradients, norm = optim.clip_grad_norm(gradients, self.max_norm)
        self.norms.append(norm)
        self.inner.update(model, gradients)
        now = model.trainable_parameters()
        if self.average is None:
            self.average = tree_map(lambda w: w, now)
        else:
            d = self.decay
            self.average = tree_map(lambda a, w: d * a + (1 - d) * w, self.average, now)


class Chunks:
    """Windows of a fixed length over all texts; items are token ids and an offset."""

    def __init__(self, path, tokenizer, length):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        text = "\n".join(m["content"] for row in rows for m in row["messages"])
        ids = tokenizer.encode(text)
        self.rows = [ids[i : i + length] for i in range(0, len(ids) - length, length)]

    def __getitem__(self, i):
        return (self.rows[i], 0)

    def __len__(self):
        return len(self.rows)


class Losses(TrainingCallback):
    def __init__(self):
        self.values, self.tokens = [], 0

    def on_train_loss_report(self, info):
        self.values.append(float(info["train_loss"]))
        self.tokens = int(info["trained_tokens"])


def fit(folder, out, inner, iters):
    np.random.seed(3)
    model, tokenizer = load(str(folder / "model"))
    model.freeze()
    linear_to_lora_layers(
        model,
        1,
        {"rank": 4, "scale": 5.0, "dropout": 0.0, "keys": {"mlp.up_proj", "mlp.down_proj"}},
    )
    model.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    optimizer = Averaging(inner)
    losses = Losses()
    args = TrainingArgs(
        batch_size=3, iters=iters, steps_per_report=1, adapter_file=str(out / "own.safetensors")
    )
    mx.disable_compile()  # the wrapper keeps arrays outside of the optimizer's state
    begin = time.perf_counter()
    train(
        model,
        optimizer,
        Chunks(folder / "data" / "train.jsonl", tokenizer, 33),
        args=args,
        training_callback=losses,
    )
    seconds = time.perf_counter() - begin
    distance = sum(
        mx.abs(a - w).sum().item()
        for (_, a), (_, w) in zip(
            tree_flatten(optimizer.average), tree_flatten(model.trainable_parameters())
        )
    )
    norms = [norm.item() for norm in optimizer.norms]
    return losses, {"distance": distance, "norms": norms}, seconds


def main(model_path, out, iters=10):
    folder, out = Path(model_path).parent, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    found, tokens, seconds, more = [], 0, 0.0, {}
    for name, inner in (
        ("sign", SignMomentum(2e-3, weight_decay=0.1)),
        ("sgd", optim.SGD(learning_rate=0.05, momentum=0.9)),
    ):
        losses, more[name], took = fit(folder, out, inner, iters)
        found += losses.values
        tokens, seconds = tokens + losses.tokens, seconds + took
    return {"losses": found, "more": more, "tokens": tokens, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
