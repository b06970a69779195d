"""A model for optimizers, gradients for it, and the updates in float64."""

import numpy as np

from pyloss import optim

SHAPES = {"a": (3, 7), "b": (1,), "c": (33, 5), "layers.0.lora_a": (2, 2, 3)}


class Holder:
    """The one method of a model that an optimizer uses."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.arrays = {
            name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()
        }

    def trainable_parameters(self):
        return self.arrays


def some_grads(seed):
    rng = np.random.default_rng(1000 + seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def adamw_float64(
    p, g, s, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, bias_correction=True
):
    b1, b2 = betas
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
    c1, c2 = (1 - b1**t, 1 - b2**t) if bias_correction else (1, 1)
    return p - lr * weight_decay * p - lr * (s["m"] / c1) / (np.sqrt(s["v"] / c2) + eps)


def sgd_float64(p, g, s, t, lr, momentum=0.0, weight_decay=0.0, dampening=0.0, nesterov=False):
    g = g + weight_decay * p
    if momentum:
        s["buf"] = g if t == 1 else momentum * s["buf"] + (1 - dampening) * g
        g = g + momentum * s["buf"] if nesterov else s["buf"]
    return p - lr * g


def lion_float64(p, g, s, t, lr, betas=(0.9, 0.99), weight_decay=0.0):
    m = s.get("m", 0)
    s["m"] = betas[1] * m + (1 - betas[1]) * g
    return p - lr * (np.sign(betas[0] * m + (1 - betas[0]) * g) + weight_decay * p)


def adam_atan2_float64(
    p, g, s, t, lr, betas=(0.9, 0.999), weight_decay=0.01, a=1.0, b=1.0, correct_angle=False
):
    b1, b2 = betas
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
    outside, inside = (1, 1 - b1**t) if correct_angle else (1 - b1**t, 1)
    angle = np.arctan2(s["m"] / inside, b * np.sqrt(s["v"] / (1 - b2**t)))
    return p - lr * weight_decay * p - a * lr / outside * angle


CASES = [
    (optim.AdamW, adamw_float64, {}),
    (optim.AdamW, adamw_float64, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}),
    (optim.AdamW, adamw_float64, {"bias_correction": False, "weight_decay": 0.0}),
    (optim.AdamATan2, adam_atan2_float64, {}),
    (optim.AdamATan2, adam_atan2_float64, {"betas": (0.8, 0.95), "weight_decay": 0.3}),
    (optim.AdamATan2, adam_atan2_float64, {"a": 1.27, "b": 0.5, "correct_angle": True}),
    (optim.SGD, sgd_float64, {}),
    (optim.SGD, sgd_float64, {"weight_decay": 0.1}),
    (optim.SGD, sgd_float64, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (optim.SGD, sgd_float64, {"momentum": 0.9, "nesterov": True}),
    (optim.Lion, lion_float64, {}),
    (optim.Lion, lion_float64, {"betas": (0.5, 0.7), "weight_decay": 0.2}),
]
