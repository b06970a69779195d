"""A model that trains in milliseconds, with loss and gradient in NumPy, for the training loop.

It offers what the loop uses of a model: a table of bigram logits. In training mode it adds noise
from `pyloss.random`, so that a run that loses its random state is noticed.
"""

import numpy as np

import pyloss.random
from pyloss import nn, optim
from pyloss.tuner.trainer import TrainingArgs, TrainingCallback, train

VOCABULARY = 11


class Tiny:
    adapter_config = {  # noqa: RUF012
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {"rank": 1, "scale": 1.0},
    }

    def __init__(self, seed=0, noise=0.1, vocabulary=VOCABULARY):
        rng = np.random.default_rng(seed)
        self.vocab_size = vocabulary
        self.arrays = {
            "layers.0.lora_a": rng.standard_normal((vocabulary, 3)).astype(np.float32),
            "layers.0.lora_b": rng.standard_normal((3, vocabulary)).astype(np.float32),
        }
        self.training = False
        self.noise = noise
        self.layers = [None]
        self.checkpointing = False

    def trainable_parameters(self):
        return dict(self.arrays)

    parameters = trainable_parameters

    def train(self, mode=True):
        self.training = mode

    def eval(self):
        self.training = False

    def set_grad_checkpoint(self, mode):
        self.checkpointing = mode

    def keep(self, shape):
        """The dropout mask of the next call."""
        if not (self.training and self.noise):
            return np.ones(shape)
        return np.random.default_rng(pyloss.random.next_seed()).random(shape) >= self.noise


def target_weights(batch, lengths):
    if lengths.dtype == np.float32:
        return lengths[:, 1:].astype(np.float64)
    place = np.arange(1, batch.shape[1])
    return ((place >= lengths[:, :1]) & (place < lengths[:, 1:])).astype(np.float64)


def both(model, batch, lengths):
    """`((loss, ntoks), grads)` of the mean cross entropy over the target tokens."""
    a, b = (array.astype(np.float64) for array in model.arrays.values())
    weights = target_weights(batch, lengths)
    count = weights.sum()
    source, target = batch[:, :-1], batch[:, 1:]
    hidden = a[source] * (mask := model.keep((*source.shape, 3)))
    logits = hidden @ b
    logits -= logits.max(-1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    own = np.take_along_axis(probabilities, target[..., None], -1)[..., 0]
    loss = -(np.log(own) * weights).sum() / count
    grad = probabilities - np.eye(model.vocab_size)[target]
    grad *= (weights / count)[..., None]
    grad_a = np.zeros_like(a)
    np.add.at(grad_a, source, grad @ b.T * mask)
    grad_b = np.einsum("bti,btj->ij", hidden, grad)
    names = list(model.arrays)
    return (loss, count), {names[0]: grad_a.astype(np.float32), names[1]: grad_b.astype(np.float32)}


def tiny_loss(model, batch, lengths):
    return both(model, batch, lengths)[0]


def tiny_value_and_grad(model, loss):
    """Replaces `nn.value_and_grad`: the value of `loss`, with the gradient of `both`."""

    def call(model, *batch):
        before = pyloss.random.state()
        value = loss(model, *batch)
        pyloss.random.set_state(before)
        return value, both(model, *batch)[1]

    return call


def install():
    nn.value_and_grad = tiny_value_and_grad


def samples(count=13, seed=5):
    """`(tokens, offset)` of rows of 3 to 9 tokens."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, VOCABULARY, n).tolist(), int(rng.integers(0, 3)))
        for n in rng.integers(3, 10, count)
    ]


class Recorder(TrainingCallback):
    def __init__(self):
        self.train, self.val = [], []

    def on_train_loss_report(self, train_info):
        self.train.append(train_info)

    def on_val_loss_report(self, val_info):
        self.val.append(val_info)

    @property
    def losses(self):
        return {info["iteration"]: info["train_loss"] for info in self.train}

    @property
    def val_losses(self):
        return {info["iteration"]: info["val_loss"] for info in self.val}


def run(
    folder,
    model=None,
    optimizer=None,
    val=True,
    loss=tiny_loss,
    callback=None,
    data=None,
    iterate=None,
    **settings,
):
    """Train a tiny model; return the model, the reports and the result."""
    model = model or Tiny()
    optimizer = optimizer or optim.AdamW(0.05)
    callback = callback or Recorder()
    defaults = {
        "batch_size": 2,
        "iters": 12,
        "steps_per_report": 1,
        "steps_per_eval": 4,
        "steps_per_save": 5,
        "seed": 3,
    }
    args = TrainingArgs(
        **defaults
        | {"adapter_file": folder and folder / "adapters.safetensors", "progress": False}
        | settings
    )
    extra = {"iterate_batches": iterate} if iterate else {}
    valid = samples(5, 9) if val is True else val or None
    result = train(
        model, optimizer, data or samples(), valid, args, loss, training_callback=callback, **extra
    )
    return model, callback, result
