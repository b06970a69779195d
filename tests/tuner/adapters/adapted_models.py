"""Models with adapters for tests: their configurations, layers and random training."""

import numpy as np

from pyloss.tuner import LoRALinear

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
CONFIG = {"rank": 4, "scale": 3.0, "dropout": 0.0}


def adapters(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def randomize(model, seed=0):
    rng = np.random.default_rng(seed)
    for array in model.trainable_parameters().values():
        array[...] = rng.standard_normal(array.shape) / 4
